"""Multi-head self-attention with one fused product for queries, keys and values.

Shapes: B samples, N tokens, D dim, h heads, d = D / h.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Finite, so that a row whose keys are all masked does not become NaN; its exponential relative to any score is 0.
MASKED = -1e30


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B, 1, 1, N] from valid [B, N] bool: 0 where a token may be attended to, else MASKED."""
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, MASKED)
    return bias[:, None, None, :]


def plain_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(d) + bias) v for [B, h, N, d]; torch's softmax of bf16 computes in float32 by itself.

    On the CPU in bf16 this is faster than torch's fused attention, in the backward pass above all.
    """
    batch, heads, tokens, width = q.shape
    q, k, v = (part.reshape(batch * heads, tokens, width) for part in (q, k, v))
    if bias is None:
        scores = torch.bmm(q * width**-0.5, k.transpose(1, 2))
    else:
        bias = bias.expand(batch, heads, 1, tokens).reshape(batch * heads, 1, tokens)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).view(batch, heads, tokens, width)


class QKV(nn.Linear):
    """Queries, keys and values in one product, [.., D] -> [.., 3 D]; biases on queries and values alone (BEiT)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    """Self-attention over all tokens of a sample.

    Args:
        dim: D.
        num_heads: h; divides D.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QKV(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, N, D], bias from ``key_bias`` (None: attend to all) -> [B, N, D]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if x.is_cuda:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        else:
            out = plain_attention(q, k, v, bias)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, dim))
