"""A Triton kernel of ``model.counter_random``: in plain PyTorch the bits take 26 operations, ``uniform`` of them 31.

Integers alone, but for the last step, which is exact, too: the same bits as there. Places are computed in int64. Run
under TRITON_INTERPRET=1 and compiled for sm_80 and sm_90, but not timed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from eve_ds.kernels.triton_kernels import launch

BLOCK, WARPS = 1024, 4
MOST_DIMENSIONS = 3
SIZES = ("count", "columns", "depth", "first_0", "first_1", "first_2", "second_0", "second_1", "second_2")

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


def random_numbers(key: int, first: Tensor, second: Tensor, uniform: bool) -> Tensor:
    """mix(mix(key ^ first) ^ second), int64; or ``uniform`` of it, float32.

    Args:
        key: an int64.
        first: int64.
        second: int64; both broadcast to at most ``MOST_DIMENSIONS`` dimensions.
        uniform: which of the two.
    """
    shape = torch.broadcast_shapes(first.shape, second.shape)
    if len(shape) > MOST_DIMENSIONS:
        raise ValueError(f"random numbers of shape {tuple(shape)}: at most {MOST_DIMENSIONS} dimensions")
    out = first.new_empty(shape, dtype=torch.float32 if uniform else torch.int64)
    if out.numel():
        _, columns, depth = sizes = (1,) * (MOST_DIMENSIONS - len(shape)) + tuple(shape)
        launch(
            _random_kernel, (triton.cdiv(out.numel(), BLOCK),),
            first, second, out, key, out.numel(), columns, depth, *first.expand(sizes).stride(),
            *second.expand(sizes).stride(), UNIFORM=uniform, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x += _GOLDEN
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=["key", *SIZES])  # or it would be compiled for several kinds of each
def _random_kernel(  # type: ignore[no-untyped-def]
    first, second, out, key, count, columns, depth, first_0, first_1, first_2, second_0, second_1, second_2,
    UNIFORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    row, column, cell = place // depth // columns, place // depth % columns, place % depth
    one = tl.load(first + row * first_0 + column * first_1 + cell * first_2, mask=inside, other=0)
    other = tl.load(second + row * second_0 + column * second_1 + cell * second_2, mask=inside, other=0)
    # Unsigned: a shift to the right brings zeros.
    bits = _mix(_mix(key.to(tl.uint64) ^ one.to(tl.uint64)) ^ other.to(tl.uint64))
    if UNIFORM:
        tl.store(out + place, ((bits >> 41).to(tl.float32) + 0.5) * 2.0**-23, mask=inside)
    else:
        tl.store(out + place, bits.to(tl.int64), mask=inside)
