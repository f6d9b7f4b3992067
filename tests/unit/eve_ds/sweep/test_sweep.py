"""Tables, commands and arithmetic of ``python -m eve_ds.sweep``."""

from __future__ import annotations

import copy
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.demo import FIRST_VALUES
from eve_ds.errors import exit_code
from eve_ds.finetune_options import expand_options
from eve_ds.model.model_config import ModelConfig
from eve_ds.options import check_options
from eve_ds.recipes import hint_of, parse_value, type_errors
from eve_ds.sweep import __main__ as sweep
from eve_ds.sweep.stages import Settings, Stage, lanes, options, run_folder, scores_file, shape
from eve_ds.sweep.summary import MOST_SEEDS, T_975, difference, markdown, spread, table_of
from eve_ds.sweep.tables import MEASURES, TABLES, Paper
from preprocessing.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[4]


def settings(out: Path, **changed: Any) -> Settings:
    tasks = {"itr_coco": ("tiny_shapes_itr", "captions")}
    return Settings(
        **({"out": out, "config": "tiny_shapes", "data": "captions", "tokenizer": "t", "tasks": tasks} | changed)
    )


def pretrained(stage: Stage) -> PretrainConfig:
    return parse(PretrainConfig, stage.command[stage.command.index("eve_ds.pretrain") + 1 :], "test")


# Tables


@pytest.fixture(scope="module")
def recipe() -> PretrainConfig:
    return parse(PretrainConfig, ["--config", "tiny_shapes"], "test")


@pytest.mark.parametrize("name", TABLES)
def test_rows_differ_and_the_reference_is_the_recipe(name: str, recipe: PretrainConfig) -> None:
    """By their values, so that two ways to write the same options count as one; each is a value that its key takes."""
    table, configs = TABLES[name], {}
    for row in table.rows:
        config = copy.deepcopy(recipe)
        words = options(row, config.model)
        check_options(PretrainConfig, words)
        for option, typed in zip(words[::2], words[1::2], strict=True):
            key, value = option.removeprefix("--"), parse_value(typed)
            assert not list(type_errors(value, hint_of(PretrainConfig, key), key))
            *section, last = key.split(".")
            setattr(getattr(config, section[0]) if section else config, last, value)
        config.model.check()
        config.objective.check()
        assert config.spec.name == config.task and config not in configs.values()
        configs[row.name] = config
    if name == "experts":
        configs[table.reference].model.num_experts = recipe.model.num_experts  # 32 is the paper's
    assert configs[table.reference] == recipe


def test_the_rows_have_the_numbers_of_the_documents() -> None:
    """docs/ablations.md has them by hand: NLVR2 dev / test-P, Flickr30k text / image, VQA."""
    page = (REPOSITORY / "docs/ablations.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and " / " in line and "--" in line]
    lines = [row.split("|")[3:6] for row in rows if "--task" not in row]  # targets: codes are no data of a sweep
    listed = {Paper(float(n.split("/")[1]), *map(float, f.split("/")), float(v)) for n, f, v in lines}
    told = {row.paper for name in ("objective", "last_blocks", "modality_routing") for row in TABLES[name].rows}
    assert len(lines) == 10 and listed == told
    assert {name for name, table in TABLES.items() if any(row.paper for row in table.rows)} == {
        "objective", "last_blocks", "modality_routing", "rivals",
    }  # fmt: skip
    assert [row.paper for row in TABLES["rivals"].rows] == [
        None, None, (None, 94.2, 80.8, 77.1), (None, 94.0, 80.0, 76.8), (None, 94.4, 81.2, 77.4),
    ]  # fmt: skip


def test_blocks_are_those_of_the_recipe() -> None:
    base = parse(PretrainConfig, ["--config", "pretrain_base"], "test").model
    rows = {row.name: options(row, base) for row in TABLES["last_blocks"].rows}
    assert rows["shared"] == ["--model.soft_layers", "[]", "--model.shared_layers", "[10,11]"]
    assert rows["shared_deeper"] == [
        "--model.depth",
        "13",
        "--model.soft_layers",
        "[]",
        "--model.shared_layers",
        "[11,12]",
    ]
    base.soft_layers = []
    with pytest.raises(UserError, match=r"model\.soft_layers of the recipe is empty; row shared "):
        options(TABLES["last_blocks"].rows[0], base)


def test_initial_values_have_the_recipes_shape_but_where_the_fine_tuning_decides(
    recipe: PretrainConfig, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: {image_size: 96, layer_scale: 0.1}\n", encoding="utf-8")
    plain, larger = (json.loads(shape(recipe.model, config)) for config in ("tiny_shapes_itr", str(mine)))
    assert plain.pop("image_size") == 64 and plain.pop("layer_scale") == 1.0 and plain == larger
    assert ModelConfig(image_size=64, layer_scale=1.0, **plain) == recipe.model


def test_measures_are_those_that_the_tasks_write() -> None:
    for task, measures in MEASURES.items():
        spec = FinetuneConfig(task=task).spec
        known = dict(spec.measures)
        for measure in measures:
            assert measure.key in known and measure.to_percent == spec.to_percent and measure.key in Paper._fields


# Commands


def test_runs_of_a_seed_share_it_and_rows_differ_in_their_options_alone(tmp_path: Path) -> None:
    common = settings(tmp_path, steps=7, finetune_steps=5, extra=("--optimizer.lr", "1e-4", "--model.dim", "64"))
    found = lanes(common, TABLES["objective"], [FIRST_VALUES, "mim", "separate"], 2, check=False)
    assert [[stage.title for stage in lane] for lane in found[:3]] == [
        ["first_values, seed 0: fine-tuning on itr_coco"],
        ["mim, seed 0: pre-training", "mim, seed 0: fine-tuning on itr_coco"],
        ["separate, seed 0: pre-training", "separate, seed 0: fine-tuning on itr_coco"],
    ]
    assert len(found) == 6
    mim, separate = (pretrained(lane[0]) for lane in found[4:])
    assert (mim.engine.seed, mim.optimizer.total_steps, mim.optimizer.lr, mim.model.dim) == (1, 7, 1e-4, 64)
    assert mim.objective.mode == "mim" and Path(mim.output_dir) == run_folder(tmp_path, "mim", 1, "pretrain")
    mim.objective.mode, mim.output_dir = separate.objective.mode, separate.output_dir
    assert mim == separate
    (first,), (before, tuned) = found[3], found[5]
    argv, defaults = expand_options(first.command[3:])
    config = parse(FinetuneConfig, argv, "test", defaults)
    assert config.model == separate.model and config.init_from is None and config.data.tokenizer == "t"
    assert (config.engine.seed, config.optimizer.total_steps, config.optimizer.lr) == (1, 5, 2e-3)
    start = tuned.command.index("--checkpoint")
    assert tuned.command[start + 1] == str(before.folder)
    shared = tuned.command[:start] + tuned.command[start + 2 : -1]
    assert shared == first.command[:start] + first.command[start + 6 : -1]


def test_several_ranks_are_launched_with_the_recipes_expert_parallel_size(tmp_path: Path) -> None:
    ((stage, _),) = lanes(settings(tmp_path, ranks=2), TABLES["objective"], ["mlm"], 1, check=False)
    launched = "python -m eve_ds.launching python -m torch.distributed.run --standalone --nproc_per_node 2 --module "
    assert stage.shown.startswith(f"{launched}eve_ds.pretrain --config tiny_shapes ")
    assert "--engine.expert_parallel_size" not in stage.command


# Arithmetic


def test_the_quantiles_are_students() -> None:
    for degrees, quantile in enumerate(T_975, 1):
        x = np.linspace(0, quantile, 200_001)
        density = (1 + x**2 / degrees) ** (-(degrees + 1) / 2)
        scale = math.gamma((degrees + 1) / 2) / math.sqrt(degrees * math.pi) / math.gamma(degrees / 2)
        inside = scale * float(np.sum((density[1:] + density[:-1]) / 2) * (x[1] - x[0]))
        assert 0.5 + inside == pytest.approx(0.975, abs=3e-5)
    assert MOST_SEEDS == 20


def test_spread_and_difference_against_a_plain_computation() -> None:
    own, base = [88.5, 92.0, 84.5], [80.0, 90.5, 81.0]
    gaps = [8.5, 1.5, 3.5]
    mean = sum(gaps) / 3
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / 2) ** 0.5
    assert difference(own, base) == pytest.approx({"mean": mean, "half": 4.303 * deviation / 3**0.5})
    mean = sum(own) / 3
    assert spread(own) == pytest.approx({"mean": mean, "deviation": (sum((v - mean) ** 2 for v in own) / 2) ** 0.5})
    assert spread([3.0]) == {"mean": 3.0, "deviation": None} and difference([3.0], [1.0]) == {"mean": 2.0, "half": None}


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def fill(out: Path, row: str, scores: list[float]) -> None:
    for seed, score in enumerate(scores):
        write(scores_file(run_folder(out, row, seed, "nlvr")), {"accuracy": score})
        if row != FIRST_VALUES:
            write(
                run_folder(out, row, seed, "pretrain").with_suffix(".json"),
                {"command": "x", "seconds": 60 * (seed + 1)},
            )


def test_the_table_has_our_scores_beside_the_papers(tmp_path: Path) -> None:
    rows = {FIRST_VALUES: [0.5, 0.52], "hard": [0.8, 0.9], "soft": [0.9, 0.92]}
    for row, scores in rows.items():
        fill(tmp_path, row, scores)
    common = settings(tmp_path, tasks={"nlvr": ("tiny_shapes_nlvr", "nlvr")})
    figures = table_of(common, TABLES["last_blocks"], list(rows), 2)
    hard = figures[1]["scores"][0]
    assert figures[1]["minutes"] == 1.5 and hard["seeds"] == [80.0, 90.0]
    assert hard["paper"] == 80.1 and hard["paper_difference"] == pytest.approx(80.1 - 80.7)
    assert hard["difference"] == pytest.approx({"mean": -6.0, "half": 12.706 * 32**0.5 / 2**0.5})
    assert "difference" not in figures[2]["scores"][0] and figures[0]["minutes"] is None
    text = markdown("last_blocks", TABLES["last_blocks"], figures)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[:5]]
    assert [lines[0], *lines[2:]] == [
        ["last_blocks", "NLVR", "- soft", "paper: NLVR2 test-P", "- soft", "minutes"],
        ["first_values", "51.0 ± 1.4", "-40.0 ± 0.0", "–", "–", "–"],  # noqa: RUF001
        ["hard", "85.0 ± 7.1", "-6.0 ± 50.8", "80.1", "-0.6", "1.5"],
        ["soft", "91.0 ± 1.4", "–", "80.7", "–", "1.5"],  # noqa: RUF001
    ]
    assert len({len(line) for line in text.splitlines()[:5]}) == 1
    alone = table_of(common, TABLES["last_blocks"], ["hard"], 1)
    assert "difference" not in alone[0]["scores"][0]  # without the reference row
    assert "80.0 |" in markdown("last_blocks", TABLES["last_blocks"], alone)


def test_a_table_without_numbers_of_the_paper_has_no_column_for_them(tmp_path: Path) -> None:
    fill(tmp_path, "recipe", [0.5])
    common = settings(tmp_path, tasks={"nlvr": ("", "")})
    table = TABLES["mask_ratio"]
    assert "paper" not in markdown("mask_ratio", table, table_of(common, table, ["recipe"], 1))


# The command line


def typed(monkeypatch: pytest.MonkeyPatch, *argv: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sweep", *argv])
    return exit_code(sweep.main)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["objective", "--rows", "mim,soft"], "--rows mim,soft: table objective has no row 'soft'; it has "),
        (["objective", "--tasks", "itr"], "--tasks itr: 'itr' is none of itr_coco,itr_flickr,vqa,nlvr"),
        (["objective", "--data", "d"], "--data and --tokenizer go together"),
        (["objective", "--tokenizer", "d"], "--data and --tokenizer go together"),
        (["objective", "--data", "d", "--tokenizer", "t", "--tasks", "vqa"], "--finetune_data is missing: "),
        (["objective", "--tasks", "vqa,nlvr", "--finetune_data", "d"], "--finetune_config and --finetune_data are of"),
        (["objective", "--", "--model.dimm", "3"], "unknown option --model.dimm; did you mean --model.dim?"),
        (["objective", "--config", "gone"], "--config gone: No such file"),
        (["objective", "--data", "s3://a:b@c/d", "--tokenizer", "t"], "--data=s3://***@c/d: holds a user"),
        (["last_blocks", "--", "--model.soft_layers", "[]"], "model.soft_layers of the recipe is empty; row shared "),
        (["other"], "argument NAME: invalid choice: 'other'"),
        (["objective", "--seeds", "0"], "argument --seeds: '0' is not a whole number from 1 on to 20"),
        (["objective", "--seeds", "21"], "argument --seeds: '21' is not a whole number from 1 on to 20"),
        (["objective", "--steps", "x"], "argument --steps: 'x' is not a whole number from 1 on"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert typed(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_folder_of_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    assert typed(monkeypatch, "objective", "--out", str(tmp_path)) == 2
    assert f"error: --out {tmp_path}: holds files that no sweep wrote" in capsys.readouterr().err
    write(tmp_path / "sweep.json", {"table": "experts"})
    assert typed(monkeypatch, "objective", "--out", str(tmp_path)) == 2
    assert f"error: --out {tmp_path}: holds the sweep of another table, experts" in capsys.readouterr().err


def test_printed_commands_are_those_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    argv = ["modality_routing", "--out", str(out), "--seeds", "1", "--print", "--rows", "off", "--steps", "9"]
    assert typed(monkeypatch, *argv) == 0
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if line.startswith("# ")]
    assert told == ["# Drawing the data set, as raw files", "# Raw files to Arrow shards", "# Training the tokenizer",
                    "# off, seed 0: pre-training", "# off, seed 0: fine-tuning on itr_coco"]  # fmt: skip
    assert all(line.startswith(("# ", "python -m ")) for line in lines)
    assert sum("--optimizer.total_steps 9 " in line for line in lines) == 1  # of the pre-training
    write(out / "world/tokenizer/tokenizer.json", {})
    write(run_folder(out, "off", 0, "pretrain") / "model/hashes.json", {})  # run by hand
    assert typed(monkeypatch, *argv, "--data", "captions", "--tokenizer", "t") == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("# ")] == told[4:]
    assert "--data captions" in printed and "world" not in printed
