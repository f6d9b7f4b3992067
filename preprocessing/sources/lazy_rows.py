"""Rows that are made on access: in memory, each of twelve million rows takes a few numbers, not a kilobyte."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import overload

from preprocessing.sources.source import Row


class LazyRows(Sequence[Row], ABC):
    """A sequence of rows over an index in memory. Subclasses define its length and make one row at a time."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> Row:
        """Row `index`, 0 <= index < len(self). Reads the raw files again."""

    def __iter__(self) -> Iterator[Row]:
        return map(self.row, range(len(self)))  # Sequence.__iter__ calls len() for each row

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self.row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.row(index % len(self))
