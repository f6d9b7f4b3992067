"""``index``: bring an index up to date with a folder of images.

Rows of images whose size and time of change have stayed the same are kept. Whole files of kept rows stay as they are;
other kept rows are copied. Vectors of new images are committed a file at a time, so a killed run goes on where it was.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import logging
import math
import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import DataLoader, Dataset

from eve_ds.data.transforms import Transform, normalize
from eve_ds.data.worker import initialize_worker
from eve_ds.predict.eve import EVE
from eve_ds.predict.image_index import MANIFEST, ImageIndex, IndexManifest, check_model, index_schema, model_identity
from eve_ds.predict.raw_inputs import to_square
from preprocessing.errors import UserError, printable
from preprocessing.local_files import make_folder, replace_surrogates, write_atomic

ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff")
SHARD_ROWS = 8192
PREFETCH = 4  # batches that each decoding process is ahead
PROGRESS_SECONDS = 10.0
NAMED = 20  # broken images in messages; all of them are in the manifest
_FILE = re.compile(r"features-(\d{6,})\.arrow")
log = logging.getLogger(__name__)


class ImageFile(NamedTuple):
    """A file by its path relative to the folder; ``mtime_ns`` is the time of its last change."""

    path: str
    size: int
    mtime_ns: int


@dataclass
class IndexReport:
    """What an update did: images in the index now, of them new and kept; removed; not readable; new ones a second."""

    images: int
    new: int
    kept: int
    removed: int
    broken: int
    images_per_second: float


def find_images(folder: Path) -> tuple[list[ImageFile], list[dict[str, Any]]]:
    """The image files in a folder and below, by their endings, sorted; hidden ones are left out.

    Links are followed, and each folder is visited once, so that loops end.

    Returns:
        the files, and those that cannot be looked at, as in ``IndexManifest.broken``.
    Raises:
        UserError: no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; give one of image files")
    found, broken, visited = [], [], set()
    unreadable = lambda error: log.warning("%s: cannot be read (%s)", error.filename, error.strerror)  # noqa: E731
    for place, folders, names in os.walk(folder, followlinks=True, onerror=unreadable):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if name.startswith(".") or not name.lower().endswith(ENDINGS):
                continue
            path = os.path.relpath(os.path.join(place, name), folder)
            try:
                status = os.stat(os.path.join(place, name))
                if replace_surrogates(path) != path:
                    broken.append(_broken(ImageFile(replace_surrogates(path), -1, -1), "its name is not UTF-8"))
                elif stat.S_ISREG(status.st_mode):
                    found.append(ImageFile(path, status.st_size, status.st_mtime_ns))
            except OSError as error:
                broken.append(_broken(ImageFile(replace_surrogates(path), -1, -1), str(error.strerror)))
    return sorted(found), broken


def _broken(file: ImageFile, reason: str) -> dict[str, Any]:
    return file._asdict() | {"reason": reason}


class DecodedBatches(Dataset[tuple[list[ImageFile], torch.Tensor, list[tuple[ImageFile, str]]]]):
    """Image files in batches: dataset[i] -> (files, squares [n, S, S, 3] uint8, (file, reason) of the unreadable)."""

    def __init__(self, folder: Path, files: Sequence[ImageFile], transform: Transform, batch_size: int) -> None:
        self.folder, self.files, self.transform, self.batch_size = folder, files, transform, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.files) / self.batch_size)

    def __getitem__(self, number: int) -> tuple[list[ImageFile], torch.Tensor, list[tuple[ImageFile, str]]]:
        squares, good, bad = [], [], []
        for file in self.files[number * self.batch_size : (number + 1) * self.batch_size]:
            path = self.folder / file.path
            try:
                squares.append(to_square(path, self.transform))
                good.append(file)
            except UserError as error:
                bad.append((file, str(error).removeprefix(f"{path}: ").partition("; give another")[0]))
        size = self.transform.image_size
        stacked = np.stack(squares) if squares else np.zeros((0, size, size, 3), np.uint8)
        return good, torch.from_numpy(stacked), bad


def decoded(
    folder: Path, files: Sequence[ImageFile], transform: Transform, batch_size: int, num_workers: int
) -> Iterator[tuple[list[ImageFile], torch.Tensor, list[tuple[ImageFile, str]]]]:
    """The batches of ``DecodedBatches``, in order, read by ``num_workers`` processes (0: by this one)."""
    batches = DecodedBatches(folder, files, transform, batch_size)
    processes = min(num_workers, len(batches))
    ahead: dict[str, Any] = {"prefetch_factor": PREFETCH, "worker_init_fn": initialize_worker} if processes else {}
    yield from DataLoader(batches, batch_size=None, num_workers=processes, collate_fn=_as_it_is, **ahead)


def _as_it_is(batch: Any) -> Any:
    return batch


class IndexWriter:
    """Collects rows and writes them as files of the index.

    Args:
        index: its folder.
        manifest: what is in the index; its ``shards`` grow.
    """

    def __init__(self, index: Path, manifest: IndexManifest) -> None:
        self.index, self.manifest = index, manifest
        self._schema = index_schema(manifest.model["dim"], manifest.dtype)
        self._pending: list[pa.RecordBatch] = []
        self._kept = 0  # pending rows of an old file, which ``commit`` would delete
        numbers = [int(found[1]) for path in index.iterdir() if (found := _FILE.fullmatch(path.name))]
        self._next = max(numbers, default=0) + 1

    @property
    def rows(self) -> int:
        """Rows that are not in a file yet."""
        return sum(map(len, self._pending))

    def add(self, files: Sequence[ImageFile], vectors: np.ndarray) -> None:
        """Add rows with their vectors [n, E]."""
        values = pa.array(vectors.astype(self.manifest.dtype).ravel())
        columns: list[Any] = [pa.array([file[i] for file in files], self._schema.types[i]) for i in range(3)]
        column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
        self._pending.append(pa.RecordBatch.from_arrays([*columns, column], schema=self._schema))

    def keep(self, batch: pa.RecordBatch) -> None:
        """Add rows of an old file, before all new ones."""
        self._pending.append(batch)
        self._kept += len(batch)

    def write_files(self, last: bool) -> None:
        """Write the rows in whole files, with ``last`` the rest, too, and commit once no kept row waits."""
        while self.rows >= SHARD_ROWS or (last and self.rows):
            table = pa.Table.from_batches(self._pending, self._schema)
            self._write(table.slice(0, SHARD_ROWS).combine_chunks())
            self._pending = [batch for batch in table.slice(SHARD_ROWS).to_batches() if len(batch)]
            self._kept -= SHARD_ROWS
        if last or self._kept <= 0:
            self._commit()

    def _write(self, table: pa.Table) -> None:
        buffer = io.BytesIO()
        with pa.ipc.new_file(buffer, self._schema) as writer:
            writer.write_table(table)
        name = f"features-{self._next:06d}.arrow"
        self._next += 1
        write_atomic(self.index / name, buffer.getvalue())
        self.manifest.shards.append({"file": name, "rows": table.num_rows, "bytes": buffer.tell()})

    def _commit(self) -> None:
        """Write the manifest, then delete the files that it does not list."""
        self.manifest.write(self.index)
        listed = {shard["file"] for shard in self.manifest.shards}
        for path in self.index.iterdir():
            if _FILE.fullmatch(path.name) and path.name not in listed:
                path.unlink()


def update_index(
    eve: EVE, folder: str | Path, index: str | Path, num_workers: int | None = None, dtype: str | None = None
) -> IndexReport:
    """Make an index of a folder's images, or bring it up to date.

    Args:
        eve: a retrieval model.
        folder: of image files; its subfolders and links are followed.
        index: the index's folder.
        num_workers: processes that decode; None: one for each core; 0: this one.
        dtype: of the vectors, float32 or float16; None: the index's, float32 for a new one.
    Raises:
        UserError: no images, another model, another folder, or a place that holds something else.
    """
    if num_workers is not None and num_workers < 0:
        raise UserError(f"num_workers={num_workers}: must be at least 0")
    eve.task("retrieval")
    source, index = Path(folder).resolve(), Path(index)
    files, broken = find_images(source)
    if not files:
        raise UserError(f"{folder}: holds no image files ({' '.join(ENDINGS)}); give a folder that does")
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    with _locked(index):
        old = _existing(eve, source, index, dtype)
        manifest = IndexManifest(model_identity(eve), str(source), dtype or "float32")
        if old is not None:
            manifest.dtype = old.manifest.dtype
        writer = IndexWriter(index, manifest)
        skipped = {_file_of(one): one for one in old.manifest.broken} if old else {}
        skipped = {file: skipped[file] for file in files if file in skipped}
        manifest.broken = broken + list(skipped.values())
        readable = [file for file in files if file not in skipped]
        kept, new = _keep(old, readable, writer) if old else (0, readable)
        removed = len(old) - kept if old else 0
        added, rate = _encode(eve, source, new, writer, workers)
        _name_broken(manifest.broken, source)
        return IndexReport(kept + added, added, kept, removed, len(manifest.broken), rate)


def _existing(eve: EVE, source: Path, index: Path, dtype: str | None) -> ImageIndex | None:
    """The index that is there, if one is. Raises UserError if it is not one of this model and folder."""
    others = [path.name for path in index.iterdir() if path.name != MANIFEST and not _FILE.fullmatch(path.name)]
    others = [name for name in others if not name.startswith(f".{MANIFEST}.") and not name.startswith(".features-")]
    if others:
        raise UserError(f"--out {index}: holds other files than an index's ({others[0]}); choose another folder")
    if not (index / MANIFEST).is_file():
        return None
    found = ImageIndex(index)
    check_model(index, found.manifest, eve)
    if found.manifest.folder != str(source):
        raise UserError(
            f"--out {index}: is the index of {found.manifest.folder}; choose another folder, or, if that was moved to "
            f'{source}, write so in "folder" of {index / MANIFEST}'
        )
    if dtype not in (None, found.manifest.dtype):
        raise UserError(f"--dtype {dtype}: {index} has vectors of {found.manifest.dtype}; choose another --out")
    return found


def _file_of(row: dict[str, Any]) -> ImageFile:
    return ImageFile(row["path"], row["size"], row["mtime_ns"])


def _keep(old: ImageIndex, files: Sequence[ImageFile], writer: IndexWriter) -> tuple[int, list[ImageFile]]:
    """Keep the rows of unchanged files. Returns how many, and the files that are not among them."""
    there = set(files)
    rows = [[_file_of(row) for row in batch.select(ImageFile._fields).to_pylist()] for batch in old.batches()]
    known = there.intersection(*[[file for part in rows for file in part]])
    new = sorted(there - known)
    place = 0
    for shard, count in zip(old.manifest.shards, old.batches_of_shard, strict=True):
        parts = list(zip(old.batches()[place : place + count], rows[place : place + count], strict=True))
        place += count
        whole = all(file in known for _, own in parts for file in own)
        if whole and (shard["rows"] == SHARD_ROWS or not new):
            writer.manifest.shards.append(shard)
            continue
        for batch, own in parts:
            writer.keep(batch.filter(pa.array([file in known for file in own], pa.bool_())))
    return len(known), new


def _encode(
    eve: EVE, folder: Path, files: Sequence[ImageFile], writer: IndexWriter, num_workers: int
) -> tuple[int, float]:
    """Encode new images into the index and commit it. Returns how many, and images a second."""
    began = said = time.perf_counter()
    added = 0
    for good, squares, bad in decoded(folder, files, eve.transform, eve.batch_size, num_workers):
        writer.manifest.broken += [_broken(file, reason) for file, reason in bad]
        if good:
            writer.add(good, eve.vectors_of(normalize(squares.numpy())))
            added += len(good)
        if writer.rows >= SHARD_ROWS:
            writer.write_files(last=False)
        if time.perf_counter() - said > PROGRESS_SECONDS:
            said = time.perf_counter()
            log.info("%d of %d images, %.0f a second", added, len(files), added / (said - began))
    rate = added / max(time.perf_counter() - began, 1e-9)
    writer.write_files(last=True)
    return added, rate


@contextlib.contextmanager
def _locked(index: Path) -> Iterator[None]:
    """Hold the folder, made if it is missing, against a second update. The lock ends with the process."""
    try:
        make_folder(index)
        handle = os.open(index, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"--out {index}: cannot be made ({error.strerror}); choose another folder") from error
    try:
        with contextlib.suppress(OSError):  # of a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"--out {index}: another process is updating it; choose another, or wait") from None
        yield
    finally:
        os.close(handle)


def _name_broken(broken: Sequence[dict[str, Any]], folder: Path) -> None:
    for one in broken[:NAMED]:
        log.warning("%s: left out: %s", printable(str(folder / one["path"])), one["reason"])
    if len(broken) > NAMED:
        log.warning("and %d more; %s lists them all", len(broken) - NAMED, MANIFEST)
