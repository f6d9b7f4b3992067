"""docs/paper_recipe.md: every command is read by its own parser, and the recipes give what the page says."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation.common import InputError
from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.finetune_options import expand_options
from eve_ds.plan.__main__ import PretrainPlan
from preprocessing.__main__ import COMMANDS
from preprocessing.__main__ import main as preprocess
from preprocessing.errors import UserError

PAGE = Path(__file__).resolve().parents[3] / "docs" / "paper_recipe.md"
LINES = re.findall(r"^ {4}(\S.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
SOURCES_4M = ["data/coco", "data/vg", "data/sbu", "data/cc3m"]


def commands(module: str) -> list[list[str]]:
    """What follows the name of a module, or of a package's module, in the commands of the page."""
    started = rf"(?:python -m|deepspeed --hostfile hostfile --module) {re.escape(module)}(?= )"
    return [shlex.split(line)[shlex.split(line).index(module) + 1 :] for line in LINES if re.match(started, line)]


def pretrain(argv: list[str]) -> PretrainConfig:
    return parse(PretrainConfig, argv, "pretrain")


def finetune(argv: list[str]) -> FinetuneConfig:
    options, defaults = expand_options(argv)
    return parse(FinetuneConfig, options, "finetune", defaults)


def test_every_command_is_one_that_is_tried_here() -> None:
    tried = ("eve_ds.pretrain", "eve_ds.finetune", "eve_ds.plan", "eve_ds.convert", "preprocessing")
    tried += ("evaluation.retrieval", "evaluation.nlvr")
    count = sum(len(commands(module)) for module in tried)
    others = [line for line in LINES if line.startswith("jq ")]  # no part of this project
    assert count + len(others) == len(LINES) and len(others) == 1
    assert [len(commands(module)) for module in tried] == [4, 4, 3, 2, 19, 1, 1]


def test_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for module, _ in COMMANDS.values():
        monkeypatch.setattr(module, "run", lambda args: seen.append(args) or 0)
    assert [preprocess(argv) for argv in commands("preprocessing")] == [0] * len(seen)
    converted = [args for args in seen if hasattr(args, "split")]
    trained = {Path(args.out).name: args for args in converted if args.split == "train"}
    for name in (Path(path).name for path in [*SOURCES_4M, "data/cc12m"]):
        assert trained[name].near_duplicates_of == ["held_out.npz"], name
    hashed = next(args for args in seen if getattr(args, "out", "") == "held_out.npz")
    held_out = {f"{args.out}/{args.split}" for args in converted if args.split != "train" and args.out != "data/vqa"}
    assert {*hashed.directory} == held_out and len(held_out) == 6
    order = [f"{args.out}/{args.split}" if hasattr(args, "split") else getattr(args, "out", "") for args in seen]
    assert max(order.index(name) for name in held_out) < order.index("held_out.npz") < order.index("data/coco/train")


@pytest.mark.parametrize(("size", "steps", "lr"), [("base", 480_000, 5e-4), ("large", 280_000, 2e-4)])
def test_recipe_and_sources_together(size: str, steps: int, lr: float) -> None:
    """Of two recipes the later one wins, key by key: the sources leave the rest of ``data`` as it was."""
    plain = pretrain(["--config", f"pretrain_{size}"])
    for name, expected in (("4m", SOURCES_4M), ("16m", [*SOURCES_4M, "data/cc12m"])):
        config = pretrain(["--config", f"pretrain_{size}", "--config", f"sources_{name}"])
        assert [source.path for source in config.data.sources or []] == expected
        assert (config.data.home, config.data.val_split, config.data.tokenizer) == (
            "data/coco",
            "val",
            "data/tokenizer",
        )
        assert (config.optimizer.total_steps, config.optimizer.lr) == (steps, lr)
        assert config.engine.global_batch_size == 2048 and config.model == plain.model
        config.data.path, config.data.sources, config.data.tokenizer = plain.data.path, None, None
        assert config == plain


def test_training_commands() -> None:
    runs = {config.output_dir: config for config in map(pretrain, commands("eve_ds.pretrain"))}
    assert set(runs) == {"runs/base_4m", "runs/large_4m", "runs/large_16m"}
    made = {argv[argv.index("--out") + 1] for argv in commands("eve_ds.convert")}
    assert {config.init_from for config in runs.values()} == made
    for argv, task in zip(commands("eve_ds.finetune"), ("itr_coco", "itr_flickr", "vqa", "nlvr"), strict=True):
        at = argv.index("--checkpoint")
        assert argv[at + 1] in runs
        config = finetune([*argv[:at], *argv[at + 2 :]])  # the weights themselves would be looked at
        assert config.task == task and f"--config {task} " in " ".join(argv)


def test_plans() -> None:
    plans = [parse(PretrainPlan, argv, "plan") for argv in commands("eve_ds.plan")]
    assert [(plan.world_size, plan.model.dim) for plan in plans] == [(64, 768), (64, 1024), (512, 1024)]


@pytest.mark.parametrize("module", ["eve_ds.convert.__main__", "evaluation.retrieval", "evaluation.nlvr"])
def test_commands_on_files_miss_nothing_but_the_files(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = PAGE.parents[1] / "eve_ds"
    (tmp_path / "eve_ds").symlink_to(recipes)
    monkeypatch.chdir(tmp_path)
    main: Callable[[], None] = importlib.import_module(module).main
    found = commands(module.removesuffix(".__main__"))
    assert found
    for argv in found:
        monkeypatch.setattr(sys, "argv", [module, *argv])
        with pytest.raises((UserError, InputError)) as failed:
            main()
        assert "no such" in f"{failed.value} {capsys.readouterr().err}".lower()
