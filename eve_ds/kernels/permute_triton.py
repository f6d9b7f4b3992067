"""The four row operations of ``permute`` as Triton kernels: one pass over the rows, sums in float32.

Shapes as in ``permute``. One program serves one row (or token) in blocks of columns; a warp reads 256 bf16 values as 16
bytes a thread, and 768 and 1024 are multiples of 256.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256  # columns a step
WARPS = 1


def gather_rows(x_TD: Tensor, order_P: Tensor, num_rows: int, top_k: int) -> Tensor:
    """[P, D]: slot i gets token order[i] // k; an empty one zeros."""
    x_TD, order_P = x_TD.contiguous(), order_P.contiguous()
    slots, dim = order_P.numel(), x_TD.shape[1]
    y_PD = x_TD.new_empty(slots, dim)
    if y_PD.numel():
        _gather_kernel[(slots,)](x_TD, order_P, y_PD, dim, num_rows, TOP_K=top_k, BLOCK=BLOCK, num_warps=WARPS)
    return y_PD


def sum_rows(y_PD: Tensor, weights_Tk: Tensor | None, inverse_R: Tensor, top_k: int) -> Tensor:
    """[T, D]: the sum of each token's k rows, weighted if there are weights."""
    y_PD, inverse_R = y_PD.contiguous(), inverse_R.contiguous()
    tokens, dim = inverse_R.numel() // top_k, y_PD.shape[1]
    out_TD = y_PD.new_empty(tokens, dim)
    if out_TD.numel():
        weights = y_PD if weights_Tk is None else weights_Tk.contiguous()  # without weights, a pointer that is not read
        _sum_kernel[(tokens,)](
            y_PD, weights, inverse_R, out_TD, dim,
            TOP_K=top_k, WEIGH=weights_Tk is not None, SUM_IN=_sum_dtype(y_PD), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out_TD


def sum_gradient(dout_TD: Tensor, order_P: Tensor, num_rows: int, top_k: int) -> Tensor:
    """[P, D]: the gradient of unweighted ``sum_rows``; zeros in empty slots."""
    return gather_rows(dout_TD, order_P, num_rows, top_k)


def weighted_gradients(
    dout_TD: Tensor, y_PD: Tensor, weights_Tk: Tensor, order_P: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients [P, D] (zeros in empty slots) and [T, k] of y and the weights of weighted ``sum_rows``."""
    dout_TD, y_PD, weights_Tk = dout_TD.contiguous(), y_PD.contiguous(), weights_Tk.contiguous()
    (slots, dim), top_k = y_PD.shape, weights_Tk.shape[1]
    dy_PD, dweights_Tk = torch.empty_like(y_PD), torch.zeros_like(weights_Tk)
    if y_PD.numel():
        _gradients_kernel[(slots,)](
            dout_TD, y_PD, weights_Tk, order_P.contiguous(), dy_PD, dweights_Tk, dim, inverse_R.numel(),
            TOP_K=top_k, SUM_IN=_sum_dtype(y_PD), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return dy_PD, dweights_Tk


def _sum_dtype(rows: Tensor) -> tl.dtype:
    return tl.float64 if rows.dtype == torch.float64 else tl.float32


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    x, order, y, dim, num_rows,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    choice = tl.load(order + slot)
    token = choice // TOP_K
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < dim
        values = tl.load(x + token * dim + column, mask=inside & (choice < num_rows), other=0)
        tl.store(y + slot * dim + column, values, mask=inside)


@triton.jit
def _sum_kernel(  # type: ignore[no-untyped-def]
    y, weights, inverse, out, dim,
    TOP_K: tl.constexpr, WEIGH: tl.constexpr, SUM_IN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < dim
        total = tl.zeros([BLOCK], dtype=SUM_IN)
        for choice in tl.static_range(TOP_K):
            slot = tl.load(inverse + token * TOP_K + choice)
            values = tl.load(y + slot * dim + column, mask=inside, other=0).to(SUM_IN)
            if WEIGH:
                values *= tl.load(weights + token * TOP_K + choice).to(SUM_IN)
            total += values
        tl.store(out + token * dim + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(  # type: ignore[no-untyped-def]
    dout, y, weights, order, dy, dweights, dim, num_rows,
    TOP_K: tl.constexpr, SUM_IN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    choice = tl.load(order + slot)
    token = choice // TOP_K
    taken = choice < num_rows
    weight = tl.load(weights + choice, mask=taken, other=0).to(SUM_IN)
    products = tl.zeros([BLOCK], dtype=SUM_IN)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < dim
        gradient = tl.load(dout + token * dim + column, mask=inside & taken, other=0).to(SUM_IN)
        products += gradient * tl.load(y + slot * dim + column, mask=inside & taken, other=0).to(SUM_IN)
        tl.store(dy + slot * dim + column, (gradient * weight).to(dy.dtype.element_ty), mask=inside)
    tl.store(dweights + choice, tl.sum(products, axis=0).to(dweights.dtype.element_ty), mask=taken)
