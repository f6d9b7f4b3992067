"""``bench probe`` as users type it: a tiny world from raw files to the table; mistakes in one line; no DeepSpeed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.ranks import LIMIT, REPOSITORY
from tests.support.shapes import model_folder, shapes_world

WITHOUT_DEEPSPEED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
from eve_ds.bench.__main__ import main
from eve_ds.errors import run_command

run_command(main)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = shapes_world(tmp_path_factory.mktemp("world"))
    (folder / "run").mkdir()
    model_folder(folder / "run/model", folder, seed=5)
    return folder


def command(start: list[str], world: Path, *options: str) -> subprocess.CompletedProcess[str]:
    where = [f"--checkpoint={world / 'run'}", f"--data={world / 'data'}", f"--scenes={world / 'raw/annotations'}"]
    return subprocess.run(
        [sys.executable, *start, "probe", *where, "--threads=1", *options],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.mark.parametrize("start", [["-m", "eve_ds.bench"], ["-c", WITHOUT_DEEPSPEED]], ids=["typed", "no deepspeed"])
def test_the_whole_run(start: list[str], world: Path, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    ended = command(start, world, "--json", str(file))
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(file.read_text(encoding="utf-8"))
    table = ended.stdout.splitlines()[2:8]
    assert len(rows) == 6
    for line, row in zip(table, rows, strict=True):
        assert line.strip().startswith(row["probe"]) and f"{row['accuracy']:.3f}" in line.split()


def test_a_missing_scene_file_is_one_line(world: Path) -> None:
    ended = command(["-m", "eve_ds.bench"], world, f"--scenes={world}")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert f"{world}/scenes_train2014.json: cannot be read (No such file" in ended.stderr
