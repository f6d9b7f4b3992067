"""Triton kernels over rows sorted by group: bias, bias and activation, its gradient, sums of columns, zeros where no
group writes.

Each reads and writes what it changes once and computes in float32 (float64 for float64). Shapes as in ``groups``;
``offsets`` [E] int32 is where each group ends. Places in tensors are computed in int64: a tensor may have more than
2^31 elements. Run under TRITON_INTERPRET=1 and compiled for sm_80 and sm_90, but not timed.

Sums of columns by group take two kernels, so that all of the device works even where one group has all rows, and add in
a fixed order. The first sums tiles of at most ``TILE_ROWS`` rows, each within one group, and has one program per tile
and ``TILE_BLOCK`` columns; the second sums each group's tiles. Group e, whose rows start at s, has ceil(rows /
TILE_ROWS) tiles from number s // TILE_ROWS + e on. No two groups share a number, and R // TILE_ROWS + E suffice
whatever the offsets, which are read on the device alone. A number between two groups' tiles has no rows: nobody writes
its sums, and nobody reads them.

The sizes, by reasoning, not timed: a warp reads ``TILE_BLOCK`` columns of a row as 16 bytes a thread (bf16), four warps
four rows at a time, eight values of each operand a thread, in 32 to 70 registers (ptxas, sm_90, no spills); the sums
of a full tile take 1/32 of the bytes of its rows, and 9,480 tokens with k 2, 32 experts and D 768 are 984 programs. The
second kernel reads 32 columns, 128 bytes in float32, of 64 tiles at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eve_ds.kernels.triton_kernels import launch, sum_dtype

BLOCK, WARPS = 512, 2  # columns of a row a program
FLAT_BLOCK, FLAT_WARPS = 1024, 4  # values a program, whatever their rows
TILE_ROWS, TILE_STEP, TILE_BLOCK, TILE_WARPS = 64, 4, 256, 4  # rows of a tile, so many at a time; columns a program
SUM_TILES, SUM_BLOCK, SUM_WARPS = 64, 32, 4  # tiles at a time, and columns a program
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


def activation_gradient_(da_RH: Tensor, h_RH: Tensor, offsets_E: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``group_activation.activation_gradient_``: da becomes dh; the activation of h, and dh's sums by group. Skips
    other rows."""
    a_RH = torch.empty_like(h_RH)
    return a_RH, _sum_columns(da_RH, h_RH, a_RH, offsets_E, activation)


def grouped_sum(y_RN: Tensor, offsets_E: Tensor) -> Tensor:
    """``grouped_mm.grouped_sum``."""
    return _sum_columns(y_RN, y_RN, y_RN, offsets_E, "")  # without activation, the other two pointers are not used


def _sum_columns(y_RN: Tensor, h_RN: Tensor, a_RN: Tensor, offsets_E: Tensor, activation: str) -> Tensor:
    """[E, N]: the sums of y's rows by group. With an activation y first becomes, in place, its product with the
    activation's derivative at h, which is summed before it is rounded; and a the activation of h."""
    (rows, width), groups = y_RN.shape, offsets_E.numel()
    tiles = rows // TILE_ROWS + groups
    partial_tN = y_RN.new_empty(tiles, width, dtype=torch.promote_types(y_RN.dtype, torch.float32))
    sums_EN = y_RN.new_empty(groups, width)
    if sums_EN.numel():
        launch(
            _sum_rows_kernel, (tiles, triton.cdiv(width, TILE_BLOCK)),
            y_RN, h_RN, a_RN, partial_tN, offsets_E, width, groups,
            GROUPS=triton.next_power_of_2(groups), ACTIVATION=activation, COMPUTE_IN=sum_dtype(y_RN),
            ROWS=TILE_ROWS, STEP=TILE_STEP, BLOCK=TILE_BLOCK, num_warps=TILE_WARPS,
        )  # fmt: skip
        launch(
            _sum_tiles_kernel, (groups, triton.cdiv(width, SUM_BLOCK)), partial_tN, sums_EN, offsets_E, width,
            ROWS=TILE_ROWS, TILES=SUM_TILES, BLOCK=SUM_BLOCK, num_warps=SUM_WARPS,
        )  # fmt: skip
    return sums_EN


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
def _sum_rows_kernel(  # type: ignore[no-untyped-def]
    y, h, a, partial, offsets, width, groups,
    GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, COMPUTE_IN: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, GROUPS)
    starts = tl.load(offsets + place - 1, mask=(place > 0) & (place < groups), other=0)
    group = tl.sum(((place < groups) & (starts // ROWS + place <= tile)).to(tl.int32), axis=0) - 1
    start = tl.load(offsets + group - 1, mask=group > 0, other=0)
    end = tl.load(offsets + group)
    first = start + (tile - start // ROWS - group) * ROWS
    if first < end:
        column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([STEP, BLOCK], dtype=COMPUTE_IN)
        for step in range(0, tl.minimum(end - first, ROWS), STEP):
            row = first + step + tl.arange(0, STEP)
            inside = (row < end)[:, None] & (column < width)[None]
            index = row[:, None] * width + column[None]
            values = tl.load(y + index, mask=inside, other=0).to(COMPUTE_IN)
            if ACTIVATION != "":
                before = tl.load(h + index, mask=inside, other=0).to(COMPUTE_IN)
                activated, derivative = _activate(before, ACTIVATION)
                values *= derivative
                tl.store(y + index, values.to(y.dtype.element_ty), mask=inside)
                tl.store(a + index, activated.to(a.dtype.element_ty), mask=inside)
            total += values
        tl.store(partial + tile * width + column, tl.sum(total, axis=0), mask=column < width)


@triton.jit
def _sum_tiles_kernel(  # type: ignore[no-untyped-def]
    partial, sums, offsets, width,
    ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + group - 1, mask=group > 0, other=0)
    first = start // ROWS + group
    last = first + tl.cdiv(tl.load(offsets + group) - start, ROWS)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([TILES, BLOCK], dtype=partial.dtype.element_ty)
    for begin in range(first, last, TILES):
        tile = begin + tl.arange(0, TILES)
        inside = (tile < last)[:, None] & (column < width)[None]
        total += tl.load(partial + tile[:, None] * width + column[None], mask=inside, other=0)
    tl.store(sums + group * width + column, tl.sum(total, axis=0).to(sums.dtype.element_ty), mask=column < width)


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
