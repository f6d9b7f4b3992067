"""Buffers that are used again, and never while anything still looks at them."""

from __future__ import annotations

import pytest
import torch

from eve_ds.kernels import mlp
from eve_ds.kernels.mlp import PAGE, reused_empty_like

LIKE = torch.empty(7, 5)


@pytest.fixture(autouse=True)
def every_size_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "SMALLEST", 1)
    monkeypatch.setattr(mlp, "_arrays", {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_as_asked_for_and_starts_a_page(dtype: torch.dtype) -> None:
    made = [reused_empty_like(LIKE.to(dtype)) for _ in range(3)]
    for tensor in made:
        assert tensor.shape == LIKE.shape and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % PAGE == 0
    assert len({tensor.data_ptr() for tensor in made}) == 3


def test_it_is_used_again_once_no_view_of_it_lives() -> None:
    first = reused_empty_like(LIKE).fill_(1)
    place, view = first.data_ptr(), first[2:].t()
    del first
    second = reused_empty_like(LIKE).fill_(2)
    assert second.data_ptr() != place and bool((view == 1).all())
    del view
    assert reused_empty_like(LIKE).data_ptr() == place


def test_a_gradient_keeps_its_buffer() -> None:
    weight = torch.nn.Parameter(torch.zeros_like(LIKE))

    class Given(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, weight: torch.Tensor) -> torch.Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
            return reused_empty_like(weight).fill_(3)

    Given.apply(weight).backward()
    assert weight.grad is not None
    place = weight.grad.data_ptr()
    assert place % PAGE == 0  # autograd took the buffer itself, no copy
    other = reused_empty_like(LIKE).fill_(4)
    assert other.data_ptr() != place and bool((weight.grad == 3).all())


def test_small_ones_and_other_devices_are_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "SMALLEST", 1 << 20)
    reused_empty_like(LIKE)
    assert reused_empty_like(torch.empty(1 << 20, device="meta")).is_meta
    assert not mlp._arrays
