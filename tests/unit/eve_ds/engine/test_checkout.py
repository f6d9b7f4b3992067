"""The state of the checkout that the code runs from, whatever it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from eve_ds import environment
from eve_ds.engine import checkout as state

IDENTITY = {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}


def git(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, **IDENTITY}
    done = subprocess.run(["git", "-C", str(folder), *arguments], env=environment, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q", "-b", "trunk")
    (folder / "model.py").write_text("depth = 12\n")
    git(folder, "add", "model.py")
    git(folder, "commit", "-q", "-m", "first")
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert state.code(checkout) == {"commit": commit, "branch": "trunk", "dirty": False, "untracked": []}


def test_changes_are_recorded_without_passwords_and_new_files_by_name(checkout: Path) -> None:
    (checkout / "model.py").write_text("depth = 24\npath = 's3://me:sEcReT@bucket/data'\n")
    (checkout / "notes.txt").write_text("private")
    found = state.code(checkout)
    assert found["dirty"] and found["untracked"] == ["notes.txt"] and not found["diff_is_cut"]
    assert "-depth = 12\n+depth = 24\n+path = 's3://***@bucket/data'" in found["diff"]
    assert "private" not in found["diff"]
    git(checkout, "add", "notes.txt")  # now tracked, but not committed
    assert "+private" in state.code(checkout)["diff"]


def test_a_renamed_file_is_a_change_and_of_many_new_ones_some_are_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(checkout, "mv", "model.py", "net.py")
    for name in "abc":
        (checkout / name).write_text("")
    monkeypatch.setattr(state, "MAX_NAMES", 2)
    found = state.code(checkout)
    assert found["dirty"] and "rename from model.py" in found["diff"] and found["untracked"] == ["a", "b"]


def test_a_large_diff_is_cut_at_a_line(checkout: Path) -> None:
    (checkout / "model.py").write_text("s3://me:sEcReT@bucket/data\n" * 50_000)
    found = state.code(checkout)
    assert found["diff_is_cut"] and len(found["diff"]) < state.MAX_DIFF
    assert found["diff"].endswith("+s3://***@bucket/data") and "sEcReT" not in found["diff"]


def test_an_installed_package_within_another_checkout_is_not_that_checkout(checkout: Path) -> None:
    (checkout / "site-packages").mkdir()
    assert state.code(checkout / "site-packages") == {}


def test_without_git_or_with_a_broken_one_the_run_starts(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "git"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert state.code(checkout) == {}
    for script, words in (
        ("echo fatal: dubious ownership >&2; exit 128", "fatal: dubious ownership"),
        ("exec /bin/sleep 60", "git status took longer than 0.2 s"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(state, "GIT_SECONDS", 0.2)
        assert state.code(checkout) == {}
        assert f"the state of the checkout {checkout} is not recorded: {words}" in caplog.text
    assert len(caplog.records) == 3


def test_the_version_is_that_of_the_checkout_or_of_the_installed_package(checkout: Path) -> None:
    (checkout / "pyproject.toml").write_text('[project]\nversion = "7.1"\n')
    assert state.own_version(checkout) == "7.1"
    assert state.own_version(checkout / "site-packages") == environment.version("eve-ds")
    (checkout / "pyproject.toml").write_text("[project")
    assert state.own_version(checkout) == environment.version("eve-ds")
