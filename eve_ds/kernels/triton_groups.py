"""Triton kernels over rows sorted by group: bias, bias and activation, its gradient, zeros where no group writes.

Each reads and writes what it changes once and computes in float32 (float64 for float64). Shapes as in ``groups``;
``offsets`` [E] int32 is where each group ends. Places in tensors are computed in int64: a tensor may have more than
2^31 elements. Run under TRITON_INTERPRET=1 and compiled for sm_80 and sm_90, but not timed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eve_ds.kernels.triton_kernels import launch, sum_dtype

BLOCK, WARPS = 512, 2  # columns of a row a program
FLAT_BLOCK, FLAT_WARPS = 1024, 4  # values a program, whatever their rows
ZERO_ROWS, ZERO_STEPS = 16, 16  # rows a program, and blocks a program where rows do not matter: nearly all have no work


def add_group_bias_(y_RN: Tensor, bias_EN: Tensor, offsets_E: Tensor) -> Tensor:
    """Add ``bias[e]`` to the rows before ``offsets[e]`` that are in no earlier group; zero the rows after the last.

    Args:
        y_RN: [R, N] contiguous.
        bias_EN: [E, N], dense rows.
        offsets_E: [E] int32, where each group ends.
    """
    _add_bias(y_RN, y_RN, bias_EN, offsets_E, "")  # without activation, the second pointer is not written
    return y_RN


def bias_activation_(x_RH: Tensor, bias_EH: Tensor, offsets_E: Tensor, activation: str) -> Tensor:
    """``group_activation.bias_activation_``: x becomes x + bias; the activation. Skips other rows."""
    a_RH = torch.empty_like(x_RH)
    _add_bias(x_RH, a_RH, bias_EH, offsets_E, activation)
    return a_RH


def _add_bias(y_RN: Tensor, a_RN: Tensor, bias_EN: Tensor, offsets_E: Tensor, activation: str) -> None:
    (rows, width), groups = y_RN.shape, offsets_E.numel()
    if y_RN.numel():
        launch(
            _bias_kernel, (rows, triton.cdiv(width, BLOCK)),
            y_RN, a_RN, bias_EN, offsets_E, width, bias_EN.stride(0), groups,
            GROUPS=triton.next_power_of_2(groups), ACTIVATION=activation,
            COMPUTE_IN=sum_dtype(y_RN), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip


def activation_gradient_(da_RH: Tensor, h_RH: Tensor, activation: str) -> Tensor:
    """``group_activation.activation_gradient_``: da becomes dh; the activation of h."""
    a_RH, values = torch.empty_like(h_RH), h_RH.numel()
    if values:
        launch(
            _gradient_kernel, (triton.cdiv(values, FLAT_BLOCK),), da_RH, h_RH, a_RH, values,
            ACTIVATION=activation, COMPUTE_IN=sum_dtype(h_RH), BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS,
        )  # fmt: skip
    return a_RH


def zero_rest_(rows_RN: Tensor, offsets_E: Tensor) -> Tensor:
    """``groups.zero_rest_``."""
    rows, width = rows_RN.shape
    if rows_RN.numel():
        launch(
            _zero_rest_kernel, (triton.cdiv(rows, ZERO_ROWS), triton.cdiv(width, BLOCK)),
            rows_RN, offsets_E, rows, width, offsets_E.numel(), ROWS=ZERO_ROWS, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return rows_RN


def zero_empty_groups_(x_ENK: Tensor, offsets_E: Tensor) -> Tensor:
    """``groups.zero_empty_groups_``."""
    values = x_ENK[0].numel() if len(x_ENK) else 0
    if values:
        launch(
            _zero_empty_kernel, (len(x_ENK), triton.cdiv(values, ZERO_STEPS * FLAT_BLOCK)),
            x_ENK, offsets_E, values, STEPS=ZERO_STEPS, BLOCK=FLAT_BLOCK, num_warps=FLAT_WARPS,
        )  # fmt: skip
    return x_ENK


@triton.jit
def _activate(h, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]
    """The activation of h, and its derivative."""
    if ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.math.erf(h * 0.7071067811865476))
        return h * below, below + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    else:  # quick_gelu
        gate = 1 / (1 + tl.exp(-1.702 * h))
        return h * gate, gate + 1.702 * h * gate * (1 - gate)


@triton.jit
def _bias_kernel(  # type: ignore[no-untyped-def]
    y, a, bias, offsets, width, bias_stride, groups,
    GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE_IN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = tl.arange(0, GROUPS)
    ends = tl.load(offsets + place, mask=place < groups, other=2147483647)
    group = tl.sum((ends <= row).to(tl.int32), axis=0)  # groups that end before this row
    if group < groups:
        values = tl.load(y + row * width + column, mask=inside, other=0).to(COMPUTE_IN)
        values += tl.load(bias + group.to(tl.int64) * bias_stride + column, mask=inside, other=0).to(COMPUTE_IN)
        rounded = values.to(y.dtype.element_ty)
        tl.store(y + row * width + column, rounded, mask=inside)
        if ACTIVATION != "":  # of what was stored, as the backward pass sees it
            activated, _ = _activate(rounded.to(COMPUTE_IN), ACTIVATION)
            tl.store(a + row * width + column, activated.to(a.dtype.element_ty), mask=inside)
    elif ACTIVATION == "":
        tl.store(y + row * width + column, tl.zeros([BLOCK], dtype=y.dtype.element_ty), mask=inside)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    da, h, a, values,
    ACTIVATION: tl.constexpr, COMPUTE_IN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < values
    activated, derivative = _activate(tl.load(h + place, mask=inside, other=0).to(COMPUTE_IN), ACTIVATION)
    gradient = tl.load(da + place, mask=inside, other=0).to(COMPUTE_IN) * derivative
    tl.store(da + place, gradient.to(da.dtype.element_ty), mask=inside)
    tl.store(a + place, activated.to(a.dtype.element_ty), mask=inside)


@triton.jit
def _zero_rest_kernel(  # type: ignore[no-untyped-def]
    y, offsets, rows, width, groups,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rest = (row >= tl.load(offsets + groups - 1)) & (row < rows)
    if tl.sum(rest.to(tl.int32), axis=0) > 0:
        column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        zeros = tl.zeros([ROWS, BLOCK], dtype=y.dtype.element_ty)
        tl.store(y + row[:, None] * width + column[None], zeros, mask=rest[:, None] & (column < width)[None])


@triton.jit
def _zero_empty_kernel(  # type: ignore[no-untyped-def]
    x, offsets, values,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + group - 1, mask=group > 0, other=0)
    if tl.load(offsets + group) == start:
        for step in range(STEPS):
            place = (tl.program_id(1).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
            zeros = tl.zeros([BLOCK], dtype=x.dtype.element_ty)
            tl.store(x + group * values + place, zeros, mask=place < values)
