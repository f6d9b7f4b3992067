"""Which sample comes when: a pure function of (seed, epoch, position), whatever the ranks and the workers.

Training is one endless stream of samples. Position k is epoch k // n, place k % n of that epoch's permutation of the n
samples, so that each sample occurs exactly once an epoch and none is dropped where epochs meet. The world cuts the
stream into micro-batches of W x m samples one after the other, and each of these contiguously among its W ranks:

    position  p                p + m            p + 2m           p + W m
              | rank 0         | rank 1         | rank 2 ...      | next micro-batch: rank 0 ...

A step with gradient accumulation takes the next A micro-batches. Two runs with the same W x m therefore see the same
samples in every micro-batch, and two runs with the same A x W x m the same samples in every optimizer step; to resume
is to start at another position. The idea is MosaicML streaming's; the permutation is keyed, not stored: O(1) memory.

Shuffling is `full` (any sample may follow any other: every read is a seek) or by `window`, for network file systems:

    data set    | block 0 | block 1 | block 2 | ...     runs of window / 16 neighboring samples, each in a shard or two
    an epoch    | 7 | 91 | 4 | ... | 33 | 2 | ...     the blocks in keyed order, 16 of them to a window,
                  \\_ window 0 _/     \\_ window 1 _/   and the samples of a window in keyed order

All reads of a window fall into its 16 runs; readahead.py has the kernel read these from end to end before they are
needed. The same guarantees hold: each sample once an epoch, a pure function, O(1) memory, any place to resume from.
(What a whole number of blocks leaves over stays in the last window.)

Several sources are mixed by their sizes (one permutation over all), or by weights:

    round r     | 1,000 places, of which source i has its share, rounded, in keyed order          | round r + 1 ...

where source i goes through an endless shuffled stream of its own, each of its samples once in each of its epochs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

WINDOW_BLOCKS = 16
MIX_ROUND = 1000

_ROUNDS = 8
_MASK_64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
# What keeps permutations for different ends apart that would otherwise have the same key.
_BLOCKS, _WITHIN, _MIXTURE, _SOURCE = (_GOLDEN * odd & _MASK_64 for odd in (3, 5, 7, 9))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014) on an array of uint64."""
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


def permute_windows(places: np.ndarray, size: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """As `permute`, but neighboring places stay within the same `WINDOW_BLOCKS` runs of samples (see the module).

    Args:
        window: samples of a window, at least WINDOW_BLOCKS; a multiple of it, or it is rounded down to one.
    """
    block = window // WINDOW_BLOCKS
    window = block * WINDOW_BLOCKS
    blocks = size // block
    out = np.empty_like(places)
    numbers = places // window
    for number in np.unique(numbers):
        here = numbers == number
        width = min(window, size - int(number) * window)
        # 2^24 windows of 2^40 epochs: all keys differ
        inside = permute(places[here] - number * window, width, seed ^ _WITHIN, (epoch << 24) ^ int(number))
        out[here] = number * window + inside
    whole = out < blocks * block  # the rest of the division stays where it is: in the last window
    if whole.any():
        out[whole] = permute(out[whole] // block, blocks, seed ^ _BLOCKS, epoch) * block + out[whole] % block
    return out


@dataclass(frozen=True)
class Shuffle:
    """One source's endless shuffled stream.

    Args:
        size: samples n of it.
        seed: of the order.
        window: samples of a window; 0 shuffles fully.
    """

    size: int
    seed: int
    window: int = 0

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices and epochs (both int64) at these positions (int64) of the stream."""
        epochs, places = np.divmod(positions, self.size)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            arguments = (places[here], self.size, self.seed, int(epoch))
            samples[here] = permute_windows(*arguments, self.window) if self.window else permute(*arguments)
        return samples, epochs


class Mixture:
    """Several sources' streams in one, by weight: rounds of MIX_ROUND places with the same number of each source.

    Args:
        sizes: samples of each source; their indices follow each other as JoinedSplit has them.
        weights: of each source, positive; what counts is their proportion, to a thousandth.
        seed: of the order.
        window: as Shuffle's, within each source.
    """

    def __init__(self, sizes: tuple[int, ...], weights: tuple[float, ...], seed: int, window: int = 0) -> None:
        self.size = sum(sizes)
        self._seed = seed
        self._first = np.cumsum([0, *sizes])
        self._streams = [Shuffle(size, seed ^ (_SOURCE * (i + 1) & _MASK_64), window) for i, size in enumerate(sizes)]
        self.quotas = mix_quotas(weights)
        self._ends = np.cumsum(self.quotas)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As Shuffle.at; an epoch is that of the sample's source."""
        rounds, places = np.divmod(positions, MIX_ROUND)
        tickets = np.empty_like(places)
        for number in np.unique(rounds):
            here = rounds == number
            tickets[here] = permute(places[here], MIX_ROUND, self._seed ^ _MIXTURE, int(number))
        sources = np.searchsorted(self._ends, tickets, side="right")
        samples, epochs = np.empty_like(places), np.empty_like(places)
        for source, stream in enumerate(self._streams):
            here = sources == source
            quota = int(self.quotas[source])
            draws = rounds[here] * quota + tickets[here] - (self._ends[source] - quota)
            local, epochs[here] = stream.at(draws)
            samples[here] = local + self._first[source]
        return samples, epochs


def mix_quotas(weights: tuple[float, ...]) -> np.ndarray:
    """[sources] int64: places of each source in a round of MIX_ROUND, by largest remainder, at least one each."""
    shares = np.array(weights, dtype=np.float64) / sum(weights) * MIX_ROUND
    quotas = np.maximum(np.floor(shares + 1e-9).astype(np.int64), 1)
    while (left := MIX_ROUND - int(quotas.sum())) != 0:
        behind = shares - quotas
        place = int(np.argmax(behind)) if left > 0 else int(np.argmin(np.where(quotas > 1, behind, np.inf)))
        quotas[place] += 1 if left > 0 else -1
    return quotas


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
        stream: of all ranks: Shuffle or Mixture.
        micro_batch_size: samples m per rank and micro-batch.
        world_size: ranks W.
        rank: this one.
    """

    stream: Shuffle | Mixture
    micro_batch_size: int
    world_size: int = 1
    rank: int = 0

    @property
    def step(self) -> int:
        """Samples of a micro-batch, all ranks together."""
        return self.world_size * self.micro_batch_size

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """This rank's share of every micro-batch from position `start` on, without end."""
        offsets = self.rank * self.micro_batch_size + np.arange(self.micro_batch_size)
        while True:
            samples, epochs = self.stream.at(start + offsets)
            start += self.step
            yield Block(samples, epochs, None, start)

    def samples_of(self, start: int, batches: int) -> np.ndarray:
        """[batches x m] int64: what this rank reads in so many micro-batches from position `start` on."""
        offsets = np.arange(batches)[:, None] * self.step + self.rank * self.micro_batch_size
        return self.stream.at((start + offsets + np.arange(self.micro_batch_size)).ravel())[0]


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
