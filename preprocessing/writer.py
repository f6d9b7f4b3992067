"""Writes one split of a data set: Arrow shards, manifest and provenance, all at once or not at all."""

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import PIL
import pyarrow as pa

from preprocessing.schema import (
    KINDS,
    MANIFEST,
    PROVENANCE,
    SAMPLE_COLUMN,
    SCHEMA_VERSION,
    SPLITS,
    DataError,
    dump_json,
    read_manifest,
    write_atomic,
)

OURS = ("shard-*.arrow", MANIFEST, PROVENANCE)  # what a split folder may hold
_BATCH_ROWS = 256
_BATCH_BYTES = 256 << 20  # Arrow's binary columns end at 2 GiB a batch
_SHARD_BYTES = 512 << 20


class ShardWriter:
    """Writes rows to `folder/shard-00000.arrow`, `shard-00001.arrow`, …: the same bytes for the same rows."""

    def __init__(self, folder: Path, kind: str, split: str, shard_bytes: int = _SHARD_BYTES) -> None:
        self._folder = folder
        self._schema = KINDS[kind]
        self._sample_column = SAMPLE_COLUMN[kind]
        self._split = split
        self._shard_bytes = shard_bytes
        self._batch: list[dict[str, Any]] = []
        self._batch_bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._file: Any = None
        self._writer: Any = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row: a value for every column of the schema but `split`."""
        self._batch.append({**row, "split": self._split})
        self._batch_bytes += sum(len(value) for value in row.values() if isinstance(value, bytes))
        if len(self._batch) == _BATCH_ROWS or self._batch_bytes >= _BATCH_BYTES:
            self._flush()

    def close(self) -> list[dict[str, Any]]:
        """Write what is left. Returns the manifest's record of each shard: file, rows, samples, bytes, sha256."""
        self._flush()
        self._close_shard()
        return self._shards

    def _flush(self) -> None:
        if not self._batch:
            return
        if self._writer is None:
            path = self._folder / f"shard-{len(self._shards):05d}.arrow"
            self._shards.append({"file": path.name, "rows": 0, "samples": 0})
            self._file = pa.OSFile(str(path), "wb")
            self._writer = pa.ipc.new_file(self._file, self._schema)
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._batch, schema=self._schema))
        self._shards[-1]["rows"] += len(self._batch)
        self._shards[-1]["samples"] += sum(len(row[self._sample_column]) for row in self._batch)
        self._batch, self._batch_bytes = [], 0
        if self._file.tell() >= self._shard_bytes:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        self._file.close()
        self._file = self._writer = None
        shard = self._shards[-1]
        with open(self._folder / shard["file"], "rb+") as file:
            shard["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            shard["bytes"] = file.tell()
            os.fsync(file.fileno())


def write_manifest(folder: Path, kind: str, split: str, shards: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
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
    write_atomic(folder / MANIFEST, dump_json(manifest))
    return manifest


def write_provenance(folder: Path, inputs: Iterable[Path]) -> None:
    """Write `folder/provenance.json`: by whom, when, where and from which annotation files the split was made."""
    provenance = {
        "command": shlex.join(["python", "-m", "preprocessing", *sys.argv[1:]]),
        "directory": os.getcwd(),
        "host": platform.node(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": [{"file": str(path), "bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in inputs],
        "versions": {
            "python": platform.python_version(),
            "platform": platform.platform(),
            "pyarrow": pa.__version__,
            "pillow": PIL.__version__,
        },
    }
    write_atomic(folder / PROVENANCE, dump_json(provenance))


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def prepared_splits(out: Path) -> dict[str, dict[str, Any]]:
    """Manifests of the splits that `out` holds already, by split name."""
    return {split: read_manifest(out / split) for split in SPLITS if (out / split / MANIFEST).exists()}


def check_output(out: Path, kind: str, split: str, overwrite: bool) -> None:
    """Raise DataError when `out` holds this split already (unless `overwrite`) or splits of another kind."""
    for name, manifest in prepared_splits(out).items():
        if name == split and not overwrite:
            raise DataError(
                f"{out / split}: holds another run's split ({manifest['rows']} rows, kind {manifest['kind']}); "
                "give --overwrite to replace it, or another --out"
            )
        if name != split and manifest["kind"] != kind:
            raise DataError(f"{out}: holds a {manifest['kind']} data set ({name}), not {kind}; choose another --out")
