"""The experts' layer against float64 where loads are extreme, inputs are not contiguous, and fresh memory holds NaN.

tests/e2e/test_triton.py runs this file again with TRITON_INTERPRET=1, where the Triton kernels serve CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from eve_ds.kernels import expert_mlp as module
from eve_ds.kernels import grouped_mm
from eve_ds.kernels.expert_mlp import expert_mlp, reference
from eve_ds.kernels.mlp import ACTIVATIONS
from eve_ds.kernels.permute import Layout, sort_by_expert

DEVICES = ["cpu", *["cuda", "cuda:1"][: torch.cuda.device_count()]]  # the second is never the current one
EXPERTS, DIM, HIDDEN = 4, 16, 24
CHOSEN = {  # the expert of each choice; 4 stands for none
    "no token": [],
    "no token to any expert": [4, 4, 4, 4, 4, 4],
    "all to one expert": [2] * 12,
    "half of the experts empty": [1, 3, 3, 1, 1, 4, 4, 3],
    "even": [0, 1, 2, 3, 3, 2, 1, 0],
}
TOLERANCE = {torch.float64: 1e-10, torch.bfloat16: 2e-2}  # of a tensor's norm


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN; torch's grouped kernel writes none where it promises nothing (pytorch/pytorch#172439)."""

    def poisoned(x: Tensor, y: Tensor, offs: Tensor) -> Tensor:
        out = original(x, y, offs=offs)
        if y.dim() == 2:
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        else:
            out[int(offs[-1]) :] = torch.nan
        return out

    original = torch.nn.functional.grouped_mm
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
    monkeypatch.setattr(grouped_mm, "has_grouped_kernel", lambda device: True)
    monkeypatch.setattr(module, "reused_empty_like", lambda like: torch.full_like(like, torch.nan))
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def layout_of(chosen: list[int], padded: bool, device: str) -> Layout:
    """As on the CPU, or as on a GPU: without padding, counts on the device."""
    expert = torch.tensor(chosen, dtype=torch.int64, device=device)
    counts = torch.bincount(expert, minlength=EXPERTS + 1)[:EXPERTS]
    if padded:
        return sort_by_expert(expert, counts)
    order = expert.argsort(stable=True)
    return Layout(order, order.argsort(), counts)


def inputs(tokens: int, top_k: int, dtype: torch.dtype, device: str, strided: bool) -> list[Tensor]:
    """x, weights of choices, fc1's weight and bias, fc2's weight and bias, and the output's gradient."""
    torch.manual_seed(0)
    made = [
        torch.randn(shape).to(device, dtype)
        for shape in (
            (tokens, DIM), (tokens, top_k), (EXPERTS, HIDDEN, DIM), (EXPERTS, HIDDEN), (EXPERTS, DIM, HIDDEN),
            (EXPERTS, DIM), (tokens, DIM),
        )
    ]  # fmt: skip
    if strided:  # x and the gradient by column, the weights of choices too, biases as parts of wider rows
        made = [t.t().contiguous().t() if i in (0, 1, 6) else t for i, t in enumerate(made)]
        made = [torch.cat([t, t], dim=1)[:, : t.shape[1]] if i in (3, 5) else t for i, t in enumerate(made)]
    return [t.detach().requires_grad_(i < 6) for i, t in enumerate(made)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("way", ["looped", "grouped", "grouped, padded"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("load", CHOSEN)
def test_values_and_gradients(
    load: str, activation: str, top_k: int, dtype: torch.dtype, way: str, strided: bool, device: str
) -> None:
    tokens = len(CHOSEN[load]) // top_k
    layout = layout_of(CHOSEN[load], way == "grouped, padded" and device == "cpu", device)

    def run(function: Any, dtype: torch.dtype, layout: Layout) -> list[Tensor]:
        *leaves, gradient = inputs(tokens, top_k, torch.bfloat16, device, strided)
        leaves = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
        y = function(*leaves, layout, activation)
        return [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(dtype))]

    ours = run(partial(expert_mlp, use_grouped_mm=way != "looped"), dtype, layout)
    for a, b in zip(ours, run(reference, torch.float64, layout), strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= TOLERANCE[dtype] * b.norm()
        assert a[b == 0].count_nonzero() == 0  # exactly zero: experts without tokens, tokens without experts
