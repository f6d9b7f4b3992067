"""Kernels at Base sizes against float64 on the same inputs, with freed memory full of NaN: what a kernel leaves
unwritten is not zero by luck."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.kernels.expert_mlp import expert_mlp, reference
from eve_ds.kernels.layer_norm import layer_norm
from eve_ds.kernels.mlp import ACTIVATIONS, mlp
from eve_ds.kernels.permute import sort_by_expert
from tests.gpu.kit_sizes import Sizes

# Euclidean distance over the norm: a rounding in bf16 is 2^-9 = 2e-3 of a value at most, and a handful follow.
CLOSE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", list(CLOSE), ids=["bf16", "fp32"])


def poison(device: torch.device) -> None:
    """Fill memory that is free, as far as a kernel's buffers may reach, with NaN: what an allocator hands out again."""
    sizes = [2**10, 2**14] if device.type == "cpu" else [2**10, 2**14, 2**18, 2**22, 2**25, 2**28]  # values
    blocks = [torch.full((size,), torch.nan, device=device) for size in sizes for _ in range(16 if size < 2**28 else 4)]
    del blocks


def chosen_experts(pattern: str, tokens: int, experts: int, top_k: int) -> Tensor:
    """[T, k] int64: which experts the tokens go to; a token's experts differ."""
    rows = torch.arange(tokens)[:, None]
    choice = torch.arange(top_k)[None]
    if pattern == "even":
        return (rows * top_k + choice) % experts
    if pattern == "all to one":  # and second choices to nobody
        return torch.where(choice == 0, 3, experts).expand(tokens, top_k)
    if pattern == "half empty":
        return ((rows * top_k + choice) % (experts // 2)) * 2
    assert pattern == "uneven", pattern
    first = (torch.rand(tokens, 1, generator=torch.Generator().manual_seed(0)).square() * experts).long()
    return (first + choice) % experts


def outcome(function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """Output and the gradients of all inputs, float64 on the same device."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    y = function(*inputs)
    return [tensor.detach().double() for tensor in (y, *torch.autograd.grad(y, inputs, dy.to(y.dtype)))]


def compare(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], names: str
) -> dict[str, float]:
    """{name: distance of ours from float64, over the norm}, of output and gradients."""
    device, dtype = inputs[0].device, inputs[0].dtype
    doubles = [tensor.double() for tensor in inputs]
    with torch.no_grad():
        dy = torch.randn_like(plain(*doubles)).to(dtype)
    expected = outcome(plain, doubles, dy)
    poison(device)
    found = outcome(function, inputs, dy)
    errors = {}
    for name, ours, exact in zip(["y", *(f"d{name}" for name in names.split())], found, expected, strict=True):
        assert ours.shape == exact.shape and bool(ours.isfinite().all()), name
        norm = float(exact.norm())
        errors[name] = float((ours - exact).norm()) / norm if norm else float(ours.norm())
    return errors


def worst(errors: dict[str, float], dtype: torch.dtype) -> float:
    wrong = {name: f"{error:.1e}" for name, error in errors.items() if not error < CLOSE[dtype]}
    assert not wrong, f"beyond {CLOSE[dtype]}: {wrong}"
    return max(errors.values())


def draw(device: torch.device, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal values, matrices scaled so that their products keep the size of their input."""
    torch.manual_seed(0)
    scales = [shape[-1] ** -0.5 if len(shape) > 1 and index else 1.0 for index, shape in enumerate(shapes)]
    return [(torch.randn(s, device=device) * scale).to(dtype) for s, scale in zip(shapes, scales, strict=True)]


@DTYPES
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("pattern", ["even", "uneven", "all to one", "half empty", "no rows"])
def test_experts(
    pattern: str, top_k: int, activation: str, dtype: torch.dtype, device: torch.device, sizes: Sizes, figures: Any
) -> None:
    tokens = 0 if pattern == "no rows" else sizes.tokens
    chosen = chosen_experts("even" if pattern == "no rows" else pattern, tokens, sizes.experts, top_k)
    counts = torch.bincount(chosen.flatten(), minlength=sizes.experts + 1)[: sizes.experts].tolist()
    layout = sort_by_expert(chosen.flatten().to(device), counts)
    dim, hidden, experts = sizes.dim, sizes.hidden, sizes.experts
    shapes = (tokens, dim), (tokens, top_k), (experts, hidden, dim), (experts, hidden), (experts, dim, hidden)
    inputs = draw(device, dtype, *shapes, (experts, dim))
    ours, plain = (functools.partial(f, layout=layout, activation=activation) for f in (expert_mlp, reference))
    errors = compare(ours, plain, inputs, "x weights fc1_weight fc1_bias fc2_weight fc2_bias")
    name = f"experts {str(dtype)[6:]}, worst"
    figures[name] = max(worst(errors, dtype), figures.get(name, 0.0))


@DTYPES
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("rows", ["some", "none"])
def test_mlp(rows: str, activation: str, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> None:
    count, dim, hidden = sizes.tokens if rows == "some" else 0, sizes.dim, sizes.hidden
    inputs = draw(device, dtype, (count, dim), (hidden, dim), (hidden,), (dim, hidden), (dim,))

    def plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        return F.linear(ACTIVATIONS[activation](F.linear(x, w1, b1)), w2, b2)

    errors = compare(functools.partial(mlp, activation=activation), plain, inputs, "x w1 b1 w2 b2")
    worst(errors, dtype)


@DTYPES
@pytest.mark.parametrize("contiguous", [True, False])
def test_layer_norm(contiguous: bool, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> None:
    x, weight, bias = draw(device, dtype, (sizes.tokens, 2 * sizes.dim), (sizes.dim,), (sizes.dim,))
    x = x[:, : sizes.dim] if not contiguous else x[:, : sizes.dim].contiguous()

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        return x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt() * weight + bias

    worst(compare(functools.partial(layer_norm, eps=1e-6), plain, [x, weight, bias], "x weight bias"), dtype)
