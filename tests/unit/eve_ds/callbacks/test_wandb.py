"""Weights & Biases, really: offline runs on disk, one id over resumes, failures that do not stop training."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eve_ds.callbacks import Progress, WandbLog, standard_callbacks, wandb


@dataclass
class Logging:
    wandb: bool = True
    wandb_project: str = "eve-ds-test"


@dataclass
class Config:
    logging: Logging = field(default_factory=Logging)


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


def trainer(folder: Path, is_main: bool = True) -> Any:
    return SimpleNamespace(output_dir=folder, is_main=is_main, task_name="pretrain", config=Config(), world_size=2)


def train(state: Any, steps: range) -> None:
    callback = WandbLog("eve-ds-test")
    callback.fit_start(state)
    for step in steps:
        callback.step_end(state, {"step": step, "loss": 1 / step})
    callback.evaluation_end(state, {"step": steps[-1], "val/loss": 0.5})
    callback.fit_end(state)
    callback.close(state)


def test_offline_run_and_its_resume_share_one_id(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Weights & Biases logs no more")
        train(trainer(tmp_path), range(1, 4))
        train(trainer(tmp_path), range(4, 6))
    run_id = (tmp_path / "wandb_id").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    content = b"".join(path.read_bytes() for path in files)
    for word in (b"eve-ds-test", b"val/loss", b"world_size", b"wandb_project"):
        assert word in content


def test_a_failing_init_warns_once_and_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    with pytest.warns(UserWarning, match="Weights & Biases logs no more of this run: ") as caught:
        train(trainer(tmp_path), range(1, 4))
    assert len([w for w in caught if "Weights & Biases" in str(w.message)]) == 1


def test_other_ranks_do_nothing(tmp_path: Path) -> None:
    train(trainer(tmp_path, is_main=False), range(1, 3))
    assert list(tmp_path.iterdir()) == []


def test_mode_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb.mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "a key")
    assert wandb.mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb.mode() == "disabled"


def test_a_damaged_id_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "wandb_id").write_text("../no id\n")
    new = wandb.run_id(tmp_path)
    assert len(new) == 8
    assert wandb.run_id(tmp_path) == new


def test_one_flag_switches_it_off() -> None:
    config: Any = Config()
    assert [type(c) for c in standard_callbacks(config)][-1] is WandbLog
    config.logging.wandb = False
    assert [type(c) for c in standard_callbacks(config)][-1] is Progress
