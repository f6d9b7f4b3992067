"""Floating-point operations of the matrix products in a piece of code, counted by PyTorch while it runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

import torch
from torch.utils.flop_counter import FlopCounterMode


def _grouped_mm_flops(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: object, **__: object) -> int:
    """[R, K] x [E, K, N], or for a weight's gradient [N, R] x [R, K]: 2 R K N if every row belongs to a group."""
    return 2 * x_shape[0] * x_shape[1] * weight_shape[-1]


class _Counter(FlopCounterMode):
    """Without the wrapper that keeps torch.compile out of it: that imports the compiler, which takes 1.8 s."""

    def __enter__(self) -> Self:
        super().__enter__()
        kind: Any = type(self.mode)
        kind.__torch_dispatch__ = inspect.unwrap(kind.__torch_dispatch__)
        return self


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which also counts grouped products."""
    return _Counter(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flops})


def count_flops(run: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products in ``run()``, forward and backward; a multiply-add is two.

    Elementwise work (norms, activations, softmax) and gathers do not count. To count a model's operations, as the
    numerator of model FLOPs utilization (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B), run it on the meta
    device, without activation checkpointing: there experts' rows are not padded, attention is not fused (PyTorch counts
    the scores that a fused backward pass recomputes), and nothing is recomputed.
    """
    with flop_counter() as counter:
        run()
    return int(counter.get_total_flops())
