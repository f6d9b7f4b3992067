"""Weights & Biases, really: offline runs on disk, one id over resumes, failures that do not stop training."""

from __future__ import annotations

import contextlib
import http.server
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from eve_ds.callbacks import Progress, WandbLog, standard_callbacks, wandb, wandb_files
from eve_ds.config_sections import CheckpointConfig, LoggingConfig, OptimizerConfig
from preprocessing.errors import UserError


@dataclass
class Config:
    logging: LoggingConfig = field(default_factory=lambda: LoggingConfig(wandb_project="eve-ds-test", detail_every=0))
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    dry_run: bool = False


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def trainer(folder: Path, is_main: bool = True, start_step: int = 0, **settings: Any) -> Any:
    state = SimpleNamespace(output_dir=folder, is_main=is_main, task_name="pretrain", config=Config(), world_size=2)
    state.start_step = state.step = start_step
    state.stopped_early = False
    vars(state.config.logging).update(settings)
    return state


def train(state: Any, steps: range, offset: float = 0.0) -> None:
    callback = WandbLog(state.config.logging)
    callback.fit_start(state)
    for state.step in steps:
        callback.step_end(state, {"step": state.step, "loss": 1 / state.step + offset})
    callback.evaluation_end(state, {"step": steps[-1], "val/loss": 0.5})
    callback.fit_end(state)
    callback.close(state)


def pieces(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


def records(path: Path) -> list[Any]:
    """All records of a file, once wandb's own process has written it whole."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(600):
        found = []
        for raw in wandb_files.raw_records(path):
            found.append(wandb_internal_pb2.Record())
            found[-1].ParseFromString(raw)
        if found and found[-1].HasField("exit"):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def holds(path: Path, word: bytes) -> None:
    """Wait until a file holds a word: wandb's own process writes it, and may be at it when the run is finished."""
    for _ in range(600):
        if word in path.read_bytes():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} does not hold {word!r}: {path.read_bytes()!r}")


def test_offline_run_and_its_resume_share_one_id(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(trainer(tmp_path), range(1, 4))
    records(pieces(tmp_path)[0])
    train(trainer(tmp_path, start_step=3), range(4, 6))
    assert "Weights & Biases logs no more" not in caplog.text
    run_id = (tmp_path / "wandb_id").read_text().strip()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert {path.name for path in files} == {f"run-{run_id}.wandb"}
    for word in (b"eve-ds-test", b"val/loss", b"world_size", b"wandb_project"):
        holds(files[0], word)


def test_all_curves_are_drawn_over_the_optimizer_step_and_a_repeated_step_has_one_value(tmp_path: Path) -> None:
    train(trainer(tmp_path), range(1, 8))
    records(pieces(tmp_path)[0])
    # From the checkpoint of step 4: steps 5 to 7 come again, and this time an evaluation follows step 8 as well.
    train(trainer(tmp_path, start_step=4), range(5, 9), offset=100.0)
    assert len(pieces(tmp_path)) == 2
    found: dict[tuple[int, str], list[Any]] = {}
    for path in pieces(tmp_path):
        kept = records(path)
        assert ("*", "step") in [(record.metric.glob_name, record.metric.step_metric) for record in kept]
        assert kept[-1].exit.exit_code == 0 and not any(record.HasField("alert") for record in kept)
        for row in wandb_files.history(path):
            assert row["step"] == row["_step"]
            keys = row.keys() - {"step", "_step", "_runtime", "_timestamp"}
            assert keys
            for key in keys:
                found.setdefault((row["step"], key), []).append(row[key])
    losses = {(step, "train/loss"): [pytest.approx(1 / step)] for step in range(1, 8)}
    assert found == losses | {
        (7, "val/loss"): [0.5],
        (8, "train/loss"): [pytest.approx(100.125)],
        (8, "val/loss"): [0.5],
    }
    last = pieces(tmp_path)[1].parent
    last.rename(f"{last}-1")  # as wandb calls the later one of two that begin in one second
    known = wandb_files.mend_and_read(tmp_path / "wandb", wandb.run_id(tmp_path), 7)
    assert known.last == 8 and known.keys.keys() == {7, 8} and known.keys[7] >= {"train/loss", "val/loss"}
    assert wandb_files.mend_and_read(tmp_path / "wandb", "another", 7) == wandb_files.Logged(None, {})


def test_within_a_run_wandb_itself_ignores_a_step_that_is_past(tmp_path: Path) -> None:
    try:
        raise UserError("of a program that trains while it handles this")
    except UserError:
        train(trainer(tmp_path), [1, 2, 3, 2, 4])  # type: ignore[arg-type]
    (path,) = pieces(tmp_path)
    assert not any(record.HasField("alert") for record in records(path))
    assert [row["step"] for row in wandb_files.history(path)] == [1, 2, 3, 4]


def test_a_file_whose_end_is_lost_is_read_up_to_there(tmp_path: Path) -> None:
    state = trainer(tmp_path)
    callback = WandbLog(state.config.logging)
    callback.fit_start(state)
    for state.step in range(1, 4):
        callback.step_end(state, {"step": state.step, "loss": 1.0, "words": "x" * 40_000})  # type: ignore[dict-item]
    callback.close(state)
    (path,) = pieces(tmp_path)
    records(path)
    whole = path.read_bytes()
    assert len(whole) > 3 * 32 * 1024  # rows lie across blocks
    assert [row["step"] for row in wandb_files.history(path)] == [1, 2, 3]
    lengths = set()
    for share in range(100):
        path.write_bytes(whole[: len(whole) * share // 100])
        rows = [row["step"] for row in wandb_files.history(path)]
        assert rows == [1, 2, 3][: len(rows)]
        lengths.add(len(rows))
    assert lengths >= {0, 1, 2}
    at = whole.rindex(b"x" * 100)
    path.write_bytes(whole[: at - 60] + b"\xff" * 60 + whole[at:])
    assert [row["step"] for row in wandb_files.history(path)] in ([], [1], [1, 2])
    path.write_bytes(b"no file of wandb")
    assert list(wandb_files.history(path)) == []


def test_what_a_killed_process_took_along_is_logged_again_up_to_the_checkpoint(tmp_path: Path) -> None:
    train(trainer(tmp_path), range(1, 8))
    (first,) = pieces(tmp_path)
    records(first)
    whole = first.read_bytes()
    cut = [number for number, row in enumerate(wandb_files.history(first)) if row["step"] == 4]
    ends = [end for raw, end in wandb_files._placed_records(first) if wandb_files._parsed(raw).HasField("history")]
    first.write_bytes(whole[: ends[cut[0]] + 20])  # in the midst of step 5
    lines = [{"step": step, "loss": 1 / step, "not": None} for step in range(1, 8)]
    lines.insert(6, {"step": 6, "val/loss": 0.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    train(trainer(tmp_path, start_step=6), range(7, 9), offset=100.0)
    assert first.stat().st_size == ends[cut[0]] and whole.startswith(first.read_bytes())
    records(pieces(tmp_path)[1])
    rows = [row for path in pieces(tmp_path) for row in wandb_files.history(path)]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["train/loss"] for row in rows] == pytest.approx([1 / s for s in range(1, 7)] + [100 + 1 / 7, 100.125])
    assert [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row] == [(6, 0.25), (8, 0.5)]
    assert not any("train/not" in row for row in rows)


def test_a_file_that_names_no_run_is_set_aside(tmp_path: Path) -> None:
    """As wandb leaves it for its first 15 seconds: `wandb sync` uploads nothing beside it."""
    train(trainer(tmp_path), range(1, 3))
    (path,) = pieces(tmp_path)
    records(path)
    whole = path.read_bytes()
    wandb_files.mend(path)
    assert path.read_bytes() == whole
    path.write_bytes(whole[:7])
    found = wandb_files.mend_and_read(tmp_path / "wandb", wandb.run_id(tmp_path), 1)
    assert found == wandb_files.Logged(-1, {}) and pieces(tmp_path) == []
    assert path.with_name(f"{path.name}.empty").read_bytes() == whole[:7]


def test_names_alerts_images_and_files_reach_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the setting takes precedence
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.yaml").write_text("model: {}\n")
    (folder / "report.html").write_text("<html>")
    state = trainer(
        folder, wandb_entity="team", wandb_group="seeds", wandb_tags=["a", "b"], wandb_notes="why", wandb_mode="offline"
    )
    callback = WandbLog(state.config.logging)
    callback.fit_start(state)
    state.step = 3
    callback.step_end(state, {"step": 3, "loss": 2.0, "lr": 1e-3})
    callback.images_made(state, {"moe/expert_load": np.zeros((4, 6, 3), dtype=np.uint8)})
    callback.alert(state, "suspect loss", "step 3: 9 is far out")
    state.stopped_early = True
    callback.fit_end(state)
    callback.close(state)
    (path,) = pieces(folder)
    found = records(path)
    (run,) = [record.run for record in found if record.HasField("run")][:1]
    assert (run.entity, run.run_group, list(run.tags), run.notes) == ("team", "seeds", ["a", "b"], "why")
    alerts = [(record.alert.title, record.alert.text) for record in found if record.HasField("alert")]
    assert alerts == [
        ("suspect loss", f"{folder}: step 3: 9 is far out"),
        ("stopped", f"{folder}: saved at step 3 on request; the same command goes on"),
    ]
    saved = {file.path for record in found if record.HasField("files") for file in record.files.files}
    assert {"base/config.yaml", "base/report.html"} <= saved
    (row,) = wandb_files.history(path)
    assert row.keys() >= {"step", "train/loss", "optim/lr", "moe/expert_load"}
    assert capfd.readouterr().err == ""  # not even of wandb itself


def test_a_run_that_ends_by_an_error_says_so(tmp_path: Path) -> None:
    state = trainer(tmp_path)
    callback = WandbLog(state.config.logging)
    callback.fit_start(state)
    assert callback._run.settings.run_tags is None  # an empty list would take away those that a resumed run has
    with pytest.raises(UserError):
        try:
            raise UserError("the run has diverged")
        finally:
            callback.close(state)
    found = records(pieces(tmp_path)[0])
    assert [record.alert.text for record in found if record.HasField("alert")] == [
        f"{tmp_path}: step 0: the run has diverged"
    ]
    assert found[-1].exit.exit_code == 1


def test_files_that_are_not_there_are_not_attached(tmp_path: Path) -> None:
    callback, saved = WandbLog(LoggingConfig()), []
    callback._run = SimpleNamespace(save=lambda path, **_: saved.append(path.name))
    (tmp_path / "config.yaml").touch()
    callback._attach(tmp_path)
    assert saved == ["config.yaml"]


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


@pytest.mark.parametrize("fails", ["Image", "save"])
def test_a_failure_of_wandb_is_one_warning(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr({"Image": "wandb.Image", "save": "wandb.sdk.wandb_run.Run.save"}[fails], full)
    (tmp_path / "config.yaml").write_text("model: {}\n")
    state = trainer(tmp_path)
    callback = WandbLog(state.config.logging)
    callback.fit_start(state)
    run = callback._run
    callback.images_made(state, {"moe/expert_load": np.zeros((4, 6, 3), dtype=np.uint8)})
    callback.close(state)
    run.finish()
    told = [record.message for record in caplog.records if record.name == wandb.__name__]
    assert told == ["Weights & Biases logs no more of this run: No space left on device"]


def test_other_ranks_do_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # nor do they import it
    state = trainer(tmp_path, is_main=False)
    train(state, range(1, 3))
    callback = WandbLog(state.config.logging)
    callback.images_made(state, {"moe/expert_load": np.zeros((4, 6, 3), dtype=np.uint8)})
    callback.alert(state, "suspect loss", "far out")
    assert list(tmp_path.iterdir()) == [] and caplog.records == []


def test_records_lie_in_blocks_as_leveldb_has_them(tmp_path: Path) -> None:
    """A rest of 6 bytes in a block is zeros, one of 7 a fragment without data."""

    def fragment(kind: int, data: bytes) -> bytes:
        return wandb_files.FRAGMENT.pack(0, len(data), kind) + data

    whole = wandb_files.BLOCK - wandb_files.HEADER.size - wandb_files.FRAGMENT.size
    split = fragment(wandb_files.FIRST, b"") + fragment(wandb_files.LAST, b"bcd")
    path = tmp_path / "run.wandb"
    for rest in (0, 1, 6, 7):
        data = wandb_files.HEADER.pack(wandb_files.MAGIC, 0, 0) + fragment(wandb_files.FULL, b"a" * (whole - rest))
        data += split if rest == 7 else bytes(rest) + fragment(wandb_files.FULL, b"bcd")
        path.write_bytes(data)
        assert list(wandb_files.raw_records(path)) == [b"a" * (whole - rest), b"bcd"], rest
    path.write_bytes(data + bytes(7) + fragment(wandb_files.FULL, b"after zeros"))
    assert len(list(wandb_files.raw_records(path))) == 2


def test_the_server_asked_is_the_one_that_wandb_talks_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from wandb.sdk import wandb_setup

    assert wandb.base_url() == wandb_setup.singleton().settings.base_url
    monkeypatch.setenv("WANDB_BASE_URL", "http://own.example.org")
    assert wandb.base_url() == "http://own.example.org"


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
