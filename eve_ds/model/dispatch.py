"""Tokens to their experts and back: sort by expert, exchange between ranks, apply, undo, weigh and sum.

Shapes: T tokens, k choices per token, R = T k rows (one per choice), D dim, E experts.
No shape here depends on the routing, but for what is sent to other ranks. Rows of no expert (padding, choices beyond an
expert's capacity) sort to the end, are never sent or multiplied, and come back as zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from eve_ds import parallel

ApplyExperts = Callable[[Tensor, list[int]], Tensor]


class _Spread(torch.autograd.Function):
    """Row i of the result is token order[i] // k. Backward by a gather too: index_add_ walks row by row on the CPU."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        return x_TD.index_select(0, order_R if top_k == 1 else order_R.div(top_k, rounding_mode="floor"))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        dx_RD = dy_RD.index_select(0, inverse_R)
        if ctx.top_k > 1:
            dx_RD = dx_RD.unflatten(0, (-1, ctx.top_k)).sum(dim=1)
        return dx_RD, None, None, None


class _Combine(torch.autograd.Function):
    """Weighted sum of a token's k rows, found at inverse[t k .. t k + k - 1]."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, weights_Tk: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        top_k = weights_Tk.shape[1]
        y_TkD = y_RD.index_select(0, inverse_R).unflatten(0, (-1, top_k))
        ctx.save_for_backward(y_TkD, weights_Tk, order_R)
        out_TD = y_TkD[:, 0] * weights_Tk[:, :1]
        for choice in range(1, top_k):
            out_TD.addcmul_(y_TkD[:, choice], weights_Tk[:, choice : choice + 1])
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_TkD, weights_Tk, order_R = ctx.saved_tensors
        token_R = order_R.div(weights_Tk.shape[1], rounding_mode="floor")
        dy_RD = dout_TD.index_select(0, token_R).mul_(weights_Tk.reshape(-1, 1).index_select(0, order_R))
        dweights_Tk = (y_TkD * dout_TD.unsqueeze(1)).sum(dim=2)
        return dy_RD, dweights_Tk, None, None


def dispatch(
    tokens: Tensor,
    experts: Tensor,
    weights: Tensor,
    counts: Tensor,
    apply_experts: ApplyExperts,
    ep_size: int = 1,
    ep_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Send every token to its experts and sum what comes back.

    Args:
        tokens: [T, D].
        experts: [T, k] int64; E stands for "no expert".
        weights: [T, k], weight of each choice; differentiable.
        counts: [E] int64, rows of each expert in ``experts``.
        apply_experts: (rows [R, D] sorted by expert, rows per expert held here) -> [R, D].
        ep_size: ranks that share the experts; rank r of the group holds [r E / ep_size, (r + 1) E / ep_size).
        ep_group: those ranks. None: all.
    Returns:
        [T, D]; zeros for a token whose choices all are E.
    """
    top_k = experts.shape[1]
    order = experts.reshape(-1).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    rows = _Spread.apply(tokens, order, inverse, top_k)
    if ep_size == 1:
        rows = apply_experts(rows, _to_host(counts, rows.shape[0]))
    else:
        rows = _through_ranks(rows, counts, apply_experts, ep_size, ep_group)
    return _Combine.apply(rows, weights.to(rows.dtype), order, inverse)


def _through_ranks(
    rows: Tensor, counts: Tensor, apply_experts: ApplyExperts, ep_size: int, ep_group: dist.ProcessGroup | None
) -> Tensor:
    """Rows [R, D] sorted by expert -> the same rows after their experts, wherever those live. A collective."""
    sent = counts.view(ep_size, -1)  # [rank, expert there]
    received = parallel.exchange_counts(sent, ep_group)  # [rank, expert here]
    send, receive = sent.sum(dim=1).tolist(), received.sum(dim=1).tolist()
    used = sum(send)
    arrived = parallel.all_to_all_uneven(rows[:used], send, receive, ep_group)
    # They arrive by rank, then by expert; the experts want them by expert, then by rank.
    local = torch.arange(received.shape[1], device=rows.device).repeat(ep_size)
    order = local.repeat_interleave(received.reshape(-1), output_size=sum(receive)).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    sorted_rows = _Spread.apply(arrived, order, inverse, 1)
    done = apply_experts(sorted_rows, received.sum(dim=0).tolist())
    back = parallel.all_to_all_uneven(_Spread.apply(done, inverse, order, 1), receive, send, ep_group)
    if used == rows.shape[0]:
        return back
    return torch.cat([back, back.new_zeros(rows.shape[0] - used, rows.shape[1])])


def _to_host(counts: Tensor, rows: int) -> list[int]:
    """Rows per expert as numbers; an even split on the meta device, where no number is known."""
    if counts.is_meta:
        return [rows // counts.numel()] * counts.numel()
    return counts.tolist()
