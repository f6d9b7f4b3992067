"""``grouped_mm.add_group_bias_`` as one Triton kernel: a launch for all groups, one read and one write of the rows.

Run under TRITON_INTERPRET=1 and compiled for sm_80 and sm_90; not timed, since no GPU was available.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # columns a program
WARPS = 2


def add_group_bias_(y_RN: Tensor, bias_EN: Tensor, offsets_E: Tensor) -> Tensor:
    """Add ``bias[e]`` to the rows before ``offsets[e]`` that are in no earlier group; zero the rows after the last.

    Args:
        y_RN: [R, N] contiguous.
        bias_EN: [E, N], dense rows.
        offsets_E: [E] int32, where each group ends.
    """
    rows, width = y_RN.shape
    groups = offsets_E.numel()
    if y_RN.numel():
        _bias_kernel[(rows, triton.cdiv(width, BLOCK))](
            y_RN, bias_EN, offsets_E, width, bias_EN.stride(0), groups,
            GROUPS=triton.next_power_of_2(groups), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return y_RN


@triton.jit
def _bias_kernel(  # type: ignore[no-untyped-def]
    y, bias, offsets, width, bias_stride, groups,
    GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    place = tl.arange(0, GROUPS)
    ends = tl.load(offsets + place, mask=place < groups, other=2147483647)
    group = tl.sum((ends <= row).to(tl.int32), axis=0)  # groups that end before this row
    if group < groups:
        values = tl.load(y + row * width + column, mask=inside, other=0).to(tl.float32)
        values += tl.load(bias + group.to(tl.int64) * bias_stride + column, mask=inside, other=0).to(tl.float32)
    else:
        values = tl.zeros([BLOCK], dtype=tl.float32)
    tl.store(y + row * width + column, values.to(y.dtype.element_ty), mask=inside)
