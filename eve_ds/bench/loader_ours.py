"""The parts of EVE-DS that ``bench loader`` measures: the loader, opening many shards, and packing."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from eve_ds.bench.loader_baselines import train_transform, window_rate
from eve_ds.bench.loader_images import CAPTIONS, copy_names, create_once
from eve_ds.bench.loader_process import Settings
from eve_ds.data.loader import build_loader
from eve_ds.data.samples import CaptionSamples
from eve_ds.data.shards import Split
from preprocessing.local_files import dump_json
from preprocessing.shards.schema import CAPTION_SCHEMA, MANIFEST, SCHEMA_VERSION
from preprocessing.text.tokenizer import train_tokenizer

_TEXT_LENGTH, _VOCABULARY = 40, 300
_OPEN_BATCH_ROWS = 256  # rows to a record batch, as preprocessing writes them


def pack(image_folder: Path, out: Path) -> None:
    """Convert a folder of loader_images.py to ``out``/train with the preprocessing command, in this process.

    Raises:
        RuntimeError: the command failed.
    """
    arguments = ["cc3m", "--annotations", str(image_folder / CAPTIONS), "--images", str(image_folder)]
    before = sys.argv
    sys.argv = ["preprocessing", *arguments, "--split", "train", "--check", "header", "--out", str(out)]
    try:
        runpy.run_module("preprocessing", run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{' '.join(sys.argv)}: exit code {end.code}") from end
    finally:
        sys.argv = before


class Ours:
    """The training loader on shards of ``python -m preprocessing``; it also tokenizes the captions."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        image_folder = Path(settings.image_folder)
        folder = create_once(Path(settings.work) / f"ours-{image_folder.name}", lambda path: pack(image_folder, path))
        captions = json.loads((image_folder / CAPTIONS).read_text(encoding="utf-8"))
        tokenizer = train_tokenizer([caption for _, caption in captions], _VOCABULARY)
        self._dataset = CaptionSamples(folder / "train", tokenizer, train_transform(settings), _TEXT_LENGTH)

    def round(self) -> dict[str, float]:
        loader = build_loader(
            self._dataset,
            self._settings.batch_size,
            num_workers=self._settings.processes,
            prefetch=self._settings.prefetch,
            raw=True,  # as a run on a GPU takes them
        )
        batches: Any = iter(loader)
        with closing(batches):  # it is endless
            return window_rate(self._images(batches), self._settings)

    def _images(self, batches: Iterator[dict[str, Tensor]]) -> Iterator[Tensor]:
        wanted = self._settings.images // self._settings.batch_size  # one pass, as with the other loaders
        return (batch["images"] for batch in itertools.islice(batches, wanted))


class Packing:
    """``python -m preprocessing … --check header``, compared with reading and hashing the same files in one process.

    It is also compared with writing the bytes of the shards and syncing them to disk, a lower bound for packing.
    """

    def __init__(self, settings: Settings) -> None:
        source, copies = Path(settings.image_folder), settings.packing_copies
        folder = Path(settings.work) / f"packing-{source.name}-{copies}"
        self._image_folder = create_once(folder, lambda path: copy_names(source, path, copies))
        self._files = sorted(self._image_folder.glob("*.jpg"))
        self._out = Path(settings.work) / "packed"

    def round(self) -> dict[str, float]:
        # Pending writes of an earlier step must not slow down the next one.
        shutil.rmtree(self._out, ignore_errors=True)
        os.sync()
        began = time.perf_counter()
        for path in self._files:
            hashlib.sha256(path.read_bytes()).digest()
        hashed = time.perf_counter() - began
        began = time.perf_counter()
        pack(self._image_folder, self._out)
        packed = time.perf_counter() - began
        shards = [path.read_bytes() for path in sorted(self._out.rglob("*.arrow"))]
        shutil.rmtree(self._out)
        os.sync()
        began = time.perf_counter()
        write_durably(self._out, shards)
        written = time.perf_counter() - began
        self._out.unlink()
        return {
            "packing_images_per_second": len(self._files) / packed,
            "hashing_images_per_second": len(self._files) / hashed,
            "writing_images_per_second": len(self._files) / written,
        }


def write_durably(path: Path, parts: Sequence[bytes]) -> None:
    """Write a file and sync it to disk."""
    with path.open("wb", buffering=0) as file:
        for part in parts:
            file.write(part)
        os.fsync(file.fileno())


class Opening:
    """Open a split of many shards (one file under many names), then read a row of each shard."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        folder = Path(settings.work) / f"shards-{settings.shards}-{settings.shard_rows}"
        self._split = create_once(folder, self._write)

    def _write(self, folder: Path) -> None:
        count, rows = self._settings.shards, self._settings.shard_rows
        shard = folder / "rows.arrow"
        columns: dict[str, list[Any]] = {
            "image": [b"image"] * rows,
            "caption": [[f"caption {row}"] for row in range(rows)],
            "image_id": [str(row) for row in range(rows)],
            "split": ["train"] * rows,
        }
        table = pa.table(columns, schema=CAPTION_SCHEMA)
        with pa.ipc.new_file(str(shard), table.schema) as writer:
            writer.write_table(table, max_chunksize=_OPEN_BATCH_ROWS)
        sha256 = hashlib.sha256(shard.read_bytes()).hexdigest()
        record = {"rows": rows, "samples": rows, "bytes": shard.stat().st_size, "sha256": sha256}
        names = [f"shard-{number:05d}.arrow" for number in range(count)]
        for name in names:
            (folder / name).symlink_to(shard.name)
        total = {"rows": count * rows, "samples": count * rows, "dropped": {}}
        shards = [record | {"file": name} for name in names]
        manifest = {"schema_version": SCHEMA_VERSION, "kind": "caption", "split": "train", "shards": shards} | total
        (folder / MANIFEST).write_bytes(dump_json(manifest))

    def round(self) -> dict[str, float]:
        resident = _resident_bytes()
        began = time.perf_counter()
        split = Split(self._split)
        opened, opened_bytes = time.perf_counter() - began, _resident_bytes() - resident
        for number in range(self._settings.shards):
            row = number * self._settings.shard_rows + number % self._settings.shard_rows
            if split.sample(row)[0] != row:
                raise RuntimeError(f"sample {row} came from another row")
        every = time.perf_counter() - began
        return {
            "open_seconds": opened,
            "open_resident_bytes": opened_bytes,
            "open_every_shard_seconds": every,
            "open_every_shard_resident_bytes": _resident_bytes() - resident,
        }


def _resident_bytes() -> int:
    """Resident memory of this process, bytes, including pages of mapped files, which the kernel can drop."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
