"""The grouped experts against one feed-forward network at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eve_ds.kernels.mlp import ACTIVATIONS
from eve_ds.kernels.permute import Layout
from eve_ds.model.experts import Experts, pack_biases


def as_they_lie(rows: int, counts: list[int]) -> Layout:
    return Layout(torch.arange(rows), torch.arange(rows), counts, counts)


def one_by_one(experts: Experts, rows: Tensor, counts: list[int]) -> Tensor:
    """Rows beyond the counts come out as zeros."""
    parts = []
    for index, part in enumerate(rows.split([*counts, len(rows) - sum(counts)])[:-1]):
        inner = ACTIVATIONS[experts.activation](part @ experts.fc1_weight[index].t() + experts.fc1_bias[index])
        parts.append(inner @ experts.fc2_weight[index].t() + experts.fc2_bias[index])
    return torch.cat([*parts, torch.zeros_like(rows[sum(counts) :])])


@settings(max_examples=30)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    surplus=st.integers(0, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_outputs_and_gradients(counts: list[int], surplus: int, activation: str) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 6, len(counts), activation, seed=1).double()
    with torch.no_grad():
        experts.fc1_bias.normal_()
        experts.fc2_bias.normal_()
    rows = torch.randn(sum(counts) + surplus, 4, dtype=torch.float64, requires_grad=True)
    inputs = (rows, *experts.parameters())
    ours, theirs = experts(rows, None, as_they_lie(len(rows), counts)), one_by_one(experts, rows, counts)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    mine = torch.autograd.grad((ours * weight).sum(), inputs)
    other = torch.autograd.grad((theirs * weight).sum(), inputs, allow_unused=True)
    for ours_grad, theirs_grad in zip(mine, other, strict=True):
        torch.testing.assert_close(ours_grad, torch.zeros_like(ours_grad) if theirs_grad is None else theirs_grad)


def test_first_values_depend_on_seed_and_global_index_alone() -> None:
    whole, half = Experts(4, 6, 8, "gelu", seed=3), Experts(4, 6, 4, "gelu", seed=3, first=4)
    assert torch.equal(whole.fc1_weight[4:], half.fc1_weight) and torch.equal(whole.fc2_weight[4:], half.fc2_weight)
    assert not torch.equal(whole.fc1_weight[0], whole.fc1_weight[1])
    assert not torch.equal(Experts(4, 6, 8, "gelu", seed=4).fc1_weight, whole.fc1_weight)
    assert 0.015 < Experts(64, 64, 1, "gelu", seed=3).fc1_weight.std() < 0.025
    assert not whole.fc1_bias.any() and not whole.fc2_bias.any()


def test_std_scales_the_same_draws() -> None:
    """Bit for bit what scaling the default values gives: recipes of other deviations keep their initial weights."""
    wide, default = (Experts(4, 6, 2, "gelu", seed=3, **{"std": std} if std else {}) for std in (0.17, None))
    assert torch.equal(wide.fc1_weight, default.fc1_weight * (0.17 / 0.02))
    assert torch.equal(wide.fc2_weight, default.fc2_weight * (0.17 / 0.02))


def test_parameters_have_the_names_that_deepspeed_saves() -> None:
    experts = Experts(4, 6, 2, "gelu", seed=3)
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "w1": (2, 6, 4), "w2": (2, 4, 6), "w3": (2, 1, 10),
    }  # fmt: skip
    biases = experts.fc1_bias, experts.fc2_bias
    assert [tuple(bias.shape) for bias in biases] == [(2, 6), (2, 4)]
    assert torch.equal(pack_biases(*biases), experts.w3)


def test_first_values_leave_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Experts(4, 6, 2, "gelu", seed=3)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    experts = Experts(4, 6, 2, "gelu", seed=0).to(dtype)
    rows = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    out = experts(rows, None, as_they_lie(5, [2, 3]))
    out.sum().backward()
    assert out.dtype == rows.grad.dtype == experts.fc1_weight.grad.dtype == dtype
