"""A run's second place: what is whole there, what is copied and taken back, and what a failure costs."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from eve_ds.callbacks import second_copy
from eve_ds.callbacks.second_copy import SecondCopy
from eve_ds.config import PretrainConfig
from eve_ds.engine import background_copy, checkpoint, second_place
from eve_ds.engine.background_copy import BackgroundCopy
from eve_ds.engine.identity import Identity
from eve_ds.engine.resume import tag_of
from eve_ds.engine.second_place import SecondPlace
from eve_ds.engine.signals import StopRequest
from eve_ds.errors import NOT_COPIED, STOPPED
from eve_ds.finetune_options import expand_options
from preprocessing.errors import UserError
from tests.support.made_checkpoint import MODEL, OPTIMIZER, make_checkpoint
from tests.support.s3 import BUCKET, s3_server

ANY = Identity({}, {})
LIMIT = 60.0  # seconds; a hang


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "provenance").mkdir(parents=True)
    (folder / "provenance" / "start_1.json").write_text("{}\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / ".lock").write_text("")
    return folder


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path / 'second'}"
        return
    with s3_server():
        yield f"s3://{BUCKET}/{tmp_path.name}"  # the servers of one process share their objects


def ignore(_: int) -> None:
    pass


def upload(place: SecondPlace, *steps: int, keep: int = 2) -> None:
    for step in steps:
        place.upload(make_checkpoint(place.run / "checkpoints", step), keep, ignore)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_lost_run_is_taken_back_file_by_file(run: Path, uri: str) -> None:
    place = SecondPlace(uri, run)
    place.check()
    upload(place, 2, 4)
    before = contents(run)
    shutil.rmtree(run)
    assert place.restore(ANY, 9, True, ignore) == run / "checkpoints" / tag_of(4)
    older = f"checkpoints/{tag_of(2)}/"
    assert contents(run) == {n: c for n, c in before.items() if not n.startswith(older) and n != ".lock"}
    assert SecondPlace(uri, run).restore(ANY, 9, True, ignore) is None  # a second start finds nothing newer


def test_only_the_newest_are_kept_there(run: Path, uri: str) -> None:
    place = SecondPlace(uri, run)
    upload(place, 2, 4, 6, keep=2)
    assert place.complete() == [tag_of(4), tag_of(6)] == place._tags()


def test_an_interrupted_upload_is_no_checkpoint_and_goes_on_where_it_was(
    run: Path, uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, path = SecondPlace(uri, run), make_checkpoint(run / "checkpoints", 4)
    whole, sent = second_place.SecondPlace._send, []

    def fails(self: SecondPlace, checkpoint: Path, name: str, *rest: object) -> None:
        if name == OPTIMIZER and sent.count(OPTIMIZER) < 2:
            sent.append(name)
            raise OSError(5, "Input/output error")
        sent.append(name)
        whole(self, checkpoint, name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SecondPlace, "_send", fails)
    with pytest.raises(OSError):
        place.upload(path, 2, ignore)
    assert place.complete() == []
    assert SecondPlace(uri, run.parent / "other").restore(ANY, 9, True, ignore) is None
    copy = BackgroundCopy(place, 2, first_pause=0.01)
    copy.submit(path)
    assert copy.wait(LIMIT) and place.complete() == [tag_of(4)]
    assert sent == [MODEL, *[OPTIMIZER] * 3]  # what was there is not sent again


def test_a_damaged_copy_is_passed_over_for_the_one_before_it(run: Path, tmp_path: Path) -> None:
    place = SecondPlace(f"file://{tmp_path / 'second'}", run)
    upload(place, 2, 4)
    file = tmp_path / "second" / "checkpoints" / tag_of(4) / OPTIMIZER
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    shutil.rmtree(run)
    assert place.restore(ANY, 9, True, ignore) == run / "checkpoints" / tag_of(2)
    assert [path.name for path in (run / "checkpoints").iterdir()] == [tag_of(2)]
    shutil.rmtree(run)
    shutil.rmtree(tmp_path / "second" / "checkpoints" / tag_of(2))
    with pytest.raises(UserError, match="no checkpoint there is sound"):
        place.restore(ANY, 9, True, ignore)


def test_another_run_or_a_longer_one_is_refused(run: Path, tmp_path: Path) -> None:
    place = SecondPlace(f"file://{tmp_path / 'second'}", run)
    path = make_checkpoint(run / "checkpoints", 4)
    record = json.loads((path / "complete.json").read_text())
    record["state"]["identity"] = Identity({"optimizer.lr": 1e-3}, {}).tree()
    del record["digest"]
    (path / "complete.json").write_text(json.dumps(record))
    place.upload(path, 2, ignore)
    shutil.rmtree(run)
    with pytest.raises(UserError, match=r"holds another run: optimizer.lr is 0.001 there and 0.002 here"):
        place.restore(Identity({"optimizer.lr": 2e-3}, {}), 9, True, ignore)
    with pytest.raises(UserError, match="is at step 4, and is to have 3 in all"):
        place.restore(Identity({"optimizer.lr": 1e-3}, {}), 3, True, ignore)
    with pytest.raises(UserError, match=r"checkpoint.resume is false"):
        place.restore(Identity({"optimizer.lr": 1e-3}, {}), 9, False, ignore)
    assert not list((run / "checkpoints").iterdir())


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
    told: list[str] = []
    copy = BackgroundCopy(place, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background_copy._log, "warning", lambda text, *values: told.append(text % values))
        copy.submit(path)
        assert copy.wait(LIMIT)
    assert place.complete() == [] and "its hash differs" in told[0]


def test_a_file_that_grows_is_copied_as_it_was_and_again_at_the_end(run: Path, tmp_path: Path) -> None:
    place, metrics = SecondPlace(f"file://{tmp_path / 'second'}", run), run / "metrics.jsonl"
    moved: list[int] = []

    def grows(count: int) -> None:
        if not moved:
            with open(metrics, "a") as file:
                file.write('{"step": 2}\n')
        moved.append(count)

    place.upload_files(grows)
    assert (tmp_path / "second" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    place.upload_files(ignore)
    assert (tmp_path / "second" / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def config_of(run: Path, uri: str) -> PretrainConfig:
    config = PretrainConfig(output_dir=str(run))
    config.checkpoint.second_place = uri
    return config


def test_the_end_of_a_run_waits_for_the_copy_and_tells_of_a_failure(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    callback = SecondCopy(config_of(run, f"file://{second}"), StopRequest())
    callback.begin(ANY, 9)
    (run / "scores_test.json").write_text("{}")
    assert callback.finish(0) == 0 and (second / "scores_test.json").read_text() == "{}"
    shutil.rmtree(second)
    second.write_text("no folder any more")
    (run / "scores_test.json").write_text('{"a": 1}')
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second_copy._log, "error", lambda text, *values: told.append(text % values))
        assert callback.finish(0, patience=0.5) == NOT_COPIED
        assert callback.finish(STOPPED, patience=0.5) == STOPPED  # the next start copies
    assert f"cp -r {run}/. {second}" in told[0] and "the same command tries again" in told[0]
    second.unlink()
    assert callback.finish(0) == 0 and (second / "scores_test.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("s3://key:hush@bucket/x", "holds a user, a password or a key"),
        ("ftp://host/x", "scheme ftp:// is not known"),
        ("file://host/x", "write file:///FOLDER"),
        ("runs/second", "is no URI"),
        ("s3://", "names no bucket or host"),
    ],
)
def test_a_bad_uri_is_refused_with_the_options_and_without_its_secret(uri: str, why: str) -> None:
    config = PretrainConfig()
    config.checkpoint.second_place = uri
    with pytest.raises(UserError, match=why) as found:
        config.checkpoint.check()
    assert "--output_hdfs" in str(found.value) and "hush" not in str(found.value)


def test_a_place_that_cannot_be_written_or_is_the_run_itself_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for uri, why in {
        f"file://{tmp_path / 'file' / 'x'}": "cannot be written",
        f"file://{run / 'copy'}": "lie in each other",
        "hdfs://localhost/x": "set JAVA_HOME",
    }.items():
        with pytest.raises(UserError, match=why):
            SecondCopy(config_of(run, uri), StopRequest()).begin(ANY, 9)
    with s3_server(), pytest.raises(UserError, match="s3://no-such-bucket"):
        SecondCopy(config_of(run, "s3://no-such-bucket/x"), StopRequest()).begin(ANY, 9)


def test_a_place_with_another_runs_files_is_refused_before_it_has_a_checkpoint(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    (second / "identity.json").write_text(json.dumps(Identity({"evaluate": True}, {}).tree()))
    callback = SecondCopy(config_of(run, f"file://{second}"), StopRequest())
    with pytest.raises(UserError, match="holds another run: evaluate is True there and False here"):
        callback.begin(Identity({"evaluate": False}, {}), None)
    callback.begin(Identity({"evaluate": True}, {}), None)


def test_a_read_that_fails_once_is_done_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = SecondPlace(f"file://{tmp_path / 'second'}", run)
    upload(place, 4)
    shutil.rmtree(run)
    whole, calls = second_place.copy_stream, []

    def fails(*arguments: object) -> tuple[int, str]:
        calls.append(arguments)
        if len(calls) == 2:
            raise UserError("the network is down")
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(second_place, "copy_stream", fails)
    monkeypatch.setattr(second_place, "FETCH_PAUSES", (0.0,))
    assert place.restore(ANY, 9, True, ignore) is not None and len(calls) > 3


def test_output_hdfs_is_the_second_place() -> None:
    assert expand_options(["--output_hdfs", "hdfs://host/runs/base"])[0] == [
        "--checkpoint.second_place",
        "hdfs://host/runs/base",
    ]
