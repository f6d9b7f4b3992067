"""Tokens sorted by expert, and back; differentiable. Triton kernels on CUDA, plain PyTorch elsewhere.

Shapes: T tokens, k experts per token, R = T k choices (a token and one of its experts), P rows of a tensor sorted by
expert (one per choice, and padding rows), D dim. ``order`` [P] int64 is the choice in each row: choice c is one of
token c // k, and R marks a padding row. ``inverse`` [R] int64 is the row of each choice. Without padding (P = R) they
are a permutation and its inverse.

The Triton kernels were run under TRITON_INTERPRET=1 and compiled for sm_80 and sm_90, but not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eve_ds.kernels.choices import Choice, triton_choice, triton_serves
from eve_ds.kernels.groups import Groups, to_host

CHUNK = 2048  # rows whose products fit in the cache


@dataclass
class Layout:
    """Where each choice lies in a tensor [P, D] sorted by expert.

    Attributes:
        order: [P] int64, the choice in each row; R in a padding row.
        inverse: [R] int64, the row of each choice.
        tokens: tokens of each expert, without padding: numbers, or an int64 tensor [E] on the device.
        rows: rows of each expert: its tokens, then padding rows. None: there is no padding. The rows behind those of
            the last expert hold the choices of no expert.
    """

    order: Tensor
    inverse: Tensor
    tokens: list[int] | Tensor
    rows: list[int] | None = None

    @property
    def groups(self) -> Groups:
        """Whose rows are which, for grouped products; reads nothing back from the device."""
        return Groups(self.tokens if self.rows is None else self.rows, self.order.device, self.order.numel())

    @cached_property
    def tokens_per_expert(self) -> list[int]:
        """Tokens of each expert on the host: waits once for the device."""
        return to_host(self.tokens, self.order.numel()) if isinstance(self.tokens, Tensor) else self.tokens

    @property
    def padded_tokens_per_expert(self) -> list[int]:
        """Rows of each expert, on the host likewise."""
        return self.tokens_per_expert if self.rows is None else self.rows


def sort_by_expert(expert_R: Tensor, counts: list[int] | Tensor) -> Layout:
    """The layout of choices sorted by expert. On the CPU, each expert's rows are padded (``padded_count``); on other
    devices nothing is read back.

    Args:
        expert_R: [R] int64, the expert of each choice; E stands for none.
        counts: how often each expert occurs in ``expert_R``: numbers, or [E] int64 on its device.
    """
    order = expert_R.argsort(stable=True)
    row = torch.arange(order.numel(), device=order.device)
    inverse = torch.empty_like(order)
    if order.device.type != "cpu":
        return Layout(order, inverse.scatter_(0, order, row), counts)
    tokens: list[int] = counts.tolist() if isinstance(counts, Tensor) else counts
    padded = [padded_count(count) for count in tokens]
    parts = torch.tensor([*tokens, order.numel() - sum(tokens)])
    added = torch.tensor([0, *(p - c for p, c in zip(padded, tokens, strict=True))]).cumsum(0)
    row += added.repeat_interleave(parts, output_size=order.numel())
    order_P = order.new_full((order.numel() + int(added[-1]),), order.numel()).scatter_(0, row, order)
    return Layout(order_P, inverse.scatter_(0, order, row), tokens, padded)


def padded_count(count: int) -> int:
    """Rows for ``count`` tokens of an expert on the CPU: at most 1/16 or 7 more, so that few distinct numbers occur.

    oneDNN generates a kernel for every new shape of a matrix product: about 0.5 ms, and memory that grows by 1 GB in
    3,000 shapes.
    """
    step = max(8, 1 << max(count.bit_length() - 5, 0))
    return -(-count // step) * step


def permute(x_TD: Tensor, order_P: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """Copy tokens to the rows of their choices: row i of the result is token ``order[i] // top_k``.

    Args:
        x_TD: [T, D], any floating dtype; differentiable.
        order_P: [P] int64.
        inverse_R: [R] int64.
        top_k: k.
    Returns:
        [P, D] in x's dtype; padding rows hold unspecified values, finite if x is.
    """
    return _Permute.apply(x_TD, order_P, inverse_R, top_k)


def combine(y_PD: Tensor, weights_Tk: Tensor, order_P: Tensor, inverse_R: Tensor) -> Tensor:
    """The weighted sum over each token's k rows, ``inverse[t k .. t k + k - 1]``.

    The row of a choice that no expert has served must hold zeros.

    Args:
        y_PD: [P, D], any floating dtype; differentiable. Its gradient is zero in padding rows.
        weights_Tk: [T, k] in y's dtype; differentiable.
        order_P: [P] int64.
        inverse_R: [R] int64.
    Returns:
        [T, D] in y's dtype (the kernels sum in float32, plain PyTorch in y's dtype).
    """
    return _Combine.apply(y_PD, weights_Tk, order_P, inverse_R)


class _Permute(torch.autograd.Function):
    """The backward pass gathers, too: a scatter would add a token's k rows in no fixed order on a GPU."""

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


class RowOperations(NamedTuple):
    """The four row operations, of this module (plain PyTorch) or of ``triton_kernels``."""

    gather_rows: Callable[[Tensor, Tensor, int, int], Tensor]
    sum_rows: Callable[[Tensor, Tensor | None, Tensor, int], Tensor]
    sum_gradient: Callable[[Tensor, Tensor, int, int], Tensor]
    weighted_gradients: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def operations(rows: Tensor) -> RowOperations:
    """Those that run on this tensor's device; autograd does not record them."""
    if triton_serves(rows):
        from eve_ds.kernels import triton_kernels  # imports triton, which need not be installed

        return RowOperations(
            triton_kernels.gather_rows,
            triton_kernels.sum_rows,
            triton_kernels.sum_gradient,
            triton_kernels.weighted_gradients,
        )
    return RowOperations(gather_rows, sum_rows, sum_gradient, weighted_gradients)


def gather_rows(x_TD: Tensor, order_P: Tensor, num_choices: int, top_k: int) -> Tensor:
    """[P, D]: row i is token order[i] // k; in a padding row, the last token."""
    return x_TD.index_select(0, token_of_row(order_P, num_choices, top_k))


def sum_rows(y_PD: Tensor, weights_Tk: Tensor | None, inverse_R: Tensor, top_k: int) -> Tensor:
    """[T, D]: the sum of each token's k rows, weighted if there are weights."""
    inverse_Tk = inverse_R.view(-1, top_k)
    out_TD = y_PD.index_select(0, inverse_Tk[:, 0])
    if weights_Tk is not None:
        out_TD.mul_(weights_Tk[:, :1])
    for choice in range(1, top_k):
        rows_TD = y_PD.index_select(0, inverse_Tk[:, choice])
        if weights_Tk is None:
            out_TD += rows_TD
        else:
            out_TD.addcmul_(rows_TD, weights_Tk[:, choice : choice + 1])
    return out_TD


def sum_gradient(dout_TD: Tensor, order_P: Tensor, num_choices: int, top_k: int) -> Tensor:
    """[P, D]: the gradient of unweighted ``sum_rows``; zeros in padding rows."""
    return _zero_padding(gather_rows(dout_TD, order_P, num_choices, top_k), order_P, num_choices)


def weighted_gradients(
    dout_TD: Tensor, y_PD: Tensor, weights_Tk: Tensor, order_P: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients [P, D] (zeros in padding rows) and [T, k] of y and the weights of weighted ``sum_rows``."""
    num_choices = inverse_R.numel()
    dy_PD = gather_rows(dout_TD, order_P, num_choices, weights_Tk.shape[1])
    pairs = zip(y_PD.split(CHUNK), dy_PD.split(CHUNK), strict=True)
    dweights_P = torch.cat([(y * dy).sum(dim=1) for y, dy in pairs])
    dweights_Tk = dweights_P.index_select(0, inverse_R).view_as(weights_Tk)
    if num_choices:
        dy_PD.mul_(weights_Tk.reshape(-1, 1).index_select(0, order_P.clamp(max=num_choices - 1)))
    return _zero_padding(dy_PD, order_P, num_choices), dweights_Tk


def token_of_row(order_P: Tensor, num_choices: int, top_k: int) -> Tensor:
    """[P] int64; the last token in a padding row."""
    choices = order_P if order_P.numel() == num_choices else order_P.clamp(max=num_choices - 1)
    return choices if top_k == 1 else choices.div(top_k, rounding_mode="floor")


def _zero_padding(rows_PD: Tensor, order_P: Tensor, num_choices: int) -> Tensor:
    if order_P.numel() > num_choices:
        rows_PD.index_fill_(0, (order_P == num_choices).nonzero().squeeze(1), 0)
    return rows_PD


def choice(device: torch.device) -> Choice:
    """The implementation for tensors on ``device``."""
    return triton_choice("permute (tokens sent to other ranks; all tokens where experts use grouped_mm)", device)
