"""Weights & Biases, really: offline runs on disk, one id over resumes, failures that do not stop training."""

from __future__ import annotations

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
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
    detail_every: int = 0
    callbacks: tuple[str, ...] = ()


@dataclass
class Config:
    logging: Logging = field(default_factory=Logging)


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_BASE_URL"):
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


def holds(path: Path, word: bytes) -> None:
    """Wait until a file holds a word: wandb's own process writes it, and may be at it when the run is finished."""
    for _ in range(600):
        if word in path.read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} does not hold {word!r}: {path.read_bytes()!r}")


def test_offline_run_and_its_resume_share_one_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(trainer(tmp_path), range(1, 4))
    train(trainer(tmp_path), range(4, 6))
    assert "Weights & Biases logs no more" not in caplog.text
    run_id = (tmp_path / "wandb_id").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    for word in (b"eve-ds-test", b"val/loss", b"world_size", b"wandb_project"):
        holds(files[0], word)


def test_all_curves_are_drawn_over_the_optimizer_step_in_every_piece(tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2 as records

    train(trainer(tmp_path), range(1, 8))
    train(trainer(tmp_path), range(5, 9))  # from the checkpoint of step 4: 5 to 7 come again
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for path in files:
        for metric in (records.MetricRecord(name="step"), records.MetricRecord(glob_name="*", step_metric="step")):
            holds(path, metric.SerializeToString())


@contextlib.contextmanager
def served(answers: bool) -> Iterator[str]:
    """The address of a server that says 404 to everything, or nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)  # a Handler without do_GET says 501
    thread = threading.Thread(target=server.serve_forever if answers else lambda: None)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        if answers:
            server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_is_there_if_it_answers_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wandb.REACH_TIMEOUT_S <= 5
    monkeypatch.setenv("no_proxy", "*")
    with served(answers=True) as url:
        assert wandb.reachable(url)
    monkeypatch.setattr(wandb, "REACH_TIMEOUT_S", 0.3)
    with served(answers=False) as url:  # the kernel takes the connection, and that is all
        assert not wandb.reachable(url)
    assert not wandb.reachable(url)  # nobody listens there now
    assert not wandb.reachable("no address")


def test_without_a_server_a_run_with_a_key_is_logged_offline_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with served(answers=True) as url:
        pass  # nobody listens there now
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("no_proxy", "*")
    train(trainer(tmp_path), range(1, 4))
    assert f"{url} does not answer; logged offline, `wandb sync " in caplog.text and "logs no more" not in caplog.text
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    holds(path, b"val/loss")


def test_a_failing_init_warns_once_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "no such mode")
    train(trainer(tmp_path), range(1, 4))
    assert caplog.text.count("Weights & Biases logs no more of this run: ") == 1


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
