"""Image-text contrast over the global batch, and the choice of hard negatives in it (ALBEF, arXiv 2107.07651).

Legend: b this rank's rows, G rows of the global batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eve_ds.tasks.masking import uniform


def contrastive_sum(logits: Tensor, same: Tensor) -> Tensor:
    """Cross entropy of each row with equal weights over the columns that show the same image, summed over rows.

    Args:
        logits: [b, G] float32, similarities / temperature.
        same: [b, G] bool, True where row and column belong to the same image; at least one a row.
    """
    targets = same.float() / same.sum(dim=1, keepdim=True)
    return -(logits.log_softmax(dim=1) * targets).sum()


def hard_negatives(logits: Tensor, same: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one negative a row, the likelier the more similar: softmax(logits) + 1e-5, as in ALBEF and EVE.

    The draw is the largest of log weight + Gumbel noise, so that it depends on the noise of the pairs, not on the
    order or the number of ranks.

    Args:
        logits: [b, G] float32.
        same: [b, G] bool, pairs of the same image; never drawn.
        bits: [b, G] random int64, one a pair.
    Returns:
        column [b] int64, and found [b] bool: False where every column shows the same image.
    """
    noise = -(-uniform(bits).log()).log()
    score = (logits.softmax(dim=1) + 1e-5).log() + noise
    return score.masked_fill(same, -torch.inf).argmax(dim=1), ~same.all(dim=1)
