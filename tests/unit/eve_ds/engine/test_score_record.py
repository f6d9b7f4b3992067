"""Which weights a file of scores names: those of a folder, of a checkpoint, of a bare file, or none any more."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save

from eve_ds.config import FinetuneConfig
from eve_ds.engine import score_record
from eve_ds.weights.model_folder import ModelFolder


def checkpoint_of(named: Path | None, run: Path) -> Any:
    config = FinetuneConfig()
    config.init_from = None if named is None else str(named)
    dataset: Any = SimpleNamespace(split=SimpleNamespace(parts=[("s3://me:sEcReT@host/data", 3)], fingerprint="f"))
    files = None if named is None else ModelFolder.find(named, unfinished=True)
    begun = score_record.origin(config.init_from, files)
    found = score_record.about(config, dataset, "val", {"questions": 3}, run, begun)
    assert "sEcReT" not in str(found) and found["config_sha256"] is None
    return found["checkpoint"]


def test_a_checkpoint_is_named_by_the_record_of_its_files(tmp_path: Path) -> None:
    record = tmp_path / "run" / "checkpoints" / "step_00000012" / "complete.json"
    record.parent.mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text("")
    record.write_text('{"step": 12}')
    for named in (tmp_path / "run", record.parent):
        assert checkpoint_of(named, tmp_path) == {
            "path": str(named), "weights": str(record), "sha256": sha256(record.read_bytes()).hexdigest(), "step": 12
        }  # fmt: skip


def test_a_bare_file_of_weights_is_hashed(tmp_path: Path) -> None:
    weights = tmp_path / "eve.safetensors"
    weights.write_bytes(save({"weight": torch.zeros(2)}))
    expected = {"path": str(weights), "weights": str(weights), "step": None}
    assert checkpoint_of(weights, tmp_path) == expected | {"sha256": sha256(weights.read_bytes()).hexdigest()}


def test_weights_that_are_gone_and_initial_values_have_no_hash(tmp_path: Path) -> None:
    gone = ModelFolder(tmp_path / "gone.safetensors", None, None)
    assert score_record.origin("gone.safetensors", gone)["checkpoint"]["sha256"] is None
    assert checkpoint_of(None, tmp_path) is None
