"""Which sample comes when: a pure function of (seed, epoch, position), whatever the ranks and the workers.

Training is one endless stream of samples. Position k is epoch k // n, place k % n of that epoch's permutation of the n
samples, so that each sample occurs exactly once an epoch and none is dropped where epochs meet. The world cuts the
stream into micro-batches of W x m samples one after the other, and each of these contiguously among its W ranks:

    position  p                p + m            p + 2m           p + W m
              | rank 0         | rank 1         | rank 2 ...      | next micro-batch: rank 0 ...

A step with gradient accumulation takes the next A micro-batches. Two runs with the same W x m therefore see the same
samples in every micro-batch, and two runs with the same A x W x m the same samples in every optimizer step; to resume
is to start at another position. The idea is MosaicML streaming's; the permutation is keyed, not stored: O(1) memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

_ROUNDS = 8
_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014) on an array of uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    x ^= x >> np.uint64(31)
    return x


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """[rounds] uint64 keys, one of a kind for each (seed, epoch)."""
    state = np.full(1, seed & _MASK_64, dtype=np.uint64)
    state = _mix(_mix(state + np.uint64(_GOLDEN)) ^ np.uint64(epoch & _MASK_64))
    return _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def permute(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """Where an epoch's permutation of 0 .. size - 1 sends `places`.

    A Feistel network (alternating, halves of unequal width allowed) permutes the smallest power of two that holds
    `size`; values beyond `size` walk on along their cycle until they are back inside (Black and Rogaway, CT-RSA 2002).
    The domain is at most twice `size`, so that a place takes two passes or fewer on average; sizes under 9 have a
    domain of 16, since halves of one bit mix badly.

    Args:
        places: int64, each at least 0 and below `size`.
        size: n, at least 1.
        seed: of the run.
        epoch: from 0.
    Returns:
        int64 of the shape of `places`: a bijection of 0 .. size - 1.
    """
    bits = max(int(size - 1).bit_length(), 4)
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    keys = _round_keys(seed, epoch)

    def network(x: np.ndarray) -> np.ndarray:
        low, high = x & low_mask, x >> low_bits
        for index, key in enumerate(keys):
            if index % 2:
                high = high ^ (_mix(low ^ key) & high_mask)
            else:
                low = low ^ (_mix(high ^ key) & low_mask)
        return (high << low_bits) | low

    x = network(np.asarray(places).astype(np.uint64))
    while (outside := x >= np.uint64(size)).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


@dataclass(frozen=True)
class Block:
    """What one rank reads for one micro-batch.

    Args:
        samples: [m] int64 sample indices.
        epochs: [m] int64, the epoch of each.
        valid: [m] bool, False on repeats that only make the ranks even; None in training, which has none.
        end: position in the stream, over all ranks, after this micro-batch.
    """

    samples: np.ndarray
    epochs: np.ndarray
    valid: np.ndarray | None
    end: int


@dataclass(frozen=True)
class TrainOrder:
    """The endless shuffled stream, as one rank sees it.

    Args:
        size: samples n of the data set.
        micro_batch_size: samples m per rank and micro-batch.
        world_size: ranks W.
        rank: this one.
        seed: of the order.
    """

    size: int
    micro_batch_size: int
    world_size: int = 1
    rank: int = 0
    seed: int = 0

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices and epochs (both int64) at these positions (int64) of the stream."""
        epochs, places = np.divmod(positions, self.size)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            samples[here] = permute(places[here], self.size, self.seed, int(epoch))
        return samples, epochs

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """This rank's share of every micro-batch from position `start` on, without end."""
        step = self.world_size * self.micro_batch_size
        offsets = self.rank * self.micro_batch_size + np.arange(self.micro_batch_size)
        while True:
            samples, epochs = self.at(start + offsets)
            start += step
            yield Block(samples, epochs, None, start)


@dataclass(frozen=True)
class EvalOrder:
    """Every sample once, in the order of the shards.

    The last micro-batch is spread evenly over the ranks: ceil(rest / W) samples each, and what exceeds the data (fewer
    than W samples) repeats the first ones with `valid` False. All ranks make equally many batches of equal sizes.

    Args:
        size: samples n that are looked at, from the first one on.
        micro_batch_size: samples m per rank and micro-batch.
        world_size: ranks W.
        rank: this one.
    """

    size: int
    micro_batch_size: int
    world_size: int = 1
    rank: int = 0

    def __len__(self) -> int:
        return math.ceil(self.size / (self.world_size * self.micro_batch_size))

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """This rank's share of every micro-batch from sample `start` on."""
        while start < self.size:
            share = min(self.micro_batch_size, -(-(self.size - start) // self.world_size))
            positions = start + self.rank * share + np.arange(share)
            start += self.world_size * share
            yield Block(positions % self.size, np.zeros_like(positions), positions < self.size, min(start, self.size))
