"""How the commands end when it is nobody's bug: as those of ``eve_ds`` do (tests/unit/eve_ds/test_errors.py)."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest

from evaluation import vqa
from evaluation.common import run

ROOT = Path(__file__).parents[3]
ASSETS = f"{ROOT}/tests/assets"
QUESTIONS, ANNOTATIONS = f"{ASSETS}/vqa_questions.json", f"{ASSETS}/vqa_annotations.json"
PREDICTIONS = f"--predictions={ASSETS}/vqa_predictions.json"
COMMANDS = {
    "retrieval": [f"--scores={ASSETS}/retrieval_scores.npz"],
    "vqa": [PREDICTIONS, f"--annotations={ANNOTATIONS}"],
    "nlvr": [f"--predictions={ASSETS}/nlvr2_predictions.csv", f"--annotations={ASSETS}/nlvr2_split.json"],
    "submission": [PREDICTIONS, f"--questions={QUESTIONS}"],
    "compare": [f"{ASSETS}/retrieval_scores.npz", f"{ASSETS}/./retrieval_scores.npz"],  # one name twice is refused
    "baselines": [
        *(f"--train-questions={QUESTIONS}", f"--train-annotations={ANNOTATIONS}"),
        *(f"--questions={QUESTIONS}", f"--annotations={ANNOTATIONS}"),
    ],
}
FULL = b"error: No space left on device; make room or choose another folder\n"


def ended(stdout: int, name: str, arguments: list[str], **variables: str) -> tuple[int, bytes]:
    """Exit code and stderr of a command."""
    command = [sys.executable, "-m", f"evaluation.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=PIPE, env=os.environ | variables)
    return done.returncode, done.stderr


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe whose reader has left."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_gone_reader_is_no_fault_and_a_full_disk_is_one_line(
    name: str, unbuffered: str, tmp_path: Path, unread: int
) -> None:
    arguments = [*COMMANDS[name], f"--out={tmp_path}/out.json"]
    assert ended(unread, name, arguments, PYTHONUNBUFFERED=unbuffered) == (0, b"")
    written = (tmp_path / "out.json").read_text()
    assert json.loads(written)
    with open("/dev/full", "w") as full:
        assert ended(full.fileno(), name, arguments, PYTHONUNBUFFERED=unbuffered) == (2, FULL)
    assert (tmp_path / "out.json").read_text() == written


def test_a_gone_reader_keeps_no_file_from_being_written_and_hides_no_fault(tmp_path: Path, unread: int) -> None:
    more, out = f"--per_question={tmp_path}/each.json", f"--out={tmp_path}/out.json"
    assert ended(unread, "vqa", [*COMMANDS["vqa"], more, out], PYTHONUNBUFFERED="1") == (0, b"")
    assert json.loads((tmp_path / "each.json").read_text())
    for unbuffered in ("", "1"):
        code, told = ended(unread, "vqa", [*COMMANDS["vqa"], "--out=/proc/nowhere/m.json"], PYTHONUNBUFFERED=unbuffered)
        assert (code, told) == (2, b"error: /proc/nowhere/m.json: cannot be written: No such file or directory\n")


@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", rb"gr\xf6\xdfe \u72ac"), ("latin-1", b"gr\xf6\xdfe \\u72ac")]
)
def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path, encoding: str, shown: bytes) -> None:
    content = json.loads(Path(ANNOTATIONS).read_text())
    for row in content["annotations"]:
        row["answer_type"] = "größe 犬"
    (tmp_path / "a.json").write_text(json.dumps(content))
    arguments = [PREDICTIONS, f"--annotations={tmp_path}/a.json", f"--out={tmp_path}/m.json"]
    with open(tmp_path / "told", "wb") as told:
        assert ended(told.fileno(), "vqa", arguments, PYTHONIOENCODING=encoding) == (0, b"")
    assert shown in (tmp_path / "told").read_bytes()


def test_ctrl_c_ends_silently(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: list[str] | None) -> None:
        raise KeyboardInterrupt

    assert run(interrupted) == 130
    assert capsys.readouterr() == ("", "")


def test_want_of_memory_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise MemoryError

    arguments = [*COMMANDS["vqa"], "--out=/proc/nowhere/m.json"]
    for place, named in (("evaluation.vqa.accuracy", ""), ("json.loads", f"{ASSETS}/vqa_predictions.json: ")):
        monkeypatch.setattr(place, full)
        assert run(vqa.main, arguments) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"error: {named}no memory is left; ") and told.count("\n") == 1


def test_a_call_that_memory_failed_is_told_as_want_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    def starved(arguments: list[str] | None) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory", "/a/file")

    assert run(starved) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: no memory is left; ") and told.count("\n") == 1
