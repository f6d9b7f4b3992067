"""Micro-batches for one rank, read ahead: in order, resumable at any position, the same for any number of workers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from eve_ds.data.collate import Batch, collate
from eve_ds.data.sampler import Block, EvalOrder, TrainOrder
from eve_ds.data.samples import Samples
from preprocessing.schema import DataError


@dataclass(frozen=True)
class _Failure:
    """A user's mistake met in a worker process; torch would wrap the exception itself into a page of traceback."""

    message: str


_Item = tuple[Block, Batch | _Failure]


@dataclass(frozen=True)
class _Reader:
    """Block -> (block, batch), in the shape of a map-style data set, as torch's DataLoader wants it."""

    dataset: Samples
    pad_to_multiple: int

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, block: Block) -> _Item:
        try:
            samples = [self.dataset[key] for key in zip(block.samples.tolist(), block.epochs.tolist(), strict=True)]
        except DataError as error:
            return block, _Failure(str(error))
        batch = collate(samples, self.dataset.pad_id, self.dataset.max_text_length, self.pad_to_multiple)
        if block.valid is not None:
            batch["valid"] = torch.from_numpy(block.valid)
        return block, batch


class Loader:
    """An iterable of this rank's micro-batches; made by `build_loader`. Closing an iterator ends its readers at once.

    Attributes:
        position: samples of all ranks that were handed out, for checkpoints. A training loader goes on from there when
            it is iterated again; an evaluation loader starts anew.
        wait_seconds: time spent waiting for batches so far.
    """

    def __init__(
        self,
        dataset: Samples,
        order: TrainOrder | EvalOrder,
        start: int,
        num_workers: int,
        prefetch: int,
        pad_to_multiple: int,
    ) -> None:
        self.dataset = dataset
        self.order = order
        self.position = start
        self.wait_seconds = 0.0
        self._prefetch = prefetch
        self._num_workers = num_workers
        self._reader = _Reader(dataset, pad_to_multiple)

    def __len__(self) -> int:
        """Micro-batches of one pass. Raises TypeError for a training loader, which has no end."""
        if isinstance(self.order, TrainOrder):
            raise TypeError("a training loader has no end")
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.order, EvalOrder):
            self.position = 0
        source = self._from_workers() if self._num_workers else self._read_ahead()
        try:
            while (item := self._next(source)) is not None:
                block, batch = item
                if isinstance(batch, _Failure):
                    raise DataError(batch.message)
                self.position = block.end
                yield batch
        finally:
            # Ends the readers here and now. Left to the garbage collector (a traceback keeps this frame alive), torch's
            # queues go before its workers do, and each of these is then waited for in vain for five seconds.
            del source

    def _next(self, source: Iterator[_Item]) -> _Item | None:
        began = time.perf_counter()
        try:
            return next(source, None)
        finally:
            self.wait_seconds += time.perf_counter() - began

    def _from_workers(self) -> Iterator[_Item]:
        """Read in processes. They live as long as the iterator: an evaluation's do not idle through the training."""
        blocks: Any = self.order.blocks(self.position)
        reader: Any = self._reader
        return iter(
            DataLoader(
                reader,
                batch_size=None,  # a block is a batch already
                sampler=blocks,
                num_workers=self._num_workers,
                prefetch_factor=self._prefetch,
                collate_fn=_as_it_is,
                # torch draws a seed for its workers, which need none: not from the global stream, which dropout reads.
                generator=torch.Generator(),
            )
        )

    def _read_ahead(self) -> Iterator[_Item]:
        """Read in a thread of this process, `prefetch` batches ahead: decoders and torch release the Python lock."""
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        pending: deque[Future[_Item]] = deque()
        try:
            for block in self.order.blocks(self.position):
                pending.append(pool.submit(self._reader.__getitem__, block))
                if len(pending) > self._prefetch:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


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
    Raises:
        DataError: more ranks x workers than rows. While iterating: an unreadable shard or row, which it names.
    """
    least = min(micro_batch_size, world_size, prefetch, pad_to_multiple)
    if least < 1 or num_workers < 0 or not 0 <= rank < world_size:
        raise ValueError(
            f"micro_batch_size={micro_batch_size}, world_size={world_size}, prefetch={prefetch}, pad_to_multiple="
            f"{pad_to_multiple} must be at least 1, num_workers={num_workers} at least 0, rank={rank} below world_size"
        )
    order: TrainOrder | EvalOrder
    if train:
        readers = world_size * max(num_workers, 1)
        if readers > dataset.rows:
            raise DataError(
                f"{dataset.split.directory}: {dataset.rows} rows are fewer than {world_size} ranks x "
                f"{max(num_workers, 1)} workers = {readers}; use fewer ranks, fewer data.num_workers or more data"
            )
        order = TrainOrder(len(dataset), micro_batch_size, world_size, rank, seed)
    else:
        size = len(dataset) if limit is None else min(limit, len(dataset))
        order = EvalOrder(size, micro_batch_size, world_size, rank)
    return Loader(dataset, order, start_sample if train else 0, num_workers, prefetch, pad_to_multiple)
