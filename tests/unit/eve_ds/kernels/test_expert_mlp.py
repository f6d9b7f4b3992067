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

from eve_ds.kernels.choices import triton_is_interpreted
from eve_ds.kernels.expert_mlp import expert_mlp, reference
from eve_ds.kernels.mlp import ACTIVATIONS
from eve_ds.kernels.permute import Layout

DIM, HIDDEN = 8, 24
CLOSE = dict.fromkeys(("rtol", "atol"), 1e-5 if triton_is_interpreted() else 1e-10)  # that for biases adds in float32
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def layout(chosen: list[list[int]], networks: int, padding: int, device: str = "cpu") -> Layout:
    """Rows sorted by network, ``padding`` empty slots behind those of a network; ``networks`` stands for none."""
    flat = [network for row in chosen for network in row]
    order: list[int] = []
    for network in sorted(set(flat) - {networks}):
        order += [row for row, one in enumerate(flat) if one == network] + [len(flat)] * padding
    order += [row for row, one in enumerate(flat) if one == networks]
    inverse = [order.index(row) for row in range(len(flat))]
    counts = [flat.count(network) for network in range(networks)]
    slots = [count + padding * (count > 0) for count in counts]
    return Layout(torch.tensor(order, device=device).long(), torch.tensor(inverse, device=device).long(), counts, slots)


def tensors(tokens: int, top_k: int, networks: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """x, weights of choices, w1, b1, w2, b2."""
    torch.manual_seed(0)
    shapes = [(tokens, DIM), (tokens, top_k), (networks, HIDDEN, DIM), (networks, HIDDEN), (networks, DIM, HIDDEN)]
    return [torch.randn(shape).to(device, dtype).requires_grad_() for shape in [*shapes, (networks, DIM)]]


def both(
    chosen: list[list[int]],
    networks: int,
    padding: int,
    dtype: torch.dtype,
    activation: str,
    one_launch: bool,
    weigh: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Output and all gradients of ours and of the reference."""
    top_k = len(chosen[0]) if chosen else 2
    results = []
    for function in (partial(expert_mlp, one_launch=one_launch), reference):
        x, weights, *networks_ = tensors(len(chosen), top_k, networks, dtype)
        y = function(x, weights if weigh else None, *networks_, layout(chosen, networks, padding), activation)
        gradient = torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)
        inputs = [x, weights, *networks_] if weigh else [x, *networks_]
        results.append([y.detach(), *torch.autograd.grad(y, inputs, gradient)])
    return results[0], results[1]


NETWORKS = 3
tokens_of = st.integers(1, 3).flatmap(
    lambda top_k: st.lists(st.lists(st.integers(0, NETWORKS), min_size=top_k, max_size=top_k), max_size=6)
)


# "one launch" is the path for GPUs with grouped kernels; each product then falls back to what this device has.
WAYS = pytest.mark.parametrize("one_launch", [False, True], ids=["in turn", "one launch"])


@WAYS
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_values_and_gradients_equal_the_reference(activation: str, one_launch: bool) -> None:
    @settings(max_examples=25, deadline=None)
    @given(chosen=tokens_of, padding=st.integers(0, 2))
    def check(chosen: list[list[int]], padding: int) -> None:
        ours, plain = both(chosen, NETWORKS, padding, torch.float64, activation, one_launch)
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)

    check()


@WAYS
@pytest.mark.parametrize("padding", [0, 2])
def test_without_weights(padding: int, one_launch: bool) -> None:
    ours, plain = both([[1], [3], [0], [1]], NETWORKS, padding, torch.float64, "gelu", one_launch, weigh=False)
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@WAYS
def test_a_choice_of_weight_zero_still_has_a_gradient(one_launch: bool) -> None:
    """As a gate that has underflowed."""
    results = []
    for function in (partial(expert_mlp, one_launch=one_launch), reference):
        x, weights, *networks = tensors(3, 2, 2, torch.float64)
        weights = weights.detach().clone()
        weights[1] = 0
        weights.requires_grad_()
        function(x, weights, *networks, layout([[0, 1]] * 3, 2, 1), "gelu").sum().backward()
        results.append(weights.grad)
    assert results[0][1].all()
    torch.testing.assert_close(*results, **CLOSE)


@WAYS
def test_what_a_network_makes_of_other_tokens_stays_there(one_launch: bool) -> None:
    """A network that gives infinities, whose empty slots hold some other token, and a broken token that visits none."""
    x, weights, *networks = (t.detach() for t in tensors(4, 1, 2, torch.float64))
    x[3] = torch.nan
    networks[3][0] = torch.inf
    y = expert_mlp(x, weights, *networks, layout([[0], [1], [1], [2]], 2, 2), "gelu", one_launch)
    assert y.isfinite().all(dim=1).tolist() == [False, True, True, True] and not y[3].any()


@WAYS
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bf16_is_as_close_to_the_truth_as_plain_autograd(activation: str, one_launch: bool) -> None:
    chosen = [[i % 4, (i + 1 + i // 4 % 3) % 4] for i in range(32)]
    ours, plain = both(chosen, NETWORKS, 1, torch.bfloat16, activation, one_launch)
    exact = [t.detach().double().requires_grad_() for t in tensors(32, 2, NETWORKS, torch.bfloat16)]
    y = reference(*exact, layout(chosen, NETWORKS, 1), activation)
    gradient = torch.linspace(-1, 1, y.numel()).view_as(y).bfloat16().double()
    for a, b, t in zip(ours, plain, [y.detach(), *torch.autograd.grad(y, exact, gradient)], strict=True):
        error, allowed = (a.double() - t).norm(), (b.double() - t).norm()
        assert error <= 1.3 * allowed + 2e-3 * t.norm()


@WAYS
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_kept_of_the_rows_is_one_tensor_before_the_activation(device: str, one_launch: bool) -> None:
    """Beyond the caller's own tensors; on GPUs with grouped kernels the networks' results too."""
    kept: list[Tensor] = []
    inputs = tensors(12, 2, NETWORKS, torch.float32, device)
    places = layout([[0, 1]] * 12, NETWORKS, 0, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        expert_mlp(*inputs, places, "gelu", one_launch)
    theirs = {t.data_ptr() for t in [*inputs, places.order, places.inverse]}
    shapes = [tuple(t.shape) for t in kept if t.data_ptr() not in theirs]
    assert shapes == [(24, HIDDEN)] + [(24, DIM)] * one_launch


@WAYS
def test_gradients_on_meta(one_launch: bool) -> None:
    inputs = [t.detach().to("meta").requires_grad_() for t in tensors(4, 2, 2, torch.float32)]
    places = Layout(
        torch.empty(8, dtype=torch.int64, device="meta"), torch.empty(8, device="meta").long(), [4, 4], [4, 4]
    )
    expert_mlp(*inputs, places, "gelu", one_launch).sum().backward()
    assert all(t.grad is not None and t.grad.shape == t.shape for t in inputs)
