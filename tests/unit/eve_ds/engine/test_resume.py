"""Damaged checkpoints are set aside and the one before is taken; a read that fails is no damage."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from eve_ds.engine import resume
from eve_ds.engine.checkpoint import prune
from eve_ds.engine.checkpoint_record import COMPLETE, DamagedError, Manifest, hash_files
from eve_ds.weights import model_folder
from preprocessing.errors import UserError
from tests.support.made_checkpoint import MODEL, OPTIMIZER, make_checkpoint


def flip(file: Path, place: int, bit: int = 1) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= bit
    file.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda path: flip(path / MODEL, 700), f"{MODEL} is damaged"),
    "a bit of the moments": (lambda path: flip(path / OPTIMIZER, 700), f"{OPTIMIZER} is damaged"),
    "an empty file": (lambda path: (path / OPTIMIZER).write_bytes(b""), f"{OPTIMIZER} has 0 bytes"),
    "no file": (lambda path: (path / MODEL).unlink(), f"{MODEL} is missing"),
    "an empty manifest": (lambda path: (path / COMPLETE).write_bytes(b""), f"{COMPLETE} is damaged"),
    "a manifest that is no object": (lambda path: (path / COMPLETE).write_text("[1]"), f"{COMPLETE} is damaged"),
    "a digit of the step": (
        lambda path: flip(path / COMPLETE, (path / COMPLETE).read_bytes().index(b'"step": 3') + 8),
        f"{COMPLETE} is damaged (its digest differs)",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_the_one_before_is_taken(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage, words = DAMAGES[name]
    two, three = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 3)
    damage(three)
    found = resume.sound(tmp_path)
    assert found is not None and found[0] == two and found[1].step == 2 and found[1].state == {"step": 2}
    (told,) = caplog.messages
    assert told.startswith(f"{three} is damaged: {words}")
    assert "is called step_00000003.damaged now, and the run goes on from step_00000002" in told
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000002", "step_00000003.damaged"}
    assert resume.sound(tmp_path) == found and caplog.messages == [told]


def test_no_bit_of_the_manifest_can_change_unseen(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    sound, content = Manifest.read(path), (path / COMPLETE).read_bytes()
    seen = 0
    for place in range(len(content)):
        flip(path / COMPLETE, place, 1 << place % 7)
        try:
            assert Manifest.read(path) == sound  # white space, or the name of the digest
        except DamagedError:
            seen += 1
        (path / COMPLETE).write_bytes(content)
    assert seen > 0.8 * len(content)


def test_it_is_refused_when_none_is_left_now_and_at_the_next_start(tmp_path: Path) -> None:
    for step in (2, 3):
        flip(make_checkpoint(tmp_path, step) / MODEL, 700)
    for _ in range(2):
        with pytest.raises(
            UserError, match=r"no sound checkpoint is left .step_00000002.damaged, step_00000003.damaged"
        ):
            resume.sound(tmp_path)
    make_checkpoint(tmp_path, 3)
    assert resume.sound(tmp_path) is not None


def test_a_second_damage_gets_another_name_and_nothing_of_it_is_pruned(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    for _ in range(2):
        flip(make_checkpoint(tmp_path, 3) / MODEL, 700)
        assert resume.sound(tmp_path) is not None
    make_checkpoint(tmp_path, 4)
    make_checkpoint(tmp_path, 100_000_005)
    (tmp_path / "step_00000001").mkdir()  # the rest of a killed save
    prune(tmp_path, keep=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"step_100000005", "step_00000003.damaged", "step_00000003.damaged.2"}


def test_a_checkpoint_that_cannot_be_deleted_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some file systems need room to delete, and a full one has none."""
    for step in (2, 3, 4):
        make_checkpoint(tmp_path, step)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", full)
        prune(tmp_path, keep=1)
    told = caplog.messages
    assert [f"step_0000000{n}: cannot be removed now (No space left on device)" in told[n - 2] for n in (2, 3)] == [
        True,
        True,
    ]
    assert model_folder.newest_checkpoint(tmp_path) == tmp_path / "step_00000004"
    prune(tmp_path, keep=1)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000004"}


@pytest.mark.parametrize("name", [MODEL, COMPLETE])
def test_a_read_that_fails_is_no_damage(name: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 2)
    file = make_checkpoint(tmp_path, 3) / name
    if name == COMPLETE:  # as it is opened, not as it is looked for
        file.unlink()
        file.mkdir()
        words = "cannot be read"
    else:
        file.unlink()
        file.symlink_to(file)  # the system refuses to open it: what root can be refused
        words = "cannot be read .Too many levels of symbolic links."
    with pytest.raises(UserError, match=words) as refused:
        resume.sound(tmp_path)
    assert not isinstance(refused.value, DamagedError) and "nothing says that it is damaged" in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} == {"step_00000002", "step_00000003"}


def test_a_pipe_among_the_files_is_no_damage_and_not_waited_at(tmp_path: Path) -> None:
    file = make_checkpoint(tmp_path, 3) / MODEL
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"cannot be read .it is no regular file.; nothing says that it is damaged"):
        resume.sound(tmp_path)


@pytest.mark.parametrize("look", [resume.sound, model_folder.newest_checkpoint, model_folder.all_checkpoints])
def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(look: Callable[[Path], object], tmp_path: Path) -> None:
    """The run would begin anew, and write over what it did not see."""
    assert not look(tmp_path / "none yet")
    (tmp_path / "checkpoints").symlink_to(tmp_path / "checkpoints")  # the system refuses to list it, root's too
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        look(tmp_path / "checkpoints")
    prune(tmp_path / "checkpoints", keep=1)  # no more than a tidying: the run goes on


def test_what_is_read_rightly_the_second_time_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, 3)
    together = resume.hash_together

    def misread(path: Path, shares: list[list[str]]) -> object:
        return {**together(path, shares), MODEL: (0, "")}

    monkeypatch.setattr(resume, "hash_together", misread)
    with pytest.raises(UserError, match="wrongly once and rightly once, so it is sound"):
        resume.sound(tmp_path)
    assert (tmp_path / "step_00000003").is_dir()


def test_what_another_run_removes_meanwhile_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two, three = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 3)
    sizes = resume.file_sizes

    def removed(path: Path, names: object) -> object:
        if path == three:
            shutil.rmtree(three)  # a prune: complete.json goes first
        return sizes(path, names)  # type: ignore[arg-type]

    monkeypatch.setattr(resume, "file_sizes", removed)
    found = resume.sound(tmp_path)
    assert found is not None and found[0] == two and [path.name for path in tmp_path.iterdir()] == [two.name]


def test_a_sound_file_that_this_torch_cannot_read_is_no_damage(tmp_path: Path) -> None:
    """Else a run that is started with another torch would set all of its checkpoints aside."""
    path = make_checkpoint(tmp_path, 3)
    (path / MODEL).write_bytes(b"of another version")
    dataclasses.replace(Manifest.read(path), files=hash_files(path, [MODEL, OPTIMIZER])).write(path)
    with pytest.raises(UserError, match="not readable as a checkpoint file") as refused:
        resume.sound(tmp_path)
    assert path.is_dir() and "delete" not in str(refused.value)


def test_before_the_first_save_there_is_none(tmp_path: Path) -> None:
    assert resume.sound(tmp_path / "nowhere") is None
    (tmp_path / "step_00000003").mkdir()
    assert resume.sound(tmp_path) is None
