"""What a pass over held-out data gets its batches from, and how what it found comes together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds.data.samples import Samples
from eve_ds.parallel import gather_with_gradient, rank, world_size
from eve_ds.tasks.base import Batch

Arrays = dict[str, np.ndarray]


class Feed(ABC):
    """Batches of held-out data; the engine makes it. Every pass ends with a StopError, on all ranks at the same batch,
    where one of them was asked to stop.

    Attributes:
        device: of this rank.
        batch_size: samples of a rank's forward pass, at most.
    """

    device: torch.device
    batch_size: int

    @abstractmethod
    def shared(self, samples: Samples, limit: int | None = None) -> Iterator[Batch]:
        """This rank's part of ``samples`` (of the first ``limit``), on the device.

        Each sample comes once; those that only make the ranks even have ``valid`` False. All ranks get equally many
        batches, and must take all of them.
        """

    @abstractmethod
    def own(self, samples: Samples) -> Iterator[Batch]:
        """All of ``samples``, on the device, for this rank alone: other ranks may have other samples, more or none."""

    @abstractmethod
    def together(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``, which are on the device. As for ``shared``, all ranks need equally many."""


def joined(parts: Iterable[Arrays]) -> Arrays | None:
    """The rows of all parts of all ranks, in rank order, on rank 0; None on the others."""
    own = list(parts)
    mine = {name: np.concatenate([part[name] for part in own]) for name in own[0]} if own else {}
    if world_size() == 1:
        return mine
    gathered: list[Arrays | None] = [None] * world_size()
    dist.gather_object(mine, gathered if rank() == 0 else None)
    if rank() != 0:
        return None
    whole = [part for part in gathered if part]
    return {name: np.concatenate([part[name] for part in whole]) for name in whole[0]} if whole else {}


def in_order(rows: Tensor, places: Tensor) -> Tensor:
    """Rows [b, ...] of all ranks, on every rank: row ``places[i]`` of the result is ``rows[i]``.

    Args:
        rows: this rank's, without gradient.
        places: [b] int64; over all ranks a permutation.
    """
    rows, places = gather_with_gradient(rows), gather_with_gradient(places)
    found = torch.empty_like(rows)
    found[places] = rows
    return found
