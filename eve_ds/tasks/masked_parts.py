"""What masked modeling consists of: its settings, what is hidden of a pair, and the two losses.

Legend: B samples, P patches, K kept, M masked, L text length, V vocabulary, p side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.model.model_config import MOST
from eve_ds.tasks.base import Metrics
from eve_ds.tasks.spec import Objective
from preprocessing.errors import UserError

EPSILON = 1e-6  # beside the variance of a patch: a uniform one must not divide by zero

Mode = Literal["separate", "joint", "mim", "mlm"]
PixelTarget = Literal["normalized", "raw"]
WordHead = Literal["tied", "mlp"]
ImageMasking = Literal["random", "blockwise"]
WordMasking = Literal["tokens", "whole_words"]
CHOICES = {
    "mode": Mode,
    "pixel_target": PixelTarget,
    "word_head": WordHead,
    "image_masking": ImageMasking,
    "word_masking": WordMasking,
}


@dataclass
class ObjectiveConfig(Objective):
    """Masked modeling.

    Args:
        mode: separate: two passes a pair, as EVE; joint: one pass with patches and words masked at once; mim: the pass
            with masked patches alone; mlm: the pass with masked words alone.
        image_mask_ratio: share of patches masked.
        text_mask_ratio: share of words masked; at least one a text.
        image_masking: random: patches; blockwise: rectangles of them as in BEiT, of each image just as many patches.
        word_masking: tokens: each on its own; whole_words: all tokens of a word or none, at most ``text_mask_ratio`` of
            the text's tokens or one word.
        mask_replacement: shares of the masked words that become [MASK], that become a random word, and that stay as
            they are; BERT's are [0.8, 0.1, 0.1]. All of them are predicted.
        pixel_target: normalized: each patch with mean 0 and deviation 1, which MAE found better; raw: the pixels, from
            -1 to 1, as the paper says ("raw pixels").
        word_head: tied: BERT's head, the word embedding as its last layer; mlp: the paper's two-layer MLP, whose last
            layer adds vocabulary x width parameters.
        decoder_dim: width of the pixel decoder; a multiple of 4 and of ``decoder_heads``.
        decoder_depth: blocks of the pixel decoder.
        decoder_heads: its attention heads.
        seed: of the masks, and of a rival's negatives; the engine's seed is added to it.
    """

    mode: Mode = "separate"
    image_mask_ratio: float = 0.75
    text_mask_ratio: float = 0.5
    image_masking: ImageMasking = "random"
    word_masking: WordMasking = "tokens"
    mask_replacement: list[float] = field(default_factory=lambda: [1.0, 0.0, 0.0])
    pixel_target: PixelTarget = "normalized"
    word_head: WordHead = "tied"
    decoder_dim: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 8
    seed: int = 0

    def check(self) -> None:
        """Raise UserError naming the first field that makes no objective."""
        for name, kind in CHOICES.items():
            value, (*others, last) = getattr(self, name), get_args(kind)
            if value not in (*others, last):
                raise UserError(f"objective.{name}={value!r} must be {', '.join(others)} or {last}")
        for name in ("image_mask_ratio", "text_mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"objective.{name}={getattr(self, name)} must lie between 0 and 1")
        shares = self.mask_replacement
        if len(shares) != 3 or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
            raise UserError(f"objective.mask_replacement={shares} must be three shares from 0 to 1 whose sum is 1")
        if shares[2] == 1:
            raise UserError(f"objective.mask_replacement={shares} hides no word")
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            if not 1 <= getattr(self, name) <= MOST:
                raise UserError(f"objective.{name}={getattr(self, name)} must be at least 1 and at most {MOST}")
        if self.decoder_dim % 4 or self.decoder_dim % self.decoder_heads:
            heads = f"objective.decoder_heads={self.decoder_heads}"
            raise UserError(f"objective.decoder_dim={self.decoder_dim} must be a multiple of 4 and of {heads}")

    @property
    def predicts_pixels(self) -> bool:
        return self.mode != "mlm"

    @property
    def predicts_words(self) -> bool:
        return self.mode != "mim"


@dataclass
class Masks:
    """What is hidden: kept [B, K] and masked [B, M] patches; words [B, L] bool; text_ids [B, L], what is seen instead.

    ``text_ids`` has [MASK] where ``words`` is True, or what ``ObjectiveConfig.mask_replacement`` puts there.
    """

    kept: Tensor
    masked: Tensor
    words: Tensor
    text_ids: Tensor


@dataclass
class PixelOutput:
    """Rebuilt patches: predicted, target [B, M, 3 p p] float32; masked [B, M], their places."""

    predicted: Tensor
    target: Tensor
    masked: Tensor

    def metrics(self, suffix: str = "") -> Metrics:
        """Squared error, mean over a patch's values, summed over patches; with its gradient."""
        error = F.mse_loss(self.predicted, self.target, reduction="sum") / self.target.shape[-1]
        count = torch.full((), float(self.masked.numel()), device=error.device)
        return {f"mim_loss{suffix}": (error, count)}

    def of_rows(self, rows: Tensor) -> PixelOutput:
        """Those of some samples, by rows [B] bool."""
        return replace(self, **{name: value[rows] for name, value in vars(self).items()})


@dataclass
class WordOutput:
    """Predicted words at the n True places of mask [B, L]; truth [n].

    ``decode``: the word decoder with the tokens at these places, to which a truth may be given.
    """

    decode: Callable[..., Any]
    truth: Tensor
    mask: Tensor

    @property
    def scores(self) -> Tensor:
        """[n, V] float32, with their gradient."""
        scores: Tensor = self.decode()
        return scores[: len(self.truth)].float()

    def metrics(self, suffix: str = "") -> Metrics:
        """Cross entropy (nats; with its gradient) and right predictions, summed over masked words."""
        entropy, best = self.decode(truth=self.truth)
        count = torch.full((), float(len(self.truth)), device=entropy.device)
        right = (best == self.truth).sum().float()
        return {f"mlm_loss{suffix}": (entropy, count), f"mlm_accuracy{suffix}": (right, count)}


def classified(scores: Tensor, truth: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(sum, count) of the cross entropy (nats; with its gradient) and of right ones; scores [n, V], truth [n]."""
    entropy = F.cross_entropy(scores, truth, reduction="sum")
    count = torch.full((), float(truth.numel()), device=entropy.device)
    right = (scores.argmax(dim=1) == truth).sum().float()
    return (entropy, count), (right, count)


def patches_at(index: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column to pick patches [B, M] out of [B, P, ...]: copies whole patches, which ``gather`` does not."""
    return torch.arange(index.shape[0], device=index.device)[:, None], index
