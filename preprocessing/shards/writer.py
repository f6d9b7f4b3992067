"""Writes shards, manifests and provenance files."""

import os
import platform
import shlex
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import numpy as np
import PIL
import pyarrow as pa

from preprocessing.errors import UserError, without_secrets
from preprocessing.local_files import dump_json
from preprocessing.running.storage import StoragePath, file_sha256, size_of, storage_path, write_whole
from preprocessing.shards.hashed_file import HashedFile
from preprocessing.shards.schema import (
    IDS,
    IMAGE_COLUMNS,
    KINDS,
    MANIFEST,
    PROVENANCE,
    SAMPLE_COLUMN,
    SCHEMA_VERSION,
    SPLITS,
    CodeGrid,
    read_manifest,
)

DROPPED = "dropped.jsonl"  # all that was dropped, when it is too much for the manifest
SPLIT_FILES = ("shard-*.arrow", MANIFEST, PROVENANCE, DROPPED, IDS)  # patterns of the files in a split folder
_BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20  # two batches are in memory at a time: one is filled while the other is written
_FIRST_BYTES = 32 << 20  # of address space; pages that are never written take no memory
SHARD_BYTES = 512 << 20
_HASHED_INPUTS = 8 << 30

_MEMORY: deque[np.ndarray] = deque(maxlen=4)  # buffers of finished batches, to be used again


def shard_name(index: int) -> str:
    """The default file name of shard `index`."""
    return f"shard-{index:05d}.arrow"


class ShardWriter:
    """Writes rows to Arrow files of about `shard_bytes` in `folder`: the same bytes for the same rows.

    A shard gets its name, `name(0)`, `name(1)`, …, when it is complete and on disk. A thread writes and hashes a batch
    while the caller fills the next one (writing and hashing release the GIL). After an error in a `with` block no
    partial file is left. Raises OSError when the disk is full.
    """

    def __init__(
        self,
        folder: StoragePath,
        kind: str,
        split: str,
        shard_bytes: int = SHARD_BYTES,
        name: Callable[[int], str] = shard_name,
        grid: CodeGrid | None = None,
    ) -> None:
        """`grid`: of the codes, where rows have some."""
        self._folder = folder
        self._kind = kind
        self._shard_bytes = shard_bytes
        self._name = name
        self._schema = KINDS[kind] if grid is None else KINDS[kind].append(grid.field)
        self._filling, self._spare = (_Batch(kind, self._schema, split) for _ in range(2))
        self._shards: list[dict[str, Any]] = []
        self._file: HashedFile | None = None
        self._arrow: Any = None
        self._thread = ThreadPoolExecutor(1, "shard-writer")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)
        if self._file is not None:
            self._file.discard()

    def image_buffer(self, column: str) -> memoryview:
        """Memory for the next row's image of `column`: write the image to its start and pass that slice to `add`."""
        return self._filling.image_buffer(column)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row: a value for each column but `split`. A memoryview must be a slice of `image_buffer`."""
        self._filling.add(row)
        if self._filling.rows == _BATCH_ROWS or self._filling.size >= _BATCH_BYTES:
            self._flush()

    def close(self) -> list[dict[str, Any]]:
        """Write the last batch. Returns the manifest's record of each shard: file, rows, samples, bytes, sha256."""
        self._flush()
        self._wait()
        self._thread.submit(self._close_shard).result()
        self._thread.shutdown()
        for batch in (self._filling, self._spare):
            batch.free()
        return self._shards

    def _flush(self) -> None:
        if self._filling.rows:
            self._wait()
            self._writing = self._thread.submit(self._write, self._filling)
            self._filling, self._spare = self._spare, self._filling

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, batch: "_Batch") -> None:
        """Write a batch and clear it for reuse."""
        if self._file is None:
            name = self._name(len(self._shards))
            self._file = HashedFile(self._folder / name)
            self._shards.append({"file": name, "rows": 0, "samples": 0})
            self._arrow = pa.ipc.new_file(self._file, self._schema)
        self._arrow.write_batch(batch.to_arrow())
        self._shards[-1]["rows"] += batch.rows
        self._shards[-1]["samples"] += batch.samples()
        batch.clear()
        if self._file.tell() >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._file is not None:
            self._arrow.close()
            self._shards[-1]["sha256"], self._shards[-1]["bytes"] = self._file.finish()
            self._file = self._arrow = None


class _Batch:
    """The rows of a record batch that is being filled."""

    def __init__(self, kind: str, schema: pa.Schema, split: str) -> None:
        self._schema = schema
        self._sample_column = SAMPLE_COLUMN[kind]
        self._split = split
        self._images = {name: _Images() for name in IMAGE_COLUMNS[kind]}
        self._columns: dict[str, list[Any]] = {
            name: [] for name in self._schema.names if name not in self._images and name != "split"
        }
        self.rows = 0
        self.size = 0  # bytes of the images

    def image_buffer(self, column: str) -> memoryview:
        """Free memory for an image."""
        return self._images[column].image_buffer()

    def samples(self) -> int:
        """The number of captions, questions or statements."""
        return sum(map(len, self._columns[self._sample_column]))

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        for name, images in self._images.items():
            image = row[name]
            images.append(image)
            self.size += len(image)
        for name, values in self._columns.items():
            values.append(row[name])
        self.rows += 1

    def to_arrow(self) -> pa.RecordBatch:
        """The rows as a record batch. It shares the memory of the images, so it is valid until `clear`."""
        values = {**self._columns, "split": [self._split] * self.rows}
        arrays = [
            self._images[column.name].to_arrow()
            if column.name in self._images
            else pa.array(values[column.name], column.type)
            for column in self._schema
        ]
        return pa.record_batch(arrays, schema=self._schema)

    def clear(self) -> None:
        """Remove the rows, but keep the memory."""
        for images in self._images.values():
            images.clear()
        for values in self._columns.values():
            values.clear()
        self.rows = self.size = 0

    def free(self) -> None:
        """Hand the memory to later batches; this batch must not be used again."""
        for images in self._images.values():
            if len(images.memory):
                _MEMORY.append(images.memory)


class _Images:
    """A column of images in one buffer, from which Arrow writes them.

    The buffer is reused: fresh memory for each batch makes packing take a third longer or more.
    """

    def __init__(self) -> None:
        self.memory = np.empty(0, dtype=np.uint8)  # until the first image
        self._view = self.memory.data
        self._ends = [0]

    def image_buffer(self) -> memoryview:
        """The memory after the last image."""
        if not len(self.memory):
            try:
                self.memory = _MEMORY.pop()
            except IndexError:
                self.memory = np.empty(_FIRST_BYTES, dtype=np.uint8)
            self._view = self.memory.data
        return self._view[self._ends[-1] :]

    def append(self, data: bytes | memoryview) -> None:
        """Add an image. A memoryview is at the start of `image_buffer` already."""
        start = self._ends[-1]
        end = start + len(data)
        if not isinstance(data, memoryview):
            if len(data) > len(self.image_buffer()):
                larger = np.empty(max(end, 2 * len(self.memory)), dtype=np.uint8)
                larger[:start] = self.memory[:start]
                self.memory, self._view = larger, larger.data
            self._view[start:end] = data
        self._ends.append(end)

    def to_arrow(self) -> pa.Array:
        """The same array as pa.array(…, pa.binary()), but sharing the memory."""
        offsets = pa.py_buffer(np.array(self._ends, dtype=np.int32))
        data = pa.py_buffer(self.memory).slice(0, self._ends[-1])
        return pa.Array.from_buffers(pa.binary(), len(self._ends) - 1, [None, offsets, data])

    def clear(self) -> None:
        """Remove the images."""
        self._ends = [0]


def write_manifest(
    folder: StoragePath, kind: str, split: str, shards: list[dict[str, Any]], **fields: Any
) -> dict[str, Any]:
    """Write `folder/manifest.json` with the shards, their totals and `fields` (dropped, dropped_items, source)."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "split": split,
        "rows": sum(shard["rows"] for shard in shards),
        "samples": sum(shard["samples"] for shard in shards),
        "shards": shards,
        **fields,
    }
    write_whole(folder / MANIFEST, dump_json(manifest))
    return manifest


def write_provenance(
    folder: StoragePath, inputs: Iterable[str | os.PathLike[str] | StoragePath], processes: int = 1
) -> None:
    """Write `folder/provenance.json`: the command, time, host, versions and annotation files of the split.

    It has the SHA-256 of the inputs, unless they hold more than 8 GiB in all (tar files with the images in them).
    """
    places = [storage_path(path) for path in inputs]
    try:
        sizes = [size_of(path) for path in places]
        hashed = sum(sizes) <= _HASHED_INPUTS
        described = [
            {"file": str(path), "bytes": size, "sha256": file_sha256(path) if hashed else None}
            for path, size in zip(places, sizes, strict=True)
        ]
    except OSError as error:
        raise UserError(f"{error.filename or error}: cannot be read any more; run the same command again") from None
    provenance = {
        "command": without_secrets(shlex.join(["python", "-m", "preprocessing", *sys.argv[1:]])),
        "directory": os.getcwd(),
        "host": platform.node(),
        "processes": processes,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": described,
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "pyarrow": pa.__version__,
            "pillow": PIL.__version__,
        },
    }
    write_whole(folder / PROVENANCE, dump_json(provenance))


def prepared_splits(out: StoragePath) -> list[str]:
    """The names of the finished splits in `out`."""
    return [split for split in SPLITS if (out / split / MANIFEST).exists()]


def check_output(out: StoragePath, kind: str, split: str, overwrite: bool) -> None:
    """Raise UserError when `out` holds this split already (unless `overwrite`) or splits of another kind."""
    for name in prepared_splits(out):
        if name == split and overwrite:
            continue
        manifest = _manifest_beside(out / name)
        if name == split:
            raise UserError(
                f"{out / split}: holds a finished split already ({manifest['rows']} rows, kind {manifest['kind']}); "
                "give --overwrite to replace it, or another --out"
            )
        if manifest["kind"] != kind:
            raise UserError(f"{out}: holds a {manifest['kind']} data set ({name}), not {kind}; choose another --out")


def _manifest_beside(folder: StoragePath) -> dict[str, Any]:
    """The manifest of an existing split."""
    try:
        return read_manifest(folder)
    except UserError as error:
        raise UserError(
            f"{error} (--split {folder.name} --overwrite), or fix it: python -m preprocessing verify {folder} --repair"
        ) from None
