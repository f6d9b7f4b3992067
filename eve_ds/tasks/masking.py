"""Which patches and words are masked, and what else is random in a sample: pure functions of (seed, sample id).

The random numbers are counter-based (splitmix64's finalizer over seed, stream, sample id and position), so a sample
needs no state and a batch is one vectorized call on its own device.
Legend: B samples, P patches, K kept, M masked, L text length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eve_ds.model.counter_random import random_bits, random_uniform, shift_right

# One stream of random numbers per use, so that the uses are independent of one another.
PATCHES, WORDS, NEGATIVE_TEXTS, NEGATIVE_IMAGES, DROP_PATH = 1, 2, 3, 4, 5
BLOCKS, SCATTERED, REPLACEMENT, RANDOM_WORD = 11, 12, 13, 14
ROUTER_JITTER = 16
RECTANGLES = 32  # of 75 % of 196 patches, 0.09 % of the images need more
SMALLEST_ASPECT = 0.3  # of a rectangle, and its inverse the largest (BEiT)


def masked_patches(num_patches: int, ratio: float) -> int:
    """How many of an image's patches are masked: the same for every image, at least 1 and never all."""
    return min(max(math.floor(num_patches * ratio + 0.5), 1), num_patches - 1)


def masked_words(length: int, ratio: float) -> int:
    """How many words ``choose_words`` masks in a text of ``length`` tokens, [CLS] and [SEP] included."""
    return min(max(math.floor((length - 2) * ratio + 0.5), 1), max(length - 2, 0))


def split_patches(seed: int, sample_id: Tensor, num_patches: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Draw the visible and the masked patches of each image at random.

    Args:
        seed: of the run.
        sample_id: [B] int64.
        num_patches: P, at least 2.
        ratio: share of patches masked.
    Returns:
        kept [B, K] and masked [B, M] patch indices, int64, each row ascending; K + M = P.
    """
    position = torch.arange(num_patches, device=sample_id.device)
    order = random_bits(seed, PATCHES, sample_id[:, None], position).argsort(dim=1, stable=True)
    kept = num_patches - masked_patches(num_patches, ratio)
    return order[:, :kept].sort(dim=1).values, order[:, kept:].sort(dim=1).values


def split_blocks(seed: int, sample_id: Tensor, num_patches: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Draw the masked patches in rectangles (BEiT's blockwise masking, arXiv 2106.08254, algorithm 1).

    Until M patches are masked: a rectangle of s patches, s uniform from 16 to as many as are still missing (16 of 196,
    of other grids in proportion, and never fewer), with a ratio r of height to width uniform from 0.3 to 1/0.3, so of
    height sqrt(s r) and width sqrt(s/r), rounded, at most the grid's side, at a uniform place. BEiT ends with M or
    more, this with exactly M: the last rectangle gives its new patches row by row, from its top or, in half of the
    images, from its bottom. What ``RECTANGLES`` of them leave missing is drawn patch by patch. Patches amid the image
    are masked more often than those at its edge, as in BEiT.

    Arguments and results are those of ``split_patches``; the grid is square.
    """
    side, count = math.isqrt(num_patches), masked_patches(num_patches, ratio)
    smallest = max(round(num_patches * 16 / 196), 1)
    device, batch = sample_id.device, sample_id.shape[0]
    numbers = torch.arange(4 * RECTANGLES + 1, device=device)
    # float64 and roots, which all devices round alike: the rectangles are the same on each.
    draws = random_uniform(seed, BLOCKS, sample_id[:, None], numbers).double()
    size, aspect, *corner = draws[:, :-1].reshape(batch, RECTANGLES, 4).unbind(2)
    aspect = SMALLEST_ASPECT + aspect * (1 / SMALLEST_ASPECT - SMALLEST_ASPECT)
    aspects, places = torch.stack([aspect, 1 / aspect], dim=2), torch.stack(corner, dim=2)
    line = torch.arange(side, device=device)
    taken = torch.zeros(batch, side, side, dtype=torch.bool, device=device)
    since = torch.zeros(batch, side, side, dtype=torch.int64, device=device)  # rectangles from the one that took it on
    for number in range(RECTANGLES):
        missing = (count - taken.sum(dim=(1, 2)))[:, None]
        area = smallest + size[:, number, None] * (missing - smallest).clamp(min=0)
        lengths = (area * aspects[:, number]).sqrt().round().clamp(1, side)
        start = (places[:, number] * (side + 1 - lengths)).floor()  # [B, 2]: top and left
        inside = (line >= start[..., None]) & (line < (start + lengths)[..., None])  # [B, 2, side]
        taken |= inside[:, 0, :, None] & inside[:, 1, None]
        since += taken
    position = torch.arange(num_patches, device=device)
    within = torch.where(draws[:, -1:] < 0.5, position, num_patches - 1 - position)
    # 40 bits beside at most 33 x P: no overflow, and hardly ever equal.
    scattered = shift_right(random_bits(seed, SCATTERED, sample_id[:, None], position), 24)
    last = torch.where(taken.flatten(1), within, scattered)
    order = ((RECTANGLES - since.flatten(1)) * num_patches + last).argsort(dim=1, stable=True)
    return order[:, count:].sort(dim=1).values, order[:, :count].sort(dim=1).values


def choose_words(
    seed: int, sample_id: Tensor, text_mask: Tensor, ratio: float, continues: Tensor | None = None
) -> Tensor:
    """Draw the words to mask: n = ``ratio`` of each text's tokens, rounded, at least one if it has any.

    With ``continues`` all tokens of a word are masked or none: words are drawn in a random order until the next one
    would make it more than n tokens. The first is masked even if it alone has more, so a text loses at most n tokens or
    one word, and at least one word. Where no token continues a word, the choice is that without ``continues``.

    Args:
        seed: of the run.
        sample_id: [B] int64.
        text_mask: [B, L], 1 word, 0 padding; the first and the last token of a text are [CLS] and [SEP], never masked.
        ratio: share of tokens masked.
        continues: [B, L] bool, True where a token belongs to the word of the token before; None: each is a word.
    Returns:
        [B, L] bool, True where masked; does not depend on how far the batch is padded.
    """
    present = text_mask.long()
    place = present.cumsum(dim=1)
    length = present.sum(dim=1, keepdim=True)
    maskable = (present > 0) & (place > 1) & (place < length)
    words = (length.squeeze(1) - 2).clamp(min=0)
    count = torch.minimum((words.double() * ratio + 0.5).floor().long().clamp(min=1), words)
    position = torch.arange(text_mask.shape[1], device=text_mask.device)
    # Halved, so that the places that may not be masked sort behind all others.
    key = shift_right(random_bits(seed, WORDS, sample_id[:, None], position), 1)
    if continues is not None:  # a word's tokens share the key of its first
        begins = ~continues | (place <= 2)
        first = torch.where(begins, position, 0).cummax(dim=1).values
        key = key.gather(1, first)
    order = key.masked_fill(~maskable, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
    if continues is None:
        return rank < count[:, None]
    size = torch.zeros_like(rank).scatter_add_(1, first, maskable.long()).gather(1, first)
    before = rank.gather(1, first)  # tokens of the words drawn before this one
    return maskable & ((before + size <= count[:, None]) | (before == 0))


def hide_words(
    seed: int, sample_id: Tensor, text_ids: Tensor, words: Tensor, mask_id: int, shares: Sequence[float], others: Tensor
) -> Tensor:
    """Replace masked words as BERT does (arXiv 1810.04805): by [MASK], by a random word, or not at all.

    Args:
        seed: of the run.
        sample_id: [B] int64.
        text_ids: [B, L].
        words: [B, L] bool, the masked ones.
        mask_id: of [MASK].
        shares: of the masked words that become [MASK], that become a random word, that stay; drawn token by token.
        others: [n] int64, the ids that random words are drawn from.
    Returns:
        [B, L], ``text_ids`` with the masked ones replaced. Which are replaced, and by what, does not depend on them.
    """
    position = torch.arange(text_ids.shape[1], device=text_ids.device)
    draw = random_uniform(seed, REPLACEMENT, sample_id[:, None], position)
    number = shift_right(random_bits(seed, RANDOM_WORD, sample_id[:, None], position), 1) % others.shape[0]
    swapped = words & (draw >= shares[0]) & (draw < shares[0] + shares[1])
    return torch.where(swapped, others[number], text_ids.masked_fill(words & (draw < shares[0]), mask_id))
