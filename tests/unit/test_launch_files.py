"""What is not Python: shell scripts and container recipes, by the linters of their kind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAMS = Path(sys.prefix) / "bin"
SHELL = ("launch/**/*.sh", "launch/slurm/*.sbatch", "docs/*.sh", ".ci/run")


def lint(program: str, *words: str | Path, text: str | None = None) -> None:
    told = subprocess.run([PROGRAMS / program, *words], input=text, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr


def test_shell_scripts(repository: Path) -> None:
    scripts = [path for pattern in SHELL for path in sorted(repository.glob(pattern))]
    assert len(scripts) >= 9
    lint("shellcheck", "--external-sources", f"--source-path={repository}", *scripts)


@pytest.mark.parametrize("name", ["pretrain", "finetune"])
@pytest.mark.parametrize("known", [{}, {"SLURM_SUBMIT_DIR": "/"}, {"SLURM_JOB_ID": "1"}], ids=str)
def test_a_batch_script_that_is_run_by_hand_says_sbatch(repository: Path, name: str, known: dict[str, str]) -> None:
    outside = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
    script = str(repository / "launch" / "slurm" / f"{name}.sbatch")
    told = subprocess.run(["bash", script], env=outside | known, capture_output=True, text=True, check=False)
    assert (told.returncode, told.stdout, told.stderr.count("\n")) == (2, "", 1)
    assert told.stderr.startswith(f"error: {script}: is a job for Slurm; submit it with sbatch, as in: sbatch ")


def test_dockerfile(repository: Path) -> None:
    lint("hadolint", repository / "launch" / "containers" / "Dockerfile")


@pytest.mark.parametrize("section", ["post", "environment"])
def test_apptainer_recipe(repository: Path, section: str) -> None:
    text = (repository / "launch" / "containers" / "eve-ds.def").read_text(encoding="utf-8")
    sections = dict(part.partition("\n")[::2] for part in text.split("\n%")[1:])
    assert list(sections) == ["files", "post", "environment"]
    lint("shellcheck", "--shell=sh", "-", text=sections[section])


def test_both_recipes_install_the_same(repository: Path) -> None:
    folder = repository / "launch" / "containers"
    packages = "python3 python3-dev python3-venv build-essential openmpi-bin"
    for name in ("Dockerfile", "eve-ds.def"):
        assert f"--no-install-recommends {packages}" in (folder / name).read_text(encoding="utf-8")
