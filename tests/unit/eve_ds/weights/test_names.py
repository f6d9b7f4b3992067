"""Published names and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eve_ds.model.backbone import Backbone
from eve_ds.model.config import ModelConfig
from eve_ds.weights import WeightsError, from_published, is_published, to_published

ASSETS = Path(__file__).parents[3] / "assets"
CONFIG = ModelConfig.from_vlmo(ASSETS / "vlmo_config.json", image_size=32)
EXPERT = "backbone.encoder.layers.2.mlp_moe.moe.experts.experts.3.fc1.weight"


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    return load_file(ASSETS / "nlvr_biattn.safetensors")


@pytest.mark.parametrize("name", ["vqa", "nlvr_plain", "nlvr_biattn", "retrieval"])
def test_round_trip_is_equal(name: str) -> None:
    state = load_file(ASSETS / f"{name}.safetensors")
    ours = from_published(state, CONFIG)
    back = to_published(ours, CONFIG)
    assert is_published(state) and not is_published(ours)
    assert set(back) == set(state)
    for key, tensor in state.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key


def test_our_names_are_those_of_the_model(published: dict[str, Tensor]) -> None:
    model = nn.Module()
    model.backbone = Backbone(CONFIG)
    ours = {name: tensor for name, tensor in from_published(published, CONFIG).items() if name.startswith("backbone.")}
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in model.state_dict().items()
    }


def test_experts_are_packed_in_order(published: dict[str, Tensor]) -> None:
    ours = from_published(published, CONFIG)
    assert torch.equal(ours["backbone.blocks.2.moe.experts.w1"][3], published[EXPERT])
    biases = [published[EXPERT.replace("fc1.weight", name)] for name in ("fc1.bias", "fc2.bias")]
    assert torch.equal(ours["backbone.blocks.2.moe.experts.w3"][3, 0], torch.cat(biases))


def test_missing_and_unknown_names_are_listed(published: dict[str, Tensor]) -> None:
    state = dict(published)
    del state[EXPERT], state["backbone.norm.bias"]
    state["backbone.encoder.layers.9.norm1.weight"] = torch.zeros(1)
    with pytest.raises(WeightsError) as caught:
        from_published(state, CONFIG)
    message = str(caught.value)
    assert f"missing: {EXPERT}, backbone.norm.bias" in message
    assert "unknown: backbone.encoder.layers.9.norm1.weight" in message
    with pytest.raises(WeightsError, match=r"missing: backbone\.blocks"):
        to_published(state, CONFIG)


def test_position_ids_need_not_be_there(published: dict[str, Tensor]) -> None:
    state = {name: tensor for name, tensor in published.items() if "position_ids" not in name}
    assert from_published(state, CONFIG).keys() == from_published(published, CONFIG).keys()
