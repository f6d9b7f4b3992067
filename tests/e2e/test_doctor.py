"""The doctor as it is typed: a whole run, one where nothing is installed, and one that finds broken libraries."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from eve_ds.doctor import __main__ as doctor
from eve_ds.doctor import software
from eve_ds.doctor.known_faults import Facts, find_faults
from tests.support.healthy import HEALTHY

KEYS = ["versions", "cpu", "memory", "torch", "speeds", "operations", "notes", "faults"]
SPEEDS = ["memory_copy_bytes_per_s", "matmul_bf16_flop_per_s", "matmul_fp32_flop_per_s"]


def run_doctor(python: str, folder: Path, repository: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [python, "-m", "eve_ds.doctor", "--json", str(folder / "doctor.json")],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stdout + done.stderr
    found = json.loads((folder / "doctor.json").read_text(encoding="utf-8"))
    assert list(found) == KEYS
    assert done.returncode == (1 if found["faults"] else 0)
    return done, found


@pytest.fixture(scope="module")
def whole_run(
    repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    return run_doctor(sys.executable, tmp_path_factory.mktemp("doctor"), repository)


def test_a_whole_run(whole_run: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    done, found = whole_run
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) < 50
    assert found["versions"]["deepspeed"] == "0.19.8"
    assert all(found["speeds"][name] > 1e6 for name in SPEEDS)
    kernels = {"permute", "grouped_mm", "group_activation", "layer_norm", "adam", "adam_offload"}
    assert set(found["operations"]) == kernels
    for operation in found["operations"].values():
        assert operation["operation"] in done.stdout and operation["live"] in done.stdout
        assert operation["live"] in [a["name"] for a in operation["alternatives"] if a["available"]]
    for fault in found["faults"]:
        assert fault["found"] in done.stdout and fault["mend"] in done.stdout


def test_where_nothing_is_installed(tmp_path: Path, repository: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=False, symlinks=True)
    done, found = run_doctor(str(tmp_path / "empty" / "bin" / "python"), tmp_path, repository)
    assert done.returncode == 1
    missing = [fault["found"] for fault in found["faults"]]
    for name in ("torch", "deepspeed", "pyarrow", "numpy"):
        assert f"{name} is not installed" in missing
    assert found["speeds"] == found["operations"] == found["torch"] == {}


def test_the_json_file_cannot_be_written(
    whole_run: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "examine", lambda ranks: whole_run[1])
    monkeypatch.setattr(sys, "argv", ["doctor", "--json", str(tmp_path / "file" / "doctor.json")])
    with pytest.raises(SystemExit) as stopped:
        doctor.main()
    errors = capsys.readouterr().err
    assert stopped.value.code == 2 and errors.count("\n") == 1 and "--json" in errors


BROKEN = {
    "deepspeed/__init__.py": "raise AttributeError('module torch has no attribute that was here before')",
    "triton/__init__.py": "raise SystemExit(3)",
    "pyarrow/__init__.py": "import os; os.abort()",
    "torch/__init__.py": "raise ImportError('libcudart.so.13: cannot open shared object file')",
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that child processes find first, and no MPI library."""
    for name, text in BROKEN.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text + "\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MPI4PY_LIBMPI", str(tmp_path / "libmpi.so"))


@pytest.mark.usefixtures("broken")
def test_libraries_that_do_not_load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    packages = software.packages()
    assert packages["deepspeed"].problem.startswith("AttributeError: module torch")
    assert packages["triton"].problem == "its import ended with exit code 3"
    assert packages["pyarrow"].problem  # "… exit code -6", or what a fault handler says
    assert "MPI library" in packages["mpi4py"].problem
    found, problem = software.torch_side(measure=False)
    assert found == {} and problem.startswith("ImportError: libcudart.so.13")
    facts = Facts(**HEALTHY | {"packages": packages, "torch_problem": problem})
    found_faults = [fault.found for fault in find_faults(facts)]
    assert len(found_faults) == 4  # all but mpi4py, which few runs need
    assert any("mpi4py finds no MPI library" in note for note in doctor.notes(facts))


def test_a_broken_deepspeed_costs_only_its_own_operations(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deepspeed.py").write_text("raise AttributeError('gone')\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(repository)
    found, problem = software.torch_side(measure=False)
    assert problem == "" and "AttributeError: gone" in found["operations.adam_offload"]["error"]
    assert found["operations.grouped_mm"]["live"] == "one product per expert" or found["torch"]["devices"]
