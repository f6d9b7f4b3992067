"""Tokens to their experts and back: sort by expert, exchange between ranks, apply, undo, weigh and sum.

Shapes: T tokens, k choices per token, R = T k rows (one per choice), P slots (rows, and on the CPU some empty ones), D
dim, E experts. Where the experts' products are one launch (``kernels/expert_mlp.py``), no shape depends on the routing
but those of what is sent to other ranks. Rows of no expert (padding, choices beyond an expert's capacity) lie in the
last slots, are never sent or multiplied, and come back as zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from eve_ds import parallel
from eve_ds.kernels.permute import Layout, combine, spread

ApplyExperts = Callable[[Tensor, Tensor | None, Layout], Tensor]


def cpu_slots(count: int) -> int:
    """Slots for so many rows of an expert on the CPU: at most 1/16 or 7 more, so that few different numbers occur.

    Every matrix product of a new shape has its kernel generated anew there: about 0.5 ms, and memory that grows by 1 GB
    in 3,000 shapes.
    """
    step = max(8, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


def sort_by_expert(expert: Tensor, counts: list[int]) -> Layout:
    """Lay out rows of the given experts ([R] int64, len(counts) for none), ``counts`` of them for each expert."""
    order = expert.argsort(stable=True)
    slot = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order)
    if order.device.type != "cpu":
        return Layout(order, inverse.scatter_(0, order, slot), counts, counts)
    slots = [cpu_slots(count) for count in counts]
    rows = torch.tensor([*counts, order.numel() - sum(counts)])
    added = torch.tensor([0, *(s - c for s, c in zip(slots, counts, strict=True))]).cumsum(0)
    slot += added.repeat_interleave(rows, output_size=order.numel())
    order_P = order.new_full((order.numel() + int(added[-1]),), order.numel()).scatter_(0, slot, order)
    return Layout(order_P, inverse.scatter_(0, order, slot), counts, slots)


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
        apply_experts: (tokens [T, D], weights [T, k], layout of the experts held here) -> weighted sums [T, D]; without
            weights, k is 1.
        ep_size: ranks that share the experts; rank r of the group holds [r E / ep_size, (r + 1) E / ep_size).
        ep_group: those ranks. None: all.
    Returns:
        [T, D]; zeros for a token whose choices all are E.
    """
    top_k = experts.shape[1]
    weights = weights.to(tokens.dtype)
    if ep_size == 1:
        layout = sort_by_expert(experts.reshape(-1), _to_host(counts, experts.numel()))
        return apply_experts(tokens, weights, layout)
    order = experts.reshape(-1).argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    rows = _through_ranks(spread(tokens, order, inverse, top_k), counts, apply_experts, ep_size, ep_group)
    return combine(rows, weights, order, inverse)


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
    expert = local.repeat_interleave(received.reshape(-1), output_size=sum(receive))
    layout = sort_by_expert(expert, received.sum(dim=0).tolist())
    done = apply_experts(arrived, None, layout)
    back = parallel.all_to_all_uneven(done, receive, send, ep_group)
    if used == rows.shape[0]:
        return back
    return torch.cat([back, back.new_zeros(rows.shape[0] - used, rows.shape[1])])


def _to_host(counts: Tensor, rows: int) -> list[int]:
    """Rows per expert as numbers; an even split on the meta device, where no number is known."""
    if counts.is_meta:
        return [rows // counts.numel()] * counts.numel()
    return counts.tolist()
