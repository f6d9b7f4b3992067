"""Attention over lengths, padding and extreme scores against float64.

The fused kernels that torch picks on a GPU are others for each case. pytorch#196678: NaN in the queries' gradient where
N % 128 = 64 and a row's scores are far below zero.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from eve_ds.model.block import Attention, key_bias
from tests.gpu.kit_sizes import Sizes

BATCH = 8
CLOSE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
# A score's rounding error grows with the score, and its exponential turns it into a relative one of the weight.
CLOSE_EXTREME = {torch.bfloat16: 0.5, torch.float32: 1e-3}


def valid_tokens(tokens: int, device: torch.device) -> Tensor:
    """[B, N] bool: the first sample whole, others down to half; of one token, all of it."""
    length = torch.linspace(tokens, max(1, tokens // 2), BATCH, device=device).long()
    return torch.arange(tokens, device=device) < length[:, None]


def outcome(layer: Attention, x: Tensor, bias: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x, bias)
    y.backward(dy.to(y.dtype))
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value.detach().double() for name, value in {"y": y, "x": x.grad, **gradients}.items()}


@pytest.mark.parametrize("dtype", list(CLOSE), ids=["bf16", "fp32"])
@pytest.mark.parametrize("scale", [1, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_attention(
    padded: bool, scale: int, dtype: torch.dtype, device: torch.device, sizes: Sizes, figures: dict[str, Any]
) -> None:
    faults, worst = [], 0.0
    for tokens in sizes.lengths:
        torch.manual_seed(tokens)
        layer = Attention(sizes.dim, sizes.heads).to(device, dtype)
        with torch.no_grad():
            layer.qkv.weight.normal_(std=sizes.dim**-0.5)
            layer.qkv.weight[: sizes.dim] *= scale  # of the queries: the scores grow alike
        x = torch.randn(BATCH, tokens, sizes.dim, device=device, dtype=dtype)
        valid = valid_tokens(tokens, device) if padded else None
        dy = torch.randn_like(x) * (1 if valid is None else valid[:, :, None])
        exact = outcome(
            copy.deepcopy(layer).double(), x.double(), None if valid is None else key_bias(valid, torch.float64), dy
        )
        ours = outcome(layer, x, None if valid is None else key_bias(valid, dtype), dy)
        limit = (CLOSE if scale == 1 else CLOSE_EXTREME)[dtype]
        for name, value in exact.items():
            error = float((ours[name] - value).norm() / value.norm().clamp_min(1e-3 * float(exact["y"].norm())))
            worst = max(worst, error)
            if not error < limit:  # NaN is not below it either
                faults.append(f"{tokens} tokens, {name}: {error:.1e}")
        if valid is not None:  # what stands in padding changes nobody
            other = layer(torch.where(valid[:, :, None], x, 3 * x), key_bias(valid, dtype))
            assert torch.equal(other[valid], layer(x, key_bias(valid, dtype))[valid]), tokens
    case = f"{str(dtype)[6:]}, scores x {scale}, {'padded' if padded else 'whole'}"
    figures[f"attention {case}: worst relative error, at most {limit}"] = worst
    assert not faults, faults
