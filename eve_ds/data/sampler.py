"""The order of samples: a pure function of (seed, epoch, position), independent of the ranks and workers.

Training reads one endless stream of samples. Position k is epoch k // n, index k % n of that epoch's permutation of the
n samples, so each sample occurs exactly once per epoch and none is dropped between epochs. The stream is cut into
micro-batches of W x m samples, and each of these into contiguous parts for its W ranks:

    position  p                p + m            p + 2m           p + W m
              | rank 0         | rank 1         | rank 2 ...      | next micro-batch: rank 0 ...

A step with gradient accumulation takes the next A micro-batches. So two runs with the same W x m see the same samples
in every micro-batch, and two runs with the same A x W x m the same samples in every optimizer step; resuming means
starting at another position. The idea is MosaicML streaming's; the permutation is computed, not stored: O(1) memory.

Shuffling is either full (any sample may follow any other: every read is a seek) or windowed, for network file systems:

    dataset     | block 0 | block 1 | block 2 | ...     runs of window / 16 neighboring samples, each in a shard or two
    an epoch    | 7 | 91 | 4 | ... | 33 | 2 | ...     the blocks in random order, 16 of them per window,
                  \\_ window 0 _/     \\_ window 1 _/   and the samples of a window in random order

All reads of a window fall into its 16 blocks; ``batch_reader.ReadAhead`` has the kernel read these sequentially before
they are needed. The same guarantees hold: each sample once per epoch, a pure function, O(1) memory, resumable at any
position.
(Samples beyond a whole number of blocks stay in the last window.)

Several sources are mixed in proportion to their sizes (one permutation over all), or to weights:

    round r     | 1,000 positions, of which source i has its rounded share, in random order       | round r + 1 ...

where source i is an endless shuffled stream of its own, with each of its samples once in each of its epochs.
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
# Separate the keys of permutations that serve different purposes.
_BLOCKS, _WITHIN, _MIXTURE, _SOURCE = (_GOLDEN * odd & _MASK_64 for odd in (3, 5, 7, 9))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer (Steele, Lea and Flood, OOPSLA 2014) on an array of uint64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    x ^= x >> np.uint64(31)
    return x


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """[rounds] uint64 keys, unique to each (seed, epoch)."""
    state = np.full(1, seed & _MASK_64, dtype=np.uint64)
    state = _mix(_mix(state + np.uint64(_GOLDEN)) ^ np.uint64(epoch & _MASK_64))
    return _mix(state + np.arange(1, _ROUNDS + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def permute(places: np.ndarray, size: int, seed: int, epoch: int) -> np.ndarray:
    """The values of an epoch's permutation of 0 .. size - 1 at ``places``.

    A Feistel network (alternating, halves of unequal width allowed) permutes the smallest power of two that holds
    ``size``; values of ``size`` or more are permuted again until they fall below it (cycle walking: Black and Rogaway,
    CT-RSA 2002). The domain is at most twice ``size``, so this takes at most two passes on average; sizes under 9 use a
    domain of 16, since halves of one bit mix badly.

    Args:
        places: int64, each at least 0 and below ``size``.
        size: n, at least 1.
        seed: of the run.
        epoch: from 0.
    Returns:
        int64 of the shape of ``places``: a bijection of 0 .. size - 1.
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
    """Like ``permute``, but the places of a window map to the same ``WINDOW_BLOCKS`` blocks (see the module).

    Args:
        window: samples per window, at least WINDOW_BLOCKS; rounded down to a multiple of it.
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
    whole = out < blocks * block  # the remainder stays in the last window
    if whole.any():
        out[whole] = permute(out[whole] // block, blocks, seed ^ _BLOCKS, epoch) * block + out[whole] % block
    return out


@dataclass(frozen=True)
class Shuffle:
    """Endless shuffled stream over one source.

    Args:
        size: number of samples n.
        seed: of the order.
        window: samples per window; 0 shuffles the whole epoch.
    """

    size: int
    seed: int
    window: int = 0

    def samples_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample indices and epochs (both int64) at positions (int64) of the stream."""
        epochs, places = np.divmod(positions, self.size)
        samples = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            arguments = (places[here], self.size, self.seed, int(epoch))
            samples[here] = permute_windows(*arguments, self.window) if self.window else permute(*arguments)
        return samples, epochs


class Mixture:
    """Endless stream over several sources by weight: rounds of MIX_ROUND samples, with a fixed number of each source.

    Args:
        sizes: number of samples of each source; sample indices are consecutive over the sources, as in JoinedSplit.
        weights: of each source, positive; relative, resolved to a thousandth.
        seed: of the order.
        window: as in Shuffle, within each source.
    """

    def __init__(self, sizes: tuple[int, ...], weights: tuple[float, ...], seed: int, window: int = 0) -> None:
        self.size = sum(sizes)
        self._seed = seed
        self._first = np.cumsum([0, *sizes])
        self._streams = [Shuffle(size, seed ^ (_SOURCE * (i + 1) & _MASK_64), window) for i, size in enumerate(sizes)]
        self.quotas = mix_quotas(weights)
        self._ends = np.cumsum(self.quotas)

    def samples_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Like Shuffle.samples_at; epochs are those of each sample's source."""
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
            local, epochs[here] = stream.samples_at(draws)
            samples[here] = local + self._first[source]
        return samples, epochs


def mix_quotas(weights: tuple[float, ...]) -> np.ndarray:
    """[sources] int64: samples of each source in a round of MIX_ROUND, by largest remainder, at least one each."""
    shares = np.array(weights, dtype=np.float64) / sum(weights) * MIX_ROUND
    quotas = np.maximum(np.floor(shares + 1e-9).astype(np.int64), 1)
    while (left := MIX_ROUND - int(quotas.sum())) != 0:
        behind = shares - quotas
        place = int(np.argmax(behind)) if left > 0 else int(np.argmin(np.where(quotas > 1, behind, np.inf)))
        quotas[place] += 1 if left > 0 else -1
    return quotas


@dataclass(frozen=True)
class MicroBatchIndices:
    """The samples of one rank's micro-batch.

    Args:
        samples: [m] int64 sample indices.
        epochs: [m] int64, the epoch of each.
        valid: [m] bool, False on repeats that fill up the last micro-batch of a rank; None in training.
        end: position in the stream of all ranks after this micro-batch.
    """

    samples: np.ndarray
    epochs: np.ndarray
    valid: np.ndarray | None
    end: int


@dataclass(frozen=True)
class TrainOrder:
    """The endless shuffled stream, as one rank sees it.

    Args:
        stream: the samples of all ranks.
        micro_batch_size: samples m per rank and micro-batch.
        world_size: ranks W.
        rank: this one.
    """

    stream: Shuffle | Mixture
    micro_batch_size: int
    world_size: int = 1
    rank: int = 0

    @property
    def global_batch_size(self) -> int:
        """Samples of a micro-batch over all ranks."""
        return self.world_size * self.micro_batch_size

    def micro_batches(self, start: int = 0) -> Iterator[MicroBatchIndices]:
        """This rank's part of every micro-batch from position ``start`` on, endless."""
        offsets = self.rank * self.micro_batch_size + np.arange(self.micro_batch_size)
        while True:
            samples, epochs = self.stream.samples_at(start + offsets)
            start += self.global_batch_size
            yield MicroBatchIndices(samples, epochs, None, start)

    def samples_of(self, start: int, batches: int) -> np.ndarray:
        """[batches * m] int64: the samples of this rank in ``batches`` micro-batches from position ``start`` on."""
        offsets = np.arange(batches)[:, None] * self.global_batch_size + self.rank * self.micro_batch_size
        return self.stream.samples_at((start + offsets + np.arange(self.micro_batch_size)).ravel())[0]


@dataclass(frozen=True)
class EvalOrder:
    """Every sample once, in the order of the shards.

    The last micro-batch is split evenly over the ranks: ceil(rest / W) samples each. Fewer than W of them repeat the
    first samples, with ``valid`` False. All ranks have the same number of batches, of the same sizes.

    Args:
        size: number of samples n.
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

    def micro_batches(self, start: int = 0) -> Iterator[MicroBatchIndices]:
        """This rank's part of every micro-batch from sample ``start`` on."""
        while start < self.size:
            share = min(self.micro_batch_size, -(-(self.size - start) // self.world_size))
            positions = start + self.rank * share + np.arange(share)
            start += self.world_size * share
            yield MicroBatchIndices(
                positions % self.size, np.zeros_like(positions), positions < self.size, min(start, self.size)
            )
