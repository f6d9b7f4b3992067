"""The backbone against what the published EVE code computes from the same weights (fp32, on the CPU)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from tests.support.published import load_published

ASSETS = Path(__file__).parents[3] / "assets"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    with np.load(ASSETS / "outputs.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.mark.parametrize(("mode", "capacity_factor"), [("nodrop", None), ("capacity1", 1.0)])
@pytest.mark.parametrize("inputs", ["vl", "vision", "text"])
def test_outputs_are_those_of_the_published_code(
    golden: dict[str, Tensor], mode: str, capacity_factor: float | None, inputs: str
) -> None:
    config = ModelConfig.from_vlmo(ASSETS / "vlmo_config.json", image_size=32)
    config = replace(config, capacity_factor=capacity_factor)
    model = nn.Module()
    model.backbone = backbone = Backbone(config, published_routing=True).eval()
    load_published(model, ASSETS / "vqa.safetensors", config)
    images = golden["image"] if inputs != "text" else None
    text = (golden["text_ids"], golden["text_atts"]) if inputs != "vision" else (None, None)
    with torch.no_grad():
        out = backbone(images, *text)
    torch.testing.assert_close(out.hidden, golden[f"backbone_{inputs}_{mode}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.aux_per_layer, golden[f"aux_{inputs}_{mode}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out.aux_loss, golden[f"aux_{inputs}_{mode}"].mean(), atol=1e-4, rtol=0)
    torch.testing.assert_close(backbone.norm(out.before_norm), out.hidden)
    assert out.num_image_tokens == (0 if inputs == "text" else 17)
