"""kernels/mlp.py against plain autograd."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eve_ds.kernels import mlp as module
from eve_ds.kernels.mlp import ACTIVATIONS, mlp, reference

DIM, HIDDEN = 8, 24


def tensors(counts: list[int], extra: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """x, w1, b1, w2, b2 for ``counts`` rows and ``extra`` rows of no network."""
    torch.manual_seed(seed)
    networks = len(counts)
    shapes = [
        (sum(counts) + extra, DIM),
        (networks, HIDDEN, DIM),
        (networks, HIDDEN),
        (networks, DIM, HIDDEN),
        (networks, DIM),
    ]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def both(counts: list[int], extra: int, dtype: torch.dtype, activation: str) -> tuple[list[Tensor], list[Tensor]]:
    """Output and all gradients of ours and of the reference."""
    results = []
    for function in (mlp, reference):
        inputs = tensors(counts, extra, dtype)
        y = function(*inputs, counts, activation)
        weights = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, weights)])
    return results[0], results[1]


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    extra=st.integers(0, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_values_and_gradients_equal_the_reference(counts: list[int], extra: int, activation: str) -> None:
    ours, plain = both(counts, extra, torch.float64, activation)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("counts", [[16, 0, 7, 3], [5]])
def test_grouped_products_equal_the_reference(
    counts: list[int], activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path for GPUs with grouped kernels; each product then falls back to what this device has."""
    monkeypatch.setattr(module, "has_grouped_kernel", lambda device: True)
    ours, plain = both(counts, 2, torch.float64, activation)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bf16_is_as_close_to_the_truth_as_plain_autograd(activation: str) -> None:
    counts = [16, 7, 0, 9]
    ours, plain = both(counts, 1, torch.bfloat16, activation)
    exact = [t.detach().double().requires_grad_() for t in tensors(counts, 1, torch.bfloat16)]
    y = reference(*exact, counts, activation)
    truth = [
        y.detach(),
        *torch.autograd.grad(y, exact, torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().double()),
    ]
    for a, b, t in zip(ours, plain, truth, strict=True):
        error, allowed = (a.double() - t).norm(), (b.double() - t).norm()
        assert error <= 1.3 * allowed + 1e-3 * t.norm()


def test_quick_gelu_is_its_formula() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS["quick_gelu"](x), x * torch.sigmoid(1.702 * x))


def test_gradients_on_meta() -> None:
    inputs = [t.detach().to("meta").requires_grad_() for t in tensors([3, 2], 1, torch.float32)]
    mlp(*inputs, [3, 2], "gelu").sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs)
