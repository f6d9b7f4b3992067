"""kernels/expert_mlp.py against plain autograd.

tests/e2e/test_triton.py runs some of this file again with TRITON_INTERPRET=1, where Triton kernels serve CPU tensors.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eve_ds.kernels import grouped_mm, groups, permute
from eve_ds.kernels.expert_mlp import expert_mlp, reference
from eve_ds.kernels.mlp import ACTIVATIONS
from eve_ds.kernels.permute import Layout

DIM, HIDDEN = 8, 24
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def layout(chosen: list[list[int]], num_experts: int, padding: int, device: str = "cpu") -> Layout:
    """Rows sorted by expert, ``padding`` rows more for each expert that has tokens; ``num_experts`` stands for none."""
    flat = [expert for row in chosen for expert in row]
    order: list[int] = []
    for expert in sorted(set(flat) - {num_experts}):
        order += [row for row, one in enumerate(flat) if one == expert] + [len(flat)] * padding
    order += [row for row, one in enumerate(flat) if one == num_experts]
    inverse = [order.index(row) for row in range(len(flat))]
    counts = [flat.count(expert) for expert in range(num_experts)]
    padded = [count + padding * (count > 0) for count in counts]
    return Layout(
        torch.tensor(order, device=device).long(), torch.tensor(inverse, device=device).long(), counts, padded
    )


def tensors(tokens: int, top_k: int, num_experts: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x, weights of choices, fc1's weight and bias, fc2's weight and bias."""
    torch.manual_seed(0)
    shapes = [
        (tokens, DIM),
        (tokens, top_k),
        (num_experts, HIDDEN, DIM),
        (num_experts, HIDDEN),
        (num_experts, DIM, HIDDEN),
    ]
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in [*shapes, (num_experts, DIM)]]


def both(
    chosen: list[list[int]],
    num_experts: int,
    padding: int,
    dtype: torch.dtype,
    activation: str,
    use_grouped_mm: bool,
    weigh: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and all gradients of ours and of the reference."""
    top_k = len(chosen[0]) if chosen else 2
    results = []
    for function in (partial(expert_mlp, use_grouped_mm=use_grouped_mm), reference):
        x, weights, *parameters = tensors(len(chosen), top_k, num_experts, dtype)
        y = function(x, weights if weigh else None, *parameters, layout(chosen, num_experts, padding), activation)
        gradient = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        inputs = [x, weights, *parameters] if weigh else [x, *parameters]
        results.append([y.detach(), *torch.autograd.grad(y, inputs, gradient)])
    return results[0], results[1]


EXPERTS = 3
tokens_of = st.integers(1, 3).flatmap(
    lambda top_k: st.lists(st.lists(st.integers(0, EXPERTS), min_size=top_k, max_size=top_k), max_size=6)
)


# "grouped" is the path for GPUs with grouped kernels; each product then falls back to what this device has.
WAYS = pytest.mark.parametrize("use_grouped_mm", [False, True], ids=["looped", "grouped"])


@WAYS
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_values_and_gradients_equal_the_reference(activation: str, use_grouped_mm: bool) -> None:
    @settings(max_examples=25)
    @given(chosen=tokens_of, padding=st.integers(0, 2))
    def check(chosen: list[list[int]], padding: int) -> None:
        ours, plain = both(chosen, EXPERTS, padding, torch.float64, activation, use_grouped_mm)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    check()


@WAYS
@pytest.mark.parametrize("padding", [0, 2])
def test_without_weights(padding: int, use_grouped_mm: bool) -> None:
    ours, plain = both([[1], [3], [0], [1]], EXPERTS, padding, torch.float64, "gelu", use_grouped_mm, weigh=False)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@WAYS
def test_a_choice_of_weight_zero_still_has_a_gradient(use_grouped_mm: bool) -> None:
    """As a gate that has underflowed."""
    results = []
    for function in (partial(expert_mlp, use_grouped_mm=use_grouped_mm), reference):
        x, weights, *parameters = tensors(3, 2, 2, torch.float64)
        weights = weights.detach().clone()
        weights[1] = 0
        weights.requires_grad_()
        function(x, weights, *parameters, layout([[0, 1]] * 3, 2, 1), "gelu").sum().backward()
        results.append(weights.grad)
    assert results[0][1].all()
    torch.testing.assert_close(*results, **CLOSE)


@WAYS
def test_padding_rows_and_unrouted_tokens_add_nothing(use_grouped_mm: bool) -> None:
    """An expert that gives infinities, whose padding rows hold some other token; and a NaN token that is not routed."""
    x, weights, *parameters = (t.detach() for t in tensors(4, 1, 2, torch.float64))
    x[3] = torch.nan
    parameters[3][0] = torch.inf
    y = expert_mlp(x, weights, *parameters, layout([[0], [1], [1], [2]], 2, 2), "gelu", use_grouped_mm)
    assert y.isfinite().all(dim=1).tolist() == [False, True, True, True] and not y[3].any()


@WAYS
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bf16_is_as_close_to_the_truth_as_plain_autograd(activation: str, use_grouped_mm: bool) -> None:
    chosen = [[i % 4, (i + 1 + i // 4 % 3) % 4] for i in range(32)]
    ours, plain = both(chosen, EXPERTS, 1, torch.bfloat16, activation, use_grouped_mm)
    exact = [t.detach().double().requires_grad_() for t in tensors(32, 2, EXPERTS, torch.bfloat16)]
    y = reference(*exact, layout(chosen, EXPERTS, 1), activation)
    gradient = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().double()
    for a, b, t in zip(ours, plain, [y.detach(), *torch.autograd.grad(y, exact, gradient)], strict=True):
        error, allowed = (a.double() - t).norm(), (b.double() - t).norm()
        assert error <= 1.3 * allowed + 2e-3 * t.norm()


@WAYS
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_kept_of_the_rows_is_one_tensor_before_the_activation(device: str, use_grouped_mm: bool) -> None:
    """Beyond the caller's own tensors; the grouped function keeps fc2's results, too."""
    kept: list[Tensor] = []
    inputs = tensors(12, 2, EXPERTS, torch.float32, device)
    places = layout([[0, 1]] * 12, EXPERTS, 0, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        expert_mlp(*inputs, places, "gelu", use_grouped_mm)
    theirs = {t.data_ptr() for t in [*inputs, places.order, places.inverse]}
    shapes = [tuple(t.shape) for t in kept if t.data_ptr() not in theirs]
    assert shapes == [(24, HIDDEN)] + [(24, DIM)] * use_grouped_mm


@WAYS
def test_gradients_on_meta(use_grouped_mm: bool) -> None:
    inputs = [t.detach().to("meta").requires_grad_() for t in tensors(4, 2, 2, torch.float32)]
    places = Layout(
        torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(8, device="meta").long(), [4, 4], [4, 4]
    )
    expert_mlp(*inputs, places, "gelu", use_grouped_mm).sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs)


@pytest.mark.parametrize(("use_grouped_mm", "reads"), [(False, 1), (True, 0)], ids=["looped", "grouped"])
def test_loads_on_the_device_are_read_back_once_or_never(
    use_grouped_mm: bool, reads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both passes together."""
    seen: list[Tensor] = []
    for module in (permute, groups):
        monkeypatch.setattr(module, "to_host", lambda counts, rows: (seen.append(counts), counts.tolist())[1])
    monkeypatch.setattr(grouped_mm, "has_grouped_kernel", lambda device: True)
    inputs = tensors(6, 2, EXPERTS, torch.bfloat16)
    places = layout([[0, 2]] * 6, EXPERTS, 0)
    on_device = Layout(places.order, places.inverse, torch.tensor([6, 0, 6]))
    expert_mlp(*inputs, on_device, "gelu", use_grouped_mm).sum().backward()
    assert len(seen) == reads
