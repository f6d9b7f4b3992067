"""A run's second place: what is whole there, what is copied and taken back, and what a failure costs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from eve_ds.callbacks.second_copy import SecondCopy
from eve_ds.config import PretrainConfig
from eve_ds.engine import second_place
from eve_ds.engine.background_copy import BackgroundCopy
from eve_ds.engine.identity import Identity
from eve_ds.engine.resume import tag_of
from eve_ds.engine.second_place import SecondPlace
from eve_ds.engine.signals import StopRequest
from eve_ds.finetune_options import expand_options
from eve_ds.weights.model_folder import write_hashes
from preprocessing.errors import UserError
from tests.support.made_checkpoint import MODEL, OPTIMIZER, make_checkpoint
from tests.support.s3 import BUCKET, s3_server
from tests.support.second_run import ANY, LIMIT, config_of, contents, ignore, make_run, told


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture(params=["file", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "file":
        yield f"file://{tmp_path / 'second'}"
        return
    with s3_server():
        yield f"s3://{BUCKET}/{tmp_path.name}"  # the servers of one process share their objects


def upload(place: SecondPlace, *steps: int, keep: int = 2) -> None:
    for step in steps:
        place.upload(make_checkpoint(place.run / "checkpoints", step), keep, ignore)


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


@pytest.mark.parametrize("error", [UserError("no network"), OSError("When reading: AWS Error NETWORK_CONNECTION")])
def test_a_read_that_fails_midway_is_done_again(
    error: Exception, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = SecondPlace(f"file://{tmp_path / 'second'}", run)
    upload(place, 4)
    before = contents(run)
    shutil.rmtree(run)
    failed: list[int] = []

    def fails_once(_: int) -> None:  # told of a piece that has been read
        if len(failed) < 2:
            failed.append(1)
            raise error

    monkeypatch.setattr(second_place, "FETCH_PAUSES", (0.0, 0.0))
    assert place.restore(ANY, 9, True, fails_once) is not None and len(failed) == 2
    assert contents(run) == {name: content for name, content in before.items() if name != ".lock"}


def test_a_read_that_fails_each_time_is_told_in_a_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = tmp_path / "second"
    place = SecondPlace(f"file://{second}", run)
    upload(place, 4)
    shutil.rmtree(run)
    monkeypatch.setattr(second_place, "FETCH_PAUSES", (0.0,))
    for name in ("metrics.jsonl", "identity.json"):
        (second / name).unlink(missing_ok=True)
        (second / name).symlink_to("/proc/self/mem")  # it opens, and its first byte cannot be read
        with pytest.raises(UserError, match="Input/output error"):
            SecondCopy(config_of(run, f"file://{second}"), StopRequest()).begin(ANY, 9)
    assert not list((run / "checkpoints").iterdir())


def make_best(run: Path, step: int) -> None:
    """``run/model_best``, as an export leaves it."""
    folder = run / "model_best"
    folder.mkdir(exist_ok=True)
    (folder / "best.json").unlink(missing_ok=True)
    for name in ("config.yaml", "model.safetensors"):
        (folder / name).write_bytes(f"{name} of step {step}\n".encode() * 99)
    write_hashes(folder, ("config.yaml", "model.safetensors"))
    (folder / "best.json").write_text(json.dumps({"step": step}))


def test_the_best_weights_are_taken_back_as_one(run: Path, uri: str) -> None:
    place = SecondPlace(uri, run)
    make_best(run, 4)
    upload(place, 4)
    whole = contents(run / "model_best")
    make_best(run, 2)
    for name in ("best.json", f"../checkpoints/{tag_of(4)}/complete.json"):  # killed in an export, and lost
        (run / "model_best" / name).unlink()
    (run / "model_best" / "answer_list.json").write_text("of the older export")
    assert place.restore(ANY, 9, True, ignore) is not None
    assert contents(run / "model_best") == whole


def test_files_of_two_exports_are_no_best_weights_there(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    place, path = SecondPlace(f"file://{second}", run), make_checkpoint(run / "checkpoints", 4)
    make_best(run, 2)
    place.upload(path, 2, ignore)
    before = contents(second / "model_best")
    assert before == contents(run / "model_best")
    (run / "model_best" / "best.json").unlink()
    (run / "model_best" / "config.yaml").write_text("an export is under way")
    place.upload_files(ignore)
    assert contents(second / "model_best") == before
    make_best(run, 3)

    def exports(_: int) -> None:
        if json.loads((run / "model_best" / "best.json").read_text())["step"] == 3:
            make_best(run, 4)

    place.upload_files(exports)
    assert not (second / "model_best" / "best.json").exists()
    other = SecondPlace(f"file://{second}", tmp_path / "other")
    assert other.restore(ANY, 9, True, ignore) is not None and not (tmp_path / "other" / "model_best").exists()
    place.upload_files(ignore)
    assert contents(second / "model_best") == contents(run / "model_best")


@pytest.mark.parametrize("name", ["model.safetensors", "hashes.json"])
def test_damaged_best_weights_there_are_left_out(name: str, run: Path, tmp_path: Path) -> None:
    place = SecondPlace(f"file://{tmp_path / 'second'}", run)
    make_best(run, 4)
    upload(place, 4)
    (tmp_path / "second" / "model_best" / name).write_bytes(b"{")
    shutil.rmtree(run)
    with told("warning", second_place) as lines:
        assert place.restore(ANY, 9, True, ignore) == run / "checkpoints" / tag_of(4)
    assert "model.safetensors is damaged or missing; the best weights there are left out" in lines[0]
    assert not (run / "model_best").exists() and len(list((run / "checkpoints").iterdir())) == 1


def test_what_killed_copies_left_is_removed(run: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    place, path = SecondPlace(f"file://{second}", run), make_checkpoint(run / "checkpoints", 4)
    there = second / "checkpoints" / tag_of(4)
    there.mkdir(parents=True)
    for left in (
        there / f".{OPTIMIZER}.01234567",
        there / ".complete.json.89abcdef",
        second / ".metrics.jsonl.0a0b0c0d",
    ):
        left.write_text("a part")
    place.check()
    place.upload(path, 2, ignore)
    shutil.rmtree(run)
    (run / "checkpoints" / ".from_second_step_00000002").mkdir(parents=True)
    (run / ".metrics.jsonl.01234567").write_text("a part")
    place.restore(ANY, 9, True, ignore)
    assert not [name for folder in (run, second) for name in contents(folder) if "/." in f"/{name}"]
    assert [each.name for each in (run / "checkpoints").iterdir()] == [tag_of(4)]


def test_checkpoints_that_vanish_do_not_disturb_the_copy_of_files(run: Path, tmp_path: Path) -> None:
    vanishing = make_checkpoint(run / "checkpoints", 2)
    looked = []

    def scandir(folder: Path) -> Iterator[os.DirEntry[str]]:
        looked.append(Path(folder).name)
        return os_scandir(folder)

    os_scandir = os.scandir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", scandir)
        SecondPlace(f"file://{tmp_path / 'second'}", run).upload_files(ignore)
    assert "provenance" in looked and not {"checkpoints", vanishing.name} & set(looked)


def test_output_hdfs_is_the_second_place() -> None:
    assert expand_options(["--output_hdfs", "hdfs://host/runs/base"])[0] == [
        "--checkpoint.second_place",
        "hdfs://host/runs/base",
    ]
