"""A head that is loaded has the size that its file says; what contradicts or lacks it is one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from eve_ds.config import FinetuneConfig, parse
from eve_ds.engine import setup
from eve_ds.engine.first_weights import load_first_weights
from eve_ds.engine.loaded_head import settle_head
from eve_ds.finetune_options import expand_options
from preprocessing.errors import UserError
from tests.support.shards import tiny_tokenizer
from tests.support.tiny_tasks import OBJECTIVE, tiny_config, tiny_task


def settled(assets: Path, task: str, name: str | Path, *options: str, classes: int = 0) -> FinetuneConfig:
    """The config after ``settle_head``, of a command line with EVE's JSON and a recipe that says embed_dim 256."""
    file = name if isinstance(name, Path) else assets / f"{name}.safetensors"
    argv = ["--config", "itr_coco", "--task", task, "--checkpoint", str(file), "--model.image_size=32", *options]
    if isinstance(name, str):
        argv += ["--vlmo_config", str(assets / "vlmo_config.json")]
    argv, defaults = expand_options(argv)
    config = parse(FinetuneConfig, argv, "finetune", defaults)
    settle_head(config, argv, classes)
    return config


@pytest.mark.parametrize("option", ["--evaluate", "--load_head"])
def test_the_settings_of_a_head_are_its_file_s(assets: Path, option: str) -> None:
    assert settled(assets, "itr_coco", "retrieval", option).objective.embed_dim == 24
    assert settled(assets, "nlvr", "nlvr_biattn", option).objective.biattn
    assert not settled(assets, "nlvr", "nlvr_plain", option, "--config", "nlvr").objective.biattn
    assert settled(assets, "vqa", "vqa", option, classes=3128).objective.head_hidden is None  # it has twice the width


def test_a_head_of_another_hidden_width_is_built_as_wide(assets: Path, tmp_path: Path) -> None:
    state = load_file(assets / "vqa.safetensors")
    for name in ("0.weight", "0.bias", "1.weight", "1.bias"):
        state[f"output.{name}"] = state[f"output.{name}"][:96].clone()
    state["output.3.weight"] = state["output.3.weight"][:, :96].clone()
    torch.save({"model": state, "epoch": 1}, tmp_path / "vqa.th")
    options = ["--load_head", "--vlmo_config", str(assets / "vlmo_config.json")]
    config = settled(assets, "vqa", tmp_path / "vqa.th", *options, classes=3128)
    assert config.objective.head_hidden == 96
    task = setup.build_task(config, tiny_tokenizer(), 3128)
    load_first_weights(task, config, load_head=True)
    assert torch.equal(task.state_dict()["output.3.weight"], state["output.3.weight"])


def test_a_head_that_is_trained_keeps_the_recipe_s_settings(assets: Path) -> None:
    assert settled(assets, "itr_coco", "retrieval").objective.embed_dim == 768


@pytest.mark.parametrize(
    ("task", "name", "options", "words"),
    [
        ("itr_coco", "retrieval", ["--objective.embed_dim=64"], "objective.embed_dim=64 was given.*embed_dim=24"),
        ("itr_coco", "retrieval", ["--objective", "{embed_dim: 64}"], "objective.embed_dim=64 was given"),
        ("nlvr", "nlvr_plain", ["--biattn"], "objective.biattn=True was given.*biattn=False"),
        ("vqa", "vqa", ["--objective.head_hidden", "64"], "objective.head_hidden=64 was given.*head_hidden=128"),
    ],
)
def test_an_option_that_contradicts_the_head_is_refused(
    assets: Path, task: str, name: str, options: list[str], words: str
) -> None:
    with pytest.raises(UserError, match=words) as error:
        settled(assets, task, name, "--evaluate", *options)
    assert f"{name}.safetensors" in str(error.value)


def test_a_yaml_file_of_eves_is_no_option_that_contradicts_the_head(assets: Path, tmp_path: Path) -> None:
    eve = tmp_path / "eve.yaml"
    eve.write_text("image_res: 32\nitc_proj_dim: 256\nk_test: 16\n")
    found = settled(assets, "itr_coco", "retrieval", "--evaluate", "--config", str(eve)).objective
    assert (found.embed_dim, found.k_test) == (24, 16)
    with pytest.raises(UserError, match=r"objective\.embed_dim=64 was given"):
        settled(assets, "itr_coco", "retrieval", "--evaluate", f"--config={eve}", "--objective.embed_dim=64")


def test_an_option_that_agrees_is_taken(assets: Path) -> None:
    assert settled(assets, "itr_coco", "retrieval", "--evaluate", "--objective.embed_dim=24").objective.embed_dim == 24
    found = settled(assets, "vqa", "vqa", "--evaluate", "--objective.head_hidden=128", classes=3128)
    assert found.objective.head_hidden == 128


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        ("itr_coco", "vqa", r"no whole head for task retrieval; missing: itc_.*it holds output;"),
        ("vqa", "retrieval", r"no whole head for task vqa; missing: output\.0\.weight.*it holds itc_temp, .*itm_head;"),
        ("nlvr", "vqa", r"no whole head for task nlvr; missing: output\.3\.weight of two classes"),
    ],
)
def test_a_file_without_the_head_says_what_it_holds(assets: Path, task: str, name: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        settled(assets, task, name, "--evaluate")
    assert f"{name}.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_answers_of_another_number_are_named(assets: Path) -> None:
    with pytest.raises(UserError, match=r"vqa\.safetensors: its head knows 3128 answers, D has 6; .*--answer-list"):
        settled(assets, "vqa", "vqa", "--evaluate", "--data", "D", classes=6)


def test_a_pre_trained_model_has_no_head(assets: Path, tmp_path: Path) -> None:
    state = {name: value.contiguous() for name, value in tiny_task("pretrain").state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    stored = {
        "task": "pretrain",
        "model": dataclasses.asdict(tiny_config()),
        "objective": dataclasses.asdict(OBJECTIVE),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(stored))
    words = "it holds pixel_decoder, word_decoder, of a run of task pretrain; name a model that was fine-tuned"
    with pytest.raises(UserError, match=words):
        settled(assets, "vqa", tmp_path, "--load_head")


def test_a_file_tells_the_image_size_that_eves_json_does_not(assets: Path) -> None:
    argv = ["--checkpoint", str(assets / "vqa.safetensors"), "--vlmo_config", str(assets / "vlmo_config.json")]
    assert json.loads((assets / "vlmo_config.json").read_text()).get("image_size") is None
    rest, defaults = expand_options(argv)
    assert parse(FinetuneConfig, rest, "finetune", defaults).model.image_size == 32


def test_a_checkpoint_s_head_is_told_by_its_run(assets: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "complete.json").write_text("{}")
    stored = {"model": dataclasses.asdict(tiny_config()), "objective": {"embed_dim": 48, "temperature": 0.2}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(stored))
    found = settled(assets, "itr_coco", tmp_path / "run", "--load_head").objective
    assert (found.embed_dim, found.temperature) == (48, 0.07)
    with pytest.raises(UserError, match=r"objective\.embed_dim=64 was given, but the head in .*step_00000002 has"):
        settled(assets, "itr_coco", tmp_path / "run", "--load_head", "--objective.embed_dim=64")
