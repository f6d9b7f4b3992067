"""``engine.compile: on`` in whole runs: the losses of a run without it, few graphs, resume, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support import ranks


@pytest.fixture(scope="module")
def arguments(tiny_run: list[str]) -> list[str]:
    return [*tiny_run, "--engine.precision=fp32", "--engine.micro_batch_size=4", "--data.augmentation=none"]


def losses(output: Path) -> list[float]:
    """By step; of a step that was taken twice, the last."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return list({record["step"]: record["loss"] for record in found if "lr" in record}.values())


def loads(output: Path) -> list[float]:
    """What a callback counts with hooks in the experts' layers, by step."""
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [value for record in found for key, value in record.items() if key.startswith("moe/")]


def test_a_compiled_run_learns_as_the_plain_one_and_goes_on(arguments: list[str], tmp_path: Path) -> None:
    arguments = [*arguments, "--logging.detail_every=2"]
    ranks.run("eve_ds.pretrain", [*arguments, f"--output_dir={tmp_path / 'plain'}"])
    compiled = [*arguments, f"--output_dir={tmp_path / 'compiled'}"]
    said = ranks.run("tests.support.compiled_run", [*compiled, "--engine.compile=on"])
    # Hard blocks, soft ones, each with both passes, and the decoder's: three, whatever the steps.
    assert re.findall(r"^GRAPHS (\d+) BREAKS (\d+)$", said, re.MULTILINE) == [("3", "0")]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert len(loads(tmp_path / "plain")) > 6
    assert loads(tmp_path / "compiled") == pytest.approx(loads(tmp_path / "plain"), rel=1e-4)
    ranks.run("eve_ds.pretrain", [*compiled, "--engine.compile=off", "--optimizer.total_steps=8"])
    assert len(losses(tmp_path / "compiled")) == 8


def test_blocks_that_are_computed_again(arguments: list[str], tmp_path: Path) -> None:
    """Operations are counted in the first forward pass; its backward pass computes blocks again as they ran then."""
    again = [*arguments, "--model.checkpoint_activations=true", "--optimizer.total_steps=3"]
    ranks.run("eve_ds.pretrain", [*again, f"--output_dir={tmp_path / 'plain'}"])
    compiled = [*again, f"--output_dir={tmp_path / 'compiled'}", "--engine.compile=on"]
    said = ranks.run("tests.support.compiled_run", compiled)
    assert re.findall(r"^GRAPHS (\d+) BREAKS (\d+)$", said, re.MULTILINE) == [("3", "0")]
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)


def test_a_dry_run_tells_the_time_of_a_step_that_compiles_nothing(arguments: list[str], tmp_path: Path) -> None:
    """Its last. No operations are counted in a dry run, so that its first step compiles all."""
    dry = [*arguments, "--engine.compile=on", "--dry_run", f"--output_dir={tmp_path / 'run'}"]
    said = ranks.run("tests.support.compiled_run", dry)
    assert re.findall(r"^STEPS (.*)$", said, re.MULTILINE) == ["3 3"]
    assert "all is in order, nothing was written" in said and not (tmp_path / "run").exists()


def test_zero_3_is_refused(arguments: list[str], tmp_path: Path) -> None:
    options = ["--engine.compile=on", "--deepspeed_config=ds_configs/zero3.json", f"--output_dir={tmp_path / 'run'}"]
    codes, said = ranks.finish(ranks.start("eve_ds.pretrain", [*arguments, *options], 2))
    assert codes[0] == 2
    assert "engine.compile=on: ZeRO 3" in said and "Traceback" not in said
