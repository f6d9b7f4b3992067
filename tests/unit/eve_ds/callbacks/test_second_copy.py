"""The thread that copies a run to its second place, and how the end of a run waits for it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from eve_ds.callbacks import second_copy
from eve_ds.callbacks.second_copy import SecondCopy
from eve_ds.engine import background_copy, checkpoint, second_place
from eve_ds.engine.background_copy import BackgroundCopy
from eve_ds.engine.resume import tag_of
from eve_ds.engine.second_place import SecondPlace
from eve_ds.engine.signals import StopRequest
from eve_ds.errors import NOT_COPIED, STOPPED, StopError
from preprocessing.errors import UserError
from tests.support.made_checkpoint import OPTIMIZER, make_checkpoint
from tests.support.second_run import ANY, LIMIT, config_of, make_run, told


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def test_a_waiting_checkpoint_gives_way_to_a_newer_and_rotation_spares_the_one_under_way(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, folder = SecondPlace(f"file://{tmp_path / 'second'}", run), run / "checkpoints"
    started, go_on, uploaded = threading.Event(), threading.Event(), []
    whole = SecondPlace.upload

    def slow(self: SecondPlace, path: Path, *rest: object) -> None:
        started.set()
        assert go_on.wait(LIMIT)
        whole(self, path, *rest)  # type: ignore[arg-type]
        uploaded.append(path.name)

    monkeypatch.setattr(SecondPlace, "upload", slow)
    copy = BackgroundCopy(place, 1)
    for step in (2, 4, 6):
        copy.submit(make_checkpoint(folder, step))
        assert started.wait(LIMIT)
        checkpoint.prune(folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == [tag_of(2), tag_of(6)]
    go_on.set()
    assert copy.wait(LIMIT) and uploaded == [tag_of(2), tag_of(6)] and place.complete() == [tag_of(6)]
    checkpoint.prune(folder, 1)
    assert [path.name for path in folder.iterdir()] == [tag_of(6)]


def test_a_checkpoint_that_rotation_removed_first_is_no_failure(run: Path, tmp_path: Path) -> None:
    place, path = SecondPlace(f"file://{tmp_path / 'second'}", run), make_checkpoint(run / "checkpoints", 2)
    shutil.rmtree(path)
    copy = BackgroundCopy(place, 2)
    copy.submit(path)
    assert copy.wait(LIMIT) and copy.failure is None and place.complete() == []


def test_a_checkpoint_that_is_damaged_here_is_never_whole_there(run: Path, tmp_path: Path) -> None:
    place, path = SecondPlace(f"file://{tmp_path / 'second'}", run), make_checkpoint(run / "checkpoints", 2)
    (path / OPTIMIZER).write_bytes((path / OPTIMIZER).read_bytes()[:-1] + b"x")
    copy = BackgroundCopy(place, 2)
    with told("warning", background_copy) as lines:
        copy.submit(path)
        assert copy.wait(LIMIT)
    assert place.complete() == [] and "its hash differs" in lines[0] and "its hash differs" in str(copy.damage)


def test_an_error_that_nobody_expects_is_a_failure_like_any_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = SecondPlace.upload_files, []

    def fails(self: SecondPlace, moved: second_place.Moved) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise KeyError
        whole(self, moved)

    monkeypatch.setattr(SecondPlace, "upload_files", fails)
    copy = BackgroundCopy(SecondPlace(f"file://{tmp_path / 'second'}", run), 2, first_pause=0.01)
    with told("warning", background_copy) as lines:
        copy.submit()
        assert copy.wait(LIMIT) and len(calls) == 2
    assert "KeyError" in lines[0]


def test_the_end_of_a_run_waits_for_the_copy_and_tells_of_a_failure(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    callback = SecondCopy(config_of(run, f"file://{second}"), StopRequest())
    callback.begin(ANY, 9)
    (run / "scores_test.json").write_text("{}")
    assert callback.finish(0) == 0 and (second / "scores_test.json").read_text() == "{}"
    shutil.rmtree(second)
    second.write_text("no folder any more")
    (run / "scores_test.json").write_text('{"a": 1}')
    with told("error", second_copy) as lines:
        assert callback.finish(0, patience=0.5) == NOT_COPIED
        assert callback.finish(STOPPED, patience=0.5) == STOPPED  # the next start copies
    assert f"cp -r {run}/. {second}" in lines[0] and "the same command tries again" in lines[0]
    second.unlink()
    assert callback.finish(0) == 0 and (second / "scores_test.json").read_text() == '{"a": 1}'


def test_a_damaged_record_here_is_told_and_the_thread_goes_on(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    (make_checkpoint(run / "checkpoints", 2) / "complete.json").write_text("{")
    callback = SecondCopy(config_of(run, f"file://{second}"), StopRequest())
    callback.begin(ANY, None)
    callback.fit_start(SimpleNamespace())  # type: ignore[arg-type]
    with told("error", second_copy) as lines:
        assert callback.finish(0, patience=LIMIT) == NOT_COPIED and callback.finish(STOPPED) == STOPPED
    assert "lacks the newest checkpoint" in lines[0] and "complete.json is damaged" in lines[0]
    assert (second / "metrics.jsonl").exists()
    callback.checkpoint_saved(SimpleNamespace(), make_checkpoint(run / "checkpoints", 4))  # type: ignore[arg-type]
    assert callback.finish(0) == 0


@pytest.mark.parametrize(
    ("error", "copied"),
    [(StopError(), True), (UserError("diverged"), True), (OSError(28, "full"), True), (StopError(15), False)],
)
def test_what_ends_a_run_waits_for_the_copy_unless_it_ends_at_once(
    error: BaseException, copied: bool, run: Path, tmp_path: Path
) -> None:
    callback = SecondCopy(config_of(run, f"file://{tmp_path / 'second'}"), StopRequest())
    with pytest.raises(type(error)) as raised, callback:
        callback.begin(ANY, 9)
        raise error
    assert raised.value is error and (tmp_path / "second" / "metrics.jsonl").exists() == copied


WAITS = """
import sys
from eve_ds.callbacks import second_copy
from eve_ds.config import PretrainConfig
from eve_ds.engine.identity import Identity
from eve_ds.engine.signals import StopRequest
from eve_ds.errors import run_command

def main():
    second_copy.STOP_PATIENCE, second_copy._TOLD, second_copy._EVERY = 0.2, 0.0, 0.1
    config = PretrainConfig(output_dir=sys.argv[1])
    config.checkpoint.second_place = "file://" + sys.argv[2]
    with StopRequest().handling() as stop, second_copy.SecondCopy(config, stop) as second:
        second.begin(Identity({}, {}), None)
        second._copy.place.root = second._copy.place.root / "file" / "x"  # it is lost
        return second.finish(0)

run_command(main)
"""


def test_a_finished_run_that_is_asked_to_stop_while_it_waits_ends_with_75(run: Path, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "file").write_text("")
    command = [sys.executable, "-c", WAITS, str(run), str(tmp_path / "second")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None and any("copying to" in line for line in waiting.stderr)
        waiting.send_signal(signal.SIGTERM)
        text = waiting.stderr.read()
        assert waiting.wait(LIMIT) == STOPPED, text
    assert "lacks a part of this run" in text and "Traceback" not in text
