"""A run whose loss or gradient is not finite; a checkpoint that is not this run's, or whose data have changed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from eve_ds.callbacks import wandb_files
from tests.support import ranks
from tests.support.shards import make_caption_set

SPIKE = "tests.support.spike"


@pytest.fixture(scope="module")
def options(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, "--logging.wandb=false", "--engine.precision=fp32", "--optimizer.total_steps=6"]


@pytest.fixture(scope="module")
def spiked(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("spiked") / "run"
    text = ranks.run(SPIKE, [*options, f"--output_dir={output}"])
    assert text.count("step 2: the loss or its gradient is not finite; left out") == 1
    return output


def steps(output: Path) -> dict[int, dict[str, float]]:
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {int(record["step"]): record for record in found if "lr" in record}


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / "model.safetensors")


def without_the_end(run: Path, copy: Path, last: int = 6) -> Path:
    shutil.copytree(run, copy)
    for late in (f"checkpoints/step_{last:08d}", "model", "samples"):
        shutil.rmtree(copy / late)
    return copy


def refused(arguments: list[str], words: str) -> None:
    codes, text = ranks.finish(ranks.start("eve_ds.pretrain", arguments, 2))
    assert codes[0] == 2 and codes[1] in (2, -signal.SIGTERM), text
    assert text.count("error:") == 1 and words in text and "Traceback" not in text, text


def test_a_step_left_out_is_counted_and_resumed_exactly(spiked: Path, options: list[str], tmp_path: Path) -> None:
    found = steps(spiked)
    assert found[2]["loss"] is None and "skipped_steps" not in found[1]
    assert [found[step]["skipped_steps"] for step in range(2, 7)] == [1] * 5
    (suspect,) = map(json.loads, (spiked / "suspects.jsonl").read_text().splitlines())
    assert (suspect["step"], suspect["kind"], suspect["not_finite"]) == (2, "not finite", ["loss"])
    assert suspect["rank_losses"][0] > 0 and suspect["rank_losses"][1] is None  # it was rank 1's
    assert len(suspect["samples"]) == 8 and max(suspect["samples"]) < 24 * 5
    assert all(found[step]["loss"] > 0 for step in (1, 3, 4, 5, 6))
    again = without_the_end(spiked, tmp_path / "run")
    assert "training from step 3 to step 6" in ranks.run("eve_ds.pretrain", [*options, f"--output_dir={again}"])
    for step in (4, 5, 6):
        assert steps(again)[step]["loss"] == found[step]["loss"]
    left, right = weights(spiked), weights(again)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_it_is_resumed_by_other_ranks_too(spiked: Path, options: list[str], tmp_path: Path) -> None:
    other = without_the_end(spiked, tmp_path / "run")
    changes = ["--engine.expert_parallel_size=1", "--engine.micro_batch_size=4"]
    ranks.run("eve_ds.pretrain", [*options, f"--output_dir={other}", *changes], world_size=1)
    for step in (4, 5, 6):
        assert steps(other)[step]["loss"] == pytest.approx(steps(spiked)[step]["loss"], abs=1e-4)


def test_a_run_that_diverges_stops_before_it_spoils_its_checkpoints(options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    refused(
        [
            *options,
            f"--output_dir={output}",
            "--optimizer.lr=1e20",
            "--optimizer.total_steps=50",
            "--checkpoint.every=1",
        ],
        "the run has diverged: since step 2 no loss or gradient was finite; nothing was saved since",
    )
    assert len(steps(output)) == 11 and not (output / "model").exists()
    suspects = [json.loads(line) for line in (output / "suspects.jsonl").read_text().splitlines()]
    assert [suspect["step"] for suspect in suspects] == list(range(2, 12))
    assert all(suspect["kind"] == "not finite" and "loss" in suspect["not_finite"] for suspect in suspects)
    assert [path.parent.name for path in (output / "checkpoints").glob("*/complete.json")] == ["step_00000001"]
    replay = [sys.executable, "docs/examples/replay.py", str(output), "1"]
    environment = {**os.environ, "PYTHONPATH": str(ranks.REPOSITORY)}
    told = subprocess.run(replay, capture_output=True, text=True, env=environment, cwd=ranks.REPOSITORY)
    assert told.returncode == 0 and "first module: ['" in told.stdout, told.stdout + told.stderr
    assert told.stdout.endswith("replayed 4 micro-batches of step 2 with step_00000001\n")
    told = subprocess.run([*replay[:-1], "11"], capture_output=True, text=True, env=environment, cwd=ranks.REPOSITORY)
    assert told.returncode == 1 and told.stderr.endswith("suspects.jsonl: has no line 11; it has 10\n")
    shutil.rmtree(output / "checkpoints")
    told = subprocess.run(replay, capture_output=True, text=True, env=environment, cwd=ranks.REPOSITORY)
    assert told.returncode == 1 and "checkpoints: holds none of a step before 2" in told.stderr, told.stderr
    assert "Traceback" not in told.stderr


def test_fp16_finds_its_scale_and_a_resumed_run_keeps_it(options: list[str], tmp_path: Path) -> None:
    """From 2**31, far above what fits: more than ten steps in a row are left out, of which the run must not end."""
    file, output = tmp_path / "fp16.json", tmp_path / "run"
    scaling = {"enabled": "auto", "initial_scale_power": 31, "hysteresis": 1, "loss_scale_window": 4}
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": scaling}))
    half = [*options, "--engine.precision=fp16", f"--deepspeed_config={file}", "--optimizer.total_steps=30"]
    half += ["--checkpoint.every=22", "--logging.eval_every=0", "--spike=fp16"]
    ranks.run(SPIKE, [*half, f"--output_dir={output}"])
    found = steps(output)
    scales, skipped = ([found[step].get(key, 0) for step in found] for key in ("optim/loss_scale", "skipped_steps"))
    first = next(i for i, count in enumerate(skipped) if i and count == skipped[i - 1])  # the first that is applied
    assert 10 < first < 19 and skipped[:first] == list(range(1, first + 1))
    assert scales[: first + 1] == [2.0 ** (31 - i) for i in range(first + 1)]
    # Rank 1's experts alone overflow in step 20: rank 0 leaves it out, too, and halves its scale.
    assert skipped[19] == skipped[18] + 1 and scales[20] == scales[19] / 2 and found[20]["loss"] > 0
    assert any(later == 2 * before for before, later in itertools.pairwise(scales))
    assert not (output / "suspects.jsonl").exists() and all(record["loss"] > 0 for record in found.values())
    again = without_the_end(output, tmp_path / "again", last=30)
    assert "training from step 22 to step 30" in ranks.run(SPIKE, [*half, f"--output_dir={again}"])
    for step in range(23, 31):
        for key in ("loss", "grad_norm", "optim/loss_scale", "skipped_steps"):
            assert steps(again)[step][key] == found[step][key]
    left, right = weights(output), weights(again)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_finite_divergence_is_told_with_its_samples_and_ends_the_run_if_wished(
    options: list[str], tmp_path: Path
) -> None:
    """At a learning rate that rises to 20 the loss rises, too: told at once, and when it stays there."""
    rising = ["--optimizer.total_steps=100", "--optimizer.warmup=0.99", "--optimizer.lr=20", "--logging.eval_every=0"]
    rising += ["--optimizer.gradient_clipping=0", "--optimizer.stop_on_divergence=true", "--checkpoint.every=30"]
    output = tmp_path / "run"
    dashboard = ["--logging.wandb=true", "--logging.wandb_mode=offline", f"--output_dir={output}"]
    codes, text = ranks.finish(ranks.start("eve_ds.pretrain", [*options, *rising, *dashboard], 2))
    assert codes == [2, 2], text
    suspects = [json.loads(line) for line in (output / "suspects.jsonl").read_text().splitlines()]
    lines = [line for line in text.splitlines() if line.startswith("WARNING: step ")]
    assert len(lines) == len(suspects) >= 1 and suspects[-1]["lasting"]
    assert all(suspect["kind"] == "loss" for suspect in suspects)
    for line, suspect in zip(lines, suspects, strict=True):
        assert f"step {suspect['step']}: the loss " in line and f"(all 8: {output / 'suspects.jsonl'})" in line
        assert len(suspect["samples"]) == 8 and max(suspect["samples"]) < 24 * 5
        assert ", ".join(map(str, suspect["samples"])) in line
    last = suspects[-1]["step"]
    assert f"error: the run has diverged: step {last}: the loss has been around" in text
    assert "the last checkpoint is step_000000" in text and max(steps(output)) == last < 100
    (path,) = (output / "wandb").glob("offline-run-*/*.wandb")
    sent = b"".join(wandb_files.raw_records(path))
    assert sent.count(b"suspect loss") == len(suspects) and sent.count(b"ended by an error") == 1


def test_other_data_another_tokenizer_and_foreign_checkpoints_are_refused(
    spiked: Path, options: list[str], tmp_path: Path
) -> None:
    data, tokenizer = (Path(option.split("=")[1]) for option in options[1:3])
    shutil.copytree(data, tmp_path / "captions")
    shutil.copytree(tokenizer, tmp_path / "tokenizer")
    paths = [f"--data.path={tmp_path / 'captions'}", f"--data.tokenizer={tmp_path / 'tokenizer'}"]
    own = [options[0], *paths, *options[3:]]
    begun = tmp_path / "begun"
    ranks.run("eve_ds.pretrain", [*own, f"--output_dir={begun}", "--optimizer.total_steps=3"])

    renamed = tmp_path / "renamed"
    shutil.copytree(begun, renamed)
    (renamed / "checkpoints/step_00000003").rename(renamed / "checkpoints/step_00000004")
    refused([*own, f"--output_dir={renamed}"], "holds step 3, so it was renamed")

    seeded = tmp_path / "seeded"
    shutil.copytree(begun, seeded)
    tree = yaml.safe_load((seeded / "config.yaml").read_text())
    tree["engine"]["seed"] = 7
    (seeded / "config.yaml").write_text(yaml.safe_dump(tree))
    (seeded / "identity.json").unlink()
    words = "step_00000003: is a checkpoint of another run: engine.seed is 0 there and 7 here; make these equal"
    refused([*own, f"--output_dir={seeded}", "--engine.seed=7"], words)

    vocabulary = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    vocabulary["normalizer"] = {"type": "Lowercase"}
    whole = (tmp_path / "tokenizer/tokenizer.json").read_text()
    (tmp_path / "tokenizer/tokenizer.json").write_text(json.dumps(vocabulary))
    refused([*own, f"--output_dir={begun}"], "holds another run: tokenizer is /")
    (tmp_path / "tokenizer/tokenizer.json").write_text(whole)

    shutil.rmtree(tmp_path / "captions/train")
    make_caption_set(tmp_path / "captions", rows=17, split="train")
    refused([*own, f"--output_dir={begun}"], "holds another run: training data is /")


def test_a_full_disk_is_told_in_a_line_and_left_with_room(options: list[str], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        started = ranks.start("eve_ds.pretrain", [*options, f"--output_dir={small / 'run'}"], 2)
        outputs = [rank.communicate(timeout=ranks.LIMIT)[0] for rank in started]
        text = "".join(outputs)
        assert 2 in [rank.returncode for rank in started] and "Traceback" not in text, text
        assert "step_00000003 cannot be written, most often because the disk is full (" in text and "make room" in text
        assert not list((small / "run/checkpoints").glob("step_*"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_stop_at_the_last_step_saves_and_the_same_command_finishes(options: list[str], tmp_path: Path) -> None:
    arguments = [*options, f"--output_dir={tmp_path / 'run'}", "--optimizer.total_steps=1"]
    codes, text = ranks.finish(ranks.start(SPIKE, [*arguments, "--spike=stop"], 2))
    assert codes == [75, 75] and "stopped early" in text, text
    assert not (tmp_path / "run/model").exists()
    ranks.run("eve_ds.pretrain", arguments)
    assert (tmp_path / "run/model/model.safetensors").is_file()
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [("val/loss" in record, record["step"]) for record in records] == [(False, 1), (True, 1)]


def test_a_stop_in_a_step_that_is_left_out_waits_for_a_sound_one_to_save(options: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    started = ranks.start(SPIKE, [*options, f"--output_dir={output}", "--checkpoint.every=0", "--spike=unsound"], 2)
    codes, text = ranks.finish(started)
    assert codes == [75, 75] and "step 2: the loss or its gradient is not finite" in text, text
    assert [path.parent.name for path in (output / "checkpoints").glob("*/complete.json")] == ["step_00000003"]
