"""`python -m preprocessing` as a user types it, in a process of its own."""

from pathlib import Path

from preprocessing.__main__ import COMMANDS
from tests.unit.preprocessing.helpers import command, write_json


def one_line(*arguments: object) -> str:
    """The line on stderr of a run that ends with exit code 2."""
    done = command(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_help_names_every_command() -> None:
    done = command("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    done = command("coco", "--help")
    assert done.returncode == 0 and "--max-dropped" in done.stdout


def test_bad_usage_is_one_line() -> None:
    assert "COMMAND" in one_line()
    assert "--annotations" in one_line("coco", "--images", ".", "--split", "train", "--out", "x")
    assert "invalid choice: 'dev'" in one_line("easy-vqa", "--split", "dev", "--out", "x")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    end = ("--images", tmp_path, "--split", "train", "--out", tmp_path / "out")
    message = one_line("coco", "--annotations", tmp_path / "captions.json", *end)
    assert message.startswith("preprocessing coco: ") and "captions.json: no such file" in message
    (tmp_path / "bad.json").write_text("[1,\n2,]")
    assert "bad.json: invalid JSON at line 2 column" in one_line("json", "--task", "vqa", "--annotations",
                                                                 tmp_path / "bad.json", *end)  # fmt: skip
    empty = write_json(tmp_path / "empty.json", [])
    assert "empty data set" in one_line("json", "--task", "retrieval", "--annotations", empty, *end)
    assert not (tmp_path / "out").exists()


def test_preprocessing_does_not_import_torch() -> None:
    import subprocess
    import sys

    from tests.unit.preprocessing.helpers import ROOT

    code = "import sys, preprocessing.__main__; sys.exit(bool({'torch', 'eve_ds'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
