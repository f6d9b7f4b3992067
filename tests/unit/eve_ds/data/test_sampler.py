"""The order of samples: a bijection an epoch, the same stream for any world, accumulation and resume."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds.data.sampler import EvalOrder, TrainOrder, permute


@settings(max_examples=40, deadline=None)
@given(
    size=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 1000, 1025])),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**40),
)
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    image = permute(np.arange(size), size, seed, epoch)
    assert image.dtype == np.int64
    assert np.array_equal(np.sort(image), np.arange(size))


def test_permutation_needs_no_table() -> None:
    size = 10**12 + 7
    places = np.array([0, 1, size // 2, size - 1])
    image = permute(places, size, seed=3, epoch=1)
    assert len(set(image.tolist())) == 4 and image.min() >= 0 and image.max() < size
    assert permute(places[2:3], size, seed=3, epoch=1)[0] == image[2]


def test_permutation_depends_on_seed_and_epoch_and_shuffles() -> None:
    size = 1000
    images = [permute(np.arange(size), size, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    for one, other in combinations(images, 2):
        assert (one == other).sum() < 15  # one is expected by chance
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
    for image in images:
        assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 0.15
        assert (np.diff(image) == 1).sum() < 15


def test_small_permutations_are_all_reached_about_equally() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        key = tuple(permute(np.arange(4), 4, 0, epoch).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 24
    assert min(counts.values()) > 20 and max(counts.values()) < 100


def test_order_is_pinned() -> None:
    # A change here would give every resumed run another order.
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [0, 2, 3, 4, 7, 6, 1, 8, 9, 5]
    samples, epochs = TrainOrder(size=5, micro_batch_size=4, seed=7).at(np.arange(3, 8))
    assert epochs.tolist() == [0, 0, 1, 1, 1]
    assert samples.tolist() == [0, 1, 1, 3, 4]


def _micro_batches(size: int, micro: int, world: int, count: int, start: int = 0) -> list[list[tuple[int, int]]]:
    """Global micro-batches, put together from the ranks' shares, as (epoch, sample)."""
    ranks = [TrainOrder(size, micro, world, rank, seed=11).blocks(start) for rank in range(world)]
    out = []
    for _ in range(count):
        blocks = [next(rank) for rank in ranks]
        assert len({block.end for block in blocks}) == 1
        out.append([pair for b in blocks for pair in zip(b.epochs.tolist(), b.samples.tolist(), strict=True)])
    return out


@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_world_sees_the_same_micro_batches(world: int) -> None:
    reference = _micro_batches(37, 8, 1, 12)
    assert _micro_batches(37, 8 // world, world, 12) == reference


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (2, 4), (4, 1), (4, 2)])
def test_any_accumulation_sees_the_same_steps(world: int, accumulation: int) -> None:
    global_batch = 16
    reference = _micro_batches(37, global_batch, 1, 6)
    micro = global_batch // world // accumulation
    parts = _micro_batches(37, micro, world, 6 * accumulation)
    steps = [list(chain(*parts[k : k + accumulation])) for k in range(0, len(parts), accumulation)]
    assert steps == reference


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resume_mid_epoch_in_another_world(world: int) -> None:
    whole = _micro_batches(37, 8, 1, 12)
    assert _micro_batches(37, 8 // world, world, 5, start=7 * 8) == whole[7:]


def test_every_sample_once_an_epoch_across_micro_batch_borders() -> None:
    stream = list(chain(*_micro_batches(37, 4, 2, 14)))[: 3 * 37]
    for epoch in range(3):
        part = stream[epoch * 37 : (epoch + 1) * 37]
        assert {e for e, _ in part} == {epoch}
        assert sorted(s for _, s in part) == list(range(37))


@pytest.mark.parametrize("size,micro,world", [(10, 4, 1), (10, 4, 2), (7, 2, 4), (8, 2, 4), (3, 2, 8), (1, 5, 3)])
def test_evaluation_covers_each_sample_once(size: int, micro: int, world: int) -> None:
    orders = [EvalOrder(size, micro, world, rank) for rank in range(world)]
    seen = []
    repeats = 0
    for blocks in zip(*(order.blocks() for order in orders), strict=True):
        assert len({len(block.samples) for block in blocks}) == 1 and len(blocks[0].samples) <= micro
        for block in blocks:
            assert block.valid is not None
            seen += block.samples[block.valid].tolist()
            repeats += int((~block.valid).sum())
    assert seen == list(range(size))
    assert repeats < world
    assert len(list(orders[0].blocks())) == len(orders[0])
