"""Micro-batches for one rank: prefetched, in order, resumable at any position, the same for any number of workers."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from eve_ds.data.batch_reader import Batch, BatchReader, LoadedBatch, ReadAhead, SharedImages, to_batch
from eve_ds.data.sampler import WINDOW_BLOCKS, EvalOrder, Mixture, Shuffle, TrainOrder
from eve_ds.data.samples import Samples
from eve_ds.data.worker import JOB_SIGNALS, check_alive, explain_timeout, explain_worker_death, initialize_worker
from preprocessing.errors import UserError, printable

# Up to this number of corrupt rows never stop a run that tolerates any: a fraction of few samples means little.
TOLERATED_CORRUPT_ROWS = 3

log = logging.getLogger(__name__)


class Loader:
    """Iterable of this rank's micro-batches, from ``build_loader``. Closing an iterator ends its workers at once.

    Attributes:
        position: number of samples yielded on all ranks, for checkpoints. A training loader continues from there when
            it is iterated again; an evaluation loader starts again from 0.
        wait_seconds: total time spent waiting for batches.
        replaced: number of yielded samples that replace a corrupt one.
        drawn: [sources] int64, number of yielded samples of each part of the dataset (``dataset.split.parts``).
    """

    def __init__(
        self,
        dataset: Samples,
        order: TrainOrder | EvalOrder,
        start: int,
        num_workers: int,
        prefetch: int,
        reader: BatchReader,
        max_corrupt: float,
        timeout: float,
        raw: bool = False,
        pin: bool = False,
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
        self._raw, self._pin = raw, pin
        self._corrupt_rows: set[str] = set()
        self._workers: list[BaseProcess] = []

    def samples_at(self, start: int, count: int) -> list[int]:
        """Sample indices, over all ranks, at positions ``start`` to ``start + count - 1`` of a training loader."""
        assert isinstance(self.order, TrainOrder)
        return self.order.stream.samples_at(np.arange(start, start + count))[0].tolist()

    def __len__(self) -> int:
        """Number of micro-batches in one pass. Raises TypeError for a training loader, which is endless."""
        if isinstance(self.order, TrainOrder):
            raise TypeError("a training loader is endless and has no length")
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.order, EvalOrder):
            self.position = 0
        images = self._shared_images() if self._num_workers else None
        source = self._read_in_workers(images) if self._num_workers else self._read_in_thread()
        try:
            with images.pinned() if images is not None and self._pin else nullcontext():
                while (batch := self._next(source)) is not None:
                    if batch.failure is not None:
                        raise UserError(batch.failure)
                    self._count(batch)
                    arrays = batch.arrays
                    if images is not None and batch.slot is not None:
                        arrays = arrays | images.view(batch.slot, len(batch.indices.samples))
                    yield to_batch(arrays, self._raw)
        finally:
            # Ends the workers immediately. The garbage collector (a traceback keeps this frame alive) would free the
            # queues of torch before its workers, and torch would wait five seconds for each worker in vain.
            del source

    def _next(self, source: Iterator[LoadedBatch]) -> LoadedBatch | None:
        began = time.perf_counter()
        check_alive(self._workers)
        try:
            return next(source, None)
        except RuntimeError as error:
            if line := explain_worker_death(error):
                raise UserError(line) from error
            if "timed out after" in str(error):
                workers = multiprocessing.active_children()
                line = explain_timeout(self._timeout, workers)
                for worker in workers:  # a stopped process does not handle SIGTERM
                    os.kill(int(worker.pid or os.getpid()), signal.SIGCONT)
                raise UserError(line) from None
            raise
        except TimeoutError:
            raise UserError(explain_timeout(self._timeout, [])) from None
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _count(self, batch: LoadedBatch) -> None:
        """Update the counters; raise UserError when too many of the rows seen so far were corrupt."""
        self.position = batch.indices.end
        sources = np.searchsorted(self._ends, batch.indices.samples, side="right")
        self.drawn += np.bincount(sources, minlength=len(self.drawn))
        self.replaced += len(batch.replaced)
        new = [each for each in batch.replaced if each.where not in self._corrupt_rows]
        for each in new:
            log.warning("%s", printable(each.message))
        self._corrupt_rows |= {each.where for each in new}
        seen = min(int(self.drawn.sum()), len(self.dataset))
        if new and len(self._corrupt_rows) > max(TOLERATED_CORRUPT_ROWS, self._max_corrupt * seen):
            raise UserError(
                f"{len(self._corrupt_rows)} corrupt rows among {seen} samples, more than data.max_corrupt="
                f"{self._max_corrupt:g}; `python -m preprocessing verify` lists them; the last one: {new[-1].message}"
            )

    def _shared_images(self) -> SharedImages:
        # One slot more than prefetched batches: torch requests the next batch before it returns this one, whose slot
        # stays untouched until the batch after it is asked for.
        slots = self._num_workers * self._prefetch + 1
        dataset = self.dataset
        size = self.order.micro_batch_size
        return SharedImages(slots, dataset.images, size, dataset.transform.image_size)

    def _read_in_workers(self, images: SharedImages | None) -> Iterator[LoadedBatch]:
        """Read in worker processes. They end with the iterator, so those of an evaluation do not idle in training."""
        numbered: Any = enumerate(self.order.micro_batches(self.position))
        reader: Any = replace(self._reader, images=images)
        context = multiprocessing.get_context("fork")  # SharedImages needs it
        # Workers inherit this mask: no thread of theirs, not even one that a library starts at the fork, can be ended
        # by a signal before ``initialize_worker`` runs.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
        try:
            # Allocates as many descriptors and semaphores as the workers need. If they are lacking it fails here, with
            # one line; inside a half-constructed iterator of torch's it would end in a page of traceback.
            queues = [context.Queue() for _ in range(2 * self._num_workers + 1)]
            del queues
            others = multiprocessing.active_children()
            source = iter(
                DataLoader(
                    reader,
                    batch_size=None,  # an item is a batch already
                    sampler=numbered,
                    num_workers=self._num_workers,
                    prefetch_factor=self._prefetch,
                    timeout=self._timeout,
                    collate_fn=_identity,
                    worker_init_fn=initialize_worker,
                    multiprocessing_context=context,
                    # torch draws a seed for its workers; this keeps the global generator (dropout's) untouched.
                    generator=torch.Generator(),
                )
            )
            self._workers = [each for each in multiprocessing.active_children() if each not in others]
            return source
        except OSError as error:  # semaphores lie in /dev/shm; processes and descriptors may be limited
            raise UserError(
                f"data.num_workers={self._num_workers}: the processes cannot be started ({error.strerror}); free or "
                "enlarge /dev/shm, raise `ulimit -n` and `ulimit -u`, or lower data.num_workers"
            ) from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _read_in_thread(self) -> Iterator[LoadedBatch]:
        """Read in a thread of this process, ``prefetch`` batches ahead: decoders and torch release the GIL."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        pending: deque[Future[LoadedBatch]] = deque()
        try:
            for numbered in enumerate(self.order.micro_batches(self.position)):
                pending.append(pool.submit(self._reader.__getitem__, numbered))
                if len(pending) > self._prefetch:
                    yield pending.popleft().result(self._timeout)
            while pending:
                yield pending.popleft().result(self._timeout)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _identity(value: Any) -> Any:
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
    raw: bool = False,
    pin: bool = False,
) -> Loader:
    """Build the loader of one rank: endless and shuffled for training, one pass in order for evaluation.

    Args:
        dataset: one of samples.py.
        micro_batch_size: samples per rank and micro-batch. The number of micro-batches per optimizer step does not
            change the order of the samples (see sampler.py).
        world_size, rank: of the data-parallel group.
        train: False for evaluation; its batches also hold ``valid`` [B] bool.
        seed: of the sample order; training only.
        start_sample: ``position`` of the loader to continue from; training only.
        limit: maximum number of samples, from the first one on; evaluation only.
        num_workers: number of worker processes; 0 reads in a thread of this process.
        prefetch: number of batches read ahead by each worker.
        pad_to_multiple: the padded text length is a multiple of this.
        window: shuffle within windows of this many samples, which network file systems can read sequentially
            (sampler.py); 0 shuffles the whole epoch; training only.
        weights: sampling weights of the parts of ``dataset.split``; None draws every sample equally often; training
            only.
        max_corrupt: fraction of corrupt rows, of the samples seen, above which training stops; up to it the next sample
            replaces a corrupt one. 0 stops at the first corrupt row, as evaluation always does.
        timeout: maximum seconds to wait for a batch.
        raw: images* as decoded, [B, H, W, 3] uint8, in memory that may be overwritten when the next batch is asked for.
        pin: pin the memory that worker processes share, for copies to a GPU.
    Raises:
        UserError: more ranks x workers than rows. While iterating: a shard or row that cannot be read (named in the
            message), a worker that died, or no batch within ``timeout``.
        ValueError: an argument is outside its range.
    """
    _check_arguments(micro_batch_size, world_size, rank, num_workers, prefetch, pad_to_multiple)
    order: TrainOrder | EvalOrder
    if train:
        check_readers(dataset.split.name, dataset.rows, world_size, num_workers)
        order = TrainOrder(_stream(dataset, seed, window, weights), micro_batch_size, world_size, rank)
        read_ahead = ReadAhead(dataset.split, order, window) if window else None
        reader = BatchReader(dataset, pad_to_multiple, replace=max_corrupt > 0, read_ahead=read_ahead)
    else:
        size = len(dataset) if limit is None else min(limit, len(dataset))
        order, start_sample = EvalOrder(size, micro_batch_size, world_size, rank), 0
        reader = BatchReader(dataset, pad_to_multiple, replace=False)
    return Loader(dataset, order, start_sample, num_workers, prefetch, reader, max_corrupt, timeout, raw, pin)


def _check_arguments(
    micro_batch_size: int, world_size: int, rank: int, num_workers: int, prefetch: int, pad_to_multiple: int
) -> None:
    least = min(micro_batch_size, world_size, prefetch, pad_to_multiple)
    if least < 1 or num_workers < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}, world_size={world_size}, prefetch={prefetch}, pad_to_multiple="
            f"{pad_to_multiple} must be at least 1, num_workers={num_workers} at least 0, rank={rank} below world_size"
        )


def check_readers(name: str, rows: int, world_size: int, num_workers: int) -> None:
    """Raise UserError unless each process that reads the data set ``name`` has a row."""
    workers = max(num_workers, 1)
    if world_size * workers > rows:
        raise UserError(
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
