"""``index``: bring an index up to date with a folder of images.

Rows of images whose size and time of change have stayed the same are kept. Whole files of kept rows stay as they are;
other kept rows are copied. Vectors of new images are committed a file at a time, so a killed run goes on where it was.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import logging
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from torch.utils.data import DataLoader, Dataset

from eve_ds.data.transforms import Transform, normalize
from eve_ds.data.worker import explain_worker_death, initialize_worker
from eve_ds.predict.eve import EVE
from eve_ds.predict.image_files import ENDINGS, ImageFile, find_images, hiding
from eve_ds.predict.image_index import (
    FILE,
    MANIFEST,
    Broken,
    ImageIndex,
    IndexManifest,
    Shard,
    check_model,
    index_schema,
    model_identity,
)
from eve_ds.predict.raw_inputs import UndecodableError, read_image
from preprocessing.errors import UserError, printable
from preprocessing.local_files import make_folder, replace_surrogates, write_atomic

SHARD_ROWS = 8192
PREFETCH = 4  # batches that each decoding process is ahead
PROGRESS_SECONDS = 10.0
START_ERRORS = (errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM)  # of a decoding process
NAMED = 20  # broken images in messages; all of them are in the manifest
_TEMPORARY = re.compile(r"\.(features-\d{6,}\.arrow|manifest\.json)\.[0-9a-f]{8}")  # of a killed run
log = logging.getLogger(__name__)


@dataclass
class IndexReport:
    """What an update did: images in the index now, of them new, changed and kept; removed; not readable; images encoded
    a second."""

    images: int = 0
    new: int = 0
    changed: int = 0
    kept: int = 0
    removed: int = 0
    broken: int = 0
    images_per_second: float = 0.0


class Decoded(NamedTuple):
    """A batch of files: those that could be read with their squares, [n, S, S, 3] uint8, and the others.

    No tensor: torch hands those of a process over in shared memory, an open file each, and where that fails (too many
    open files, ``ulimit -f``) the batch is lost and the loader waits for it forever.
    """

    files: list[ImageFile]
    squares: np.ndarray
    broken: list[Broken]


class DecodedBatches(Dataset[Decoded]):
    """Image files in batches."""

    def __init__(self, folder: Path, files: Sequence[ImageFile], transform: Transform, batch_size: int) -> None:
        self.folder, self.files, self.transform, self.batch_size = folder, files, transform, batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.files) / self.batch_size)

    def __getitem__(self, number: int) -> Decoded:
        squares, good, bad = [], [], []
        for file in self.files[number * self.batch_size : (number + 1) * self.batch_size]:
            try:
                image = read_image(self.folder / file.path, self.transform.max_pixels)
                squares.append(np.asarray(self.transform.square(image)))
                good.append(file)
            except UndecodableError as error:
                bad.append(Broken(file.path, str(error), file.size, file.mtime_ns))
            except UserError as error:
                bad.append(Broken(file.path, str(error)))
        size = self.transform.image_size
        stacked = np.stack(squares) if squares else np.zeros((0, size, size, 3), np.uint8)
        return Decoded(good, stacked, bad)


def decoded(
    folder: Path, files: Sequence[ImageFile], transform: Transform, batch_size: int, num_workers: int
) -> Iterator[Decoded]:
    """Files in batches, in order, read by ``num_workers`` processes (0: by this one)."""
    batches = DecodedBatches(folder, files, transform, batch_size)
    processes = min(num_workers, len(batches))
    ahead: dict[str, Any] = {"prefetch_factor": PREFETCH, "worker_init_fn": initialize_worker} if processes else {}
    loader = DataLoader(batches, batch_size=None, num_workers=processes, collate_fn=_as_it_is, **ahead)
    try:
        started = iter(loader)
    except OSError as error:
        # torch's iterator is half made: deleting it fails, too, and Python would print that.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        error.__traceback__ = None  # which holds the iterator
        sys.unraisablehook = hook
        raise
    yield from started


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
        numbers = [int(found[1]) for path in index.iterdir() if (found := FILE.fullmatch(path.name))]
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
        sha256 = hashlib.sha256(buffer.getbuffer()).hexdigest()
        self.manifest.shards.append(Shard(name, table.num_rows, buffer.tell(), sha256))

    def _commit(self) -> None:
        """Write the manifest, then delete the files that it does not list, and the temporary ones of a killed run."""
        self.manifest.write(self.index)
        listed = {MANIFEST, *(shard.file for shard in self.manifest.shards)}
        for path in self.index.iterdir():
            if _is_own(path.name) and path.name not in listed:
                path.unlink()


def _is_own(name: str) -> bool:
    """Whether a file in an index has a name that the index gives."""
    return name == MANIFEST or bool(FILE.fullmatch(name) or _TEMPORARY.fullmatch(name))


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
        UserError: no images, another model, another folder, a place that holds something else, or a killed process.
    """
    if num_workers is not None and num_workers < 0:
        raise UserError(f"num_workers={num_workers}: must be at least 0")
    eve.task("retrieval")
    source, index = Path(folder).resolve(), Path(index)
    for path in (source, index):
        if replace_surrogates(str(path)) != str(path):
            raise UserError(f"{path}: its name is not UTF-8; rename it")
    files, broken, hidden = find_images(source)
    if not files:
        raise UserError(f"{folder}: holds no image files ({' '.join(ENDINGS)}); give a folder that does")
    workers = len(os.sched_getaffinity(0)) if num_workers is None else num_workers
    with _locked(index):
        old = _existing(eve, source, index, dtype)
        manifest = IndexManifest(model_identity(eve), str(source), dtype or "float32")
        if old is not None:
            manifest.dtype = old.manifest.dtype
        writer = IndexWriter(index, manifest)
        undecodable = {(one.path, one.size, one.mtime_ns): one for one in old.manifest.broken} if old else {}
        manifest.broken = broken + [undecodable[file] for file in files if file in undecodable]
        found = {one.path for one in manifest.broken}
        manifest.broken += [
            one for one in undecodable.values() if hiding(one.path, hidden) is not None and one.path not in found
        ]
        readable = [file for file in files if file not in undecodable]
        kept, before = _keep(old, readable, hidden, writer) if old else (set(), set())
        unkept = {one.path for one in manifest.broken} - {file.path for file in kept}  # others are hidden files
        manifest.broken = [one for one in manifest.broken if one.path in unkept]
        _name_hidden({place: hidden[place] for place in hidden if place not in unkept}, kept, source)
        with _explained():
            done = _encode(eve, source, [file for file in readable if file not in kept], before, writer, workers)
        _name_broken(manifest.broken, source)
        done.kept, done.broken = len(kept), len(manifest.broken)
        done.images = done.kept + done.new + done.changed
        done.removed = len(before) - done.kept - done.changed
        return done


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What torch and the system raise when decoding processes fail becomes a UserError."""
    again = "and start again: the index goes on from its last whole file"
    try:
        yield
    except (OSError, RuntimeError) as error:
        number = getattr(error, "errno", None)
        if explain_worker_death(error) is not None:
            raise UserError(
                "a decoding process was killed, most often for lack of memory; give a lower --num_workers or "
                f"--batch_size, {again}"
            ) from error
        if number in START_ERRORS or str(error).startswith(os.strerror(errno.EMFILE)):  # torch's, without a number
            reason = os.strerror(number or errno.EMFILE)
            raise UserError(
                f"no connection to the decoding processes ({reason}); raise the limits (ulimit -n, ulimit -u) or give "
                f"a lower --num_workers, {again}"
            ) from error
        raise


def _existing(eve: EVE, source: Path, index: Path, dtype: str | None) -> ImageIndex | None:
    """The index that is there, if one is. Raises UserError if it is not one of this model and folder."""
    names = [path.name for path in index.iterdir()]
    if others := [name for name in names if not _is_own(name)]:
        raise UserError(f"--out {index}: holds other files than an index's ({others[0]}); choose another folder")
    if MANIFEST not in names:
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


def _keep(
    old: ImageIndex, files: Sequence[ImageFile], hidden: Mapping[str, str], writer: IndexWriter
) -> tuple[set[ImageFile], set[str]]:
    """Keep the rows of unchanged files, and of hidden ones. Returns these files, and the paths of all rows."""
    rows = [[ImageFile(**row) for row in batch.select(ImageFile._fields).to_pylist()] for batch in old.batches]
    known = {file for part in rows for file in part}.intersection(files)
    new = len(known) < len(files)
    if hidden:
        known |= {file for part in rows for file in part if hiding(file.path, hidden) is not None}
    place = 0
    for shard, count in zip(old.manifest.shards, old.batches_of_shard, strict=True):
        parts = list(zip(old.batches[place : place + count], rows[place : place + count], strict=True))
        place += count
        whole = all(file in known for _, own in parts for file in own)
        if whole and (shard.rows == SHARD_ROWS or not new):
            writer.manifest.shards.append(shard)
            continue
        for batch, own in parts:
            writer.keep(batch.filter(pa.array([file in known for file in own], pa.bool_())))
    return known, {file.path for part in rows for file in part}


def _encode(
    eve: EVE, folder: Path, files: Sequence[ImageFile], before: set[str], writer: IndexWriter, num_workers: int
) -> IndexReport:
    """Encode images into the index and commit it. Returns how many are new, and changed, and images a second."""
    began = said = time.perf_counter()
    added = changed = 0
    for good, squares, bad in decoded(folder, files, eve.transform, eve.batch_size, num_workers):
        writer.manifest.broken += bad
        changed += sum(file.path in before for file in good)
        if good:
            writer.add(good, eve.vectors_of(normalize(squares)))
            added += len(good)
        if writer.rows >= SHARD_ROWS:
            writer.write_files(last=False)
        if time.perf_counter() - said > PROGRESS_SECONDS:
            said = time.perf_counter()
            log.info("%d of %d images, %.0f a second", added, len(files), added / (said - began))
    rate = added / max(time.perf_counter() - began, 1e-9)
    writer.write_files(last=True)
    return IndexReport(new=added - changed, changed=changed, images_per_second=rate)


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


def _name_hidden(hidden: Mapping[str, str], kept: Iterable[ImageFile], folder: Path) -> None:
    counts = Counter(hiding(file.path, hidden) for file in kept) if hidden else Counter()
    for place, reason in sorted(hidden.items())[:NAMED]:
        name = printable(str(folder / place))
        log.warning("%s: cannot be read (%s); images that the index keeps of it: %d", name, reason, counts[place])
    if len(hidden) > NAMED:
        log.warning("and %d more files and folders that cannot be read", len(hidden) - NAMED)


def _name_broken(broken: Sequence[Broken], folder: Path) -> None:
    for one in broken[:NAMED]:
        log.warning("%s: left out: %s", printable(str(folder / one.path)), one.reason)
    if len(broken) > NAMED:
        log.warning("and %d more; %s lists them all", len(broken) - NAMED, MANIFEST)
