"""Published names and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks import Task
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.vqa import VQA
from eve_ds.weights.published import from_published, is_published, to_published
from preprocessing.errors import UserError

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


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"soft_layers": [3], "shared_layers": [2]}, {"norm2_vl.weight", "mlp_vl.fc1.weight", "mlp_vl.fc2.bias"}),
        ({"modality_routing": False}, {"norm2_vl.weight", "mlp_moe.moe.gate.wg.weight"}),
    ],
)
def test_models_of_the_ablations_have_the_published_codes_names(changes: dict[str, Any], names: set[str]) -> None:
    config = replace(CONFIG, **changes)
    state = {f"backbone.{name}": value for name, value in Backbone(config).state_dict().items()}
    published = to_published(state, config)
    own = {name.split("layers.2.")[1] for name in published if ".layers.2." in name}
    assert names <= own and not any("_embed" in name or "_imag" in name for name in own)
    back = from_published(published, config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())


def test_experts_are_packed_in_order(published: dict[str, Tensor]) -> None:
    ours = from_published(published, CONFIG)
    assert torch.equal(ours["backbone.blocks.2.moe.experts.w1"][3], published[EXPERT])
    biases = [published[EXPERT.replace("fc1.weight", name)] for name in ("fc1.bias", "fc2.bias")]
    assert torch.equal(ours["backbone.blocks.2.moe.experts.w3"][3, 0], torch.cat(biases))


def test_missing_and_unknown_names_are_listed(published: dict[str, Tensor]) -> None:
    state = dict(published)
    del state[EXPERT], state["backbone.norm.bias"]
    state["backbone.encoder.layers.9.norm1.weight"] = torch.zeros(1)
    with pytest.raises(UserError) as caught:
        from_published(state, CONFIG)
    message = str(caught.value)
    assert f"missing: {EXPERT}, backbone.norm.bias" in message
    assert "unknown: backbone.encoder.layers.9.norm1.weight" in message
    with pytest.raises(UserError, match=r"missing: backbone\.blocks"):
        to_published(state, CONFIG)


TASKS: dict[str, Callable[[Backbone], Task]] = {
    "retrieval": lambda backbone: Retrieval(backbone, embed_dim=5),
    "vqa": lambda backbone: VQA(backbone, num_answers=7, head_hidden=11),
    "nlvr_plain": lambda backbone: NLVR(backbone),
    "nlvr_biattn": lambda backbone: NLVR(backbone, biattn=True),
}
SIZES = [
    ModelConfig(image_size=12, patch_size=4, dim=20, depth=5, num_heads=5, mlp_hidden=28, vocab_size=33,
                text_positions=40, soft_layers=[1, 3, 4], num_experts=3),
    ModelConfig(image_size=16, patch_size=16, dim=12, depth=2, num_heads=2, mlp_hidden=50, vocab_size=9, soft_layers=[],
                num_experts=2),
    ModelConfig(image_size=8, patch_size=2, dim=8, depth=1, num_heads=1, mlp_hidden=8, vocab_size=9, soft_layers=[0],
                num_experts=1, top_k=1),
]  # fmt: skip


@pytest.mark.parametrize("config", SIZES, ids=["five_layers", "no_experts", "one_expert"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_sizes_of_every_task_round_trip(task: str, config: ModelConfig, dtype: torch.dtype) -> None:
    ours = {
        name: torch.randn_like(value).to(dtype) for name, value in TASKS[task](Backbone(config)).state_dict().items()
    }
    there = to_published(ours, config)
    assert there["backbone.position_ids_vision"].shape == (1, 1 + config.num_patches)
    assert there.get("itc_temp", torch.zeros(())).ndim == 0
    again = to_published(from_published(there, config), config)
    back = from_published(there, config)
    for one, other in ((ours, back), (there, again)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.half(), lambda t: t[None]])
def test_experts_of_one_layer_must_be_alike(change: Callable[[Tensor], Tensor], published: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"experts\.3\.fc1\.weight is .* unlike .*experts\.0\.fc1\.weight"):
        from_published(published | {EXPERT: change(published[EXPERT])}, CONFIG)


def test_shuffled_position_ids_are_refused(published: dict[str, Tensor]) -> None:
    name = "backbone.position_ids_text"
    with pytest.raises(UserError, match=r"position_ids_text: positions are not 0, 1, 2"):
        from_published(published | {name: published[name].flip(0)}, CONFIG)


def test_position_ids_need_not_be_there(published: dict[str, Tensor]) -> None:
    state = {name: tensor for name, tensor in published.items() if "position_ids" not in name}
    assert from_published(state, CONFIG).keys() == from_published(published, CONFIG).keys()
