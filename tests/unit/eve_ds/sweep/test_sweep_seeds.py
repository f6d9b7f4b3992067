"""One fine-tuning with several seeds: its commands, what is refused, and the figures."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev

import pytest

from eve_ds.config import FinetuneConfig, parse
from eve_ds.finetune_options import expand_options
from eve_ds.sweep import seeds
from eve_ds.sweep.stages import FINETUNE, Stage
from preprocessing.errors import UserError

OPTIONS = ["--config", "tiny_shapes_vqa", "--init_from", "null", "--data", "d", "--split", "val"]


def test_each_seed_is_the_command_with_its_seed_and_its_folder(tmp_path: Path) -> None:
    stages, split = seeds.stages_of([FINETUNE, *OPTIONS], tmp_path, 2, ranks=1)
    assert split == "val"
    for seed, stage in enumerate(stages):
        folder = tmp_path / f"seed_{seed}"
        own = ["--engine.seed", str(seed), "--output_dir", str(folder)]
        assert stage.command == ["python", "-m", FINETUNE, *OPTIONS, *own]
        assert (stage.folder, stage.product) == (folder, folder / "scores_val.json")
    launched = ["deepspeed", "--num_gpus", "2", "--module"]
    stages, _ = seeds.stages_of([*launched, FINETUNE, *OPTIONS], tmp_path, 1, ranks=1)
    assert stages[0].command[:8] == ["python", "-m", "eve_ds.launching", *launched, FINETUNE]
    stages, _ = seeds.stages_of([FINETUNE, *OPTIONS], tmp_path, 1, ranks=2)
    assert "torch.distributed.run" in stages[0].command


def test_each_seed_has_its_own_second_place(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("checkpoint: {second_place: s3://bucket/x/}")
    of_recipe = ["--config", str(tmp_path / "recipe.yaml"), "--task", "vqa", *OPTIONS[2:]]
    given = [
        ["--output_hdfs", "s3://bucket/x"],
        ["--checkpoint.second_place", "s3://bucket/x"],
        ["--checkpoint.second_place=s3://bucket/x/"],
    ]
    for words in (*([*OPTIONS[:2], *place, *OPTIONS[2:]] for place in given), of_recipe):
        stages, _ = seeds.stages_of([FINETUNE, *words], tmp_path, 2, ranks=1)
        for seed, stage in enumerate(stages):
            argv, defaults = expand_options(stage.command[stage.command.index(FINETUNE) + 1 :])
            found = parse(FinetuneConfig, argv, "python -m eve_ds.finetune", defaults)
            assert found.checkpoint.second_place == f"s3://bucket/x/seed_{seed}"


@pytest.mark.parametrize(
    ("command", "ranks", "fault"),
    [
        ([], 1, "behind -- stands no eve_ds.finetune"),
        (["eve_ds.pretrain"], 1, "behind -- stands no eve_ds.finetune"),
        ([FINETUNE, *OPTIONS, "--seed", "3"], 1, "--seed differs from seed to seed: leave it out"),
        ([FINETUNE, *OPTIONS, "--output_dir=x"], 1, "--output_dir differs from seed to seed"),
        ([FINETUNE, *OPTIONS, "--optimizer.lrr", "3"], 1, "optimizer.lrr"),
        (["torchrun", "--module", FINETUNE, *OPTIONS], 2, "--ranks 2: the launcher torchrun says how many"),
    ],
)
def test_a_command_that_is_none_of_one_fine_tuning_is_refused(
    command: list[str], ranks: int, fault: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        seeds.stages_of(command, tmp_path, 2, ranks)
    assert fault in str(raised.value) and "\n" not in str(raised.value)


def test_the_figures_are_means_and_sample_deviations_of_every_metric(tmp_path: Path) -> None:
    stages = []
    for seed, value in enumerate((50.0, 52.0, 57.0)):
        stages.append(Stage(f"seed {seed}", [], tmp_path, tmp_path / f"{seed}.json"))
        own = {"soft_accuracy": value, "only_first": 1.0} if seed == 0 else {"soft_accuracy": value}
        stages[-1].product.write_text(json.dumps(own | {"best": {"step": 7}, "incomplete": {}}))
    found = seeds.scores_of(stages)
    values = [50.0, 52.0, 57.0]
    assert found == {"soft_accuracy": {"mean": 53.0, "deviation": stdev(values), "n": 3, "values": values}}
    assert "| soft_accuracy | 53 ± 3.6         | 3 | 50     | 52     | 57     |" in seeds.markdown(found, "val", 3)


def test_recalls_after_re_ranking_are_metrics_and_what_lies_beside_them_is_none(tmp_path: Path) -> None:
    beside = {
        "official_split": "COCO test",
        "intervals": {"txt_r1": [1.0, 2.0], "reranked": {"txt_r1": [1.0, 2.0]}},
        "incomplete": {"texts": {"scored": 4, "of": 5}, "dropped": {"unreadable": 1}},
        "best": {"metric": "val/txt_r1", "mode": "max", "value": 1.0, "step": 7},
        "about": {"samples": 5, "step": 7, "task": "itr_coco"},
    }
    stages = []
    for seed, value in enumerate((50.0, 52.0)):
        stages.append(Stage(f"seed {seed}", [], tmp_path, tmp_path / f"{seed}.json"))
        own = {"txt_r1": value, "reranked": {"txt_r1": value + 4, "r_mean": 60}}
        stages[-1].product.write_text(json.dumps(own | beside))
    found = seeds.scores_of(stages)
    values = {name: each["values"] for name, each in found.items()}
    assert values == {"txt_r1": [50, 52], "reranked/txt_r1": [54, 56], "reranked/r_mean": [60, 60]}
    assert found["reranked/txt_r1"]["mean"] == 55
    assert "| reranked/txt_r1 | 55 ± 1.4 " in seeds.markdown(found, "test", 2)
