"""Tensors of more than 2^31 elements: kernels against plain PyTorch, and the experts' layer against float64.

The reading of such tensors is tested without a GPU, too (tests/unit/eve_ds/kernels/test_permute.py), and so is that all
kernels compute places in int64 (test_triton.py there).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eve_ds.kernels import permute
from eve_ds.kernels.expert_mlp import expert_mlp, reference
from eve_ds.kernels.group_activation import activation_gradient_, bias_activation_
from eve_ds.kernels.grouped_mm import add_group_bias_, grouped_sum
from eve_ds.kernels.groups import Groups, zero_empty_groups_, zero_rest_
from eve_ds.kernels.mlp import ACTIVATIONS
from eve_ds.kernels.permute import sort_by_expert

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROWS, WIDTH, ENDS = 2**21 + 8, 1024, 16  # 4 GiB of bf16; so many first and last rows are compared


def small_numbers(rows: int, width: int) -> Tensor:
    """-3 .. 3 in bf16, of which sums are exact."""
    return torch.randint(-3, 4, (rows, width), dtype=torch.int8, device="cuda").bfloat16()


def ends(rows: Tensor) -> Tensor:
    return torch.cat([rows[:ENDS], rows[-ENDS:]])


def test_rows() -> None:
    tokens = ROWS // 2
    x, order = small_numbers(tokens, WIDTH), torch.arange(ROWS, device="cuda").flip(0)
    assert order.numel() * WIDTH > 2**31
    operations = permute.operations(x)
    rows = operations.gather_rows(x, order, ROWS, 2)
    assert torch.equal(ends(rows), ends(x.flip(0)).repeat_interleave(2, dim=0)[[*range(ENDS), *range(-ENDS, 0)]])
    assert torch.equal(operations.sum_rows(rows, None, order, 2), 2 * x)
    weights = torch.full((tokens, 2), 0.5, dtype=torch.bfloat16, device="cuda")
    assert torch.equal(operations.sum_rows(rows, weights, order, 2), x)
    dy, dweights = operations.weighted_gradients(x, rows, weights, order, order)
    assert torch.equal(ends(dy), ends(rows) / 2)
    expected = ends(x).double().square().sum(dim=1, keepdim=True).expand(-1, 2)
    torch.testing.assert_close(ends(dweights).double(), expected, rtol=1e-2, atol=0)


def test_groups() -> None:
    counts = torch.tensor([5, 0, ROWS - 10, 0], device="cuda")  # five rows of no group
    groups, bias = Groups(counts, torch.device("cuda")), small_numbers(4, WIDTH)
    x, served = small_numbers(ROWS, WIDTH), ROWS - 5
    of_row = bias[groups.group_of_row(ROWS).clamp(max=3)]
    expected = x + of_row
    del of_row
    y = add_group_bias_(x.clone(), bias, groups)
    assert torch.equal(y[:served], expected[:served]) and not y[served:].any()
    by_group = [expected[:5], expected[:0], expected[5:served], expected[:0]]
    assert torch.equal(
        grouped_sum(y, groups), torch.stack([part.sum(0, dtype=torch.float32) for part in by_group]).bfloat16()
    )
    for activation in ACTIVATIONS.values():
        h = x.clone()
        a = bias_activation_(h, bias, groups, activation)
        da = torch.ones_like(h)
        again, sums = activation_gradient_(da, h, groups, activation)
        torch.testing.assert_close(sums[2].float(), da[5:served].sum(0, dtype=torch.float32), rtol=2e-2, atol=0)
        assert torch.equal(h[:served], expected[:served]) and torch.equal(again[:served], a[:served])
        exact = ends(expected[:served]).double().requires_grad_()
        right = activation(exact)
        (gradient,) = torch.autograd.grad(right.sum(), exact)
        torch.testing.assert_close(ends(a[:served]).double(), right.detach(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ends(da[:served]).double(), gradient, rtol=1e-2, atol=1e-2)
    x.fill_(torch.nan)
    assert bool(zero_rest_(x, groups)[:served].isnan().all()) and not x[served:].any()
    matrices = x.view(4, ROWS // 4, WIDTH).fill_(torch.nan)
    zero_empty_groups_(matrices, groups)
    assert matrices[[0, 2]].isnan().all() and not matrices[[1, 3]].any()


def test_experts() -> None:
    """A token's result and gradients do not depend on the others, and only the last ones' results have a gradient: the
    same layer in float64 over these alone gives all that is compared."""
    experts, dim, hidden, tokens, last = 8, 64, 4096, 2**18 + 64, 64
    assert 2 * tokens * hidden > 2**31
    torch.manual_seed(0)
    shapes = [
        (tokens, dim), (tokens, 2), (experts, hidden, dim), (experts, hidden), (experts, dim, hidden), (experts, dim),
    ]  # fmt: skip
    scales = [1, 1, dim**-0.5, 1, hidden**-0.5, 1]
    inputs = [
        (scale * torch.randn(shape, device="cuda")).bfloat16().requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    chosen = torch.stack([torch.randperm(experts, device="cuda")[:2] for _ in range(last)])
    chosen = torch.cat([torch.randint(0, experts, (tokens - last, 2), device="cuda"), chosen])
    gradient = torch.zeros(tokens, dim, dtype=torch.bfloat16, device="cuda")
    gradient[-last:].normal_()

    def layout(chosen: Tensor) -> permute.Layout:
        return sort_by_expert(chosen.flatten(), torch.bincount(chosen.flatten(), minlength=experts))

    y = expert_mlp(*inputs, layout(chosen), "quick_gelu")
    ours = [y.detach(), *torch.autograd.grad(y, inputs, gradient)]
    ours[:3] = [tensor[-last:] for tensor in ours[:3]]
    exact = [(t.detach()[-last:] if i < 2 else t.detach()).double().requires_grad_() for i, t in enumerate(inputs)]
    right = reference(*exact, layout(chosen[-last:]), "quick_gelu")
    truth = [right.detach(), *torch.autograd.grad(right, exact, gradient[-last:].double())]
    for mine, true in zip(ours, truth, strict=True):
        assert (mine.double() - true).norm() <= 2e-2 * true.norm()
