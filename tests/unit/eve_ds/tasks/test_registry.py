"""Tasks by name and by import path, and what a config with a user's own task takes (docs/examples)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from docs.examples import my_objective, my_task
from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.tasks import FinetuneSpec, Objective, PretrainSpec
from eve_ds.tasks.registry import BY_NAME, FINETUNE, PRETRAIN, find_spec, finetune_spec, pretrain_spec
from preprocessing.errors import UserError
from tests.support.tiny import caption_batch, model_config
from tests.support.tiny_tasks import MASK, RIVALS

TASK, OBJECTIVE = "docs.examples.my_task:SPEC", "docs.examples.my_objective:SPEC"


def config(root: type, *options: str) -> Any:
    return parse(root, [*options], "test")


def test_names_are_those_of_the_contract() -> None:
    assert list(FINETUNE) == ["itr_coco", "itr_flickr", "vqa", "nlvr"]
    assert list(PRETRAIN) == ["pretrain", *RIVALS, "mlm_mim_codes"]
    assert {name: find_spec(name).name for name in BY_NAME} == {name: name for name in BY_NAME}
    assert find_spec("itr_flickr") is find_spec("retrieval")
    assert find_spec(TASK) is finetune_spec(TASK) is my_task.SPEC and pretrain_spec(OBJECTIVE) is my_objective.SPEC


@pytest.mark.parametrize(
    "spec", [*map(find_spec, BY_NAME), my_task.SPEC, my_objective.SPEC], ids=lambda spec: spec.name
)
def test_every_spec_is_whole(spec: Any) -> None:
    assert isinstance(spec, FinetuneSpec) != isinstance(spec, PretrainSpec)
    assert issubclass(spec.objective, Objective) and dataclasses.is_dataclass(spec.objective)
    if isinstance(spec, FinetuneSpec):
        assert spec.title and spec.measures


def test_the_section_objective_is_the_tasks_own() -> None:
    found = config(FinetuneConfig, "--task", TASK, "--objective.label_smoothing", "0.2")
    assert isinstance(found, FinetuneConfig) and found.objective == my_task.ColorObjective(0.2)
    with pytest.raises(UserError, match=r"unknown option --objective\.embed_dim"):
        config(FinetuneConfig, "--task", TASK, "--objective.embed_dim", "8")
    with pytest.raises(UserError, match=r"objective\.label_smoothing=2\.0 must be"):
        config(FinetuneConfig, "--task", TASK, "--objective.label_smoothing", "2")
    with pytest.raises(UserError, match=r"--objective\.label_smoothing: expected a number, got 'much'"):
        config(FinetuneConfig, "--task", TASK, "--objective.label_smoothing", "much")


def test_a_recipe_names_the_task_and_the_command_line_wins(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    recipe.write_text(f"task: {OBJECTIVE}\nobjective: {{text_mask_ratio: 0.25}}\n")
    assert config(PretrainConfig, "--config", str(recipe)).objective == my_objective.WordsObjective(0.25)
    recipe.write_text(f"task: {OBJECTIVE}\n")
    assert config(PretrainConfig, "--config", str(recipe), "--task=pretrain") == PretrainConfig()
    recipe.write_text("task: docs.examples.absent:SPEC\n")
    with pytest.raises(UserError, match=r"own\.yaml: task docs\.examples\.absent:SPEC: there is no module docs\.exam"):
        config(PretrainConfig, "--config", str(recipe))


@pytest.mark.parametrize(
    ("root", "task", "message"),
    [
        (FinetuneConfig, "itm", r"--task: expected one of itr_coco, itr_flickr, vqa, nlvr, or the import path of your"),
        (PretrainConfig, "vqa", r"--task: expected one of pretrain, itc_itm, .* or the import path"),
        (FinetuneConfig, "docs.examples.my_task:SPEK", r"docs\.examples\.my_task has no SPEK; check the spelling"),
        (FinetuneConfig, OBJECTIVE, r"expected an instance of eve_ds\.tasks\.FinetuneSpec, this is of type WordsSpec"),
        (PretrainConfig, TASK, r"expected an instance of eve_ds\.tasks\.PretrainSpec, this is of type ColorSpec"),
        (FinetuneConfig, "docs.examples.my_task:ColorSpec", r"FinetuneSpec, this is of type ABCMeta"),
    ],
)
def test_what_is_no_task_is_told_in_one_line(root: type, task: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config(root, "--task", task)
    assert "\n" not in str(caught.value) and "--task" in str(caught.value)


@pytest.mark.parametrize("task", [TASK, OBJECTIVE])
def test_the_examples_give_every_parameter_a_gradient(task: str) -> None:
    from eve_ds.model.backbone import Backbone

    spec = find_spec(task)
    built = spec.build(Backbone(model_config()), spec.objective(), mask_id=MASK, num_classes=0, seed=0)
    batch = caption_batch(4) | {"color": torch.tensor([0, 1, 3, -1]), "sample": torch.arange(4)}
    output = built(batch)
    output.loss.backward()
    assert output.loss.isfinite()
    assert [name for name, value in built.named_parameters() if value.grad is None] == []
    assert all(name.startswith(("backbone.", *built.heads)) for name in built.state_dict())


@pytest.mark.parametrize("task", [TASK, OBJECTIVE])
def test_an_own_task_can_be_planned(task: str) -> None:
    from eve_ds.plan.__main__ import FinetunePlan, PretrainPlan, _root
    from eve_ds.plan.figures import make_plan

    root = PretrainPlan if task == OBJECTIVE else FinetunePlan
    assert _root(["--task", task]) is root
    shape = [
        f"--model.{name}={value}" for name, value in dataclasses.asdict(model_config()).items() if value is not None
    ]
    options = config(root, "--task", task, *shape, "--engine.global_batch_size=8", "--device_memory=1GiB")
    plan = make_plan(dataclasses.replace(options, device="cpu", world_size=2))
    assert plan["run"]["task"] == task and plan["flops_per_sample"] > 0
    assert plan["memory"]["without_checkpointing"]["peak"] > 0
