"""Users' mistakes: exit code 2, one line on stderr that names the culprit, no traceback, nothing lost."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import LIMIT, REPOSITORY
from tests.support.shards import make_caption_set, tiny_tokenizer

TINY = str(REPOSITORY / "tests" / "e2e" / "tiny.yaml")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    make_caption_set(root / "captions", rows=6, split="train")
    make_caption_set(root / "captions", rows=6, split="val")
    make_caption_set(root / "broken", rows=6, split="train")
    make_caption_set(root / "broken", rows=6, split="val")
    shard = root / "broken" / "train" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-100])
    shutil.copytree(make_caption_set(root / "leaky", rows=6), root / "leaky" / "val")
    make_caption_set(root / "empty", rows=0, split="train")
    tiny_tokenizer(root / "tokenizer")
    (root / "occupied").mkdir()
    (root / "occupied" / "thesis.tex").write_text("x")
    return root


CASES = {
    "no data": (["--data.path={root}/nowhere"], ["nowhere/train"]),
    "no tokenizer": (["--data.tokenizer={root}/nowhere"], ["nowhere"]),
    "truncated shard": (["--data.path={root}/broken"], ["shard-00000.arrow"]),
    "trained on what is held out": (
        ["--data.path={root}/leaky"],
        ["6 images stand in both", "image-0", "allow_overlap"],
    ),
    "empty data set": (["--data.path={root}/empty"], ["empty"]),
    "more ranks than rows": (["--data.num_workers=7"], ["6 rows", "1 ranks x 7 workers"]),
    "token ids beyond the vocabulary": (["--model.vocab_size=100"], ["tokenizer.json", "model.vocab_size"]),
    "unknown key": (["--model.widht=3"], ["--model.widht", "model."]),
    "experts over more ranks than there are": (
        ["--engine.expert_parallel_size=4"],
        ["engine.expert_parallel_size=4", "world size 1"],
    ),
    "a folder of other things": (["--output_dir={root}/occupied"], ["occupied"]),
    "unknown split": (["--data.train_split=trian"], ["trian"]),
    "no DeepSpeed file": (["--deepspeed_config=none.json"], ["none.json"]),
    "gradient norms that are not at hand": (
        ["--logging.grad_norms_every=1", "--deepspeed_config=zero2_offload", "--engine.micro_batch_size=null"],
        ["logging.grad_norms_every", "offload_optimizer"],
    ),
    "steps to trace after the end, in a dry run, too": (
        ["--logging.profile=7:9", "--dry_run"],
        ["logging.profile=7:9", "the run ends with step 6"],
    ),
    "half a sample per rank": (["--engine.micro_batch_size=3"], ["engine.micro_batch_size=3"]),
}


@pytest.mark.parametrize("case", CASES)
def test_pretraining_names_the_culprit(case: str, data: Path, tmp_path: Path) -> None:
    changes, words = CASES[case]
    options = [f"--config={TINY}", f"--data.path={data / 'captions'}", f"--data.tokenizer={data / 'tokenizer'}"]
    options += [f"--output_dir={tmp_path / 'run'}", "--engine.expert_parallel_size=1", "--logging.wandb=false"]
    options += [change.format(root=data) for change in changes]
    result = subprocess.run(
        [sys.executable, "-m", "eve_ds.pretrain", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2, result.stderr
    assert len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(word in errors[0] for word in words), errors[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_finetuning_names_a_missing_checkpoint(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eve_ds.finetune", "--task", "itr_coco", "--checkpoint", str(tmp_path / "none")]
    command += ["--data", str(data / "captions"), "--output_dir", str(tmp_path / "run")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("error:") == 1 and str(tmp_path / "none") in result.stderr


def test_the_report_names_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{")
    command = [sys.executable, "-m", "eve_ds.report", "--run", str(tmp_path), "--out", str(tmp_path / "report.html")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 2 and "metrics.json" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "report.html").exists()


def test_finetuning_names_what_is_no_callback_before_it_reads_data(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eve_ds.finetune", "--task", "itr_coco", "--data", str(tmp_path / "no_data")]
    command += ["--output_dir", str(tmp_path / "run"), "--logging.callbacks=[tests.support.ranks:REPOSITORY]"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 2 and not (tmp_path / "run").exists()
    assert result.stderr.startswith("error: --logging.callbacks tests.support.ranks:REPOSITORY: is no callback")


def test_what_is_no_port_is_named(data: Path, tmp_path: Path) -> None:
    options = [f"--config={TINY}", f"--data.path={data / 'captions'}", f"--data.tokenizer={data / 'tokenizer'}"]
    options += [f"--output_dir={tmp_path / 'run'}", "--engine.expert_parallel_size=1", "--logging.wandb=false"]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "70000", "RANK": "0", "WORLD_SIZE": "1"}
    command = [sys.executable, "-m", "eve_ds.pretrain", *options]
    result = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **place}, capture_output=True, text=True, timeout=LIMIT
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "error: MASTER_PORT=70000: is no port from 1 to 65535; " in result.stderr


def test_a_port_that_is_taken_is_named(data: Path, tmp_path: Path) -> None:
    options = [f"--config={TINY}", f"--data.path={data / 'captions'}", f"--data.tokenizer={data / 'tokenizer'}"]
    options += [f"--output_dir={tmp_path / 'run'}", "--engine.expert_parallel_size=1", "--logging.wandb=false"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = subprocess.run(
            [sys.executable, "-m", "eve_ds.pretrain", *options],
            cwd=REPOSITORY,
            env={**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert len(errors) == 1 and f"127.0.0.1:{port}" in errors[0] and "--master_port" in errors[0], result.stderr
