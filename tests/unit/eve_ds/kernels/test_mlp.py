"""kernels/mlp.py against plain autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.kernels.mlp import ACTIVATIONS, mlp

DIM, HIDDEN = 8, 24


def reference(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, activation: str) -> Tensor:
    return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)


def tensors(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """x, w1, b1, w2, b2."""
    torch.manual_seed(0)
    shapes = [(rows, DIM), (HIDDEN, DIM), (HIDDEN,), (DIM, HIDDEN), (DIM,)]
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def both(rows: int, dtype: torch.dtype, activation: str) -> tuple[list[Tensor], list[Tensor]]:
    """Output and all gradients of ours and of the reference."""
    results = []
    for function in (mlp, reference):
        inputs = tensors(rows, dtype)
        y = function(*inputs, activation)
        weights = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, weights)])
    return results[0], results[1]


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_values_and_gradients_equal_the_reference(rows: int, activation: str) -> None:
    for a, b in zip(*both(rows, torch.float64, activation), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bf16_is_as_close_to_the_truth_as_plain_autograd(activation: str) -> None:
    ours, plain = both(32, torch.bfloat16, activation)
    exact = [t.detach().double().requires_grad_() for t in tensors(32, torch.bfloat16)]
    y = reference(*exact, activation)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().double()
    truth = [y.detach(), *torch.autograd.grad(y, exact, weights)]
    for a, b, t in zip(ours, plain, truth, strict=True):
        error, allowed = (a.double() - t).norm(), (b.double() - t).norm()
        assert error <= 1.3 * allowed + 1e-3 * t.norm()


def test_quick_gelu_is_its_formula() -> None:
    x = torch.linspace(-5, 5, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS["quick_gelu"](x), x * torch.sigmoid(1.702 * x))


def test_gradients_on_meta() -> None:
    inputs = [t.detach().to("meta").requires_grad_() for t in tensors(5, torch.float32)]
    mlp(*inputs, "gelu").sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs)
