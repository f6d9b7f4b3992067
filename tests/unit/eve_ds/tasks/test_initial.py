"""First weights: what the tensors' shapes do not show must be as the weights were trained with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from eve_ds.engine.first_weights import SHAPE_INDEPENDENT, load_initial
from eve_ds.model.backbone import Backbone
from eve_ds.tasks import Task
from eve_ds.tasks.vqa import VQA
from preprocessing.errors import UserError
from tests.support.tiny_tasks import NUM_ANSWERS, tiny_config, tiny_task

OTHER = {"num_heads": 8, "top_k": 1, "modality_to_experts": False, "activation": "gelu", "norm_eps": 1e-5}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pre-trained model folder."""
    folder = tmp_path_factory.mktemp("run") / "model"
    folder.mkdir()
    state = tiny_task("pretrain").state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": dataclasses.asdict(tiny_config())}))
    return folder.parent


def vqa(**changes: Any) -> Task:
    return VQA(Backbone(dataclasses.replace(tiny_config(), **changes)), NUM_ANSWERS)


@pytest.mark.parametrize("name", SHAPE_INDEPENDENT)
def test_other_settings_than_the_weights_were_trained_with_are_refused(name: str, run: Path) -> None:
    trained, asked = getattr(tiny_config(), name), OTHER[name]
    words = rf"model\.{name} is {asked} here, but .* with {trained} \(.*config\.yaml\); set --model\.{name} "
    with pytest.raises(UserError, match=words):
        load_initial(vqa(**{name: asked}), run, load_head=False)


def test_settings_that_may_differ_do(run: Path) -> None:
    free = {"image_size": 48, "drop_path": 0.2, "max_text_length": 8, "capacity_factor": 1.5, "aux_loss_weight": 0.5}
    free |= {"init_std": 0.1, "position_std": 0.1, "layer_scale": 1.0, "checkpoint_activations": True}
    task = vqa(**free)
    load_initial(task, run, load_head=False)
    expected = tiny_task("pretrain").backbone.norm.weight
    assert torch.equal(task.backbone.norm.weight, expected)


def test_what_a_stored_config_leaves_out_is_the_default(run: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    (tmp_path / "config.yaml").write_text("model: {num_heads: 4}")
    load_initial(vqa(), tmp_path, load_head=False)
    with pytest.raises(UserError, match=r"model\.activation is gelu here, .* with quick_gelu"):
        load_initial(vqa(activation="gelu"), tmp_path, load_head=False)
    (tmp_path / "config.yaml").write_text("models: {}")
    with pytest.raises(UserError, match=r"config\.yaml: no 'model' section"):
        load_initial(vqa(), tmp_path, load_head=False)


def test_weights_without_a_config_are_not_compared(run: Path, tmp_path: Path) -> None:
    (tmp_path / "bare.safetensors").write_bytes((run / "model" / "model.safetensors").read_bytes())
    load_initial(vqa(activation="gelu"), tmp_path / "bare.safetensors", load_head=False)
