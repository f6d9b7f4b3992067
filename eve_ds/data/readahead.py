"""Sequential reading under a windowed shuffle: the kernel reads a window's runs before its samples are asked for.

With `data.shuffle_window` the next thousands of samples lie in a few runs of the shards (sampler.py). A network file
system is fast at reading these from end to end and slow at fetching them one by one in random order. So each process
asks the kernel, in the order of the file, to read what it and its siblings will want in the window to come; when the
samples are read, in the order of training, they come out of the page cache. A rank asks for its own samples alone, and
its workers each for one part of them: nothing is fetched by a machine that does not need it. The page cache must hold
two windows of images (16,384 of 60 kB are 1 GB).
"""

from __future__ import annotations

from collections import deque

import numpy as np
from torch.utils.data import get_worker_info

from eve_ds.data.sampler import Block, TrainOrder
from eve_ds.data.sources import AnySplit

_HASTE = 1.25  # ahead of the pace at which the window is used up


class ReadAhead:
    """Called with each block that a process is about to read, it has the kernel read what the next window needs.

    Args:
        split: where the samples are.
        order: of them.
        window: samples of a window, over all ranks.
    """

    def __init__(self, split: AnySplit, order: TrainOrder, window: int) -> None:
        self._split, self._order = split, order
        # Micro-batches of a stretch as long as a window, or as an epoch where that is shorter: all samples, then.
        self._batches = -(-min(window, order.stream.size) // order.step)
        self._reach: int | None = None  # all positions below it have been asked for, or are due
        self._due: deque[int] = deque()
        self._share = 0

    def __call__(self, block: Block) -> None:
        stretch = self._batches * self._order.step
        start = block.end - self._order.step
        if self._reach is None:
            # Worker w begins with block w. All of them take their parts of the same stretches, from block 0 on.
            self._reach = start - _worker()[0] * self._order.step
            self._plan()
            self._ask(len(self._due))  # there is no window before the first, in which to spread this out
        while self._reach < start + stretch:
            self._plan()
        self._ask(self._share)

    def _plan(self) -> None:
        """Make due what this process has to ask for in the next stretch, in the order of the file."""
        assert self._reach is not None
        worker, workers = _worker()
        samples = np.unique(self._order.samples_of(self._reach, self._batches))
        mine = np.array_split(samples, workers)[worker]
        self._due.extend(mine.tolist())
        self._share = int(np.ceil(_HASTE * workers * len(mine) / self._batches))
        self._reach += self._batches * self._order.step

    def _ask(self, count: int) -> None:
        self._split.read_ahead([self._due.popleft() for _ in range(min(count, len(self._due)))])


def _worker() -> tuple[int, int]:
    """Number of this worker process, and of how many; (0, 1) where a thread reads."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)
