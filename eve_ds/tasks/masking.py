"""Which patches and words are masked, and what else is random in a sample: pure functions of (seed, sample id).

The random numbers are counter-based (splitmix64's finalizer over seed, stream, sample id and position), so a sample
needs no state and a batch is one vectorised call on its own device.
Legend: B samples, P patches, K kept, M masked, L text length.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# One stream of random numbers per use, so that the uses are independent of one another.
PATCHES, WORDS, NEGATIVE_TEXTS, NEGATIVE_IMAGES, DROP_PATH = 1, 2, 3, 4, 5


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; int64's own drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """One splitmix64 step (Steele, Lea and Flood, OOPSLA 2014): int64 in, int64 out, products wrap around."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def random_bits(seed: int, stream: int, first: Tensor, second: Tensor) -> Tensor:
    """Random int64 of (seed, stream, first, second); ``first`` and ``second`` are int64 and broadcast."""
    start = torch.tensor(_signed(seed), dtype=torch.int64, device=first.device)
    return mix(mix(mix(mix(start) ^ stream) ^ first) ^ second)


def uniform(bits: Tensor) -> Tensor:
    """Random int64 to float32 strictly between 0 and 1 (top 23 bits: one more and the largest would round to 1)."""
    return (_shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23


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


def choose_words(seed: int, sample_id: Tensor, text_mask: Tensor, ratio: float) -> Tensor:
    """Draw the words to mask: ``ratio`` of each text's words, rounded, at least one if it has any.

    Args:
        seed: of the run.
        sample_id: [B] int64.
        text_mask: [B, L], 1 word, 0 padding; the first and the last token of a text are [CLS] and [SEP], never masked.
        ratio: share of words masked.
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
    key = _shift_right(random_bits(seed, WORDS, sample_id[:, None], position), 1)
    order = key.masked_fill(~maskable, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, position.expand_as(order))
    return rank < count[:, None]
