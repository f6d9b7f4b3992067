"""Sequential reading under a windowed shuffle: the kernel reads a window's runs before its samples are needed.

With ``data.shuffle_window`` above 0, the next thousands of samples lie in a few runs of the shards (sampler.py). A
network file system reads such runs fast from end to end, and slowly image by image in random order. So each process
asks the kernel, in file order, to read ahead the samples of the coming window; when they are read in training order,
they come from the page cache. A rank asks for its own samples only, and each of its workers for a part of them: no
machine fetches what it does not use. The page cache must hold two windows of images (16,384 of 60 kB are 1 GB).
"""

from __future__ import annotations

from collections import deque

import numpy as np
from torch.utils.data import get_worker_info

from eve_ds.data.sampler import MicroBatchIndices, TrainOrder
from eve_ds.data.sources import AnySplit

_SPEED = 1.25  # of reading ahead, relative to the speed at which training consumes samples


class ReadAhead:
    """Called with the indices of each micro-batch before it is read; asks the kernel to read ahead the next window.

    Args:
        split: the shards.
        order: the order of the samples.
        window: samples per window, over all ranks.
    """

    def __init__(self, split: AnySplit, order: TrainOrder, window: int) -> None:
        self._split, self._order = split, order
        # Work is planned in chunks of this many micro-batches: a window, or an epoch if that is shorter.
        self._batches = -(-min(window, order.stream.size) // order.global_batch_size)
        self._planned: int | None = None  # all positions below it have been requested or are in the queue
        self._queue: deque[int] = deque()
        self._per_call = 0

    def __call__(self, indices: MicroBatchIndices) -> None:
        chunk = self._batches * self._order.global_batch_size
        start = indices.end - self._order.global_batch_size
        if self._planned is None:
            # Worker w begins with micro-batch w, but all workers plan the same chunks, from micro-batch 0 on.
            self._planned = start - _worker()[0] * self._order.global_batch_size
            self._plan()
            self._request(len(self._queue))  # the first window has none before it over which to spread the requests
        while self._planned < start + chunk:
            self._plan()
        self._request(self._per_call)

    def _plan(self) -> None:
        """Queue this process's part of the next chunk, in file order."""
        assert self._planned is not None
        worker, workers = _worker()
        samples = np.unique(self._order.samples_of(self._planned, self._batches))
        mine = np.array_split(samples, workers)[worker]
        self._queue.extend(mine.tolist())
        self._per_call = int(np.ceil(_SPEED * workers * len(mine) / self._batches))
        self._planned += self._batches * self._order.global_batch_size

    def _request(self, count: int) -> None:
        self._split.read_ahead([self._queue.popleft() for _ in range(min(count, len(self._queue)))])


def _worker() -> tuple[int, int]:
    """(index of this worker process, number of workers); (0, 1) in the training process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
