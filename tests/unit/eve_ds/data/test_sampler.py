"""The order of samples: a bijection an epoch, the same stream for any world, accumulation and resume."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds.data.sampler import (
    MIX_ROUND,
    WINDOW_BLOCKS,
    EvalOrder,
    Mixture,
    Shuffle,
    TrainOrder,
    mix_quotas,
    permute,
    permute_windows,
)


@settings(max_examples=40)
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


def test_order_is_reproducible_across_versions() -> None:
    # A change here would give every resumed run another order.
    assert permute(np.arange(10), 10, seed=0, epoch=0).tolist() == [0, 2, 3, 4, 7, 6, 1, 8, 9, 5]
    samples, epochs = Shuffle(size=5, seed=7).samples_at(np.arange(3, 8))
    assert epochs.tolist() == [0, 0, 1, 1, 1]
    assert samples.tolist() == [0, 1, 1, 3, 4]


STREAMS = {
    "full": Shuffle(37, 11),
    "window": Shuffle(37, 11, window=WINDOW_BLOCKS),
    "mixture": Mixture((20, 12, 5), (3.0, 1.0, 0.5), seed=11),
    "window mixture": Mixture((20, 17), (3.0, 1.0), seed=11, window=WINDOW_BLOCKS),
}


def _micro_batches(
    size: int, micro: int, world: int, count: int, start: int = 0, stream: Shuffle | Mixture | None = None
) -> list[list[tuple[int, int]]]:
    """Global micro-batches, put together from the ranks' shares, as (epoch, sample)."""
    stream = stream or Shuffle(size, 11)
    ranks = [TrainOrder(stream, micro, world, rank).micro_batches(start) for rank in range(world)]
    out = []
    for _ in range(count):
        batches = [next(rank) for rank in ranks]
        assert len({batch.end for batch in batches}) == 1
        out.append([pair for b in batches for pair in zip(b.epochs.tolist(), b.samples.tolist(), strict=True)])
    return out


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("world", [2, 4])
def test_any_world_size_and_start_give_the_same_samples(name: str, world: int) -> None:
    whole = _micro_batches(37, 8, 1, 12, stream=STREAMS[name])
    assert _micro_batches(37, 8 // world, world, 12, stream=STREAMS[name]) == whole
    assert _micro_batches(37, 8 // world, world, 5, start=7 * 8, stream=STREAMS[name]) == whole[7:]


@settings(max_examples=60)
@given(
    size=st.one_of(st.integers(1, 200), st.sampled_from([1023, 1024, 1025, 4096])),
    window=st.integers(WINDOW_BLOCKS, 300),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**30),
)
def test_windows_are_a_bijection_that_reads_few_runs(size: int, window: int, seed: int, epoch: int) -> None:
    image = permute_windows(np.arange(size), size, seed, epoch, window)
    assert np.array_equal(np.sort(image), np.arange(size))
    block = window // WINDOW_BLOCKS
    span = block * WINDOW_BLOCKS
    for start in range(0, size, span):
        runs = np.unique(image[start : start + span] // block)
        assert len(runs) <= WINDOW_BLOCKS + 1  # one more: the remainder of the division into blocks
    some = np.arange(size)[::-3].copy()
    assert np.array_equal(permute_windows(some, size, seed, epoch, window), image[some])


def test_windows_shuffle() -> None:
    one, other = (permute_windows(np.arange(4096), 4096, 5, epoch, 256) for epoch in (0, 1))
    assert (one == other).sum() < 20
    for image in (one, other):
        assert (np.diff(image) == 1).mean() < 0.02  # neighbors within a window are torn apart
        assert abs(np.corrcoef(image, np.arange(4096))[0, 1]) < 0.2
    first = {tuple(np.unique(image[:256] // 16)) for image in (one, other)}
    assert len(first) == 2  # another epoch has other runs in its first window


def test_a_mixture_keeps_its_weights_and_each_source_its_epochs() -> None:
    sizes, weights = (70, 30, 400), (5.0, 3.0, 2.0)
    mixture = Mixture(sizes, weights, seed=3)
    samples, epochs = mixture.samples_at(np.arange(2 * MIX_ROUND))
    starts = np.cumsum([0, *sizes])
    for source, quota in enumerate((500, 300, 200)):
        mine = (samples >= starts[source]) & (samples < starts[source + 1])
        for number in range(2):
            assert mine[number * MIX_ROUND : (number + 1) * MIX_ROUND].sum() == quota
        pairs = set(zip(epochs[mine].tolist(), samples[mine].tolist(), strict=True))
        assert len(pairs) == 2 * quota  # no sample twice in an epoch of its source
        whole = 2 * quota // sizes[source]
        assert all(np.sum(mine & (epochs == epoch)) == sizes[source] for epoch in range(whole))
    runs = np.diff(np.flatnonzero(samples < sizes[0]))
    assert runs.max() < 25  # the sources alternate
    assert samples.tolist() != Mixture(sizes, weights, seed=4).samples_at(np.arange(2 * MIX_ROUND))[0].tolist()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1.0,), [1000]), ((1.0, 1.0, 1.0), [334, 333, 333]), ((1e-9, 1.0), [1, 999]), ((2.0, 6.0), [250, 750])],
)
def test_mix_quotas(weights: tuple[float, ...], expected: list[int]) -> None:
    assert mix_quotas(weights).tolist() == expected


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


def test_every_sample_occurs_once_per_epoch() -> None:
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
    for batches in zip(*(order.micro_batches() for order in orders), strict=True):
        assert len({len(batch.samples) for batch in batches}) == 1 and len(batches[0].samples) <= micro
        for batch in batches:
            assert batch.valid is not None
            seen += batch.samples[batch.valid].tolist()
            repeats += int((~batch.valid).sum())
    assert seen == list(range(size))
    assert repeats < world
    assert len(list(orders[0].micro_batches())) == len(orders[0])
