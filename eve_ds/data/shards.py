"""Prepared shards, read in place: memory-mapped Arrow IPC files, one row touched at a time, exact random access.

Nothing is opened before it is asked for: counts come from the manifest, a shard is mapped when a row of it is wanted,
and a sample's row is found by bisection in the list offsets that Arrow stores anyway. So a split of any size opens in
the time of one JSON file and one `stat` a shard, and holds no index in memory beyond a few numbers a shard.
Shards without a manifest, as ViLT's and EVE's own scripts leave them, are counted when the split is opened.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa

from eve_ds.data.mapping import MappedFile, binary_cell, check_offsets, check_size, not_arrow
from preprocessing.errors import DataError
from preprocessing.shards.manifest import read_manifest
from preprocessing.shards.schema import IMAGE_COLUMNS, KINDS, SAMPLE_COLUMN

# Every mapped shard holds two file descriptors, and 1,024 of them is a common limit for a process.
OPEN_SHARDS = 128
# Columns that training does not need and that EVE's own shards lack.
_OPTIONAL_COLUMNS = ("image_id", "split")
# Stretches of a file closer together than this are read ahead as one.
_READ_AHEAD_GAP = 64 << 10


class RowError(DataError):
    """A fault of one row; the others of its shard are none the worse for it.

    Args:
        where: the row, as Row.where has it.
        fault: what is wrong, and the mend.
    """

    def __init__(self, where: str, fault: str) -> None:
        super().__init__(f"{where}: {fault}")
        self.where = where


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a shard: keeps the shard mapped as long as it lives, and copies only the cells that are asked for.

    Its methods raise DataError where the shard has gone or been cut off since it was mapped.
    """

    batch: pa.RecordBatch
    index: int  # within the batch
    file: MappedFile
    number: int  # within the shard

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def where(self) -> str:
        """The shard and the row in it (from 0), for messages."""
        return f"{self.path}: row {self.number}"

    def value(self, column: str) -> Any:
        """The cell as a Python object."""
        self.file.check()
        return self._python(self.batch.column(column)[self.index], column)

    def item(self, column: str, item: int) -> Any:
        """Entry `item` of a list cell as a Python object; a cell that is no list is its own entry 0."""
        self.file.check()
        cell = self.batch.column(column)[self.index]
        if not isinstance(cell, pa.ListScalar):  # LargeListScalar is one, too
            return self._python(cell, column)
        if cell.values is None or item >= len(cell.values):
            raise RowError(self.where, f"column {column!r} has no entry {item}; prepare the split again")
        return self._python(cell.values[item], column)

    def _python(self, cell: pa.Scalar, column: str) -> Any:
        try:
            return cell.as_py()
        except UnicodeDecodeError as error:
            raise RowError(
                self.where, f"column {column!r} is not UTF-8 text ({error.reason}); prepare it again"
            ) from None

    def entries(self, column: str) -> int:
        """How many entries a list cell has: none where it is null; a cell that is no list has one."""
        self.file.check()
        cell = self.batch.column(column)[self.index]
        if not isinstance(cell, pa.ListScalar):
            return 1
        return 0 if cell.values is None else len(cell.values)

    def blob(self, column: str) -> bytes:
        """A binary cell. Raises RowError when it is null."""
        view = self._view(column)
        if view is None:
            raise RowError(self.where, f"column {column!r} is null; prepare the split again")
        return self.file.read(view)

    def place(self, column: str) -> tuple[int, int] | None:
        """Where a binary cell lies in the file, as MappedFile.place has it; None for null."""
        view = self._view(column)
        return None if view is None else self.file.place(view)

    def _view(self, column: str) -> pa.Buffer | None:
        self.file.check()
        try:
            return binary_cell(self.batch.column(column), self.index)
        except IndexError:
            raise RowError(
                self.where, f"column {column!r} has no such bytes; copy or prepare the shard again"
            ) from None


@dataclass(frozen=True)
class Shard:
    path: Path
    bytes: int
    rows: int
    samples: int
    sha256: str = ""  # where there is a manifest


@dataclass(frozen=True)
class _Bounds:
    """Batch b of a shard holds its rows `first_row[b]` to `first_row[b + 1]`, and samples likewise."""

    first_row: np.ndarray  # [batches + 1] int64
    first_sample: np.ndarray  # [batches + 1] int64


class Split:
    """The shards of one split folder.

    Args:
        directory: folder with `manifest.json` and the files that it lists.
        files: take these files, in this order, and ask for no manifest: sources.py chooses them.
        open_shards: so many stay mapped.
    Attributes:
        kind: "caption", "vqa" or "nlvr".
        name: the folder, for messages.
        rows: images (pairs of images for NLVR).
        samples: captions, questions or statements: what one epoch visits.
        parts: (name, samples) of the sources; a split has one.
        manifest: as it was read; {} where there is none.
    Raises:
        DataError: a shard is missing or has another size than the manifest says, or the split is empty; when a row is
            read, also: a shard is not Arrow, lacks a column or holds other counts than the manifest says.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        files: Sequence[Path] | None = None,
        open_shards: int = OPEN_SHARDS,
    ) -> None:
        self.directory = Path(directory)
        self.name = str(self.directory)
        self._arguments = (directory, files, open_shards)
        self.manifest: dict[str, Any] = {}
        # Kept when a shard is unmapped: a few numbers, which take longer to find than the file takes to map.
        self._bounds: dict[int, _Bounds] = {}
        if files is None:
            self._read_manifest()
        else:
            self._count(files)
        self._first_row = _starts([shard.rows for shard in self._shards])
        self._first_sample = _starts([shard.samples for shard in self._shards])
        self.rows = int(self._first_row[-1])
        self.samples = int(self._first_sample[-1])
        if not self.samples:
            raise DataError(f"{self.directory}: the split holds no samples; prepare it from data that has some")
        # functools' cache is safe to use from the prefetching thread and from the main one at once.
        self._open: Callable[[int], MappedFile] = functools.lru_cache(maxsize=open_shards)(self._map)

    def __reduce__(self) -> tuple[type[Split], tuple[Any, ...]]:
        # A spawned worker maps the files itself.
        return (Split, self._arguments)

    @property
    def parts(self) -> list[tuple[str, int]]:
        return [(self.name, self.samples)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the shards hold, as the manifest has it; without one, of their names, sizes and counts."""
        shards = [(shard.path.name, shard.bytes, shard.rows, shard.samples, shard.sha256) for shard in self._shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    @property
    def hashed_shards(self) -> list[Shard]:
        """Those shards of which a manifest has the hash."""
        return [shard for shard in self._shards if shard.sha256]

    def row(self, index: int) -> Row:
        """Row `index` of the split, from 0. Raises IndexError beyond the last one."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        number = _bisect(self._first_row, index)
        file, bounds = self._shard(number)
        local = index - int(self._first_row[number])
        b = _bisect(bounds.first_row, local)
        return Row(file.batch(b), local - int(bounds.first_row[b]), file, local)

    def sample(self, index: int) -> tuple[int, Row, int]:
        """Sample `index` of the split: its row's number, the row, and its place among the row's samples."""
        if not 0 <= index < self.samples:
            raise IndexError(f"sample {index} of {self.samples}")
        number = _bisect(self._first_sample, index)
        file, bounds = self._shard(number)
        local = index - int(self._first_sample[number])
        b = _bisect(bounds.first_sample, local)
        batch = file.batch(b)
        starts = _sample_starts(batch.column(SAMPLE_COLUMN[self.kind]))
        target = int(starts[0]) + local - int(bounds.first_sample[b])
        place = _bisect(starts, target)
        local_row = int(bounds.first_row[b]) + place
        row = Row(batch, place, file, local_row)
        return int(self._first_row[number]) + local_row, row, target - int(starts[place])

    def sample_rows(self) -> np.ndarray:
        """[samples] int64: the row of every sample. Reads every shard's list offsets, and nothing else of it."""
        column = SAMPLE_COLUMN[self.kind]
        counts = [np.diff(_sample_starts(batch.column(column))) for _, batch in self.batches()]
        return np.repeat(np.arange(self.rows), np.concatenate([np.zeros(0, dtype=np.int64), *counts]))

    def batches(self) -> Iterator[tuple[Path, pa.RecordBatch]]:
        """(shard, record batch) of all of them, in order; what is not looked at is not read."""
        for number in range(len(self._shards)):
            file = self._shard(number)[0]
            for b in range(file.reader.num_record_batches):
                yield file.path, file.reader.get_batch(b)

    def answers(self) -> Iterator[dict[int, str]]:
        """Label -> answer of every question that has some; nothing but their columns is read. For "vqa" alone."""
        for _, batch in self.batches() if self.kind == "vqa" else ():
            pairs = zip(batch.column("answer_labels").to_pylist(), batch.column("answers").to_pylist(), strict=True)
            for labels, answers in pairs:
                for of_question in zip(labels or (), answers or (), strict=True):
                    yield dict(zip(*(part or () for part in of_question), strict=True))

    def read_ahead(self, samples: Iterable[int]) -> None:
        """Have the kernel read the images of these samples (in rising order) into its cache; does not wait for it."""
        file, start, end = None, 0, 0
        for sample in samples:
            _, row, _ = self.sample(sample)
            for column in IMAGE_COLUMNS[self.kind]:
                place = row.place(column)
                if place is None:
                    continue
                if file is row.file and start <= place[0] <= end + _READ_AHEAD_GAP:
                    end = max(end, place[1])
                    continue
                if file is not None:
                    file.will_need(start, end)
                file, (start, end) = row.file, place
        if file is not None:
            file.will_need(start, end)

    def _shard(self, number: int) -> tuple[MappedFile, _Bounds]:
        file = self._open(number)
        file.check()
        return file, self._bounds[number]

    def _read_manifest(self) -> None:
        manifest = self.manifest = read_manifest(self.directory)
        self.kind: str = manifest["kind"]
        self._shards = [
            Shard(self.directory / record["file"], record["bytes"], record["rows"], record["samples"], record["sha256"])
            for record in manifest["shards"]
        ]
        for shard in self._shards:
            check_size(shard.path, shard.bytes)
        rows, samples = sum(shard.rows for shard in self._shards), sum(shard.samples for shard in self._shards)
        if (rows, samples) != (manifest["rows"], manifest["samples"]):
            raise DataError(
                f"{self.directory}: the manifest counts {manifest['rows']} rows and {manifest['samples']} samples, its "
                f"shards {rows} and {samples}; prepare the split again"
            )

    def _count(self, files: Sequence[Path]) -> None:
        """Take shards without a manifest: look into each of them for its kind and its counts."""
        self._shards = []
        for number, path in enumerate(files):
            file = _open_without_manifest(path)
            kind = _kind(path, file.reader.schema)
            if number and kind != self.kind:
                raise DataError(f"{path}: is a {kind} shard, {files[0]} a {self.kind} shard; keep them in two folders")
            self.kind = kind
            bounds = self._bounds[number] = self._measure(file)
            self._shards.append(Shard(path, file.size, int(bounds.first_row[-1]), int(bounds.first_sample[-1])))

    def _map(self, number: int) -> MappedFile:
        """Map a shard and check it against the manifest."""
        shard = self._shards[number]
        file = MappedFile(shard.path, shard.bytes)
        if number not in self._bounds:
            # Through a map of its own: measuring touches pages all over the file, and they would stay resident.
            self._bounds[number] = self._measure(MappedFile(shard.path, shard.bytes))
        bounds = self._bounds[number]
        found = int(bounds.first_row[-1]), int(bounds.first_sample[-1])
        if found != (shard.rows, shard.samples):
            raise DataError(
                f"{shard.path}: {found[0]} rows and {found[1]} samples, the manifest says {shard.rows} and "
                f"{shard.samples}; copy or prepare it again"
            )
        return file

    def _measure(self, file: MappedFile) -> _Bounds:
        rows, samples = [], []
        try:
            _check_columns(file.path, file.reader.schema, self.kind)
            for b in range(file.reader.num_record_batches):
                batch = file.reader.get_batch(b)
                for column in batch.columns:
                    check_offsets(column)
                starts = _sample_starts(batch.column(SAMPLE_COLUMN[self.kind]))
                rows.append(batch.num_rows)
                samples.append(int(starts[-1]) - int(starts[0]))
        except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
            raise not_arrow(file.path, error) from error
        return _Bounds(_starts(rows), _starts(samples))


def shard_kind(path: Path) -> str:
    """What a shard without a manifest holds: "caption", "vqa" or "nlvr". Raises DataError where it is none of these."""
    return _kind(path, _open_without_manifest(path).reader.schema)


def split_inside(path: Path) -> str | None:
    """What the column ``split`` of a shard without a manifest says of its first row; None without such a column."""
    reader = _open_without_manifest(path).reader
    if "split" not in reader.schema.names or not reader.num_record_batches:
        return None
    first = reader.get_batch(0).column("split").slice(0, 1).to_pylist()
    return str(first[0]) if first and first[0] is not None else None


def _open_without_manifest(path: Path) -> MappedFile:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; copy it again") from None
    return MappedFile(path, size)


def _kind(path: Path, schema: pa.Schema) -> str:
    for kind, column in (("nlvr", "image_0"), ("vqa", "questions"), ("caption", "caption")):
        if column in schema.names:
            return kind
    raise DataError(
        f"{path}: has none of the columns caption, questions and image_0, so it is no shard of ours; move it"
    )


def _check_columns(path: Path, schema: pa.Schema, kind: str) -> None:
    for name in KINDS[kind].names:
        if name not in schema.names and name not in _OPTIONAL_COLUMNS:
            raise DataError(f"{path}: has no column {name!r}, which a {kind} shard needs; prepare it again")
    for name in IMAGE_COLUMNS[kind]:
        if not (pa.types.is_binary(schema.field(name).type) or pa.types.is_large_binary(schema.field(name).type)):
            raise DataError(f"{path}: column {name!r} is {schema.field(name).type}, not binary; prepare it again")
    found = schema.field(SAMPLE_COLUMN[kind]).type
    lists = pa.types.is_list(found) or pa.types.is_large_list(found)
    if not (lists or pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise DataError(f"{path}: column {SAMPLE_COLUMN[kind]!r} is {found}, not a string or a list; prepare it again")


def _sample_starts(column: pa.Array) -> np.ndarray:
    """[rows + 1] where each row's samples start, counted from an arbitrary origin: Arrow's own offsets, not copied.

    A plain string column (as EVE's scripts write it) has one sample a row.
    """
    if isinstance(column, pa.ListArray | pa.LargeListArray):
        return cast(np.ndarray, column.offsets.to_numpy())
    return np.arange(len(column) + 1)


def _starts(counts: Sequence[int]) -> np.ndarray:
    """[n + 1] int64 cumulative counts, from 0."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _bisect(starts: np.ndarray, index: int) -> int:
    """The range that holds `index`; empty ranges hold nothing."""
    return int(np.searchsorted(starts, index, side="right")) - 1
