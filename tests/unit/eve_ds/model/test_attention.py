"""Attention against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from eve_ds.kernels.attention import plain_attention
from eve_ds.model.block import Attention, key_bias


@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_is_scaled_dot_product_attention(masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, 5, 4, requires_grad=True) for _ in range(3))
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    ours = plain_attention(q, k, v, key_bias(valid, torch.float32) if masked else None)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :] if masked else None)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((theirs * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)


def test_a_fully_masked_sample_is_finite() -> None:
    valid = torch.tensor([[False, False, False]])
    out = Attention(4, 2)(torch.randn(1, 3, 4), key_bias(valid, torch.float32))
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_fit_in_16_bits(dtype: torch.dtype) -> None:
    valid = torch.tensor([[True, False, True], [False, False, False]])
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, dtype=dtype)
    layer = Attention(4, 2).to(dtype)
    out = layer(x, key_bias(valid, dtype))
    assert out.isfinite().all()
    assert (key_bias(valid, dtype) + torch.finfo(dtype).min / 4).isfinite().all()  # with scores added to it
    torch.testing.assert_close(out[:1, ::2], layer(x[:1, ::2], None), rtol=1e-2, atol=1e-2)


def test_keys_have_no_bias_and_queries_and_values_do() -> None:
    qkv = Attention(4, 2).qkv
    with torch.no_grad():
        qkv.q_bias.fill_(2.0)
        qkv.v_bias.fill_(3.0)
    assert qkv(torch.zeros(1, 4)).tolist() == [[2.0] * 4 + [0.0] * 4 + [3.0] * 4]
