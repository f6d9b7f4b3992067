"""Tokens to slots sorted by expert, and slots back to tokens; differentiable. Triton kernels on CUDA, else plain torch.

Shapes: T tokens, k choices per token, R = T k rows (one per choice), P >= R slots (some may stay empty), D dim.
``order`` [P] int64 names the choice in each slot: choice order[i] is one of token order[i] // k, and R stands for an
empty slot. ``inverse`` [R] int64 is the slot of each choice. With P = R they are a permutation and its inverse.

Experts that take turns (``expert_mlp``) move their rows themselves: there only rows for other ranks come here.

The Triton kernels were run under TRITON_INTERPRET=1 and compiled for sm_80 and sm_90; no GPU was at hand to time them.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eve_ds.kernels import permute_reference
from eve_ds.kernels.choices import Alternative, Choice, triton_is_interpreted, triton_state


class Layout(NamedTuple):
    """Where each row lies while sorted by expert.

    Attributes:
        order: [P] int64, the row in each slot; R in an empty one.
        inverse: [R] int64, the slot of each row.
        counts: rows of each expert.
        slots: slots of each expert: its rows, then empty ones. Rows of no expert lie behind all.
    """

    order: Tensor
    inverse: Tensor
    counts: list[int]
    slots: list[int]


def spread(x_TD: Tensor, order_P: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """Give every choice a copy of its token: slot i of the result holds token ``order[i] // top_k``.

    Args:
        x_TD: [T, D], any floating dtype; differentiable.
        order_P: [P] int64.
        inverse_R: [R] int64.
        top_k: k.
    Returns:
        [P, D] in x's dtype; what an empty slot holds is not said, but it is finite if x is.
    """
    return _Spread.apply(x_TD, order_P, inverse_R, top_k)


def combine(y_PD: Tensor, weights_Tk: Tensor, order_P: Tensor, inverse_R: Tensor) -> Tensor:
    """Weighted sum of a token's k rows, which stand in slots ``inverse[t k .. t k + k - 1]``.

    Rows are taken as they are: one that no expert has served must hold zeros to add nothing.

    Args:
        y_PD: [P, D], any floating dtype; differentiable. Its gradient is zero in empty slots.
        weights_Tk: [T, k] in y's dtype; differentiable.
        order_P: [P] int64.
        inverse_R: [R] int64.
    Returns:
        [T, D] in y's dtype (the kernels sum in float32, plain torch in y's dtype).
    """
    return _Combine.apply(y_PD, weights_Tk, order_P, inverse_R)


class _Spread(torch.autograd.Function):
    """Backward is a gather too: to add k rows to a token, a GPU would take them in no fixed order."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_P: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        return operations(x_TD).gather_rows(x_TD, order_P, inverse_R.numel(), top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_PD: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return operations(dy_PD).sum_rows(dy_PD, None, inverse_R, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_PD: Tensor, weights_Tk: Tensor, order_P: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(y_PD, weights_Tk, order_P, inverse_R)
        return operations(y_PD).sum_rows(y_PD, weights_Tk, inverse_R, weights_Tk.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *operations(dout_TD).weighted_gradients(dout_TD, *ctx.saved_tensors), None, None


def operations(rows: Tensor) -> ModuleType:
    """The module whose four row operations serve this tensor; they take no part in autograd."""
    if (rows.is_cuda or (rows.device.type == "cpu" and triton_is_interpreted())) and triton_state()[0]:
        from eve_ds.kernels import permute_triton  # imports triton, which need not be installed

        return permute_triton
    return permute_reference


def choice(device: torch.device) -> Choice:
    """What serves tensors on ``device``."""
    available, reason, how = triton_state()
    if available and device.type != "cuda" and not triton_is_interpreted():
        available, reason, how = False, "for CUDA tensors", ""
    return Choice(
        "permute (rows for other ranks; all rows where experts are one launch)",
        (Alternative("Triton", available, reason, how), Alternative("plain torch", True, "always runs")),
    )
