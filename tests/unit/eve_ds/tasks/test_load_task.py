"""Published checkpoints give the published numbers; files that do not fit are named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eve_ds.tasks import Task, load_task_model
from eve_ds.tasks.masked_modeling import MaskedModeling
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from preprocessing.errors import UserError
from tests.support.tiny_tasks import OBJECTIVE, tiny_batch, tiny_config, tiny_task

ASSETS = Path("tests/assets")
CONFIG = ASSETS / "vlmo_config.json"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    """What the published code computes from the weights in tests/assets, without dropping tokens."""
    with np.load(ASSETS / "outputs.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def published(task: str, name: str) -> Task:
    return load_task_model(task, ASSETS / f"{name}.safetensors", CONFIG, image_size=32, published_routing=True)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found.detach(), expected, atol=1e-4, rtol=0)


def test_vqa_equals_the_published_code(golden: dict[str, torch.Tensor]) -> None:
    task = published("vqa", "vqa")
    assert same(task.predict(golden["image"], golden["text_ids"], golden["text_atts"]), golden["vqa_logits"])


@pytest.mark.parametrize("head", ["plain", "biattn"])
def test_nlvr_equals_the_published_code(head: str, golden: dict[str, torch.Tensor]) -> None:
    task = published("nlvr", f"nlvr_{head}")
    assert isinstance(task, NLVR)
    assert task.biattn == (head == "biattn")
    logits = task.predict((golden["image"], golden["image2"]), golden["text_ids"], golden["text_atts"])
    assert same(logits, golden[f"nlvr_{head}_logits"])


def test_retrieval_equals_the_published_code(golden: dict[str, torch.Tensor]) -> None:
    task = published("retrieval", "retrieval")
    assert isinstance(task, Retrieval)
    image, ids, mask = golden["image"], golden["text_ids"], golden["text_atts"]
    assert same(task.encode_image(image), golden["itc_image_normed"])
    assert same(task.encode_text(ids, mask), golden["itc_text_normed"])
    assert same(task.encode_image(image, normed=False), golden["itc_image"])
    assert same(task.encode_text(ids, mask, normed=False), golden["itc_text"])
    assert same(task.match(image, ids, mask), golden["itm_logits"])


def test_published_routing_pads_texts_to_forty(golden: dict[str, torch.Tensor]) -> None:
    task = published("retrieval", "retrieval")
    row = slice(1, 2)
    length = int(golden["text_atts"][row].sum())
    short = (golden[name][row, :length] for name in ("text_ids", "text_atts"))
    assert length < 40
    assert same(task.match(golden["image"][row], *short), golden["itm_logits"][row])


def test_any_published_file_has_a_backbone_to_pretrain(golden: dict[str, torch.Tensor]) -> None:
    task = published("pretrain", "vqa")
    hidden = task.backbone(golden["image"], golden["text_ids"], golden["text_atts"]).hidden
    assert same(hidden, golden["backbone_vl_nodrop"])
    assert not task.training
    assert task.dtype == torch.float32


def test_decoders_that_a_file_lacks_are_told_of_and_repeat(caplog: pytest.LogCaptureFixture) -> None:
    first, second = (load_task_model("pretrain", ASSETS / "vqa.safetensors", CONFIG).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "vqa.safetensors holds no decoders of pre-training" in caplog.text


def test_capacity_factor_is_passed_on(golden: dict[str, torch.Tensor]) -> None:
    path = ASSETS / "vqa.safetensors"
    task = load_task_model("vqa", path, CONFIG, 32, capacity_factor=1.0, published_routing=True)
    hidden = task.backbone(golden["image"], golden["text_ids"], golden["text_atts"]).hidden
    assert same(hidden, golden["backbone_vl_capacity1"])


def test_a_torch_file_loads_too(tmp_path: Path, golden: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": load_file(ASSETS / "nlvr_plain.safetensors")}, path)
    task = load_task_model("nlvr", path, CONFIG, image_size=32)
    logits = task.predict((golden["image"], golden["image2"]), golden["text_ids"], golden["text_atts"])
    assert logits.shape == (3, 2)


def test_image_size_is_read_off_the_positions_or_interpolated_to() -> None:
    path = ASSETS / "vqa.safetensors"
    assert load_task_model("vqa", path, CONFIG).config.image_size == 32
    larger = load_task_model("vqa", path, CONFIG, image_size=48)
    batch = tiny_batch(2)
    logits = larger.predict(torch.randn(2, 3, 48, 48), batch["text_ids"], batch["text_mask"])
    assert logits.shape == (2, 3128)


@pytest.mark.parametrize(
    ("kind", "name"),
    [("pretrain", "pretrain"), ("vqa", "vqa"), ("nlvr", "nlvr_biattn"), ("retrieval", "retrieval")],
)
def test_a_model_folder_comes_back_as_it_was(kind: str, name: str, tmp_path: Path) -> None:
    task = tiny_task(name)
    save_file({key: value.contiguous() for key, value in task.state_dict().items()}, tmp_path / "model.safetensors")
    stored = {"model": dataclasses.asdict(tiny_config()), "objective": dataclasses.asdict(OBJECTIVE)}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    loaded = load_task_model(kind, tmp_path)
    state = task.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    if isinstance(loaded, MaskedModeling):
        assert loaded.objective == OBJECTIVE


def test_a_published_file_of_another_model_is_named(tmp_path: Path) -> None:
    narrower = json.loads(CONFIG.read_text())
    narrower["moe_param"]["num_experts"] = 4
    (tmp_path / "vlmo.json").write_text(json.dumps(narrower))
    with pytest.raises(UserError, match=r"vqa\.safetensors: .* unknown: .*experts\.4\.fc1\.bias"):
        load_task_model("vqa", ASSETS / "vqa.safetensors", tmp_path / "vlmo.json")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown task 'itm'"):
        load_task_model("itm", ASSETS / "vqa.safetensors", CONFIG)
    with pytest.raises(UserError, match=r"none\.safetensors"):
        load_task_model("vqa", tmp_path / "none.safetensors", CONFIG)
    with pytest.raises(UserError, match=r"vqa\.safetensors: no config\.yaml beside it"):
        load_task_model("vqa", ASSETS / "vqa.safetensors")
    with pytest.raises(UserError, match=r"vqa\.safetensors: no head for task retrieval: 'itc_vision_proj_head"):
        load_task_model("retrieval", ASSETS / "vqa.safetensors", CONFIG)
    with pytest.raises(UserError, match=r"vqa\.safetensors: the weights are not those of this model.*output\.3"):
        load_task_model("nlvr", ASSETS / "vqa.safetensors", CONFIG)
    save_file(load_file(ASSETS / "vqa.safetensors"), tmp_path / "model.safetensors")
    (tmp_path / "config.yaml").write_text("model: {dimm: 3}\n")
    with pytest.raises(UserError, match=r"config\.yaml: model: unknown key 'dimm'; did you mean dim\?"):
        load_task_model("vqa", tmp_path)


def test_evaluated_as_published_the_vectors_are_those_before_the_final_norm(golden: dict[str, torch.Tensor]) -> None:
    task = published("retrieval", "retrieval")
    assert isinstance(task, Retrieval)
    task.evaluate_as_published()
    assert same(task.encode_image(golden["image"]), golden["itc_image"])
    assert same(task.encode_text(golden["text_ids"], golden["text_atts"]), golden["itc_text"])
