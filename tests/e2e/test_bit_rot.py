"""A bit of a shard flips: the run says which, beside its steps or before the first; mended, the run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.shards import make_caption_set, tiny_tokenizer


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    """Of a run that is longer than a test; its second shard has a flipped bit."""
    make_caption_set(tmp_path / "captions", rows=24, split="train", shard_rows=12)
    make_caption_set(tmp_path / "captions", rows=6, split="val")
    tiny_tokenizer(tmp_path / "tokenizer")
    flip(tmp_path / "captions/train/shard-00001.arrow")
    return [
        "--config=tests/e2e/tiny.yaml",
        f"--data.path={tmp_path / 'captions'}",
        f"--data.tokenizer={tmp_path / 'tokenizer'}",
        f"--output_dir={tmp_path / 'run'}",
        "--data.max_corrupt=0.99",
    ]


def test_a_run_saves_and_ends_and_goes_on_when_the_shard_is_mended(options: list[str], tmp_path: Path) -> None:
    codes, output = ranks.finish(ranks.start("eve_ds.pretrain", [*options, "--optimizer.total_steps=100000"], 2))
    assert codes[0] == 2, output
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert f"{tmp_path / 'captions/train/shard-00001.arrow'}: its SHA-256 is not the manifest's" in line
    assert "Traceback" not in output
    assert "stopped" not in output and "goes on from here" not in output  # as after a request, whose exit code is 75
    (saved,) = (tmp_path / "run/checkpoints").glob("step_*/complete.json")
    step = json.loads(saved.read_text())["step"]
    assert f"the run is saved at step {step}" in line
    flip(tmp_path / "captions/train/shard-00001.arrow")
    output = ranks.run("eve_ds.pretrain", [*options, f"--optimizer.total_steps={step + 1}"], 2)
    assert (tmp_path / "run/model/model.safetensors").is_file() and "data.verify" not in output


@pytest.mark.long
def test_verify_full_ends_before_the_first_step_and_off_does_not_look(options: list[str], tmp_path: Path) -> None:
    codes, output = ranks.finish(ranks.start("eve_ds.pretrain", [*options, "--data.verify=full"], 2))
    assert codes[0] == 2 and "shard-00001.arrow: its SHA-256 is not the manifest's" in output
    assert not (tmp_path / "run/checkpoints").exists()
    ranks.run("eve_ds.pretrain", [*options, "--data.verify=off"], 2)
