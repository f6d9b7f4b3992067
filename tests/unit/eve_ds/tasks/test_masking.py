"""Masks are a function of (seed, sample id) and nothing else, and cover what they say."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds.model.counter_random import mix, random_bits, uniform
from eve_ds.tasks.masking import (
    BLOCKS,
    RANDOM_WORD,
    RECTANGLES,
    REPLACEMENT,
    SCATTERED,
    WORDS,
    choose_words,
    hide_words,
    masked_patches,
    masked_words,
    split_blocks,
    split_patches,
)

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
@settings(max_examples=30)
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


def blocks_by_hand(seed: int, sample_id: int, side: int, count: int) -> set[int]:
    """One image, one rectangle and one patch at a time."""
    numbers = torch.arange(4 * RECTANGLES + 1)
    draws = uniform(random_bits(seed, BLOCKS, torch.tensor(sample_id), numbers)).double().tolist()
    smallest = max(round(side * side * 16 / 196), 1)
    masked: set[int] = set()
    for number in range(RECTANGLES):
        size, aspect, top, left = draws[4 * number : 4 * number + 4]
        area = smallest + size * max(count - len(masked) - smallest, 0)
        ratio = 0.3 + aspect * (1 / 0.3 - 0.3)
        height = min(max(round(math.sqrt(area * ratio)), 1), side)
        width = min(max(round(math.sqrt(area * (1 / ratio))), 1), side)
        y, x = math.floor(top * (side + 1 - height)), math.floor(left * (side + 1 - width))
        rows = [side * i + j for i in range(y, y + height) for j in range(x, x + width)]
        new = [place for place in rows if place not in masked]
        if draws[-1] >= 0.5:
            new.reverse()
        masked |= set(new[: count - len(masked)])
        if len(masked) == count:
            return masked
    others = [place for place in range(side * side) if place not in masked]
    keys = (random_bits(seed, SCATTERED, torch.tensor(sample_id), torch.arange(side * side)) >> 24) & (2**40 - 1)
    others.sort(key=lambda place: int(keys[place]))
    return masked | set(others[: count - len(masked)])


@pytest.mark.parametrize(("side", "ratio"), [(14, 0.75), (14, 0.4), (14, 0.95), (4, 0.75), (2, 0.5)])
def test_blocks_are_those_drawn_by_hand(side: int, ratio: float) -> None:
    ids = torch.cat([IDS, torch.arange(20)])
    kept, masked = split_blocks(3, ids, side * side, ratio)
    assert masked.shape == (25, masked_patches(side * side, ratio))
    assert torch.equal(torch.cat([kept, masked], dim=1).sort(dim=1).values, torch.arange(side**2).expand(25, -1))
    assert torch.equal(kept, kept.sort(dim=1).values) and torch.equal(masked, masked.sort(dim=1).values)
    for sample_id, places in zip(ids.tolist(), masked.tolist(), strict=True):
        assert set(places) == blocks_by_hand(3, sample_id, side, len(places)), sample_id


def test_blocks_are_blocks_and_depend_on_seed_and_sample_alone() -> None:
    ids, count = torch.arange(500), 147
    chosen = [split(0, ids, 196, 0.75)[1] for split in (split_patches, split_blocks)]
    neighbors = []
    for masked in chosen:
        grid = torch.zeros(500, 196).scatter_(1, masked, 1).reshape(500, 14, 14)
        neighbors.append(float((grid[:, 1:] == grid[:, :-1]).double().mean()))
    assert neighbors[0] == pytest.approx(0.625, abs=0.02) and neighbors[1] > 0.85
    assert torch.equal(split_blocks(0, ids[[7, 3]], 196, 0.75)[1], chosen[1][[7, 3]])
    assert not torch.equal(split_blocks(1, ids, 196, 0.75)[1], chosen[1])
    assert {len(set(row)) for row in chosen[1].tolist()} == {count}
    assert split_blocks(0, ids[:0], 196, 0.75)[1].shape == (0, count)


def whole_words_by_hand(seed: int, sample_id: int, continues: list[bool], ratio: float) -> set[int]:
    """Masked places of one text whose tokens, [CLS] and [SEP] included, have these marks."""
    places = range(1, len(continues) - 1)
    words: list[list[int]] = []
    for place in places:
        if words and continues[place]:
            words[-1].append(place)
        else:
            words.append([place])
    words.sort(
        key=lambda word: int(random_bits(seed, WORDS, torch.tensor(sample_id), torch.tensor(word[0]))) % 2**64 // 2
    )
    most, masked = masked_words(len(continues), ratio), []
    for number, word in enumerate(words):
        if number and len(masked) + len(word) > most:
            break
        masked += word
    return set(masked)


@pytest.mark.parametrize("ratio", [0.15, 0.5, 0.9])
def test_whole_words_are_those_drawn_by_hand(ratio: float) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 15, (60,), generator=draw)
    mask, ids = lengths_mask(lengths.tolist(), 17), torch.arange(60) * 31 + 5
    continues = torch.rand(60, 17, generator=draw) < 0.5
    chosen = choose_words(9, ids, mask, ratio, continues)
    for row, length in enumerate(lengths.tolist()):
        expected = whole_words_by_hand(9, int(ids[row]), continues[row, :length].tolist(), ratio)
        assert set(chosen[row].nonzero().flatten().tolist()) == expected
        assert bool(expected) == (length > 2)


def test_words_of_one_token_are_chosen_as_tokens_are() -> None:
    mask = lengths_mask([12, 3, 7, 9, 5], 12)
    assert torch.equal(choose_words(1, IDS, mask, 0.5, torch.zeros_like(mask)), choose_words(1, IDS, mask, 0.5))
    one = torch.ones_like(mask)  # the whole text is one word: it is masked all the same
    assert torch.equal(choose_words(1, IDS, mask, 0.5, one).sum(dim=1), torch.tensor([10, 1, 5, 7, 3]))


def test_masked_words_are_replaced_as_bert_does() -> None:
    rows, width, others = 3000, 20, torch.tensor([7, 9, 30])
    words = choose_words(0, torch.arange(rows), torch.ones(rows, width), 0.5)
    text = torch.full((rows, width), 50)
    hidden = hide_words(2, torch.arange(rows), text, words, 4, [0.8, 0.1, 0.1], others)
    assert (hidden[~words] == 50).all()
    found = {value: float((hidden[words] == value).double().mean()) for value in (4, 7, 9, 30, 50)}
    assert found == pytest.approx({4: 0.8, 7: 0.1 / 3, 9: 0.1 / 3, 30: 0.1 / 3, 50: 0.1}, abs=0.01)
    other = hide_words(2, torch.arange(rows), text + 1, words, 4, [0.8, 0.1, 0.1], others)
    assert torch.equal(other[hidden != 50], hidden[hidden != 50])  # the true word decides nothing
    alone = hide_words(2, torch.tensor([41]), text[:1, :9], words[41:42, :9], 4, [0.8, 0.1, 0.1], others)
    assert torch.equal(alone[0], hidden[41, :9])
    assert torch.equal(
        hide_words(2, torch.arange(rows), text, words, 4, [1.0, 0.0, 0.0], others), text.masked_fill(words, 4)
    )
    draws = uniform(random_bits(2, REPLACEMENT, torch.tensor(41), torch.tensor(3)))
    number = (int(random_bits(2, RANDOM_WORD, torch.tensor(41), torch.tensor(3))) % 2**64 // 2) % 3
    one = torch.ones(1, 4, dtype=torch.bool)
    by_hand = 4 if draws < 0.3 else [7, 9, 30][number] if draws < 0.9 else 50
    assert hide_words(2, torch.tensor([41]), text[:1, :4], one, 4, [0.3, 0.6, 0.1], others)[0, 3] == by_hand
