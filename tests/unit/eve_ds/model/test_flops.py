"""The operations that PyTorch counts, against numbers computed by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from eve_ds.kernels.permute import Layout
from eve_ds.model.backbone import Backbone
from eve_ds.model.experts import Experts
from eve_ds.model.flops import count_flops
from tests.support.tiny import model_config

META = torch.device("meta")


def test_a_linear_layer() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(7, 3)
    assert count_flops(lambda: layer(x)) == 2 * 7 * 3 * 5
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 2 * 7 * 3 * 5  # x has no gradient
    x.requires_grad_()
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * 2 * 7 * 3 * 5


COUNT = """
import sys
import torch
from eve_ds.model.flops import count_flops
x = torch.ones(4, 4)
assert count_flops(lambda: x @ x) == 128
print("torch._dynamo" in sys.modules)
"""


def test_counting_does_not_import_torchs_compiler() -> None:
    ended = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "False"


@pytest.mark.parametrize(("dtype", "sums"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_experts(dtype: torch.dtype, sums: int) -> None:
    """Six products of [32 rows, 16] and [16, 24]; grouped_mm sums the biases' gradients as products with 8 columns."""
    with META:
        experts = Experts(16, 24, 4, "gelu", seed=0).to(dtype)
        experts.use_grouped_mm = True
        x, index = torch.empty(32, 16, dtype=dtype, requires_grad=True), torch.empty(32, dtype=torch.int64)
    layout = Layout(index, index, [8] * 4, [8] * 4)
    products = 6 * 2 * 32 * 16 * 24
    assert count_flops(lambda: experts(x, None, layout).sum().backward()) == products + sums * 2 * 32 * 8 * (16 + 24)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("top_k", [1, 2])
def test_backbone(top_k: int, recomputed: bool) -> None:
    """4 pairs of 1 + 16 image and 8 text tokens; D 32, H 64, 3 blocks of which 2 route softly among 4 experts."""
    config = model_config(top_k=top_k, checkpoint_activations=recomputed)
    with META:
        backbone = Backbone(config)
        images, text_ids = torch.empty(4, 3, 32, 32), torch.empty(4, 8, dtype=torch.int64)
    pairs, tokens, dim, hidden = 4, 25, 32, 64
    rows = pairs * tokens
    patches = 2 * pairs * 16 * (3 * 8 * 8) * dim
    attention = 2 * rows * dim * 4 * dim + 2 * 2 * pairs * tokens * tokens * dim  # projections; scores and sums
    mlp = 2 * 2 * rows * dim * hidden
    vectors = 2 * tokens * 2 * dim  # the modality's vector, as a product of one-hot rows [tokens, 2]
    router = 2 * rows * dim * 4
    blocks = 3 * attention + mlp + 2 * (vectors + router + top_k * mlp)
    assert count_flops(lambda: backbone(images, text_ids)) == patches + blocks

    def step() -> Any:
        output = backbone(images, text_ids)
        (output.hidden.sum() + output.aux_loss).backward()

    forwards = 3 + recomputed  # forward, and backward twice as much; the pixels and the one-hot rows have no gradient
    assert count_flops(step) == 2 * patches + forwards * blocks - 2 * vectors
