"""Prepared shards, read in place: memory-mapped Arrow IPC files, one row touched at a time, exact random access.

Nothing is opened before it is asked for: counts come from the manifest, a shard is mapped when a row of it is wanted,
and a sample's row is found by bisection in the list offsets that Arrow stores anyway. So a split of any size opens in
the time of one JSON file and one `stat` a shard, and holds no index in memory beyond a few numbers a shard.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from preprocessing.schema import IMAGE_COLUMNS, KINDS, SAMPLE_COLUMN, DataError, read_manifest

# Every mapped shard holds a file descriptor, and 1,024 of them is a common limit for a process.
_OPEN_SHARDS = 128
# Columns that training does not need and that EVE's own shards lack.
_OPTIONAL_COLUMNS = ("image_id", "split")


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a shard: keeps the shard mapped as long as it lives, and copies only the cells that are asked for."""

    batch: pa.RecordBatch
    index: int  # within the batch
    path: Path
    number: int  # within the shard

    @property
    def where(self) -> str:
        """The shard and the row in it (from 0), for messages."""
        return f"{self.path}: row {self.number}"

    def value(self, column: str) -> Any:
        """The cell as a Python object."""
        return self.batch.column(column)[self.index].as_py()

    def item(self, column: str, item: int) -> Any:
        """Entry `item` of a list cell as a Python object; a cell that is no list is its own entry 0."""
        cell = self.batch.column(column)[self.index]
        if not isinstance(cell, pa.ListScalar):
            return cell.as_py()
        if cell.values is None or item >= len(cell.values):
            raise DataError(f"{self.where}: column {column!r} has no entry {item}; prepare the split again")
        return cell.values[item].as_py()

    def blob(self, column: str) -> bytes:
        """A binary cell. Raises DataError when it is null."""
        value = self.batch.column(column)[self.index].as_py()
        if value is None:
            raise DataError(f"{self.where}: column {column!r} is null; prepare the split again")
        return bytes(value)


@dataclass(frozen=True)
class _Shard:
    """An open shard. Batch b holds the shard's rows `first_row[b]` to `first_row[b + 1]`, and samples likewise."""

    path: Path
    reader: Any
    first_row: np.ndarray  # [batches + 1] int64
    first_sample: np.ndarray  # [batches + 1] int64


class Split:
    """The shards of one split folder.

    Args:
        directory: folder with `manifest.json` and the files that it lists.
    Attributes:
        kind: "caption", "vqa" or "nlvr".
        rows: pictures (pairs of pictures for NLVR).
        samples: captions, questions or statements: what one epoch visits.
    Raises:
        DataError: a shard is missing or has another size than the manifest says, or the split is empty; when a row is
            read, also: a shard is not Arrow, lacks a column or holds other counts than the manifest says.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        manifest = read_manifest(self.directory)
        self.kind: str = manifest["kind"]
        self._records: list[dict[str, Any]] = manifest["shards"]
        for record in self._records:
            _check_file(self.directory / record["file"], record["bytes"])
        self._first_row = _starts([record["rows"] for record in self._records])
        self._first_sample = _starts([record["samples"] for record in self._records])
        self.rows = int(self._first_row[-1])
        self.samples = int(self._first_sample[-1])
        if self.rows != manifest["rows"] or self.samples != manifest["samples"]:
            raise DataError(
                f"{self.directory}: the manifest counts {manifest['rows']} rows and {manifest['samples']} samples, its "
                f"shards {self.rows} and {self.samples}; prepare the split again"
            )
        if not self.samples:
            raise DataError(f"{self.directory}: the split holds no samples; prepare it from data that has some")
        # Kept when a shard is unmapped: a few numbers, which take longer to find than the file takes to map.
        self._bounds: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        # functools' cache is safe to use from the prefetching thread and from the main one at once.
        self._open: Callable[[int], _Shard] = functools.lru_cache(maxsize=_OPEN_SHARDS)(self._map)

    def __reduce__(self) -> tuple[type[Split], tuple[Path]]:
        # A spawned worker maps the files itself.
        return (Split, (self.directory,))

    def row(self, index: int) -> Row:
        """Row `index` of the split, from 0. Raises IndexError beyond the last one."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        number = _bisect(self._first_row, index)
        shard = self._open(number)
        local = index - int(self._first_row[number])
        b = _bisect(shard.first_row, local)
        return Row(shard.reader.get_batch(b), local - int(shard.first_row[b]), shard.path, local)

    def sample(self, index: int) -> tuple[int, Row, int]:
        """Sample `index` of the split: its row's number, the row, and its place among the row's samples."""
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        number = _bisect(self._first_sample, index)
        shard = self._open(number)
        local = index - int(self._first_sample[number])
        b = _bisect(shard.first_sample, local)
        batch = shard.reader.get_batch(b)
        starts = _sample_starts(batch.column(SAMPLE_COLUMN[self.kind]))
        target = int(starts[0]) + local - int(shard.first_sample[b])
        place = _bisect(starts, target)
        local_row = int(shard.first_row[b]) + place
        row = Row(batch, place, shard.path, local_row)
        return int(self._first_row[number]) + local_row, row, target - int(starts[place])

    def sample_rows(self) -> np.ndarray:
        """[samples] int64: the row of every sample. Reads every shard's list offsets, and nothing else of it."""
        counts = [np.zeros(0, dtype=np.int64)]
        for number in range(len(self._records)):
            reader = self._open(number).reader
            for b in range(reader.num_record_batches):
                counts.append(np.diff(_sample_starts(reader.get_batch(b).column(SAMPLE_COLUMN[self.kind]))))
        return np.repeat(np.arange(self.rows), np.concatenate(counts))

    def _map(self, number: int) -> _Shard:
        """Map a shard and check it against the manifest."""
        record = self._records[number]
        path = self.directory / record["file"]
        _check_file(path, record["bytes"])
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            if number not in self._bounds:
                self._check_columns(path, reader.schema)
                self._bounds[number] = self._measure(reader)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: is no readable Arrow file ({_line(error)}); copy or prepare it again") from error
        first_row, first_sample = self._bounds[number]
        if (first_row[-1], first_sample[-1]) != (record["rows"], record["samples"]):
            raise DataError(
                f"{path}: {first_row[-1]} rows and {first_sample[-1]} samples, the manifest says {record['rows']} and "
                f"{record['samples']}; copy or prepare it again"
            )
        return _Shard(path, reader, first_row, first_sample)

    def _measure(self, reader: Any) -> tuple[np.ndarray, np.ndarray]:
        """A shard's `first_row` and `first_sample`."""
        rows, samples = [], []
        for b in range(reader.num_record_batches):
            batch = reader.get_batch(b)
            starts = _sample_starts(batch.column(SAMPLE_COLUMN[self.kind]))
            rows.append(batch.num_rows)
            samples.append(int(starts[-1]) - int(starts[0]))
        return _starts(rows), _starts(samples)

    def _check_columns(self, path: Path, schema: pa.Schema) -> None:
        for name in KINDS[self.kind].names:
            if name not in schema.names and name not in _OPTIONAL_COLUMNS:
                raise DataError(f"{path}: has no column {name!r}, which a {self.kind} shard needs; prepare it again")
        for name in IMAGE_COLUMNS[self.kind]:
            if not (pa.types.is_binary(schema.field(name).type) or pa.types.is_large_binary(schema.field(name).type)):
                raise DataError(f"{path}: column {name!r} is {schema.field(name).type}, not binary; prepare it again")
        kind = schema.field(SAMPLE_COLUMN[self.kind]).type
        if not (pa.types.is_list(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(
                f"{path}: column {SAMPLE_COLUMN[self.kind]!r} is {kind}, not a string or a list; prepare it again"
            )


def _sample_starts(column: pa.Array) -> np.ndarray:
    """[rows + 1] where each row's samples start, counted from an arbitrary origin: Arrow's own offsets, not copied.

    A plain string column (as EVE's scripts write it) has one sample a row.
    """
    if isinstance(column, pa.ListArray):
        return cast(np.ndarray, column.offsets.to_numpy())
    return np.arange(len(column) + 1)


def _starts(counts: list[int]) -> np.ndarray:
    """[n + 1] int64 cumulative counts, from 0."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _bisect(starts: np.ndarray, index: int) -> int:
    """The range that holds `index`; empty ranges hold nothing."""
    return int(np.searchsorted(starts, index, side="right")) - 1


def _check_file(path: Path, size: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, but the manifest lists it; copy or prepare it again") from None
    if found != size:
        raise DataError(
            f"{path}: {found} bytes, the manifest says {size}: truncated or changed; copy or prepare it again"
        )


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
