"""What a start records of the code and the machine, whatever state the checkout is in."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from eve_ds.callbacks import start_record
from eve_ds.engine import run_folder
from eve_ds.weights.model_folder import starts

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
    assert start_record.code(checkout) == {"commit": commit, "branch": "trunk", "dirty": False, "untracked": []}


def test_changes_are_recorded_without_passwords_and_new_files_by_name(checkout: Path) -> None:
    (checkout / "model.py").write_text("depth = 24\npath = 's3://me:sEcReT@bucket/data'\n")
    (checkout / "notes.txt").write_text("private")
    found = start_record.code(checkout)
    assert found["dirty"] and found["untracked"] == ["notes.txt"] and not found["diff_is_cut"]
    assert "-depth = 12\n+depth = 24\n+path = 's3://***@bucket/data'" in found["diff"]
    assert "private" not in found["diff"]
    git(checkout, "add", "notes.txt")  # now tracked, but not committed
    assert "+private" in start_record.code(checkout)["diff"]


def test_a_renamed_file_is_a_change_and_of_many_new_ones_some_are_named(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(checkout, "mv", "model.py", "net.py")
    for name in "abc":
        (checkout / name).write_text("")
    monkeypatch.setattr(start_record, "MAX_NAMES", 2)
    found = start_record.code(checkout)
    assert found["dirty"] and "rename from model.py" in found["diff"] and found["untracked"] == ["a", "b"]


def test_a_large_diff_is_cut_at_a_line(checkout: Path) -> None:
    (checkout / "model.py").write_text("s3://me:sEcReT@bucket/data\n" * 50_000)
    found = start_record.code(checkout)
    assert found["diff_is_cut"] and len(found["diff"]) < start_record.MAX_DIFF
    assert found["diff"].endswith("+s3://***@bucket/data") and "sEcReT" not in found["diff"]


def test_an_installed_package_within_another_checkout_is_not_that_checkout(checkout: Path) -> None:
    (checkout / "site-packages").mkdir()
    assert start_record.code(checkout / "site-packages") == {}


def test_without_git_or_with_a_broken_one_the_run_starts(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "git"
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert start_record.code(checkout) == {}
    for script, words in (
        ("echo fatal: dubious ownership >&2; exit 128", "fatal: dubious ownership"),
        ("exec /bin/sleep 60", "git status took longer than 0.2 s"),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(start_record, "GIT_SECONDS", 0.2)
        assert start_record.code(checkout) == {}
        assert f"the state of the checkout {checkout} is not recorded: {words}" in caplog.text
    assert len(caplog.records) == 3


def test_versions_are_those_that_are_imported() -> None:
    found = start_record.versions()
    for name in ("torch", "deepspeed", "numpy", "pyarrow", "tokenizers", "pyyaml", "eve-ds"):
        try:
            expected = metadata.version(name)
        except metadata.PackageNotFoundError:  # eve-ds, where the code runs from a checkout
            assert name == "eve-ds" and name not in found
        else:
            assert found[name] == expected


def test_of_a_package_that_is_there_twice_the_one_that_is_imported_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/my_pack-1.dist-info", "b/My.Pack-2.dist-info", "b/other-3.egg-info", "b/editable.egg-info"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert start_record.versions().keys() == {"python", "my-pack", "other"}
    assert start_record.versions().items() >= {("my-pack", "1"), ("other", "3")}


def test_a_record_tells_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "s3://me:sEcReT@bucket/data"
    monkeypatch.setattr(start_record, "code", lambda root: {})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "eve_ds.pretrain", f"--data.path={address}"])
    for name in ("RANK_OF_KEYS", "MY_NCCL_KEY", "SLURM_JWT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2" if name == "WORLD_SIZE" else "sEcReT")
    tree = dataclasses.make_dataclass("Tree", ["data", "engine"])
    trainer = SimpleNamespace(
        config=tree({"path": address, "all": [address, 0.5, None], "file": Path("x")}, {"seed": 3}),
        engine=SimpleNamespace(config={"nvme_path": address}),
        identity=SimpleNamespace(tree=lambda: {"inputs": {}}),
        topology=tree(1, 2),
        start_step=4,
        total_steps=9,
    )
    found = start_record.start_record(trainer, [])  # type: ignore[arg-type]
    assert "sEcReT" not in json.dumps(found)
    assert found["command"].endswith("--data.path=s3://***@bucket/data")
    assert found["variables"]["WORLD_SIZE"] == "2" and found["seeds"] == {"engine": 3}
    safe = "s3://***@bucket/data"
    assert found["config"]["data"] == {"path": safe, "all": [safe, 0.5, None], "file": "x"}


def test_each_start_has_a_file_of_its_own_and_makes_no_run_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    for number in (1, 2):
        path = start_record.next_file(tmp_path)
        assert path == tmp_path / "provenance" / f"start_{number:04d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(number))
    assert not run_folder.holds_run(tmp_path)  # its start failed before the first step
    (tmp_path / "provenance" / "start_10000.json").write_text("")
    (tmp_path / "provenance" / "start_of_mine.json").write_text("")
    assert [path.stem for path in starts(tmp_path)] == ["start_0001", "start_0002", "start_10000"]
    assert start_record.next_file(tmp_path).stem == "start_10001"
