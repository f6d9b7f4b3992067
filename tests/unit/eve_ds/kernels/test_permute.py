"""Permuting and combining rows, against a product with a matrix of zeros and ones in float64.

tests/e2e/test_triton.py runs this file again with TRITON_INTERPRET=1, where the Triton kernels serve CPU tensors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eve_ds.kernels import permute
from eve_ds.kernels.choices import triton_is_interpreted

DEVICES = ["cpu", *["cuda", "cuda:1"][: torch.cuda.device_count()]]  # the second is never the current one
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}
SHAPES = [(5, 2, 40, 3), (0, 2, 8, 0), (3, 1, 300, 0), (3, 3, 257, 0), (1, 1, 1, 2)]  # tokens, k, dim, padding rows


def layout(tokens: int, top_k: int, padding: int, device: str) -> tuple[Tensor, Tensor]:
    """A random (order [P], inverse [R]) with ``padding`` padding rows at random places."""
    rows = tokens * top_k
    inverse = torch.randperm(rows + padding)[:rows].sort().values[torch.randperm(rows)]
    order = torch.full((rows + padding,), rows)
    order[inverse] = torch.arange(rows)
    return order.to(device), inverse.to(device)


def membership(order: Tensor, tokens: int, top_k: int) -> Tensor:
    """[P, R] float64: 1 where a row holds a choice."""
    return torch.nn.functional.one_hot(order.cpu(), tokens * top_k + 1)[:, :-1].double()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "top_k", "dim", "padding"), SHAPES)
def test_permute(tokens: int, top_k: int, dim: int, padding: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    order, inverse = layout(tokens, top_k, padding, device)
    x = torch.randn(tokens, dim, dtype=dtype, device=device, requires_grad=True)
    rows = permute.permute(x, order, inverse, top_k)
    gradient = torch.randn_like(rows)
    rows.backward(gradient)
    member = membership(order, tokens, top_k)
    taken = member.sum(1).bool()
    repeated = x.detach().cpu().double().repeat_interleave(top_k, dim=0)
    torch.testing.assert_close(rows.detach().cpu().double()[taken], (member @ repeated)[taken], rtol=0, atol=0)
    assert rows.isfinite().all() and rows.dtype == dtype
    dx = (member.t() @ gradient.cpu().double()).unflatten(0, (tokens, top_k)).sum(1)
    torch.testing.assert_close(x.grad.cpu().double(), dx, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "top_k", "dim", "padding"), SHAPES)
def test_combine(tokens: int, top_k: int, dim: int, padding: int, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    order, inverse = layout(tokens, top_k, padding, device)
    y = torch.randn(order.numel(), dim, dtype=dtype, device=device, requires_grad=True)
    weights = torch.rand(tokens, top_k, dtype=dtype, device=device, requires_grad=True)
    out = permute.combine(y, weights, order, inverse)
    gradient = torch.randn_like(out)
    out.backward(gradient)
    member = membership(order, tokens, top_k)
    wide_y, wide_w = (t.detach().cpu().double().requires_grad_() for t in (y, weights))
    expected = ((member.t() @ wide_y) * wide_w.reshape(-1, 1)).view(tokens, top_k, dim).sum(1)
    expected.backward(gradient.cpu().double())
    close = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.detach().cpu().double(), expected.detach(), **close)
    torch.testing.assert_close(y.grad.cpu().double(), wide_y.grad, **close)
    # a weight's gradient is a sum of D products: bf16 rounds each of them in plain torch
    wide = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype] * max(1, dim) ** 0.5}
    torch.testing.assert_close(weights.grad.cpu().double(), wide_w.grad, **wide)
    assert out.dtype == y.grad.dtype == weights.grad.dtype == dtype


@pytest.mark.parametrize("padding", [0, 2])
def test_numeric_gradients(padding: int) -> None:
    torch.manual_seed(0)
    order, inverse = layout(2, 2, padding, "cpu")
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(4 + padding, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    taken = order < 4
    assert torch.autograd.gradcheck(lambda x: permute.permute(x, order, inverse, 2)[taken], (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda y, w: permute.combine(y, w, order, inverse), (y, weights), fast_mode=True)


def test_rows_of_no_expert_add_nothing() -> None:
    order, inverse = layout(2, 2, 0, "cpu")
    y, weights = torch.randn(4, 8), torch.rand(2, 2)
    y[inverse[[1, 2, 3]]] = 0  # only the first token's first choice was served
    out = permute.combine(y, weights, order, inverse)
    torch.testing.assert_close(out, torch.stack([weights[0, 0] * y[inverse[0]], torch.zeros(8)]))


def test_strided_inputs() -> None:
    order, inverse = layout(4, 2, 0, "cpu")
    x, y, weights = torch.randn(6, 4).t(), torch.randn(6, 8).t(), torch.rand(2, 4).t()
    assert torch.equal(permute.permute(x, order, inverse, 2), permute.permute(x.contiguous(), order, inverse, 2))
    straight = permute.combine(y.contiguous(), weights.contiguous(), order, inverse)
    assert torch.equal(permute.combine(y, weights, order, inverse), straight)


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
def test_what_serves(device: str) -> None:
    fused = device.startswith("cuda") or (device == "cpu" and triton_is_interpreted())
    plain = permute.operations(torch.empty(1, device=device)).gather_rows is permute.gather_rows
    assert plain != fused
    if device != "meta":
        assert permute.choice(torch.device(device)).live.name == ("Triton" if fused else "plain torch")


def test_on_the_meta_device() -> None:
    order, inverse = torch.empty(6, dtype=torch.int64, device="meta"), torch.empty(6, dtype=torch.int64, device="meta")
    x = torch.empty(3, 4, device="meta", requires_grad=True)
    weights = torch.empty(3, 2, device="meta", requires_grad=True)
    out = permute.combine(permute.permute(x, order, inverse, 2), weights, order, inverse)
    out.sum().backward()
    assert out.shape == x.grad.shape == (3, 4) and x.grad.is_meta


@pytest.mark.parametrize("device", DEVICES)
def test_rows_beyond_2_31_elements(device: str) -> None:
    """Of a tensor of 4 GiB only the last rows are ever touched, so that on the CPU it has no memory."""
    tokens, dim, last = 2**21 + 8, 1024, 6
    huge = torch.empty(tokens, dim, dtype=torch.bfloat16, device=device)
    assert (tokens - last) * dim > 2**31
    part = huge[-last:].copy_(torch.randn(last, dim))
    place = torch.arange(tokens - last, tokens, device=device)
    operations = permute.operations(huge)
    assert torch.equal(operations.gather_rows(huge, 2 * place + 1, 2 * tokens, 2), part)
    assert torch.equal(operations.sum_rows(huge, None, place, 1), part)
    y, weights = torch.randn_like(part), torch.ones(tokens, 1, dtype=torch.bfloat16, device=device)
    inverse = torch.zeros(tokens, dtype=torch.int64, device=device)
    inverse[place] = torch.arange(last, device=device)
    dy, dweights = operations.weighted_gradients(huge, y, weights, place, inverse)
    assert torch.equal(dy, part)
    expected = (part.double() * y.double()).sum(dim=1, keepdim=True)
    torch.testing.assert_close(dweights[place].double(), expected, rtol=3e-2, atol=1)
