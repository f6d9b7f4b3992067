"""Grouped products against one group at a time in float64; torch's own kernel through its CPU implementation.

tests/e2e/test_triton.py runs those of biases, activations and zeros again with TRITON_INTERPRET=1, where the Triton
kernels serve CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eve_ds.kernels import grouped_mm as module
from eve_ds.kernels.group_activation import activation_gradient_, bias_activation_
from eve_ds.kernels.grouped_mm import add_group_bias_, grouped_mm, grouped_sum, grouped_weight_gradient
from eve_ds.kernels.groups import Groups, zero_empty_groups_, zero_rest_
from eve_ds.kernels.mlp import ACTIVATIONS, Activation

DEVICES = ["cpu", *["cuda", "cuda:1"][: torch.cuda.device_count()]]  # the second is never the current one
COUNTS = [[3, 0, 5, 1], [0, 0, 0, 0], [0, 4, 0, 0], [9]]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
MakeGroups = Callable[[list[int], str], Groups]


def on_host(counts: list[int], device: str) -> Groups:
    return Groups(counts, torch.device(device))


def on_device(counts: list[int], device: str) -> Groups:
    return Groups(torch.tensor(counts, device=device), torch.device(device))


def wide(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()


def parts(rows: Tensor, counts: list[int]) -> list[Tensor]:
    return list(wide(rows).split([*counts, len(rows) - sum(counts)]))[:-1]


@pytest.fixture(params=["loop", "torch's grouped_mm"])
def grouped_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether ``torch._grouped_mm`` is called, which has an implementation for the CPU too."""
    monkeypatch.setattr(module, "has_grouped_kernel", lambda device: request.param != "loop")
    return request.param != "loop"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make_groups", [on_host, on_device])
@pytest.mark.parametrize("surplus", [0, 2])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
def test_all_products(
    counts: list[int], dtype: torch.dtype, surplus: int, make_groups: MakeGroups, device: str, grouped_kernel: bool
) -> None:
    torch.manual_seed(0)
    rows, inner, outer, close = sum(counts) + surplus, 16, 24, {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    dy = torch.randn(rows, outer, device=device, dtype=dtype)
    w = torch.randn(len(counts), outer, inner, device=device, dtype=dtype) / inner
    groups = make_groups(counts, device)
    rest = torch.zeros(surplus, outer, dtype=torch.float64)

    y = zero_rest_(grouped_mm(x, w.mT, groups), groups)
    expected = torch.cat([part @ wide(weight).t() for part, weight in zip(parts(x, counts), w, strict=True)] + [rest])
    torch.testing.assert_close(wide(y), expected, **close)
    assert not y[sum(counts) :].any()  # exactly zero

    dx = grouped_mm(dy, w, groups)
    expected = torch.cat([part @ wide(weight) for part, weight in zip(parts(dy, counts), w, strict=True)])
    torch.testing.assert_close(wide(dx)[: sum(counts)], expected, **close)  # its other rows hold anything

    dw = grouped_weight_gradient(dy, x, groups)
    pairs = zip(parts(dy, counts), parts(x, counts), strict=True)
    torch.testing.assert_close(wide(dw), torch.stack([a.t() @ b for a, b in pairs]), **close)

    expected = torch.stack([part.sum(0) for part in parts(dy, counts)])
    torch.testing.assert_close(wide(grouped_sum(dy, groups)), expected, **close)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make_groups", [on_host, on_device])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("counts", COUNTS)
def test_bias(counts: list[int], dtype: torch.dtype, make_groups: MakeGroups, device: str) -> None:
    width, close = 520, {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    rows = torch.randn(sum(counts) + 2, width, device=device, dtype=dtype)
    bias = torch.randn(len(counts), width + 3, device=device, dtype=dtype)[:, :width]
    shifted = [part + wide(b) for part, b in zip(parts(rows, counts), bias, strict=True)]
    expected = torch.cat([*shifted, torch.zeros(2, width, dtype=torch.float64)])
    rows[sum(counts) :] = torch.nan
    assert add_group_bias_(rows, bias, make_groups(counts, device)) is rows
    torch.testing.assert_close(wide(rows), expected, **close)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make_groups", [on_host, on_device])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS.values()), ids=list(ACTIVATIONS))
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_bias_with_activation_and_its_gradient(
    dtype: torch.dtype, activation: Activation, counts: list[int], make_groups: MakeGroups, device: str
) -> None:
    width, close, served = 520, {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}, sum(counts)
    torch.manual_seed(0)
    x = 3 * torch.randn(served + 2, width, device=device, dtype=dtype)
    bias = torch.randn(len(counts), width + 3, device=device, dtype=dtype)[:, :width]
    da = torch.randn_like(x)
    h = torch.cat([part + wide(b) for part, b in zip(parts(x, counts), bias, strict=True)]).requires_grad_()
    a = activation(h)
    (dh,) = torch.autograd.grad(a, h, wide(da[:served]))
    x[served:] = torch.nan  # as torch's grouped kernel may leave them
    found = bias_activation_(x, bias, make_groups(counts, device), activation)
    torch.testing.assert_close(wide(x[:served]), h.detach(), **close)
    torch.testing.assert_close(wide(found[:served]), a.detach(), **close)
    again, _ = activation_gradient_(da, x, make_groups(counts, device), activation)
    assert torch.equal(again[:served], found[:served])
    torch.testing.assert_close(wide(da[:served]), dh, **close)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make_groups", [on_host, on_device])
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("width", [24, 520, 20_000])  # the last one is more than a program's share
def test_zeros(width: int, counts: list[int], make_groups: MakeGroups, device: str) -> None:
    """Only where no group writes; a NaN does not survive."""
    groups, nan = make_groups(counts, device), torch.full((1,), torch.nan, device=device)
    rows = nan.repeat(sum(counts) + 35, width)
    assert zero_rest_(rows, groups) is rows
    assert rows[: sum(counts)].isnan().all() and not rows[sum(counts) :].any()
    matrices = nan.repeat(len(counts), 2, width)
    assert zero_empty_groups_(matrices, groups) is matrices
    for matrix, count in zip(matrices, counts, strict=True):
        assert matrix.isnan().all() if count else not matrix.any()


def test_the_grouped_kernel_is_reached_and_shunned(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves aligned bf16 alone; it would refuse the others with an error."""
    monkeypatch.setattr(module, "has_grouped_kernel", lambda device: True)
    rows = torch.randn(8, 16, dtype=torch.bfloat16)
    weights = torch.randn(2, 16, 24, dtype=torch.bfloat16)
    assert module._grouped_kernel_takes(rows, weights) and module._grouped_kernel_takes(rows, weights.mT)
    assert not module._grouped_kernel_takes(rows.float(), weights.float())
    assert not module._grouped_kernel_takes(rows[:, :12], weights[:, :12])  # 24 bytes
    assert not module._grouped_kernel_takes(rows[:, 1:9], weights[:, :8])  # an odd address
    assert not module._grouped_kernel_takes(rows[:0], weights)
    assert not module._grouped_kernel_takes(rows.t().contiguous().t(), weights)  # by column: a group may start anywhere
    odd = torch.randn(8, 12, dtype=torch.bfloat16)
    groups = on_host([5, 3], "cpu")
    w = torch.randn(2, 12, 7, dtype=torch.bfloat16)
    torch.testing.assert_close(grouped_mm(odd, w, groups), torch.cat([odd[:5] @ w[0], odd[5:] @ w[1]]))


def test_no_kernel_of_torch_on_the_cpu() -> None:
    assert not module.has_grouped_kernel(torch.device("cpu"))
    choice = module.choice(torch.device("cpu"))
    assert choice.live.name == "one product per expert" and "H100" in choice.alternatives[0].reason


def test_experts_in_a_few_calls(grouped_kernel: bool) -> None:
    """An expert layer's forward and backward pass by these functions: what ``kernels/expert_mlp.py`` does on CUDA."""
    torch.manual_seed(0)
    counts, dim, hidden = [4, 0, 3], 8, 16
    x = torch.randn(9, dim, dtype=torch.bfloat16)
    w1, w2 = (torch.randn(3, *shape, dtype=torch.bfloat16) / 4 for shape in ((hidden, dim), (dim, hidden)))
    b1, b2 = torch.randn(3, hidden, dtype=torch.bfloat16), torch.randn(3, dim, dtype=torch.bfloat16)
    dy = torch.randn(9, dim, dtype=torch.bfloat16)

    groups = on_host(counts, "cpu")
    h = grouped_mm(x, w1.mT, groups)
    a = bias_activation_(h, b1, groups, ACTIVATIONS["gelu"])
    y = add_group_bias_(grouped_mm(a, w2.mT, groups), b2, groups)
    dh = grouped_mm(dy, w2, groups)
    _, db1 = activation_gradient_(dh, h, groups, ACTIVATIONS["gelu"])
    found = [
        y, zero_rest_(grouped_mm(dh, w1, groups), groups),
        grouped_weight_gradient(dh, x, groups), db1,
        grouped_weight_gradient(dy, a, groups), grouped_sum(dy, groups),
    ]  # fmt: skip

    leaves = [wide(t).requires_grad_() for t in (x, w1, b1, w2, b2)]
    slices = leaves[0].split([*counts, 2])[:-1]
    outputs = [
        torch.nn.functional.gelu(part @ w1.t() + b1) @ w2.t() + b2
        for part, w1, b1, w2, b2 in zip(slices, *leaves[1:], strict=True)
    ]
    expected = torch.cat([*outputs, torch.zeros(2, dim, dtype=torch.float64)])
    expected.backward(wide(dy))
    for value, true in zip(found, [expected.detach(), *(leaf.grad for leaf in leaves)], strict=True):
        torch.testing.assert_close(wide(value), true, rtol=3e-2, atol=6e-2)
