"""Prepared shards: memory-mapped Arrow IPC files with random access to rows and samples.

Nothing is opened before it is needed: counts come from the manifest, a shard is mapped when one of its rows is read,
and a sample's row is found by bisection in the list offsets that Arrow stores. So opening a split of any size reads one
JSON file and calls ``stat`` once per shard, and the index in memory is a few numbers per shard. Shards without a
manifest, as ViLT's and EVE's own scripts write them, are counted when the split is opened.
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

from eve_ds.data.mapping import MappedFile, binary_cell, check_offsets, check_size, not_arrow_error
from preprocessing.errors import UserError
from preprocessing.shards.schema import IMAGE_COLUMNS, KINDS, SAMPLE_COLUMN, check_modality, read_manifest

# Maximum number of mapped shards: each holds two file descriptors, and a common limit per process is 1,024.
OPEN_SHARDS = 128
# Not needed for training, and missing in EVE's own shards.
_OPTIONAL_COLUMNS = ("image_id", "split")
# Byte ranges closer together than this are read ahead as one.
_READ_AHEAD_GAP = 64 << 10


class RowError(UserError):
    """One row is corrupt; the other rows of its shard are unaffected.

    Args:
        where: shard and row, as in ``Row.where``.
        fault: what is wrong; what to do.
    """

    def __init__(self, where: str, fault: str) -> None:
        super().__init__(f"{where}: {fault}")
        self.where = where


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a shard. It keeps the shard mapped, and copies only the cells that are read.

    Its methods raise UserError if the shard was deleted or truncated after it was mapped.
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
        """Shard and row number in it (from 0), for messages."""
        return f"{self.path}: row {self.number}"

    def value(self, column: str) -> Any:
        """The cell as a Python object."""
        self.file.check()
        return self._python(self.batch.column(column)[self.index], column)

    def item(self, column: str, item: int) -> Any:
        """Entry ``item`` of a list cell as a Python object; a cell that is not a list is its own entry 0."""
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
        """Number of entries of a list cell: 0 if it is null; 1 if the cell is not a list."""
        self.file.check()
        cell = self.batch.column(column)[self.index]
        if not isinstance(cell, pa.ListScalar):
            return 1
        return 0 if cell.values is None else len(cell.values)

    def blob(self, column: str) -> bytes:
        """The bytes of a binary cell. Raises RowError if it is null."""
        view = self._view(column)
        if view is None:
            raise RowError(self.where, f"column {column!r} is null; prepare the split again")
        return self.file.read(view)

    def byte_range(self, column: str) -> tuple[int, int] | None:
        """Range of a binary cell in the file, as in ``MappedFile.byte_range``; None for null."""
        view = self._view(column)
        return None if view is None else self.file.byte_range(view)

    def _view(self, column: str) -> pa.Buffer | None:
        self.file.check()
        try:
            return binary_cell(self.batch.column(column), self.index)
        except IndexError:
            raise RowError(
                self.where, f"column {column!r} points outside of its shard; copy or prepare the shard again"
            ) from None


@dataclass(frozen=True)
class Shard:
    """A shard file and its counts; ``sha256`` is empty without a manifest."""

    path: Path
    bytes: int
    rows: int
    samples: int
    sha256: str = ""


@dataclass(frozen=True)
class _Bounds:
    """Record batch b of a shard holds the rows ``first_row[b]`` to ``first_row[b + 1] - 1``; samples likewise."""

    first_row: np.ndarray  # [batches + 1] int64
    first_sample: np.ndarray  # [batches + 1] int64


class Split:
    """The shards of one split folder.

    Args:
        directory: folder with ``manifest.json`` and the files that it lists.
        files: read these files, in this order, without a manifest; chosen by sources.py.
        open_shards: maximum number of mapped shards.
    Attributes:
        kind: "caption", "vqa" or "nlvr".
        name: the folder, for messages.
        rows: number of images (pairs of images for NLVR).
        samples: number of captions, questions or statements; an epoch visits each once.
        parts: (name, samples) of each source; a split has one.
        manifest: content of the manifest; {} without one.
    Raises:
        UserError: a shard is missing or its size differs from the manifest, or the split is empty. When a row is read,
            also: a shard is not Arrow, lacks a column, or its counts differ from the manifest.
    """

    modality, counted = "pairs", "samples"  # see modalities.py; the field of Shard that counts its samples

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
        # Kept after a shard is unmapped: measuring takes longer than mapping.
        self._bounds: dict[int, _Bounds] = {}
        if files is None:
            self._read_manifest()
        else:
            self._count(files)
        self._first_row = _starts([shard.rows for shard in self._shards])
        self._first_sample = _starts([getattr(shard, self.counted) for shard in self._shards])
        self.rows = int(self._first_row[-1])
        self.samples = int(self._first_sample[-1])
        if not self.samples:
            raise UserError(f"{self.directory}: the split holds no samples; prepare it from data that has some")
        # lru_cache is thread-safe: the prefetching thread and the main thread share it.
        self._open: Callable[[int], MappedFile] = functools.lru_cache(maxsize=open_shards)(self._map)

    def __reduce__(self) -> tuple[type[Split], tuple[Any, ...]]:
        # A spawned worker maps the files again.
        return (type(self), self._arguments)

    @property
    def parts(self) -> list[tuple[str, int]]:
        return [(self.name, self.samples)]

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the shards' names, sizes and counts and, with a manifest, their hashes."""
        shards = [(shard.path.name, shard.bytes, shard.rows, shard.samples, shard.sha256) for shard in self._shards]
        return hashlib.sha256(json.dumps(shards).encode()).hexdigest()

    @property
    def hashed_shards(self) -> list[Shard]:
        """The shards whose hash is in the manifest."""
        return [shard for shard in self._shards if shard.sha256]

    def row(self, index: int) -> Row:
        """Row ``index`` of the split, from 0. Raises IndexError if it is out of range."""
        if not 0 <= index < self.rows:
            raise IndexError(f"row {index} of {self.rows}")
        number = _bisect(self._first_row, index)
        file, bounds = self._shard(number)
        local = index - int(self._first_row[number])
        b = _bisect(bounds.first_row, local)
        return Row(file.batch(b), local - int(bounds.first_row[b]), file, local)

    def sample(self, index: int) -> tuple[int, Row, int]:
        """Sample ``index`` of the split: the row number, the row, and the sample's index within the row."""
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
        """[samples] int64: the row of every sample. Reads only the list offsets of every shard."""
        column = SAMPLE_COLUMN[self.kind]
        counts = [np.diff(_sample_starts(batch.column(column))) for _, batch in self.batches()]
        return np.repeat(np.arange(self.rows), np.concatenate([np.zeros(0, dtype=np.int64), *counts]))

    def batches(self) -> Iterator[tuple[Path, pa.RecordBatch]]:
        """(shard, record batch) of all record batches, in order; cells are read lazily."""
        for number in range(len(self._shards)):
            file = self._shard(number)[0]
            for b in range(file.reader.num_record_batches):
                yield file.path, file.reader.get_batch(b)

    def answers(self) -> Iterator[dict[int, str]]:
        """{label: answer} of every question; only for "vqa". Reads no other columns."""
        for _, batch in self.batches() if self.kind == "vqa" else ():
            pairs = zip(batch.column("answer_labels").to_pylist(), batch.column("answers").to_pylist(), strict=True)
            for labels, answers in pairs:
                for question in zip(labels or (), answers or (), strict=True):
                    yield dict(zip(*(part or () for part in question), strict=True))

    def read_ahead(self, samples: Iterable[int]) -> None:
        """Ask the kernel to read the images of ``samples`` (in ascending order) into the page cache; does not wait."""
        file, start, end = None, 0, 0
        for sample in samples:
            _, row, _ = self.sample(sample)
            for column in IMAGE_COLUMNS[self.kind]:
                found = row.byte_range(column)
                if found is None:
                    continue
                if file is row.file and start <= found[0] <= end + _READ_AHEAD_GAP:
                    end = max(end, found[1])
                    continue
                if file is not None:
                    file.will_need(start, end)
                file, (start, end) = row.file, found
        if file is not None:
            file.will_need(start, end)

    def _shard(self, number: int) -> tuple[MappedFile, _Bounds]:
        file = self._open(number)
        file.check()
        return file, self._bounds[number]

    def _read_manifest(self) -> None:
        manifest = self.manifest = read_manifest(self.directory)
        check_modality(self.directory, manifest, self.modality)
        self.kind: str = manifest["kind"]
        self._shards = [
            Shard(self.directory / record["file"], record["bytes"], record["rows"], record["samples"], record["sha256"])
            for record in manifest["shards"]
        ]
        for shard in self._shards:
            check_size(shard.path, shard.bytes)
        rows, samples = sum(shard.rows for shard in self._shards), sum(shard.samples for shard in self._shards)
        if (rows, samples) != (manifest["rows"], manifest["samples"]):
            raise UserError(
                f"{self.directory}: the manifest counts {manifest['rows']} rows and {manifest['samples']} samples, its "
                f"shards {rows} and {samples}; prepare the split again"
            )

    def _count(self, files: Sequence[Path]) -> None:
        """Open shards without a manifest: read the kind and the counts of each."""
        self._shards = []
        for number, path in enumerate(files):
            file = _open_without_manifest(path)
            kind = _kind(path, file.reader.schema)
            if number and kind != self.kind:
                raise UserError(
                    f"{path}: is a {kind} shard, {files[0]} a {self.kind} shard; keep them in separate folders"
                )
            self.kind = kind
            bounds = self._bounds[number] = self._measure(file)
            self._shards.append(Shard(path, file.size, int(bounds.first_row[-1]), int(bounds.first_sample[-1])))

    def _map(self, number: int) -> MappedFile:
        """Map a shard and check it against the manifest."""
        shard = self._shards[number]
        file = MappedFile(shard.path, shard.bytes)
        if number not in self._bounds:
            # Uses a separate map: measuring touches pages all over the file, which would stay resident.
            self._bounds[number] = self._measure(MappedFile(shard.path, shard.bytes))
        bounds = self._bounds[number]
        found = int(bounds.first_row[-1]), int(bounds.first_sample[-1])
        if found != (shard.rows, shard.samples):
            raise UserError(
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
            raise not_arrow_error(file.path, error) from error
        return _Bounds(_starts(rows), _starts(samples))


def shard_kind(path: Path) -> str:
    """Kind of a shard without a manifest: "caption", "vqa" or "nlvr". Raises UserError if it is none of these."""
    return _kind(path, _open_without_manifest(path).reader.schema)


def first_row_split(path: Path) -> str | None:
    """Column ``split`` in the first row of a shard without a manifest; None without that column."""
    reader = _open_without_manifest(path).reader
    if "split" not in reader.schema.names or not reader.num_record_batches:
        return None
    first = reader.get_batch(0).column("split").slice(0, 1).to_pylist()
    return str(first[0]) if first and first[0] is not None else None


def _open_without_manifest(path: Path) -> MappedFile:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; copy it again") from None
    return MappedFile(path, size)


def _kind(path: Path, schema: pa.Schema) -> str:
    for kind, column in (("nlvr", "image_0"), ("vqa", "questions"), ("caption", "caption")):
        if column in schema.names:
            return kind
    raise UserError(
        f"{path}: has none of the columns caption, questions and image_0, so it is not a shard of EVE-DS; move it away"
    )


def _check_columns(path: Path, schema: pa.Schema, kind: str) -> None:
    for name in KINDS[kind].names:
        if (count := schema.names.count(name)) > 1 or (not count and name not in _OPTIONAL_COLUMNS):
            raise UserError(f"{path}: a {kind} shard has one column {name!r}, this one {count}; prepare it again")
    for name in IMAGE_COLUMNS[kind]:
        if not (pa.types.is_binary(schema.field(name).type) or pa.types.is_large_binary(schema.field(name).type)):
            raise UserError(f"{path}: column {name!r} is {schema.field(name).type}, not binary; prepare it again")
    found = schema.field(SAMPLE_COLUMN[kind]).type
    lists = pa.types.is_list(found) or pa.types.is_large_list(found)
    if not (lists or pa.types.is_string(found) or pa.types.is_large_string(found)):
        raise UserError(f"{path}: column {SAMPLE_COLUMN[kind]!r} is {found}, not a string or a list; prepare it again")


def _sample_starts(column: pa.Array) -> np.ndarray:
    """[rows + 1] int: start of each row's samples, from an arbitrary origin. These are Arrow's offsets, not a copy.

    A plain string column (as EVE's scripts write it) has one sample per row.
    """
    if isinstance(column, pa.ListArray | pa.LargeListArray):
        return cast(np.ndarray, column.offsets.to_numpy())
    return np.arange(len(column) + 1)


def _starts(counts: Sequence[int]) -> np.ndarray:
    """[n + 1] int64: cumulative counts, starting at 0."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def _bisect(starts: np.ndarray, index: int) -> int:
    """Number of the range that holds ``index``; empty ranges are skipped."""
    return int(np.searchsorted(starts, index, side="right")) - 1
