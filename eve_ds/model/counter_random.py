"""Counter-based random numbers: pure functions of (seed, stream, two numbers), the same on any rank and device.

splitmix64's finalizer over the four; a batch is one vectorized call on its own device, and there is no state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eve_ds.kernels.choices import triton_serves


def _signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; int64's own drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """One splitmix64 step (Steele, Lea and Flood, OOPSLA 2014): int64 in, int64 out, products wrap around."""
    x = x + _GOLDEN
    x = (x ^ shift_right(x, 30)) * _MIX_1
    x = (x ^ shift_right(x, 27)) * _MIX_2
    return x ^ shift_right(x, 31)


def random_bits(seed: int, stream: int, first: Tensor, second: Tensor) -> Tensor:
    """Random int64 of (seed, stream, first, second); ``first`` and ``second`` are int64 and broadcast, to at most three
    dimensions."""
    return _numbers(_key(seed, stream), first, second, False)


def random_uniform(seed: int, stream: int, first: Tensor, second: Tensor) -> Tensor:
    """``uniform`` of ``random_bits``."""
    return _numbers(_key(seed, stream), first, second, True)


def _numbers(key: int, first: Tensor, second: Tensor, as_uniform: bool) -> Tensor:
    # The compiler fuses the formula by itself, and cannot trace the question whether Triton serves: so that comes last.
    if not torch.compiler.is_compiling() and triton_serves(first):
        from eve_ds.kernels import triton_random  # imports triton, which need not be installed

        return triton_random.random_numbers(key, first, second, as_uniform)
    return plain_numbers(key, first, second, as_uniform)


def plain_numbers(key: int, first: Tensor, second: Tensor, as_uniform: bool) -> Tensor:
    """``triton_random.random_numbers`` by torch's operations."""
    bits = mix(mix(key ^ first) ^ second)
    return uniform(bits) if as_uniform else bits


def _key(seed: int, stream: int) -> int:
    return _mixed(_mixed(seed) ^ stream)


def _mixed(value: int) -> int:
    """``mix`` of a number, without an operation on the device."""
    value = (value + _GOLDEN) % 2**64
    value = (value ^ value >> 30) * _MIX_1 % 2**64
    value = (value ^ value >> 27) * _MIX_2 % 2**64
    return _signed(value ^ value >> 31)


def uniform(bits: Tensor) -> Tensor:
    """Random int64 to float32 strictly between 0 and 1 (top 23 bits: one more and the largest would round to 1)."""
    return (shift_right(bits, 41).to(torch.float32) + 0.5) * 2.0**-23
