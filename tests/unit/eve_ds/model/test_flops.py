"""The analytic count of operations equals what torch counts in a real forward and backward pass.

Within 0.5 %: torch counts a few sums that the model writes as products (model/flops.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from eve_ds.model.backbone import Backbone
from eve_ds.model.flops import backbone_flops, pretraining_flops, product
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks.masked import MaskedModeling, ObjectiveConfig
from eve_ds.tasks.masking import choose_words, masked_patches, masked_words

TOLERANCE = 0.005


def config(**changes: Any) -> ModelConfig:
    values: dict[str, Any] = {
        "image_size": 32,
        "patch_size": 8,
        "dim": 64,
        "depth": 3,
        "num_heads": 4,
        "mlp_hidden": 96,
        "vocab_size": 50,
        "max_text_length": 16,
        "text_positions": 16,
        "soft_layers": [1, 2],
        "num_experts": 4,
        "top_k": 2,
    }
    return ModelConfig(**{**values, **changes})


def counted(model: ModelConfig, batch: int, kept: int, text: int) -> tuple[int, int]:
    """(forward, forward and backward) on the meta device, where no expert's rows are padded."""
    device = torch.device("meta")
    with device:
        backbone = Backbone(model)
        images = torch.empty(batch, 3, model.image_size, model.image_size) if kept else None
        keep = torch.empty(batch, kept, dtype=torch.int64) if kept else None
        text_ids = torch.empty(batch, text, dtype=torch.int64) if text else None
        with FlopCounterMode(display=False) as counter:
            output = backbone(images, text_ids, patch_keep=keep)
            forward = counter.get_total_flops()
            (output.hidden.sum() + output.aux_loss).backward()
    return forward, counter.get_total_flops()


@given(
    batch=st.integers(1, 3),
    kept=st.integers(0, 16),
    text=st.integers(0, 16),
    width=st.integers(1, 3),
    depth=st.integers(1, 4),
    soft=st.integers(0, 4),
    top_k=st.integers(1, 4),
)
@settings(max_examples=15, deadline=None)
def test_backbone_count(batch: int, kept: int, text: int, width: int, depth: int, soft: int, top_k: int) -> None:
    if not kept + text:
        kept = 1  # a pass needs an image or a text
    layers = list(range(depth))[max(0, depth - soft) :]
    model = config(dim=64 * width, mlp_hidden=80 * width, depth=depth, soft_layers=layers, top_k=top_k)
    batch *= 4  # the meta device spreads rows evenly over the four experts: they must divide
    expected = backbone_flops(model, batch, kept, text)
    assert counted(model, batch, kept, text) == pytest.approx((expected.forward, expected.total), rel=TOLERANCE)


def test_base_count() -> None:
    expected = backbone_flops(ModelConfig(), 16, 49, 40)
    assert counted(ModelConfig(), 16, 49, 40) == pytest.approx((expected.forward, expected.total), rel=1e-4)


def test_padding_visits_no_expert() -> None:
    """On the CPU, every expert seen by every token and 32 rows each, so that none is padded."""
    model = config(top_k=4)
    mask = torch.zeros(4, 12, dtype=torch.bool)
    mask[:, :7] = True
    backbone = Backbone(model)
    with FlopCounterMode(display=False) as counter:
        output = backbone(
            torch.randn(4, 3, 32, 32), torch.zeros(4, 12, dtype=torch.int64), mask, torch.zeros(4, 16).long()
        )
        (output.hidden.sum() + output.aux_loss).backward()
    assert (17 + 7) * 4 % 32 == 0
    expected = backbone_flops(model, 4, 16, 12, words=7).total
    assert counter.get_total_flops() == pytest.approx(expected, rel=TOLERANCE)
    assert expected < 0.95 * backbone_flops(model, 4, 16, 12).total


def test_pixels_have_no_gradient() -> None:
    assert product(2, 3, 5, input_gradient=False).total == 2 * product(2, 3, 5).forward
    assert product(2, 3, 5).total == 3 * 60


@pytest.mark.parametrize("mode", ["separate", "joint"])
def test_pretraining_count(mode: str) -> None:
    """The whole task, forward and backward, at sizes where the CPU pads neither experts' rows nor masked words."""
    pairs, length = 32, 14
    model = config(top_k=4)
    objective = ObjectiveConfig(mode=mode, decoder_dim=24, decoder_depth=2, decoder_heads=2, text_mask_ratio=0.35)
    words = masked_words(length, objective.text_mask_ratio)
    assert pairs * words % 64 == 0
    task = MaskedModeling(Backbone(model), objective, mask_id=4)
    batch = {
        "images": torch.randn(pairs, 3, 32, 32),
        "text_ids": torch.randint(5, 50, (pairs, length)),
        "text_mask": torch.ones(pairs, length, dtype=torch.bool),
        "sample_id": torch.arange(pairs),
    }
    with FlopCounterMode(display=False) as counter:
        task(batch).loss.backward()
    patches = masked_patches(model.num_patches, objective.image_mask_ratio)
    expected = pretraining_flops(model, pairs, length, patches, words, 24, 2, joint=mode == "joint")
    assert counter.get_total_flops() == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("ratio", [0.01, 0.35, 0.5, 0.99])
def test_masked_words_is_what_is_masked(ratio: float) -> None:
    for length in range(2, 20):
        mask = torch.ones(1, length, dtype=torch.bool)
        assert int(choose_words(0, torch.tensor([3]), mask, ratio).sum()) == masked_words(length, ratio)
