"""The cross entropy of a projection to a vocabulary, without float32 scores of all rows at once.

Shapes: R rows, N of them with a truth, D dim, V vocabulary, C rows of a chunk.

5,000 masked words (256 pairs) have 1.3 GB of float32 scores over 64,000 entries, and plain autograd holds these twice
beside those in bf16. Here softmax and gradient go chunk by chunk, and what is kept is the scores' gradient, in x's
dtype. torch 2.13 has ``F.linear_cross_entropy``; torch 2.11 does not.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1024  # rows: 256 MB of float32 scores over 64,000 entries, three times at once


def linear_cross_entropy(x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, truth_N: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of softmax(x weight' + bias), and the entries with the highest scores.

    Args:
        x_RD: rows; those from N on are padding (for few distinct shapes of products) and count nowhere.
        weight_VD: in x's dtype.
        bias_V: in x's dtype.
        truth_N: int64, the right entry of each of the first N rows.
    Returns:
        The sum over N rows in nats, float32 (float64 for float64), once differentiable by x, weight and bias; and the
        entry with the highest score of each of the N rows, [N] int64.
    """
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x_RD, weight_VD, bias_V)):
        found: tuple[Tensor, Tensor] = _LinearCrossEntropy.apply(x_RD, weight_VD, bias_V, truth_N)
        return found
    return _by_chunks(x_RD, weight_VD, bias_V, truth_N, None)


def reference(x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, truth_N: Tensor) -> tuple[Tensor, Tensor]:
    """``linear_cross_entropy`` in plain PyTorch."""
    scores_NV = _wide(F.linear(x_RD, weight_VD, bias_V)[: len(truth_N)])
    return F.cross_entropy(scores_NV, truth_N, reduction="sum"), scores_NV.argmax(dim=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, truth_N: Tensor) -> tuple[Tensor, Tensor]:
        # In fp16 most of it is too small before the loss scale is applied, in the backward pass.
        kept_in = torch.float32 if x_RD.dtype == torch.float16 else x_RD.dtype
        dscores_RV = x_RD.new_empty(len(x_RD), len(weight_VD), dtype=kept_in)
        entropy, best_N = _by_chunks(x_RD, weight_VD, bias_V, truth_N, dscores_RV)
        ctx.save_for_backward(x_RD, weight_VD, dscores_RV)
        ctx.mark_non_differentiable(best_N)
        return entropy, best_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dentropy: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        x_RD, weight_VD, dscores_RV = ctx.saved_tensors
        scale: Tensor | int = dentropy
        if dscores_RV.dtype != x_RD.dtype:
            dscores_RV, scale = (dscores_RV * dentropy).to(x_RD.dtype), 1
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            (dscores_RV @ weight_VD) * scale if needs_x else None,
            (dscores_RV.t() @ x_RD) * scale if needs_weight else None,
            dscores_RV.sum(dim=0) * scale if needs_bias else None,
            None,
        )


def _by_chunks(
    x_RD: Tensor, weight_VD: Tensor, bias_V: Tensor, truth_N: Tensor, dscores_RV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What ``linear_cross_entropy`` returns. Fills in the gradient of the scores, if it is asked for."""
    # Few operations a chunk: a GPU waits for the host to launch them.
    wide = torch.float64 if x_RD.dtype == torch.float64 else torch.float32
    best_N, chosen_N = torch.empty_like(truth_N), x_RD.new_empty(len(truth_N), dtype=wide)
    minus_one = chosen_N.new_full((min(CHUNK, len(truth_N)), 1), -1.0)
    for start in range(0, len(truth_N), CHUNK):
        truth_C = truth_N[start : start + CHUNK]
        rows = slice(start, start + len(truth_C))
        stop = rows.stop if rows.stop < len(truth_N) else len(x_RD)  # the last chunk takes the padding along
        # In this order: log_softmax with a dtype holds the scores until it is done.
        log_CV = F.linear(x_RD[start:stop], weight_VD, bias_V)[: len(truth_C)].to(wide).log_softmax(dim=1)
        torch.argmax(log_CV, dim=1, out=best_N[rows])
        torch.gather(log_CV, 1, truth_C[:, None], out=chosen_N[rows, None])
        if dscores_RV is not None:
            dscores_CV = log_CV.exp_()  # softmax - 1 at the truth; in the memory of log_CV
            dscores_CV.scatter_add_(1, truth_C[:, None], minus_one[: len(truth_C)])
            dscores_RV[rows] = dscores_CV
    if dscores_RV is not None:
        dscores_RV[len(truth_N) :] = 0
    return -chosen_N.sum(), best_N


def _wide(values: Tensor) -> Tensor:
    """In float32, if they are in less."""
    return values.float() if values.dtype.itemsize < 4 else values
