"""Micro-batches for one rank, read ahead: in order, resumable at any position, the same for any number of workers."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from eve_ds.data.batch_reader import Reader, Reading, SharedImages
from eve_ds.data.collate import Batch, to_batch
from eve_ds.data.freed_memory import keep_freed_memory
from eve_ds.data.loader_faults import OF_JOBS, explain_silence, explain_worker_death, ignore_sigterm_except_from_parent
from eve_ds.data.readahead import ReadAhead
from eve_ds.data.sampler import WINDOW_BLOCKS, EvalOrder, Mixture, Shuffle, TrainOrder
from eve_ds.data.samples import Samples
from preprocessing.errors import DataError
from preprocessing.redaction import printable

# So many different corrupt rows stop no run, unless none is allowed: a share of few samples says little.
FEW_CORRUPT = 3

log = logging.getLogger(__name__)


class Loader:
    """An iterable of this rank's micro-batches; made by `build_loader`. Closing an iterator ends its readers at once.

    Attributes:
        position: samples of all ranks that were handed out, for checkpoints. A training loader goes on from there when
            it is iterated again; an evaluation loader starts anew.
        wait_seconds: time spent waiting for batches so far.
        replaced: samples handed out so far in the place of corrupt ones.
        drawn: [sources] int64, samples handed out so far of each part of the data set (`dataset.split.parts`).
    """

    def __init__(
        self,
        dataset: Samples,
        order: TrainOrder | EvalOrder,
        start: int,
        num_workers: int,
        prefetch: int,
        reader: Reader,
        max_corrupt: float,
        timeout: float,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.position = start
        self.wait_seconds = 0.0
        self.replaced = 0
        self.drawn = np.zeros(len(dataset.split.parts), dtype=np.int64)
        self._ends = np.cumsum([samples for _, samples in dataset.split.parts])
        self._prefetch = prefetch
        self._num_workers = num_workers
        self._reader = reader
        self._max_corrupt = max_corrupt
        self._timeout = timeout
        self._corrupt_rows: set[str] = set()

    def samples_at(self, start: int, count: int) -> list[int]:
        """The numbers of the samples of all ranks at positions ``start``, ``start + 1`` ... of a training loader."""
        assert isinstance(self.order, TrainOrder)
        return self.order.stream.at(np.arange(start, start + count))[0].tolist()

    def __len__(self) -> int:
        """Micro-batches of one pass. Raises TypeError for a training loader, which has no end."""
        if isinstance(self.order, TrainOrder):
            raise TypeError("a training loader has no end")
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.order, EvalOrder):
            self.position = 0
        images = self._images() if self._num_workers else None
        source = self._from_workers(images) if self._num_workers else self._read_ahead()
        try:
            while (reading := self._next(source)) is not None:
                if reading.failure is not None:
                    raise DataError(reading.failure)
                self._account(reading)
                arrays = reading.arrays
                if images is not None and reading.slot is not None:
                    arrays = arrays | images.look_at(reading.slot, len(reading.block.samples))
                yield to_batch(arrays)
        finally:
            # Ends the readers here and now. Left to the garbage collector (a traceback keeps this frame alive), torch's
            # queues go before its workers do, and each of these is then waited for in vain for five seconds.
            del source

    def _next(self, source: Iterator[Reading]) -> Reading | None:
        began = time.perf_counter()
        try:
            return next(source, None)
        except RuntimeError as error:
            if line := explain_worker_death(error):
                raise DataError(line) from error
            if "timed out after" in str(error):
                readers = multiprocessing.active_children()
                line = explain_silence(self._timeout, readers)
                for reader in readers:  # a stopped process would not end when it is told to
                    os.kill(int(reader.pid or os.getpid()), signal.SIGCONT)
                raise DataError(line) from None
            raise
        except TimeoutError:
            raise DataError(explain_silence(self._timeout, [])) from None
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _account(self, reading: Reading) -> None:
        """Count what is handed out; raise DataError when too many of the rows seen so far were corrupt."""
        self.position = reading.block.end
        sources = np.searchsorted(self._ends, reading.block.samples, side="right")
        self.drawn += np.bincount(sources, minlength=len(self.drawn))
        self.replaced += len(reading.replaced)
        new = [each for each in reading.replaced if each.where not in self._corrupt_rows]
        for each in new:
            log.warning("%s", printable(each.message))
        self._corrupt_rows |= {each.where for each in new}
        seen = min(int(self.drawn.sum()), len(self.dataset))
        if new and len(self._corrupt_rows) > max(FEW_CORRUPT, self._max_corrupt * seen):
            raise DataError(
                f"{len(self._corrupt_rows)} corrupt rows among {seen} samples, more than data.max_corrupt="
                f"{self._max_corrupt:g}; `python -m preprocessing verify` finds them all; the last: {new[-1].message}"
            )

    def _images(self) -> SharedImages:
        # A worker's next batch is asked for when one of its batches is taken, but before that one is a tensor.
        slots = self._num_workers * self._prefetch + 1
        dataset = self.dataset
        size = self.order.micro_batch_size
        return SharedImages(slots, dataset.images, size, dataset.transform.image_size)

    def _from_workers(self, images: SharedImages | None) -> Iterator[Reading]:
        """Read in processes. They live as long as the iterator: an evaluation's do not idle through the training."""
        numbered: Any = enumerate(self.order.blocks(self.position))
        reader: Any = replace(self._reader, images=images)
        context = multiprocessing.get_context("fork")  # SharedImages asks for it
        # Born so, they have no thread, not even one that a library starts at the fork, that a signal could end them in.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, OF_JOBS)
        try:
            # As many descriptors and semaphores as the processes will take. Where they are wanting, better to learn it
            # here: an iterator of torch's that is half made ends in a page of traceback.
            queues = [context.Queue() for _ in range(2 * self._num_workers + 1)]
            del queues
            return iter(
                DataLoader(
                    reader,
                    batch_size=None,  # a block is a batch already
                    sampler=numbered,
                    num_workers=self._num_workers,
                    prefetch_factor=self._prefetch,
                    timeout=self._timeout,
                    collate_fn=_as_it_is,
                    worker_init_fn=_start_reader,
                    multiprocessing_context=context,
                    # torch draws a seed for its workers, which need none: not from the global stream, dropout's.
                    generator=torch.Generator(),
                )
            )
        except OSError as error:  # semaphores live in /dev/shm; and processes and descriptors may be limited
            raise DataError(
                f"data.num_workers={self._num_workers}: the processes cannot be started ({error.strerror}); free or "
                "enlarge /dev/shm, raise `ulimit -n` and `ulimit -u`, or lower data.num_workers"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _read_ahead(self) -> Iterator[Reading]:
        """Read in a thread of this process, `prefetch` batches ahead: decoders and torch release the Python lock."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        pending: deque[Future[Reading]] = deque()
        try:
            for numbered in enumerate(self.order.blocks(self.position)):
                pending.append(pool.submit(self._reader.__getitem__, numbered))
                if len(pending) > self._prefetch:
                    yield pending.popleft().result(self._timeout)
            while pending:
                yield pending.popleft().result(self._timeout)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start_reader(worker: int) -> None:
    ignore_sigterm_except_from_parent(worker)
    keep_freed_memory()


def _as_it_is(value: Any) -> Any:
    return value


def build_loader(
    dataset: Samples,
    micro_batch_size: int,
    *,
    world_size: int = 1,
    rank: int = 0,
    train: bool = True,
    seed: int = 0,
    start_sample: int = 0,
    limit: int | None = None,
    num_workers: int = 0,
    prefetch: int = 2,
    pad_to_multiple: int = 1,
    window: int = 0,
    weights: tuple[float, ...] | None = None,
    max_corrupt: float = 0.0,
    timeout: float = 300,
) -> Loader:
    """Micro-batches for one rank: endless and shuffled for training, each sample once and in order for evaluation.

    Args:
        dataset: one of samples.py.
        micro_batch_size: samples per rank and micro-batch. How many of them make an optimizer step does not change
            which samples come (sampler.py says which do).
        world_size, rank: of the data-parallel world.
        train: False for evaluation, whose batches also hold `valid` [B] bool.
        seed: of the order; training alone.
        start_sample: `position` of the loader to go on from; training alone.
        limit: look at the first so many samples; evaluation alone.
        num_workers: processes; 0 reads in a thread of this one.
        prefetch: batches read ahead, by each worker.
        pad_to_multiple: of the text length.
        window: shuffle within windows of so many samples, which read network file systems sequentially (sampler.py);
            0 shuffles fully; training alone.
        weights: of the parts of `dataset.split`, in proportion to which they are drawn; None draws each sample equally
            often; training alone.
        max_corrupt: share of corrupt rows, of the samples seen, beyond which training stops; a corrupt sample is
            replaced by its neighbor until then. 0 stops at the first one, as evaluation always does.
        timeout: seconds in which a batch must come.
    Raises:
        DataError: more ranks x workers than rows. While iterating: an unreadable shard or row, which it names, the
            death of a worker, or no batch in time.
    """
    least = min(micro_batch_size, world_size, prefetch, pad_to_multiple)
    if least < 1 or num_workers < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}, world_size={world_size}, prefetch={prefetch}, pad_to_multiple="
            f"{pad_to_multiple} must be at least 1, num_workers={num_workers} at least 0, rank={rank} below world_size"
        )
    if not train:
        size = len(dataset) if limit is None else min(limit, len(dataset))
        reader = Reader(dataset, pad_to_multiple, replace=False)
        evaluation = EvalOrder(size, micro_batch_size, world_size, rank)
        return Loader(dataset, evaluation, 0, num_workers, prefetch, reader, max_corrupt, timeout)
    check_readers(dataset.split.name, dataset.rows, world_size, num_workers)
    order = TrainOrder(_stream(dataset, seed, window, weights), micro_batch_size, world_size, rank)
    read_ahead = ReadAhead(dataset.split, order, window) if window else None
    reader = Reader(dataset, pad_to_multiple, replace=max_corrupt > 0, read_ahead=read_ahead)
    return Loader(dataset, order, start_sample, num_workers, prefetch, reader, max_corrupt, timeout)


def check_readers(name: str, rows: int, world_size: int, num_workers: int) -> None:
    """Raise DataError unless each process that reads the data set ``name`` has a row."""
    workers = max(num_workers, 1)
    if world_size * workers > rows:
        raise DataError(
            f"{name}: {rows} rows are fewer than {world_size} ranks x {workers} workers = {world_size * workers}; use "
            "fewer ranks, lower data.num_workers, or prepare more data"
        )


def _stream(dataset: Samples, seed: int, window: int, weights: tuple[float, ...] | None) -> Shuffle | Mixture:
    if window and window < WINDOW_BLOCKS:
        raise ValueError(f"window={window}: must be 0 or at least {WINDOW_BLOCKS}")
    sizes = tuple(samples for _, samples in dataset.split.parts)
    if weights is None:
        return Shuffle(len(dataset), seed, window)
    if len(weights) != len(sizes) or min(weights) <= 0:
        raise ValueError(f"weights={weights}: must be {len(sizes)} positive numbers")
    return Mixture(sizes, weights, seed, window)
