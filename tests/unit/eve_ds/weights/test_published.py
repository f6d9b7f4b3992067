"""What EVE's config JSON leaves out is read off the tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eve_ds.model.model_config import ModelConfig
from eve_ds.weights.published import from_published, published_config, sized_as
from preprocessing.errors import UserError

ASSETS = Path(__file__).parents[3] / "assets"


def test_image_size_and_text_positions_are_those_of_the_tensors() -> None:
    state = load_file(ASSETS / "vqa.safetensors")
    config = published_config(ASSETS / "vlmo_config.json", state)
    assert (config.image_size, config.text_positions, config.max_text_length) == (32, 196, 40)
    assert sized_as(ModelConfig(patch_size=8), from_published(state, config)).image_size == 32
    state["backbone.pos_embed_vision"] = torch.zeros(1 + 36, 64)
    state["backbone.pos_embed_text"] = torch.zeros(30, 64)
    config = published_config(ASSETS / "vlmo_config.json", state)
    assert (config.image_size, config.text_positions, config.max_text_length) == (48, 30, 30)


def test_an_image_size_can_be_given() -> None:
    state = load_file(ASSETS / "vqa.safetensors")
    assert published_config(ASSETS / "vlmo_config.json", state, image_size=64).image_size == 64


def test_an_ill_typed_value_is_named(tmp_path: Path) -> None:
    values = json.loads((ASSETS / "vlmo_config.json").read_text())
    wrong = {"vision_width": "wide", "drop_path_rate": "0.1", "moeffn_layers": ["0"], "moe_param": []}
    words = {"vision_width": "dim is 'wide'", "drop_path_rate": "drop_path is '0.1'"}
    for name, value in wrong.items():
        (tmp_path / "vlmo.json").write_text(json.dumps(values | {name: value}))
        with pytest.raises(UserError, match=rf"vlmo\.json: .*{words.get(name, '')}"):
            published_config(tmp_path / "vlmo.json", {})


@pytest.mark.parametrize("shape", [(), (1, 17, 64), (1, 64)])
def test_positions_of_another_shape_are_ignored(shape: tuple[int, ...]) -> None:
    state = {"backbone.pos_embed_vision": torch.zeros(shape)}
    assert sized_as(ModelConfig(), state) == ModelConfig()


def test_ffn_type_and_type_route_mean_what_they_mean_in_eves_code(tmp_path: Path) -> None:
    values = json.loads((ASSETS / "vlmo_config.json").read_text())
    (tmp_path / "vlmo.json").write_text(json.dumps(values | {"ffn_type": "vl"}))
    with pytest.raises(UserError, match=r"vlmo\.json: ffn_type='vl' is not EVE's model, .*model\.shared_layers"):
        ModelConfig.from_vlmo(tmp_path / "vlmo.json")
    (tmp_path / "vlmo.json").write_text(json.dumps(values | {"moe_param": values["moe_param"] | {"type_route": False}}))
    assert not ModelConfig.from_vlmo(tmp_path / "vlmo.json").modality_routing
    assert ModelConfig.from_vlmo(ASSETS / "vlmo_config.json").modality_routing


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"single_ffn": {"type": "single"}}, "single_ffn="),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"relative_position_embed": True}, "relative_position_embed=True"),
        ({"vison_width": 64}, "vison_width: no key"),
        ({"moe_param": {"num_experts": 8, "topk": 2, "capacity": 2}}, "moe_param.capacity: no key"),
        ({"moe_param": {"num_experts": 8, "topk": 2, "type_route": "false"}}, "modality_routing is 'false', neither"),
        ({"gradient_checkpointing": 1}, "checkpoint_activations is 1, neither"),
    ],
)
def test_no_key_of_eves_json_is_ignored_in_silence(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    values = json.loads((ASSETS / "vlmo_config.json").read_text())
    (tmp_path / "vlmo.json").write_text(json.dumps(values | changes))
    with pytest.raises(UserError, match=rf"vlmo\.json: {words}"):
        ModelConfig.from_vlmo(tmp_path / "vlmo.json")


def test_keys_of_eves_json_are_used_or_told_of(tmp_path: Path) -> None:
    values = json.loads((ASSETS / "vlmo_config.json").read_text())
    told: list[str] = []
    assert not ModelConfig.from_vlmo(ASSETS / "vlmo_config.json", tell=told.append).checkpoint_activations
    (line,) = told
    assert line.endswith(
        'without effect on this model: vision_vocab_size (of visual tokens), vlffn_layers (of ffn_type "vl")'
    )
    values["gradient_checkpointing"] = True
    del values["moe_param"]["type_route"], values["vision_vocab_size"], values["vlffn_layers"]
    (tmp_path / "vlmo.json").write_text(json.dumps(values))
    config = ModelConfig.from_vlmo(tmp_path / "vlmo.json", tell=told.append)
    assert config.checkpoint_activations and told == [line]
    assert not config.modality_routing  # without the key EVE's code has no vectors of modality


def test_heads_of_pre_training_are_named_as_retrieval_takes_them() -> None:
    state = load_file(ASSETS / "retrieval.safetensors")
    config = published_config(ASSETS / "vlmo_config.json", state)
    expected = from_published(state, config)
    heads = {name: state.pop(name) for name in list(state) if not name.startswith("backbone.")}
    renamed = {name.replace("itc_", "mitc_").replace("itm_", "mitm_"): value for name, value in heads.items()}
    found = from_published(state | renamed, config)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    projection = {"itc_vl_text_proj_head.weight": torch.zeros(24, 64)}  # wins over the others, as in EVE's code
    assert not from_published(state | heads | projection, config)["itc_text_proj_head.weight"].any()
