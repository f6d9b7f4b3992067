"""The routers' losses in a task's loss, and a model with each switch exported and loaded again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eve_ds.model.backbone import Backbone
from eve_ds.tasks import load_task_model
from eve_ds.tasks.vqa import VQA
from eve_ds.weights.model_folder import metadata
from eve_ds.weights.save import write_weights
from tests.support.tiny import model_config
from tests.support.tiny_tasks import NUM_ANSWERS, tiny_batch


def vqa(**changes: Any) -> VQA:
    torch.manual_seed(0)
    return VQA(Backbone(model_config(**changes)), NUM_ANSWERS)


def test_the_loss_holds_the_routers_losses_by_their_weights() -> None:
    batch = tiny_batch(4)
    plain = vqa(aux_loss_weight=0.0)(batch)
    both = vqa(aux_loss_weight=0.5, router_z_loss_weight=0.25)(batch)
    assert float(plain.metrics["aux_loss"][0]) > 0 and "router_z_loss" not in plain.metrics
    aux, z = (both.metrics[name][0] for name in ("aux_loss", "router_z_loss"))
    assert float(z) > 0
    torch.testing.assert_close(both.loss, plain.loss + 0.5 * aux + 0.25 * z)


@pytest.mark.parametrize(
    "changes",
    [{"soft_layers": [2], "shared_layers": [1]}, {"modality_routing": False}, {"soft_layers": []}, {"top_k": 1}],
)
def test_a_model_of_the_ablations_is_exported_and_loaded(tmp_path: Path, changes: dict[str, Any]) -> None:
    task, batch = vqa(**changes).eval(), tiny_batch(3)
    write_weights(tmp_path / "model.safetensors", task.state_dict(), metadata(1))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"task": "vqa", "model": asdict(task.config)}))
    loaded = load_task_model("vqa", tmp_path)
    assert loaded.config == task.config
    inputs = (batch["images"], batch["text_ids"], batch["text_mask"])
    with torch.no_grad():
        assert torch.equal(loaded.predict(*inputs), task.predict(*inputs))
