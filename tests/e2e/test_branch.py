"""Branches of a run, runs that start from an unfinished one, and dry runs, as users type them."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from eve_ds.engine.checkpoint import checkpoint_bytes
from eve_ds.engine.whole_weights import consolidated_state
from tests.support import ranks
from tests.support.shards import make_vqa_set

ONE_RANK = ["--engine.expert_parallel_size=1", "--engine.precision=fp32", "--logging.wandb=false"]


@pytest.fixture(scope="module")
def options(tiny_run: list[str]) -> list[str]:
    quiet = ["--logging.eval_every=0", "--logging.samples=0", "--data.val_split=null"]
    return [*tiny_run, *ONE_RANK, *quiet, "--checkpoint.every=2", "--checkpoint.keep=5", "--logging.grad_norms_every=3"]


@pytest.fixture(scope="module")
def straight(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps, checkpoints at 2, 4 and 6."""
    output = tmp_path_factory.mktemp("straight") / "run"
    ranks.run("eve_ds.pretrain", [*options, f"--output_dir={output}"], 1)
    return output


@pytest.fixture(scope="module")
def unfinished(straight: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run as it was after step 4."""
    output = tmp_path_factory.mktemp("unfinished") / "run"
    shutil.copytree(straight, output)
    for late in ("checkpoints/step_00000006", "model"):
        shutil.rmtree(output / late)
    return output


def losses(output: Path, metric: str = "loss") -> dict[int, float]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {int(record["step"]): record[metric] for record in found if "lr" in record}


def same_weights(left: Path, right: Path) -> bool:
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (left, right))
    return all(torch.equal(a[name], b[name]) for name in a)


def test_gradient_norms_by_kind_add_up(straight: Path) -> None:
    kinds = ("attention", "embeddings", "experts", "heads", "image_ffn", "norms", "router", "text_ffn")
    for record in map(json.loads, (straight / "metrics.jsonl").read_text().splitlines()):
        found = {name: norm for name, norm in record.items() if name.startswith("optim/grad_norm/")}
        assert sorted(found) == [f"optim/grad_norm/{kind}" for kind in kinds if record["step"] in (3, 6)]
        if found:
            assert all(norm > 0 for norm in found.values())
            assert math.hypot(*found.values()) == pytest.approx(record["grad_norm"], rel=1e-5)


def test_a_branch_without_changes_is_the_run_itself(straight: Path, options: list[str], tmp_path: Path) -> None:
    output, start = tmp_path / "branch", straight / "checkpoints" / "step_00000004"
    # The profiler changes no bit, either.
    branch = [f"--output_dir={output}", f"--resume_from={start}", "--logging.profile=5:5"]
    told = ranks.run("eve_ds.pretrain", [*options, *branch], 1)
    assert "training from step 4 to step 6" in told and "step 5  memory: at most" in told
    assert "profile: steps 5 to 5 of rank 0" in told
    assert losses(output) == {step: loss for step, loss in losses(straight).items() if step > 4}
    assert same_weights(output, straight)


def test_a_branch_takes_other_groups_of_parameters(straight: Path, options: list[str], tmp_path: Path) -> None:
    """Without decay, with rates by depth and frozen words, DeepSpeed's files are cut otherwise than the new engine's.

    The branch is a cooldown: it begins at the rate of the checkpoint, and resumes bit for bit.
    """
    output = tmp_path / "branch"
    changes = ["--optimizer.weight_decay=0", "--optimizer.layer_decay=0.9", "--optimizer.schedule=cooldown"]
    changes += ["--optimizer.freeze=[backbone.text_embedding.*]", "--optimizer.total_steps=7"]
    branch = [f"--output_dir={output}", f"--resume_from={straight / 'checkpoints' / 'step_00000004'}"]
    ranks.run("eve_ds.pretrain", [*options, *branch, *changes], 1)
    found, expected = losses(output), losses(straight)
    assert found.keys() == {5, 6, 7}
    assert found[5] == pytest.approx(expected[5], abs=1e-6) and found[6] != expected[6]
    assert losses(output, "lr")[5] == losses(straight, "lr")[4]
    assert losses(output, "lr")[7] < losses(output, "lr")[6] < losses(output, "lr")[5]
    trained = load_file(output / "model" / "model.safetensors")
    for name, value in consolidated_state(straight / "checkpoints" / "step_00000004").items():
        assert torch.equal(trained[name], value) == name.startswith("backbone.text_embedding."), name
    shutil.rmtree(output / "checkpoints" / "step_00000007")
    told = ranks.run("eve_ds.pretrain", [*options, *branch, *changes, "--dry_run"], 1)
    assert "steps   6 to 7" in told and "going on from" in told
    told = ranks.run("eve_ds.pretrain", [*options, *branch, *changes], 1)
    assert "training from step 6 to step 7" in told
    assert losses(output) == found and losses(output, "lr")[7] < losses(output, "lr")[6]
    again = load_file(output / "model" / "model.safetensors")
    assert all(torch.equal(again[name], value) for name, value in trained.items())
    assert {path.name for path in straight.glob("checkpoints/*")} == {f"step_0000000{step}" for step in (2, 4, 6)}


def test_a_dry_run_builds_all_and_writes_nothing(straight: Path, options: list[str], tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    output = tmp_path / "branch"
    branch = [f"--output_dir={output}", f"--resume_from={straight}", "--optimizer.total_steps=9", "--dry_run"]
    told = ranks.run("eve_ds.pretrain", [*options, *branch], 1)
    assert "memory: " not in told and "training" not in told, "no callback is called"
    assert "dry run: all is in order, nothing was written" in told
    assert f"branching from {straight / 'checkpoints' / 'step_00000006'}" in told
    assert "steps   6 to 9, each 4 x 2 samples a rank = 8" in told
    step, speed, left = map(
        float, re.search(r"time +(\S+) s a step .* (\S+) samples/s; .*\n +left +(\S+) h", told).groups()
    )
    assert step * speed == pytest.approx(8, rel=0.01) and left == pytest.approx(3 * step / 3600, abs=0.006)
    assert re.search(
        r"memory  at most \d+ MiB beyond .* \(rank 0\), \d+ MiB .*; the plan forecasts \d+ MiB; \d+% of", told
    )
    parameters = int(re.search(r"model +([\d,]+) parameters", told)[1].replace(",", ""))
    written = sum(file.stat().st_size for file in (straight / "checkpoints" / "step_00000006").iterdir())
    assert 1 < written / checkpoint_bytes(parameters, "fp32", 2) < 1.3 and "a checkpoint takes 1 MiB" in told
    no_fall = [*branch, "--optimizer.schedule=cooldown", "--optimizer.min_lr_ratio=0.9"]
    codes, told = ranks.finish(ranks.start("eve_ds.pretrain", [*options, *no_fall], 1))
    assert codes == [2] and "optimizer.schedule cooldown: the learning rate at step 6 is" in told
    told = ranks.run("eve_ds.pretrain", [*options, *branch, "--optimizer.schedule=cooldown"], 1)
    assert "steps   6 to 9" in told and "time " in told
    assert not output.exists() and not list(tmp_path.iterdir())
    assert {path: path.stat().st_mtime_ns for path in straight.rglob("*")} == before


def test_a_dry_run_tells_of_steps_that_are_not_finite_and_writes_nothing(options: list[str], tmp_path: Path) -> None:
    bold = ["--optimizer.lr=1e30", "--optimizer.warmup=0", "--optimizer.gradient_clipping=0", "--dry_run"]
    told = ranks.run("eve_ds.pretrain", [*options, f"--output_dir={tmp_path / 'run'}", *bold], 1)
    assert "WARNING: step 1: the loss or its gradient is not finite; left out; not finite: " in told
    assert "dry run: the trial steps were NOT finite, nothing was written" in told
    assert not list(tmp_path.iterdir())


def test_fine_tuning_starts_from_an_unfinished_run_and_outlives_it(
    unfinished: Path, straight: Path, tmp_path: Path
) -> None:
    for split in ("train", "test"):
        make_vqa_set(tmp_path / "vqa", rows=12, split=split)
    source, output = tmp_path / "source", tmp_path / "run"
    shutil.copytree(unfinished, source)
    options = ["--task=vqa", f"--checkpoint={source}", f"--data={tmp_path / 'vqa'}", f"--output_dir={output}", "--bs=4"]
    options += [*ONE_RANK, "--logging.samples=0", "--data.val_split=null", "--checkpoint.every=1"]
    ranks.run("eve_ds.finetune", [*options, "--optimizer.total_steps=1", "--optimizer.lr=1e-9"], 1)
    begun = load_file(output / "model" / "model.safetensors")  # one step of 1e-9 moves nothing that can be seen
    expected = consolidated_state(source / "checkpoints" / "step_00000004")
    shared = [name for name in expected if name.startswith("backbone.")]
    assert all(torch.allclose(begun[name], expected[name], atol=1e-6) for name in shared)
    end = load_file(straight / "model" / "model.safetensors")
    assert not all(torch.allclose(begun[name], end[name], atol=1e-6) for name in shared)
    shutil.rmtree(source)
    told = ranks.run("eve_ds.finetune", [*options, "--optimizer.total_steps=2", "--optimizer.lr=1e-9"], 1)
    assert "training from step 1 to step 2" in told
    assert "the learning rate goes from 1e-09 to 5e-10, since the schedule is along 2 steps now" in told
