"""Attention behind one function: torch's fused one on a GPU, the formula as it stands elsewhere; and how far a backend
is off the formula.

Shapes: B samples, h heads, N tokens, d width of a head; q, k, v [B, h, N, d]; bias [B, 1, 1, N] is added to the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# A row whose scores have a logsumexp below -88.7, ln of float32's largest, made cuDNN's dQ NaN (pytorch#196678).
LOW_SCORE = -120.0
SCORES_AT_ONCE = 1 << 24  # of the formula in float32; several buffers of so many are alive


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


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """``plain_attention``; on CUDA by the backend that torch chooses, which on Hopper is cuDNN's, the fastest."""
    if q.is_cuda and q.shape[0]:  # fused kernels may refuse a pass without a row
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return plain_attention(q, k, v, bias)


class Trial(NamedTuple):
    """Random inputs to try a backend with: q, k, v that want gradients, the bias, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    dout: Tensor


def make_trial(x: Tensor, heads: int, bias: Tensor | None) -> Trial:
    """Inputs as a layer with so many heads makes them from x [B, N, D]: its shapes, strides, dtype and mask.

    In every second head all scores lie near ``LOW_SCORE``. Torch's global generators are left as they are.
    """
    batch, tokens, dim = x.shape
    generator = torch.Generator(x.device).manual_seed(0)
    sizes = (batch, tokens, 4, heads, dim // heads)
    *qkv, dout = torch.randn(sizes, generator=generator, dtype=x.dtype, device=x.device).unbind(2)
    made = torch.stack(qkv, dim=2)
    low = made[:, :, :2, ::2]
    low *= 0.1
    low[:, :, 0, :, 0], low[:, :, 1, :, 0] = 1, LOW_SCORE * (dim // heads) ** 0.5
    q, k, v = (part.requires_grad_() for part in made.permute(2, 0, 3, 1, 4).unbind(0))
    dout = dout.contiguous().transpose(1, 2)
    return Trial(q, k, v, bias, dout if bias is None else dout * _attends(bias))


def worst_error(run: AttentionFunction, trial: Trial) -> float:
    """How far ``run`` is off ``plain_attention`` in float32: root mean square of the difference within a head of a
    sample, relative to that of the formula, the worst of all, of the output and the gradients of q, k and v; infinity
    if anything is not finite. Synchronizes."""
    q, k, v, bias, dout = trial
    with torch.enable_grad():
        out = run(q, k, v, bias)
        found = (out, *torch.autograd.grad(out, (q, k, v), dout))
    if not all(bool(each.isfinite().all()) for each in found):
        return float("inf")
    rows = max(1, SCORES_AT_ONCE // (q.shape[1] * q.shape[2] ** 2))
    parts = [each.split(rows) for each in (q, k, v, dout, *found)]
    biases = [None] * len(parts[0]) if bias is None else [part.float() for part in bias.split(rows)]
    worst = [_errors(b, *each) for b, *each in zip(biases, *parts, strict=True)]
    return float(torch.stack(worst).max())


def tolerance(dtype: torch.dtype) -> float:
    """The largest ``worst_error`` of a sound backend. In bf16 0.0625: 0.003 is what torch's on a CPU has, 0.008 what
    gradients by cuDNN were off float64 on an H100."""
    return max(8 * torch.finfo(dtype).eps, 1e-3)


def _attends(bias: Tensor) -> Tensor:
    """[B, 1, 1, 1], 1 where a sample has a token to attend to, else 0: then its output has no meaning."""
    return (bias.amax(dim=-1, keepdim=True) == 0).to(bias.dtype)


def _errors(bias: Tensor | None, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, *found: Tensor) -> Tensor:
    q, k, v = (each.detach().float().requires_grad_() for each in (q, k, v))
    with torch.enable_grad():
        out = plain_attention(q, k, v, bias)
        wanted = (out, *torch.autograd.grad(out, (q, k, v), dout.float()))
    alive = 1.0 if bias is None else _attends(bias)
    worst = []
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        # The first column of dq is a sum that cancels: the keys' low column is the same for all.
        first = 1 if number == 1 else 0
        difference = ((one.detach().float() - other.detach()) * alive)[..., first:]
        scale = _rms(other.detach()[..., first:]) + 0.01  # gradients of q and k vanish where a row has one key
        worst.append((_rms(difference) / scale).amax())
    return torch.stack(worst).amax()


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(dim=(-2, -1)).sqrt()
