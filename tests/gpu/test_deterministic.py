"""``engine.deterministic`` on this device: every task and a whole run give the same bits twice, and after a resume."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from eve_ds.engine.determinism import be_deterministic
from tests.support import ranks
from tests.support.shards import make_caption_set, tiny_tokenizer
from tests.support.tiny_tasks import TASKS, tiny_batch, tiny_task

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _gradients(name: str) -> str:
    """SHA-256 of all gradients of a task in bf16; in a process of its own: torch is asked before CUDA starts."""
    be_deterministic()
    task = tiny_task(name).to("cuda", torch.bfloat16)
    torch.manual_seed(0)
    task({key: value.cuda() for key, value in tiny_batch(64).items()}).loss.backward()
    found = hashlib.sha256()
    for parameter in task.parameters():
        if parameter.grad is not None:
            found.update(parameter.grad.float().cpu().numpy().tobytes())
    return found.hexdigest()


def _all_gradients() -> dict[str, str]:
    return {name: _gradients(name) for name in TASKS}


def test_each_task_gives_the_same_gradients() -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=spawn) as one, ProcessPoolExecutor(2, mp_context=spawn) as other:
        assert one.submit(_all_gradients).result() == other.submit(_all_gradients).result()


def test_a_run_gives_the_same_weights_twice_and_after_a_resume(tmp_path: Path) -> None:
    for rows, split in ((24, "train"), (6, "val")):
        make_caption_set(tmp_path / "captions", rows=rows, split=split)
    tiny_tokenizer(tmp_path / "tokenizer")
    arguments = ["--config=tests/e2e/tiny.yaml", f"--data.path={tmp_path / 'captions'}", "--engine.deterministic=true"]
    arguments += [f"--data.tokenizer={tmp_path / 'tokenizer'}", "--engine.expert_parallel_size=1"]
    for name in ("one", "other", "resumed"):
        if name == "resumed":
            shutil.copytree(tmp_path / "one", half := tmp_path / name)
            for gone in (max((half / "checkpoints").iterdir()), half / "model", half / "samples"):
                shutil.rmtree(gone)
        ranks.run("eve_ds.pretrain", [*arguments, f"--output_dir={tmp_path / name}"], world_size=1)
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "other", "resumed")]
    assert weights[0] == weights[1] == weights[2]
