"""Triton kernels: the four row operations of ``permute``.

Each reads and writes its rows once and sums in float32. Shapes as in ``permute``. A program serves one row (or token)
in blocks of columns; a warp reads 256 bf16 values as 16 bytes a thread, and 768 and 1024 are multiples of 256. Places
in tensors are computed in int64: a tensor may have more than 2^31 elements. Run under TRITON_INTERPRET=1 and compiled
for sm_80 and sm_90, but not timed.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 256, 1  # columns a step of a row operation


def gather_rows(x_TD: Tensor, order_P: Tensor, num_choices: int, top_k: int) -> Tensor:
    """[P, D]: row i is token order[i] // k; zeros in a padding row."""
    x_TD, order_P = x_TD.contiguous(), order_P.contiguous()
    rows, dim = order_P.numel(), x_TD.shape[1]
    y_PD = x_TD.new_empty(rows, dim)
    if y_PD.numel():
        launch(
            _gather_kernel, (rows,), x_TD, order_P, y_PD, dim, num_choices,
            TOP_K=top_k, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return y_PD


def sum_rows(y_PD: Tensor, weights_Tk: Tensor | None, inverse_R: Tensor, top_k: int) -> Tensor:
    """[T, D]: the sum of each token's k rows, weighted if there are weights."""
    y_PD, inverse_R = y_PD.contiguous(), inverse_R.contiguous()
    tokens, dim = inverse_R.numel() // top_k, y_PD.shape[1]
    out_TD = y_PD.new_empty(tokens, dim)
    if out_TD.numel():
        weights = y_PD if weights_Tk is None else weights_Tk.contiguous()  # without weights, a pointer that is not read
        launch(
            _sum_kernel, (tokens,), y_PD, weights, inverse_R, out_TD, dim,
            TOP_K=top_k, WEIGH=weights_Tk is not None, SUM_IN=sum_dtype(y_PD), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out_TD


def sum_gradient(dout_TD: Tensor, order_P: Tensor, num_choices: int, top_k: int) -> Tensor:
    """[P, D]: the gradient of unweighted ``sum_rows``; zeros in padding rows."""
    return gather_rows(dout_TD, order_P, num_choices, top_k)


def weighted_gradients(
    dout_TD: Tensor, y_PD: Tensor, weights_Tk: Tensor, order_P: Tensor, inverse_R: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients [P, D] (zeros in padding rows) and [T, k] of y and the weights of weighted ``sum_rows``."""
    dout_TD, y_PD, weights_Tk = dout_TD.contiguous(), y_PD.contiguous(), weights_Tk.contiguous()
    (rows, dim), top_k = y_PD.shape, weights_Tk.shape[1]
    dy_PD, dweights_Tk = torch.empty_like(y_PD), torch.empty_like(weights_Tk)  # each choice has a row
    if y_PD.numel():
        launch(
            _gradients_kernel, (rows,),
            dout_TD, y_PD, weights_Tk, order_P.contiguous(), dy_PD, dweights_Tk, dim, inverse_R.numel(),
            TOP_K=top_k, SUM_IN=sum_dtype(y_PD), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return dy_PD, dweights_Tk


def launch(kernel: Any, grid: tuple[int, ...], first: Tensor, *arguments: Any, **options: Any) -> None:
    """Run a kernel on the device of its first tensor, whichever the current one is."""
    with torch.cuda.device_of(first):
        kernel[grid](first, *arguments, **options)


def sum_dtype(rows: Tensor) -> tl.dtype:
    """What values of these rows are added in."""
    return tl.float64 if rows.dtype == torch.float64 else tl.float32


@triton.jit
def _gather_kernel(  # type: ignore[no-untyped-def]
    x, order, y, dim, num_choices,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order + row)
    token = choice // TOP_K
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < dim
        values = tl.load(x + token * dim + column, mask=inside & (choice < num_choices), other=0)
        tl.store(y + row * dim + column, values, mask=inside)


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
            row = tl.load(inverse + token * TOP_K + choice)
            values = tl.load(y + row * dim + column, mask=inside, other=0).to(SUM_IN)
            if WEIGH:
                values *= tl.load(weights + token * TOP_K + choice).to(SUM_IN)
            total += values
        tl.store(out + token * dim + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradients_kernel(  # type: ignore[no-untyped-def]
    dout, y, weights, order, dy, dweights, dim, num_choices,
    TOP_K: tl.constexpr, SUM_IN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    choice = tl.load(order + row)
    token = choice // TOP_K
    taken = choice < num_choices
    weight = tl.load(weights + choice, mask=taken, other=0).to(SUM_IN)
    products = tl.zeros([BLOCK], dtype=SUM_IN)
    for start in range(0, dim, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < dim
        gradient = tl.load(dout + token * dim + column, mask=inside & taken, other=0).to(SUM_IN)
        products += gradient * tl.load(y + row * dim + column, mask=inside & taken, other=0).to(SUM_IN)
        tl.store(dy + row * dim + column, (gradient * weight).to(dy.dtype.element_ty), mask=inside)
    tl.store(dweights + choice, tl.sum(products, axis=0).to(dweights.dtype.element_ty), mask=taken)
