"""A raw data set as a converter hands it on: rows that refer to images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from preprocessing.errors import DataError
from preprocessing.formats.annotations import BadRecord
from preprocessing.images.image_refs import ImageRef
from preprocessing.running.storage import StoragePath

LISTED = 10_000  # dropped rows and records at fault that a manifest lists


@dataclass(frozen=True)
class Row:
    """One row to write: `images` in the order of the schema's image columns, `columns` all the rest but split."""

    name: str  # how a message calls it
    images: tuple[ImageRef, ...]
    columns: dict[str, Any]


class Rows(Protocol):
    """Rows in an order that never changes: a list, or a LazyRows, which reads them again each time."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """From the first to the last."""
        ...

    def __getitem__(self, index: int) -> Row:
        """One of them."""
        ...


class Faults:
    """Records of the raw files that are at fault, by reason. --max-dropped bounds them and lost images together.

    `with source.faults:` counts the BadRecord that ends the block, and goes on behind it.
    """

    def __init__(self) -> None:
        self.reasons = Counter[str]()
        self.items: list[dict[str, str]] = []  # the first LISTED, as the manifest has them
        self.first = ""  # what is wrong with the first one

    @property
    def count(self) -> int:
        """How many."""
        return self.reasons.total()

    def add(self, error: BadRecord) -> None:
        """Count a record."""
        self.first = self.first or str(error)
        self.reasons[error.reason] += 1
        if len(self.items) < LISTED:
            # Not the file's folder: the manifest depends on what the files hold, not on where they lie.
            self.items.append({"item": error.where.rsplit("/", 1)[-1], "reason": error.reason})

    def check(self, sound: int, share: float) -> None:
        """Raise DataError when more records are at fault than `share` allows, beside `sound` ones, or all are."""
        total = sound + self.count
        if self.count > share * total or (self.count and not sound):
            more = f" ({self.count} of {total} records are at fault, --max-dropped is {share:g})"
            raise DataError(f"{self.first}{more if total > 1 else ''}")

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
    """A raw data set, read and checked but for its images."""

    kind: str
    rows: Rows
    inputs: Sequence[StoragePath | str]  # the annotation files
    counts: dict[str, int]  # what the raw files hold
    left_out: Counter[str] = field(default_factory=Counter)  # by intent, by reason: no fault of the data
    answer_list: list[str] | None = None  # VQA: what the labels index
    numbered: tuple[str, ...] = ()  # columns of ids that are numbers of our own: see ids.py
    notes: list[str] = field(default_factory=list)  # what the user is to know, a line each
    faults: Faults = field(default_factory=Faults)

    @property
    def total(self) -> int:
        """Rows, and records at fault, of which there might have been as many."""
        return len(self.rows) + self.faults.count

    @property
    def where(self) -> str:
        """How a message calls it."""
        return ", ".join(map(str, self.inputs)) or self.kind
