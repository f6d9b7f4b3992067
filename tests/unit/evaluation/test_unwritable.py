"""Where outputs go. Scores that cannot be written are told in a line, and printed: they may have taken hours."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evaluation import baselines, nlvr, retrieval, vqa
from evaluation.common import InputError, run, write_text
from tests.support.limits import permissions_hold

ASSETS = Path(__file__).parents[3] / "tests/assets"
PLACES = {"/dev/full": "No space left on device", "/proc/nowhere/scores.json": "No such file or directory"}
QUESTIONS, ANNOTATIONS = f"{ASSETS}/vqa_questions.json", f"{ASSETS}/vqa_annotations.json"
COMMANDS = {
    "retrieval": (retrieval.main, [f"--scores={ASSETS}/retrieval_scores.npz"], "txt_r1 "),
    "vqa": (vqa.main, [f"--predictions={ASSETS}/vqa_predictions.json", f"--annotations={ANNOTATIONS}"], "overall "),
    "nlvr": (
        nlvr.main,
        [f"--predictions={ASSETS}/nlvr2_predictions.csv", f"--annotations={ASSETS}/nlvr2_split.json"],
        "accuracy ",
    ),
    "baselines": (
        baselines.main,
        [
            *(f"--train-questions={QUESTIONS}", f"--train-annotations={ANNOTATIONS}"),
            *(f"--questions={QUESTIONS}", f"--annotations={ANNOTATIONS}"),
        ],
        "majority_baseline ",
    ),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", COMMANDS)
def test_scores_are_printed(name: str, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, arguments, words = COMMANDS[name]
    assert run(command, [*arguments, f"--out={place}"]) == 2
    told = capsys.readouterr()
    assert told.err == f"error: {place}: cannot be written: {PLACES[place]}\n"
    assert told.out.startswith(words) and told.out.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "reason"), [("closed/x/y.json", "Permission denied"), ("n" * 300, "File name too long")]
)
def test_scores_are_printed_where_the_place_cannot_even_be_looked_at(
    name: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    command, arguments, words = COMMANDS["vqa"]
    with permissions_hold():
        assert run(command, [*arguments, f"--out={tmp_path / name}"]) == 2
    told = capsys.readouterr()
    assert told.err == f"error: {tmp_path / name}: cannot be written: {reason}\n" and told.out.startswith(words)


def test_out_is_no_folder(tmp_path: Path) -> None:
    for name in (str(tmp_path), f"{tmp_path}/new/"):
        with pytest.raises(InputError, match=f"{name}: is a folder; name a file"):
            write_text(name, "")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old.json").write_text("old")
    for name in ("old", "new"):
        (tmp_path / f"{name}.json").symlink_to(f"there/{name}.json")
        write_text(tmp_path / f"{name}.json", "text")
        assert (tmp_path / f"{name}.json").is_symlink()
        assert (tmp_path / "there" / f"{name}.json").read_text() == "text"
    assert len(list(tmp_path.rglob("*"))) == 5
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop: cannot be written: Too many levels of symbolic links"):
        write_text(tmp_path / "loop", "")


def test_stdout_that_is_a_file_is_not_replaced(tmp_path: Path) -> None:
    """Neither by a plain file in /dev, as root, nor the file that the printed line goes to."""
    command = [sys.executable, "-m", "evaluation.vqa", *COMMANDS["vqa"][1], "--out=/dev/stdout"]
    with open(tmp_path / "told", "wb") as told:
        done = subprocess.run(command, cwd=ASSETS.parents[1], stdout=told, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: /dev/stdout: is neither a pipe nor a terminal here; name a file\n"
    assert (tmp_path / "told").read_text().startswith("overall ") and Path("/dev/stdout").is_symlink()


def test_ctrl_c_while_writing_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(handle: int) -> None:
        raise KeyboardInterrupt

    (tmp_path / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(tmp_path / "a", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]
