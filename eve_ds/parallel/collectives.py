"""Collectives on ``torch.distributed``. Without a process group they act as in a world of size 1.

All ranks of a group must call them in the same order, and run their backward passes in the same order. Autograd does so
when the ranks build the same graph (also on a rank without rows: a tensor of shape [0, D] has a gradient).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Within it, the collectives of this thread act as in a world of size 1: what runs on one rank must not wait for
    the others."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def is_initialized() -> bool:
    """Whether this process belongs to a process group and is not ``alone``; false in builds of PyTorch without
    ``torch.distributed``."""
    return not _alone.get() and dist.is_available() and dist.is_initialized()


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in ``group`` (None: all); 1 without a process group."""
    return dist.get_world_size(group) if is_initialized() else 1


def rank(group: dist.ProcessGroup | None = None) -> int:
    """This process's rank in ``group`` (None: among all); 0 without a process group."""
    return dist.get_rank(group) if is_initialized() else 0


@torch.no_grad()
def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks, without gradient, in a new tensor; the input itself (detached) in a world of one."""
    if world_size(group) == 1:
        return tensor.detach()
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


@torch.no_grad()
def exchange_counts(counts: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Exchange the numbers of rows that the ranks will send to each other.

    Args:
        counts: [ranks, ...] int64; row r is sent to rank r of the group.
    Returns:
        the same shape; row r comes from rank r.
    """
    if world_size(group) == 1:
        return counts.detach()
    received = torch.empty_like(counts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, counts.contiguous(), group=group)
    return received


def _all_to_all(rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class _AllToAllUneven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.route = send, receive, group
        return _all_to_all(rows, send, receive, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive, group = ctx.route
        return _all_to_all(grad, receive, send, group), None, None, None


def all_to_all_uneven(
    rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None = None
) -> Tensor:
    """``all_to_all_single`` with uneven splits; differentiable (the gradient takes the reverse way).

    Args:
        rows: [S, ...]; the first send[0] rows go to rank 0, and so on.
        send: rows for each rank; sums to S.
        receive: rows from each rank (see ``exchange_counts``).
    Returns:
        [sum(receive), ...], in the order of the sending ranks.
    Raises:
        ValueError: ``send`` does not sum to S, or a list is not as long as the group.
    """
    size = world_size(group)
    if len(send) != size or len(receive) != size or sum(send) != rows.shape[0]:
        raise ValueError(f"all_to_all_uneven: {rows.shape[0]} rows, send={send}, receive={receive}, group of {size}")
    if size == 1:
        return rows
    return _AllToAllUneven.apply(rows, send, receive, group)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
        ctx.counts, ctx.group = counts, group
        # Padded to the longest: gloo has no uneven all-gather.
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: rows.shape[0]] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # In fp32: a sum over many ranks in bf16 would lose small terms.
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = grad.to(wide, copy=True, memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        start = sum(ctx.counts[: dist.get_rank(ctx.group)])
        return total[start : start + ctx.counts[dist.get_rank(ctx.group)]].to(grad.dtype), None, None


def gather_with_gradient(rows: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """All-gather of rows, in rank order; ranks may hold different numbers of rows, also none.

    The gradient of a rank's rows is the sum over all ranks' gradients for them, as in one process that holds the whole
    batch.

    Args:
        rows: [b, ...], the same dtype and trailing shape on every rank; integers pass without gradient.
    Returns:
        [sum of b, ...].
    """
    size = world_size(group)
    if size == 1:
        return rows
    counts = torch.zeros(size, dtype=torch.int64, device=rows.device)
    counts[rank(group)] = rows.shape[0]
    dist.all_reduce(counts, group=group)
    return _GatherRows.apply(rows, counts.tolist(), group)
