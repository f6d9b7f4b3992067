"""`python -m preprocessing` as a user types it, in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preprocessing.__main__ import COMMANDS
from tests.support.ranks import LIMIT
from tests.unit.preprocessing.helpers import ROOT, command, write_json


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


def test_words_that_are_no_utf8_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    bad = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    end = ("--images", tmp_path, "--split", "train", "--out", bad)
    assert "caf\\udce9': is not UTF-8 text" in one_line("coco", "--annotations", tmp_path / "none.json", *end)
    assert not os.path.exists(bad)
    assert "caf\\udce9': is not UTF-8 text" in one_line("tokenizer", "inspect", tmp_path, bad)


# Command lines, one after the other in one process, and the exit code of each.
ONE_BY_ONE = """
import json, sys
from preprocessing.__main__ import main
for words in json.loads(sys.argv[1]):
    print(main(words), flush=True)
"""


def test_folders_without_permission_are_one_line(tmp_path: Path) -> None:
    """Root may list any folder, unless it gives that power away."""
    locked = tmp_path / "locked"
    locked.mkdir(mode=0)
    run = [sys.executable, "-c", ONE_BY_ONE]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("runs as root, and setpriv is not there to give root's power away")
        run = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *run]
    (tmp_path / "x").write_text("1.jpg#0\tcaption\n")
    cases = (
        (
            ["img2dataset", "--images", locked, "--out", tmp_path / "out"],
            "locked: cannot be listed (Permission denied)",
        ),
        (["img2dataset", "--images", locked / "a", "--out", tmp_path / "out"], "--images"),
        (["img2dataset", "--images", tmp_path, "--out", locked / "out"], "--out"),
        (
            ["flickr30k", "--annotations", tmp_path / "x", "--images", locked, "--out", tmp_path / "out"],
            "cannot be list",
        ),
    )
    lines = [[*map(str, words), "--split", "train"] for words, _ in cases]
    done = subprocess.run(
        [*run, json.dumps(lines)], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert (done.returncode, done.stdout) == (0, "2\n" * len(cases)), done.stderr
    told = done.stderr.splitlines()
    assert len(told) == len(cases), done.stderr
    for line, (_, said) in zip(told, cases, strict=True):
        assert said in line and "Permission denied" in line


def test_preprocessing_does_not_import_torch() -> None:
    code = "import sys, preprocessing.__main__; sys.exit(bool({'torch', 'eve_ds'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
