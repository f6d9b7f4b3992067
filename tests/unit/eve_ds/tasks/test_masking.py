"""Masks are a function of (seed, sample id) and nothing else, and cover what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds.tasks.masking import choose_words, masked_patches, masked_words, mix, random_bits, split_patches, uniform

IDS = torch.tensor([0, 1, 2, 2**40 + 3, 2**62])


def lengths_mask(lengths: list[int], width: int) -> torch.Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def test_mix_is_splitmix64() -> None:
    """First outputs of the reference generator for seed 1234567 (Vigna's splitmix64.c)."""
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    step = 0x9E3779B97F4A7C15
    states = [(1234567 + i * step) % 2**64 for i in range(3)]
    signed = torch.tensor([state - 2**64 if state >= 2**63 else state for state in states])
    assert [value % 2**64 for value in mix(signed).tolist()] == expected


@given(st.integers(min_value=-(2**63), max_value=2**64 - 1), st.integers(min_value=0, max_value=2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_any_seed_and_sample_id_give_a_whole_split(seed: int, sample_id: int) -> None:
    kept, masked = split_patches(seed, torch.tensor([sample_id]), 16, 0.75)
    assert kept.shape == (1, 4)
    assert sorted(kept[0].tolist() + masked[0].tolist()) == list(range(16))


def test_patches_do_not_depend_on_the_batch() -> None:
    kept, masked = split_patches(3, IDS, 196, 0.75)
    assert kept.shape == (5, 49)
    assert masked.shape == (5, 147)
    order = torch.tensor([4, 0, 3])
    kept_part, masked_part = split_patches(3, IDS[order], 196, 0.75)
    assert torch.equal(kept_part, kept[order])
    assert torch.equal(masked_part, masked[order])


def test_patches_differ_by_sample_and_by_seed() -> None:
    kept = split_patches(3, IDS, 196, 0.75)[0]
    assert len({tuple(row) for row in kept.tolist()}) == len(IDS)
    assert not torch.equal(kept, split_patches(4, IDS, 196, 0.75)[0])


def test_every_patch_is_masked_equally_often() -> None:
    masked = split_patches(0, torch.arange(4000), 16, 0.75)[1]
    share = torch.bincount(masked.flatten(), minlength=16) / 4000
    assert torch.allclose(share, torch.full((16,), 0.75), atol=0.03)


@pytest.mark.parametrize(
    ("patches", "ratio", "expected"), [(16, 0.75, 12), (196, 0.75, 147), (2, 0.01, 1), (2, 0.99, 1)]
)
def test_number_of_masked_patches(patches: int, ratio: float, expected: int) -> None:
    assert masked_patches(patches, ratio) == expected


def test_half_of_the_words_and_at_least_one() -> None:
    mask = lengths_mask([2, 3, 4, 5, 12], 12)
    chosen = choose_words(0, IDS, mask, 0.5)
    assert chosen.sum(dim=1).tolist() == [0, 1, 1, 2, 5]
    last = mask.sum(dim=1) - 1
    assert not chosen[:, 0].any()
    assert not chosen[torch.arange(5), last].any()
    assert not (chosen & ~mask).any()


def test_words_do_not_depend_on_the_padding_or_the_batch() -> None:
    lengths = [12, 3, 7, 9, 5]
    wide = choose_words(1, IDS, lengths_mask(lengths, 40), 0.5)
    narrow = choose_words(1, IDS, lengths_mask(lengths, 12), 0.5)
    assert torch.equal(wide[:, :12], narrow)
    alone = choose_words(1, IDS[2:3], lengths_mask([7], 7), 0.5)
    assert torch.equal(alone[0], narrow[2, :7])


def test_every_word_is_masked_equally_often() -> None:
    chosen = choose_words(0, torch.arange(4000), lengths_mask([12] * 4000, 12), 0.5)
    assert torch.allclose(chosen[:, 1:-1].double().mean(dim=0), torch.full((10,), 0.5, dtype=torch.float64), atol=0.04)


def test_uniform_lies_strictly_inside_the_unit_interval() -> None:
    extremes = uniform(torch.tensor([0, -1, 2**63 - 1, -(2**63)]))
    assert ((extremes > 0) & (extremes < 1)).all()
    draws = uniform(random_bits(0, 1, torch.arange(10000), torch.tensor(0)))
    assert abs(draws.mean().item() - 0.5) < 0.02


@pytest.mark.parametrize("ratio", [0.01, 0.35, 0.5, 0.99])
def test_masked_words_is_what_is_masked(ratio: float) -> None:
    for length in range(2, 20):
        mask = torch.ones(1, length, dtype=torch.bool)
        assert int(choose_words(0, torch.tensor([3]), mask, ratio).sum()) == masked_words(length, ratio)
