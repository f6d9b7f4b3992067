"""Pre-training as users run it, two ranks: what it leaves behind, resume bit for bit, SIGTERM, a damaged checkpoint."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eve_ds.callbacks import wandb_files
from eve_ds.callbacks.metric_groups import GROUPS, grouped
from eve_ds.engine.checkpoint_record import Manifest
from eve_ds.engine.checkpoint_record import load_file as load_part
from eve_ds.engine.whole_weights import ShardedState
from eve_ds.weights.model_folder import starts
from tests.support import ranks

STEPS = 6
GROUNDING = {
    "val/mlm_loss_shuffled",
    "val/mlm_accuracy_shuffled",
    "val/mlm_loss_no_image",
    "val/mlm_accuracy_no_image",
    "val/mim_loss_shuffled",
}


@pytest.fixture(scope="module")
def tiny_run(tiny_run: list[str]) -> list[str]:
    """With micro-batches of two images, which have two captions each: of one image alone nothing can be shuffled."""
    dashboards = ["--logging.detail_every=3", "--logging.peak_tflops=1", "--logging.tensorboard=true"]
    batches = ["--engine.global_batch_size=16", "--engine.micro_batch_size=4"]
    return [*tiny_run, *batches, *dashboards, "--logging.images_every=2", "--optimizer.ema=0.9"]


@pytest.fixture(scope="module")
def straight(tiny_run: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from the first step to the last."""
    output = tmp_path_factory.mktemp("straight") / "run"
    ranks.run("eve_ds.pretrain", [*tiny_run, f"--output_dir={output}", "--logging.wandb=true"])
    return output


def records(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def learned(output: Path) -> list[dict[str, float]]:
    """What does not depend on the clock, of the training steps."""
    timed = ("samples_per_second", "step_seconds", "data/wait_fraction")
    return [
        {k: v for k, v in record.items() if k not in timed and not k.startswith("perf/")}
        for record in records(output)
        if "lr" in record
    ]


def same_weights(left: Path, right: Path) -> bool:
    pairs = [
        [load_file(run / model / "model.safetensors") for run in (left, right)] for model in ("model", "model_ema")
    ]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def test_a_run_leaves_all_that_it_promises(straight: Path) -> None:
    steps = learned(straight)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert all(torch.isfinite(torch.tensor(list(record.values()))).all() for record in steps)
    held_out = [record for record in records(straight) if "val/loss" in record]
    assert [record["step"] for record in held_out] == [3, 6]
    assert all(record.keys() >= GROUNDING for record in held_out)
    assert not any(record.keys() & {key.removeprefix("val/") for key in GROUNDING} for record in steps)
    for record in held_out:
        assert record["val/loss"] == pytest.approx(record["val/mim_loss"] + record["val/mlm_loss"])
    assert yaml.safe_load((straight / "config.yaml").read_text())["engine"]["global_batch_size"] == 16
    assert {path.name for path in (straight / "checkpoints").iterdir()} == {"step_00000003", "step_00000006"}
    files = {"model.safetensors", "config.yaml", "tokenizer.json", "hashes.json", "README.md"}
    assert all({path.name for path in (straight / folder).iterdir()} == files for folder in ("model", "model_ema"))
    last = straight / "checkpoints/step_00000006"
    averages = [load_part(last / f"averages_rank_{rank}.pt")["averages"] for rank in range(2)]
    state = ShardedState(last, Manifest.read(last)).with_masters(averages)
    exported = load_file(straight / "model_ema/model.safetensors")
    assert exported.keys() == set(state.names) and all(torch.equal(exported[n], state.whole(n)) for n in state.names)
    for record in held_out:
        assert {key for key in record if "ema" in key} == {f"val_ema{key[3:]}" for key in record if key[:4] == "val/"}
        assert record["val_ema/loss"] != record["val/loss"]
    samples = json.loads((straight / "samples" / "samples.json").read_text())
    assert samples["images"] and samples["words"]
    counts = samples["expert_load"]["layers"][0]["counts"]
    assert len(counts) == 2 and all(len(row) == 4 and sum(row) > 0 for row in counts)
    assert list((straight / "wandb").glob("offline-run-*/*.wandb"))
    (start,) = starts(straight)
    found = json.loads(start.read_text())
    assert found["config"] == yaml.safe_load((straight / "config.yaml").read_text())
    batch = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    assert found["deepspeed_config"].items() >= batch.items() and "auto" not in json.dumps(found["deepspeed_config"])
    assert found["inputs"] == json.loads((straight / "identity.json").read_text())["inputs"]
    assert found["topology"]["world_size"] == 2 and [rank["device"] for rank in found["ranks"]] == ["cpu", "cpu"]
    assert found["seeds"].keys() == {"engine", "objective"} and found["variables"]["WORLD_SIZE"] == "2"
    assert "-m eve_ds.pretrain --config=tests/e2e/tiny.yaml" in found["command"] and found["step"] == 0
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["cpu"]


def test_a_run_draws_its_dashboards_while_it_trains(straight: Path) -> None:
    """The same in wandb's files and TensorBoard's, each metric explained in docs/metrics.md."""
    pictures = {path.name for path in (straight / "samples/step_00000002").iterdir()}
    assert {path.name for path in (straight / "samples").glob("step_*")} == {f"step_0000000{n}" for n in (2, 4, 6)}
    assert pictures >= {"p0_original.png", "p0_masked.png", "p0_rebuilt.png"}
    (last,) = [record for record in records(straight) if record["step"] == STEPS and "lr" in record]
    assert last.keys() >= {"moe/load_imbalance", "moe/layer_1/router_entropy", "perf/mfu", "perf/own_seconds_max"}
    (line,) = [json.loads(line) for line in (straight / "expert_load.jsonl").read_text().splitlines()][1:]
    # 3 steps of 16 pairs, 2 passes: 5 and 17 image tokens, 2 choices of each.
    assert line["step"] == STEPS and sum(line["counts"][0][0]) == 3 * 16 * (5 + 17) * 2
    logged = {key for record in records(straight) for key in record}
    assert not {key for key in logged if pattern_of(key) not in documented()}
    assert documented() >= GROUPS.keys()
    board = EventAccumulator(str(straight / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {grouped(key) for key in logged - {"step"}}
    assert {"moe/expert_load", "samples/p0_rebuilt"} <= set(board.Tags()["images"])
    (path,) = (straight / "wandb").glob("offline-run-*/*.wandb")
    rows = list(wandb_files.history(path))
    keys = {key for row in rows for key in row if not key.startswith("_")}
    assert keys == {grouped(key) for key in logged} | set(board.Tags()["images"])


def pattern_of(key: str) -> str:
    return re.sub(r"moe/layer_\d+/", "moe/layer_N/", key)


def documented() -> set[str]:
    """The keys in the first column of the tables of docs/metrics.md; each row says unit, meaning and what to do."""
    found: set[str] = set()
    for line in (ranks.REPOSITORY / "docs/metrics.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            keys, unit, meaning, wrong = (cell.strip() for cell in line.strip("|").split("|"))
            assert unit and meaning and wrong, line
            found |= set(re.findall("`([^`]+)`", keys))
    return found


def test_the_model_folder_loads_without_a_process_group(straight: Path) -> None:
    from eve_ds.tasks import load_task_model

    model = load_task_model("pretrain", straight)
    assert model.backbone.moe_layers()[0].experts.fc1_weight.shape == (4, 64, 32)  # the experts of both ranks
    output = model.backbone(images=torch.zeros(1, 3, 32, 32), text_ids=torch.tensor([[2, 7, 3]]))
    assert output.hidden.shape == (1, 1 + 16 + 3, 32)


def test_resume_is_exact_bit_for_bit(straight: Path, tiny_run: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(straight, output)
    for late in ("checkpoints/step_00000006", "model", "model_ema", "samples"):
        shutil.rmtree(output / late)
    text = ranks.run("eve_ds.pretrain", [*tiny_run, f"--output_dir={output}"])
    assert "training from step 3 to step 6" in text
    assert learned(output) == learned(straight)
    assert same_weights(output, straight)


def test_sigterm_saves_and_the_run_goes_on_where_it_was(straight: Path, tiny_run: list[str], tmp_path: Path) -> None:
    output = tmp_path / "run"
    options = [*tiny_run, f"--output_dir={output}", "--checkpoint.every=0"]
    started = ranks.start("eve_ds.pretrain", [*options, "--optimizer.total_steps=100000"], 2)
    deadline = time.monotonic() + ranks.LIMIT
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in started), ranks.finish(started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)  # one rank is told, all stop at the same step
    codes, text = ranks.finish(started)
    assert codes == [75, 75], text
    (saved,) = (output / "checkpoints").iterdir()
    last = learned(output)[-1]["step"]
    assert saved.name == f"step_{int(last):08d}"
    assert json.loads((saved / "complete.json").read_text())["topology"] == {
        "world_size": 2,
        "expert_parallel_size": 2,
        "zero_stage": 2,
    }
    assert not any((output / model).exists() for model in ("model", "model_ema"))
    text = ranks.run("eve_ds.pretrain", [*options, f"--optimizer.total_steps={int(last) + 2}"])
    assert f"training from step {int(last)} to step" in text
    assert [record["step"] for record in learned(output)] == list(range(1, int(last) + 3))


def test_a_stop_within_an_evaluation_saves_and_the_next_start_makes_it_up(
    straight: Path, tiny_run: list[str], tmp_path: Path
) -> None:
    options = [*tiny_run, f"--output_dir={tmp_path / 'run'}"]
    codes, text = ranks.finish(ranks.start("tests.support.spike", [*options, "--spike=evaluation"], 2))
    assert codes == [75, 75], text
    assert "step_00000003" in text and [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3]
    assert learned(tmp_path / "run") == learned(straight)[:3]  # a second start of the same command: the same bits
    ranks.run("eve_ds.pretrain", options)
    assert learned(tmp_path / "run") == learned(straight)
    assert same_weights(tmp_path / "run", straight)
    assert [json.loads(start.read_text())["step"] for start in starts(tmp_path / "run")] == [0, 3]
    scores = [
        [
            {k: v for k, v in record.items() if k == "step" or k.startswith(("val/", "val_ema/"))}
            for record in records(run)
            if "lr" not in record
        ]
        for run in (tmp_path / "run", straight)
    ]
    assert scores[0] == scores[1]
