"""A dry run on two ranks of which one has too little memory: each says so in a line, and all end with exit code 2."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.shards import make_caption_set, tiny_tokenizer

# A dry run calls no callbacks, but it imports them: this one leaves rank 1 less than DeepSpeed's buffers and a step
# need beyond what the libraries hold.
MODULE = r"""
import os, re, resource
from pathlib import Path
from eve_ds.engine.callback import Callback

if os.environ["RANK"] == "1":
    held = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + (250 << 20),) * 2)
LITTLE = Callback()
"""


def test_a_rank_without_memory_says_what_to_lower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own/little_memory.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.fspath(tmp_path / "own"))
    make_caption_set(tmp_path / "captions", rows=24, split="train")
    tiny_tokenizer(tmp_path / "tokenizer")
    options = {
        "config": "tests/e2e/tiny.yaml",
        "data.path": tmp_path / "captions",
        "data.tokenizer": tmp_path / "tokenizer",
        "data.val_split": "null",
        "engine.precision": "fp32",
        "logging.callbacks": "[little_memory:LITTLE]",
        "output_dir": tmp_path / "run",
        "dry_run": "true",
    }
    started = ranks.start("eve_ds.pretrain", [f"--{name}={value}" for name, value in options.items()], 2)
    outputs = [rank.communicate(timeout=ranks.LIMIT)[0].strip() for rank in started]
    assert [rank.returncode for rank in started] == [2, 2], outputs
    assert outputs[0] == "error: rank 0: another rank has ended in a trial step; its message says why"
    assert outputs[1].startswith("error: rank 1: can't allocate memory") and outputs[1].count("\n") == 0, outputs[1]
    assert f"(on {socket.gethostname()}); the plan forecasts " in outputs[1]
    lower = ("engine.micro_batch_size", "model.checkpoint_activations", "zero3", "zero2_offload", "eve_ds.plan")
    assert all(word in outputs[1] for word in lower)
    assert not (tmp_path / "run").exists()
