"""Sums of columns by group, alone and with the activation's gradient, against float64; fresh memory and the rows of no
group hold NaN.

tests/e2e/test_triton.py runs this file again with TRITON_INTERPRET=1, where the Triton kernels serve CPU tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from eve_ds.kernels import triton_groups
from eve_ds.kernels.choices import triton_serves
from eve_ds.kernels.group_activation import activation_gradient_
from eve_ds.kernels.grouped_mm import grouped_sum
from eve_ds.kernels.groups import Groups
from eve_ds.kernels.mlp import ACTIVATIONS, Activation

DEVICES = ["cpu", *["cuda", "cuda:1"][: torch.cuda.device_count()]]  # the second is never the current one
TILE = triton_groups.TILE_ROWS
COUNTS = {
    "all rows in one group": [0, 6 * TILE + 3, 0],
    "half of the groups empty": [0, 70, 0, 0, 200, 1, 0, 300],
    "ends of tiles": [TILE - 1, TILE, TILE + 1, 0, 1, 2 * TILE, 3 * TILE - 1, 0, 0, 2 * TILE + 1],
    "more groups than tiles": [1, 0, 2] * 11,
    "no rows": [0, 0, 0],
}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
SURPLUS = 5  # rows of no group

each = pytest.mark.parametrize("counts", list(COUNTS.values()), ids=list(COUNTS))
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_activation = pytest.mark.parametrize("activation", list(ACTIVATIONS.values()), ids=list(ACTIVATIONS))
each_device = pytest.mark.parametrize("device", DEVICES)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def rows_of(counts: list[int], width: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Groups]:
    """Values whose sums do not cancel, NaN in rows of no group; and the groups, counted on the device."""
    rows = (torch.randn(sum(counts) + SURPLUS, width) + 0.5).to(device, dtype)
    rows[sum(counts) :] = torch.nan
    return rows, Groups(torch.tensor(counts, device=device), torch.device(device))


def assert_sums(found: Tensor, rows: Tensor, counts: list[int]) -> None:
    """Added in float32 at least, rounded once; exactly zero in groups without rows."""
    groups = rows[: sum(counts)].double().split(counts)
    exact, sizes = (torch.stack([part.sum(0) for part in parts]) for parts in (groups, [g.abs() for g in groups]))
    added_in = torch.promote_types(found.dtype, torch.float32)
    allowed = torch.finfo(found.dtype).eps * exact.abs() + 32 * torch.finfo(added_in).eps * sizes
    assert found.shape == exact.shape and bool(((found.double() - exact).abs() <= allowed).all())


@each_device
@each_dtype
@each
@pytest.mark.parametrize("width", [24, 264])  # the last one is more than a program's share
def test_sums(width: int, counts: list[int], dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    rows, groups = rows_of(counts, width, dtype, device)
    found = grouped_sum(rows, groups)
    assert found.dtype == dtype
    assert_sums(found, rows, counts)
    assert torch.equal(found, grouped_sum(rows, groups))
    assert_sums(grouped_sum(rows.t().contiguous().t(), groups), rows, counts)


@each_device
def test_sums_of_many_rows(device: str) -> None:
    """Added in bf16, they would stop at 256 or so."""
    counts = [30_000, 0, 2]
    rows, groups = rows_of(counts, 8, torch.bfloat16, device)
    assert_sums(grouped_sum(rows, groups), rows, counts)


@each_device
@each_dtype
@each
@each_activation
def test_sums_with_the_activations_gradient(
    activation: Activation, counts: list[int], dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    (da, groups), (h, _), served = (
        rows_of(counts, 72, dtype, device), rows_of(counts, 72, dtype, device), sum(counts)
    )  # fmt: skip
    exact = h[:served].double().requires_grad_()
    value = activation(exact)
    (gradient,) = torch.autograd.grad(value, exact, da[:served].double())
    a, sums = activation_gradient_(da, h, groups, activation)
    allowed = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for found, true in ((a, value), (da, gradient)):
        torch.testing.assert_close(found[:served].double(), true.detach(), rtol=allowed, atol=allowed)
    by_group = torch.stack([part.sum(0) for part in gradient.split(counts)])
    assert sums.dtype == dtype and (sums.double() - by_group).norm() <= allowed * by_group.norm()
    assert not sums[torch.tensor(counts) == 0].any()


@pytest.mark.skipif(not triton_serves(torch.empty(0, device=DEVICES[-1])), reason="plain PyTorch computes all rows")
@each_activation
def test_rows_of_no_group_are_neither_read_nor_written(activation: Activation) -> None:
    counts = [70, 0, 3]
    (da, groups), (h, _) = (rows_of(counts, 24, torch.float32, DEVICES[-1]) for _ in range(2))
    da[73:], before = 7, h.clone()
    a, _ = activation_gradient_(da, h, groups, activation)
    assert bool((da[73:] == 7).all()) and a[73:].isnan().all() and not a[:73].isnan().any()
    assert torch.equal(h[:73], before[:73])
