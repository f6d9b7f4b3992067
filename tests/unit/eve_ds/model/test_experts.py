"""The grouped experts against one feed-forward network at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eve_ds.kernels.mlp import ACTIVATIONS
from eve_ds.kernels.permute import Layout
from eve_ds.model.experts import Experts


def as_they_lie(rows: int, counts: list[int]) -> Layout:
    return Layout(torch.arange(rows), torch.arange(rows), counts, counts)


def one_by_one(experts: Experts, rows: Tensor, counts: list[int]) -> Tensor:
    """Rows beyond the counts come out as zeros."""
    parts, hidden = [], experts.w1.shape[1]
    for index, part in enumerate(rows.split([*counts, len(rows) - sum(counts)])[:-1]):
        bias = experts.w3[index, 0]
        inner = ACTIVATIONS[experts.activation](part @ experts.w1[index].t() + bias[:hidden])
        parts.append(inner @ experts.w2[index].t() + bias[hidden:])
    return torch.cat([*parts, torch.zeros_like(rows[sum(counts) :])])


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    surplus=st.integers(0, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
def test_outputs_and_gradients(counts: list[int], surplus: int, activation: str) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 6, len(counts), activation, seed=1).double()
    with torch.no_grad():
        experts.w3.normal_()
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
    assert torch.equal(whole.w1[4:], half.w1) and torch.equal(whole.w2[4:], half.w2)
    assert not torch.equal(whole.w1[0], whole.w1[1])
    assert not torch.equal(Experts(4, 6, 8, "gelu", seed=4).w1, whole.w1)
    assert 0.015 < Experts(64, 64, 1, "gelu", seed=3).w1.std() < 0.025
    assert not whole.w3.any()


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
    assert out.dtype == rows.grad.dtype == experts.w1.grad.dtype == dtype
