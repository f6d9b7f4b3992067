"""The kit's attention without padding: each way of doing it is our layer, and torch takes the call of its function."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from eve_ds.model.block import Attention
from tests.gpu.varlen_rivals import (
    BOUND,
    CLOSE,
    COCO,
    SHORTEST_TEXT,
    Padding,
    branches,
    gradients,
    padding_of,
    relative_error,
    text_lengths,
    varlen,
    verdict,
    whole,
)

DIM, HEADS, IMAGE, WIDTH = 32, 4, 5, 9
TEXTS = torch.tensor([3, 9, 1, 8])  # one has no padding


@pytest.fixture
def layer() -> Attention:
    torch.manual_seed(0)
    made = Attention(DIM, HEADS).double()
    with torch.no_grad():
        made.qkv.q_bias.normal_()
        made.qkv.v_bias.normal_()
    return made


@pytest.fixture
def padding() -> Padding:
    return padding_of(IMAGE + TEXTS, IMAGE + WIDTH, torch.float64, torch.device("cpu"))


def inputs(padding: Padding) -> tuple[Tensor, Tensor]:
    """x, and the gradient of the output, none of it in padding."""
    x = torch.randn(*padding.valid.shape, DIM, dtype=torch.float64, requires_grad=True)
    return x, torch.randn_like(x) * padding.valid[:, :, None]


def test_offsets(padding: Padding) -> None:
    assert padding.packed.tolist() == [0, 8, 22, 28, 41]
    assert padding.apart.tolist() == [0, 8, 14, 28, 28, 34, 42, 55, 56]
    assert {padding.packed.dtype, padding.apart.dtype} == {torch.int32}
    assert padding.rows.tolist() == [row for row in range(56) if padding.valid.flatten()[row]]


@pytest.mark.parametrize("name", ["same layout", "apart", "packed", "packed once"])
def test_each_way_is_our_layer(name: str, layer: Attention, padding: Padding) -> None:
    x, dy = inputs(padding)
    ways = whole(layer, padding, 2)
    valid = padding.valid[:, :, None]
    for ours, found in zip(*(gradients(ways[each], layer, x, dy) for each in ("ours", name)), strict=True):
        real = valid if ours.shape == x.shape else torch.ones(())
        torch.testing.assert_close(found * real, ours * real, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["apart", "packed"])
def test_padding_changes_nobody(name: str, layer: Attention, padding: Padding) -> None:
    x, _ = inputs(padding)
    branch = branches(layer, padding)[name]
    other = torch.where(padding.valid[:, :, None], x, 100 * x)
    assert torch.equal(branch(other)[padding.valid], branch(x)[padding.valid])


def test_a_rival_that_attends_to_padding_is_found(layer: Attention, padding: Padding) -> None:
    x, dy = inputs(padding)
    assert relative_error(layer, padding, x, dy) < 1e-12
    wrong = padding._replace(apart=torch.arange(0, 57, IMAGE + WIDTH, dtype=torch.int32))
    assert relative_error(layer, wrong, x, dy) > CLOSE


@pytest.mark.parametrize("offsets", ["packed", "apart"])
def test_torch_takes_the_call(offsets: str, layer: Attention, padding: Padding) -> None:
    """Its signature, by its own shape function: no kernel runs on meta."""
    rows = int(getattr(padding, offsets)[-1])
    qkv = torch.empty(rows, 3, HEADS, DIM // HEADS, dtype=torch.bfloat16, device="meta", requires_grad=True)
    of: Callable[..., Tensor] = functools.partial(varlen, *qkv.unbind(1))
    out = of(getattr(padding, offsets).to("meta"), IMAGE + WIDTH)
    assert out.shape == (rows, HEADS, DIM // HEADS) and out.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(out, qkv, torch.empty_like(out))
    assert gradient.shape == qkv.shape


def test_lengths_are_those_of_captions() -> None:
    lengths = text_lengths(256)
    assert lengths.min() >= SHORTEST_TEXT and lengths.max() < SHORTEST_TEXT + len(COCO)
    assert 12.5 < lengths.double().mean() < 14 and torch.equal(lengths, text_lengths(256))


@pytest.mark.parametrize(("packed", "said"), [(4.5, "adopt packed"), (4.6, "reject")])
def test_a_rival_must_win_by_a_tenth_over_the_better_of_ours(packed: float, said: str) -> None:
    found = verdict({"ours": 6.0, "same layout": 5.0, "apart": 5.0, "packed": packed, BOUND: 1.0})
    assert found["verdict"] == said and found["wins_by"]["apart"] == 1.0
