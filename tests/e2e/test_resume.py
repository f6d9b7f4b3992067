"""One run carried on by other numbers of ranks, expert placements and ZeRO stages, as users would; and a ZeRO 3 run.

In fp32 and with the same samples in a micro-batch of all ranks, a step is the same whoever takes it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import ranks

STEPS, TOLERANCE = 9, 1e-5
ZERO_3 = "--deepspeed_config=ds_configs/zero3.json"


@pytest.fixture(scope="module")
def arguments(tiny_run: list[str]) -> list[str]:
    return [
        *tiny_run,
        "--engine.precision=fp32",
        "--engine.micro_batch_size=null",
        "--model.drop_path=0.3",
        "--model.layer_scale=1",
        "--optimizer.eps=1e-4",
        "--optimizer.ema=0.9",
        f"--optimizer.total_steps={STEPS}",
        "--checkpoint.keep=3",
        "--logging.wandb=false",
    ]


def train(arguments: list[str], output: Path, world_size: int, *options: str) -> str:
    return ranks.run("eve_ds.pretrain", [*arguments, f"--output_dir={output}", *options], world_size)


def learned(output: Path) -> dict[int, dict[str, float]]:
    """Of each training step, what does not depend on the clock."""
    timed = ("samples_per_second", "step_seconds", "data/wait_fraction")
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {int(r["step"]): {k: v for k, v in r.items() if k not in timed} for r in found if "lr" in r}


def held_out(output: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if "val/loss" in record]


def until(output: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was when it had saved its checkpoint of ``step``."""
    shutil.copytree(output, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    for folder in ("model", "model_ema", "samples"):
        shutil.rmtree(copy / folder)
    return copy


def same_steps(left: Path, right: Path, steps: range) -> None:
    a, b = learned(left), learned(right)
    for step in steps:
        for key in ("loss", "grad_norm", "samples", "lr"):
            assert a[step][key] == pytest.approx(b[step][key], abs=TOLERANCE), f"{key} of step {step}"


def same_weights(left: Path, right: Path, tolerance: float) -> None:
    for model in ("model", "model_ema"):
        a, b = (load_file(folder / model / "model.safetensors") for folder in (left, right))
        assert a.keys() == b.keys()
        for name in a:
            assert float((a[name] - b[name]).abs().max()) <= tolerance, f"{model}, {name}"


@pytest.fixture(scope="module")
def straight(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, experts on both, ZeRO 2, from the first step to the last."""
    output = tmp_path_factory.mktemp("straight") / "run"
    train(arguments, output, 2)
    return output


@pytest.fixture(scope="module")
def by_one_rank(straight: Path, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, carried on after step 3 by one rank with all experts."""
    output = until(straight, 3, tmp_path_factory.mktemp("one") / "run")
    text = train(arguments, output, 1, "--engine.expert_parallel_size=1")
    assert "written with world_size 2 (now 1), expert_parallel_size 2 (now 1); converted" in text
    assert f"training from step 3 to step {STEPS} on 1 rank(s)" in text
    return output


@pytest.fixture(scope="module")
def by_two_again(by_one_rank: Path, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That one, carried on after step 6 by two ranks with half of the experts each, and at ZeRO 3."""
    output = until(by_one_rank, 6, tmp_path_factory.mktemp("two") / "run")
    text = train(arguments, output, 2, ZERO_3, "--checkpoint.every=1")
    assert "world_size 1 (now 2), expert_parallel_size 1 (now 2), zero_stage 2 (now 3); converted" in text
    return output


def test_one_rank_goes_on_where_two_were(straight: Path, by_one_rank: Path) -> None:
    same_steps(by_one_rank, straight, range(1, STEPS + 1))
    same_weights(by_one_rank, straight, 1e-4)
    a, b = held_out(by_one_rank), held_out(straight)
    assert [record["step"] for record in a] == [3, 6, 9]
    for x, y in zip(a, b, strict=True):
        for key in ("val/loss", "val_ema/loss"):
            assert x[key] == pytest.approx(y[key], abs=TOLERANCE) and x["val_ema/loss"] != x["val/loss"]


def test_two_ranks_at_zero_3_go_on_where_one_was(straight: Path, by_two_again: Path) -> None:
    same_steps(by_two_again, straight, range(1, STEPS + 1))
    same_weights(by_two_again, straight, 1e-4)
    assert {path.name for path in (by_two_again / "checkpoints").iterdir()} == {f"step_{n:08d}" for n in (7, 8, 9)}


def test_zero_3_evaluates_shows_samples_and_exports(straight: Path, by_two_again: Path) -> None:
    from eve_ds.tasks import load_task_model

    a, b = held_out(by_two_again)[-1], held_out(straight)[-1]
    assert a["step"] == b["step"] == STEPS
    assert all(a[key] == pytest.approx(b[key], abs=TOLERANCE) for key in ("val/loss", "val_ema/loss"))
    samples, expected = (json.loads((run / "samples" / "samples.json").read_text()) for run in (by_two_again, straight))
    assert samples["words"] == expected["words"] and len(samples["images"]) == len(expected["images"]) > 0
    for folder in (by_two_again, by_two_again / "model_ema"):
        model = load_task_model("pretrain", folder)
        assert model.backbone.moe_layers()[0].experts.fc1_weight.shape == (4, 64, 32)  # the experts of both ranks
        assert bool(torch.isfinite(model.backbone(images=torch.zeros(1, 3, 32, 32)).hidden).all())


def test_zero_3_resumes_bit_for_bit(by_two_again: Path, arguments: list[str], tmp_path: Path) -> None:
    output = until(by_two_again, 7, tmp_path / "run")
    text = train(arguments, output, 2, ZERO_3, "--checkpoint.every=1")
    assert "converted" not in text and f"training from step 7 to step {STEPS}" in text
    assert learned(output) == learned(by_two_again) and held_out(output) == held_out(by_two_again)
    same_weights(output, by_two_again, 0.0)


def test_offloaded_optimizer_states_change_nothing(straight: Path, arguments: list[str], tmp_path: Path) -> None:
    output = until(straight, 6, tmp_path / "run")
    text = train(arguments, output, 2, "--deepspeed_config=ds_configs/zero2_offload.json")
    assert "Building extension" not in text  # nothing is compiled in silence
    same_steps(output, straight, range(1, STEPS + 1))
