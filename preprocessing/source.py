"""A raw data set as a converter hands it on: rows that refer to images."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from preprocessing.image_refs import ImageRef
from preprocessing.places import Place


@dataclass(frozen=True)
class Row:
    """One row to write: `images` in the order of the schema's image columns, `columns` all the rest but split."""

    name: str  # how a message calls it
    images: tuple[ImageRef, ...]
    columns: dict[str, Any]


class Rows(Protocol):
    """Rows in an order that never changes: a list, or an object that reads them again each time."""

    def __len__(self) -> int:
        """How many."""
        ...

    def __iter__(self) -> Iterator[Row]:
        """From the first to the last."""
        ...

    def __getitem__(self, index: int) -> Row:
        """One of them."""
        ...


@dataclass
class Source:
    """A raw data set, read and checked but for its images."""

    kind: str
    rows: Rows
    inputs: Sequence[Place | str]  # the annotation files
    counts: dict[str, int]  # what the raw files hold
    left_out: Counter[str] = field(default_factory=Counter)  # by intent, by reason: no fault of the data
    answer_list: list[str] | None = None  # VQA: what the labels index

    @property
    def where(self) -> str:
        """How a message calls it."""
        return ", ".join(map(str, self.inputs)) or self.kind
