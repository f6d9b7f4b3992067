"""A raw data set as converters pass it on: rows that refer to images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord
from preprocessing.images.image_refs import ImageRef
from preprocessing.running.storage import StoragePath

LISTED = 10_000  # the most dropped rows and bad records that a manifest lists


@dataclass(frozen=True)
class Row:
    """One row to write: `images` in the order of the schema's image columns, `columns` the others except split.

    Of a text without an image, `images` is empty.
    """

    name: str  # in messages
    images: tuple[ImageRef, ...]
    columns: dict[str, Any]


class Rows(Protocol):
    """Rows in a fixed order: a list, or a LazyRows, which reads the raw files again on each access."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """Iterate in order."""
        ...

    def __getitem__(self, index: int) -> Row:
        """Row `index`."""
        ...


class Faults:
    """Counts bad records of the raw files, by reason. --max-dropped bounds them and lost images together.

    `with source.faults:` catches a BadRecord in the block and counts it.
    """

    def __init__(self) -> None:
        self.reasons = Counter[str]()
        self.items: list[dict[str, str]] = []  # the first LISTED, as the manifest has them
        self.first = ""  # the message of the first one

    @property
    def count(self) -> int:
        """The number of bad records."""
        return self.reasons.total()

    def add(self, error: BadRecord) -> None:
        """Count a bad record."""
        self.first = self.first or str(error)
        self.reasons[error.reason] += 1
        if len(self.items) < LISTED:
            # Without the folder: the manifest depends on the content of the files, not on their place.
            self.items.append({"item": error.where.rsplit("/", 1)[-1], "reason": error.reason})

    def check(self, sound: int, share: float) -> None:
        """Raise UserError when the share of bad records among them and `sound` good ones is too large, or 1."""
        total = sound + self.count
        if self.count > share * total or (self.count and not sound):
            more = f" ({self.count} of {total} records are at fault, --max-dropped is {share:g})"
            raise UserError(f"{self.first}{more if total > 1 else ''}")

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, BadRecord):
            return False
        self.add(error)
        return True


@dataclass
class Source:
    """A raw data set, read and checked except for its images."""

    kind: str
    rows: Rows
    inputs: Sequence[StoragePath | str]  # the annotation files
    counts: dict[str, int]  # of records in the raw files, by kind
    left_out: Counter[str] = field(default_factory=Counter)  # rows left out on purpose, by reason; no faults
    answer_list: list[str] | None = None  # VQA: the answers that labels index
    numbered: tuple[str, ...] = ()  # id columns with numbers that we made up: see shards/ids.py
    notes: list[str] = field(default_factory=list)  # lines to print for the user
    faults: Faults = field(default_factory=Faults)
    modality: str = "pairs"  # one of MODALITIES: of "image" the rows have no captions, of "text" no images

    @property
    def total(self) -> int:
        """Rows and bad records, each of which might have become a row."""
        return len(self.rows) + self.faults.count

    @property
    def where(self) -> str:
        """The name of the source in messages: its files."""
        return ", ".join(map(str, self.inputs)) or self.kind
