"""The doctor: a whole run, one where nothing is installed, each probe with its object missing, each known fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from eve_ds import doctor
from eve_ds.diagnosis import hardware, software
from eve_ds.diagnosis.faults import HURTFUL, Facts, find_faults
from eve_ds.diagnosis.software import Package
from eve_ds.diagnosis.text import screen

KEYS = ["versions", "cpu", "memory", "torch", "speeds", "operations", "notes", "faults"]
SPEEDS = ["memory_copy_bytes_per_s", "matmul_bf16_flop_per_s", "matmul_fp32_flop_per_s"]
HEALTHY: dict[str, Any] = {
    "environ": {"PATH": ""},
    "pins": {"torch": "2.13.0", "deepspeed": "0.19.8", "mpi4py": "4.1.2"},
    "versions": {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "mpi4py": None, "triton": None},
    "torch": {"version": "2.13.0+cpu", "cuda": None, "devices": []},
    "memory": {"shm_bytes": 2**33, "shm_free_bytes": 2**33, "open_files": 65536},
    "cores": 4,
}


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
    assert set(found["operations"]) == {"permute", "grouped_mm", "layer_norm", "adam", "adam_offload"}
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


def test_no_ranks_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--ranks", "0"])
    with pytest.raises(SystemExit) as stopped:
        doctor.main()
    assert stopped.value.code == 2 and "--ranks 0" in capsys.readouterr().err


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


def test_a_package_that_is_not_there() -> None:
    assert software.version("no-such-package-as-this") is None
    assert software.run(["no-such-program-as-this"], 5)[0] == 127
    assert software.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2)[0] == 124


def test_hardware_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPUINFO", "MEMINFO", "CPU_QUOTA", "SHARED_MEMORY"):
        monkeypatch.setattr(hardware, name, tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    cpu, memory = hardware.cpu(), hardware.memory()
    assert cpu["quota_cores"] is None and not any(cpu["features"].values())
    assert memory["total_bytes"] is memory["shm_bytes"] is None
    assert hardware.nvidia() == {} and hardware.toolkit() is None
    versions = dict.fromkeys(("NCCL", "CUDA", "nvcc", "driver"))
    empty: dict[str, Any] = {"torch": {}, "speeds": {}, "operations": {}, "notes": [], "faults": []}
    assert "unknown" in screen(empty | {"versions": versions, "cpu": cpu, "memory": memory})


def program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{text}'\n", encoding="utf-8")
    path.chmod(0o755)


def test_hardware_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: avx2 amx_bf16\n", encoding="utf-8"
    )
    (tmp_path / "cpu.max").write_text("150000 100000\n", encoding="utf-8")
    monkeypatch.setattr(hardware, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(hardware, "CPU_QUOTA", tmp_path / "cpu.max")
    cpu = hardware.cpu()
    assert cpu["model"] == "A CPU" and cpu["quota_cores"] == 1.5
    assert cpu["features"] == {"avx2": True, "avx512f": False, "avx512_bf16": False, "amx_bf16": True}
    program(tmp_path / "bin" / "nvidia-smi", "580.159.03, NVIDIA H200")
    program(tmp_path / "bin" / "nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert hardware.nvidia() == {"driver": "580.159.03", "gpus": ["NVIDIA H200"]}
    assert hardware.toolkit() == "13.0"


def test_a_healthy_machine_has_no_faults() -> None:
    assert find_faults(Facts(**HEALTHY)) == []


WEB_APEX = {"name": "Apex", "available": False, "reason": "PyPI's web toolkit", "how": "pip uninstall apex"}
TWO_GPUS = {"driver": "580.159.03", "gpus": ["H200", "H200"]}
FAULTY: dict[str, tuple[dict[str, Any], str, str]] = {
    "pin": ({"versions": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, "torch is 2.12.0", "torch==2.13.0"),
    "private API": ({"versions": {"torch": "2.13.0", "deepspeed": "0.20.0"}}, "private API", "deepspeed==0.19.8"),
    "missing": ({"versions": {"torch": "2.13.0"}}, "deepspeed is not installed", "requirements.txt"),
    "triton": (
        {"versions": HEALTHY["versions"] | {"triton": "3.6.0"}, "triton_wanted": "3.7.1"},
        "torch wants 3.7.1",
        "3.7.1",
    ),
    "torchvision": (
        {"packages": {"torchvision": Package("0.28", "RuntimeError: operator torchvision::nms does not exist")}},
        "another build",
        "pip uninstall torchvision",
    ),
    "apex": ({"operations": {"layer_norm": {"alternatives": [WEB_APEX]}}}, "web toolkit", "pip uninstall apex"),
    "CPU build": ({"nvidia": TWO_GPUS}, "2 x H200 are here, but torch is a CPU build", "pip install"),
    "old driver": (
        {"nvidia": TWO_GPUS, "torch": {"version": "2.13.0", "cuda": "13.0", "devices": []}},
        "cannot use them",
        "driver",
    ),
    "hidden GPUs": (
        {
            "nvidia": TWO_GPUS,
            "torch": {"version": "2.13.0", "cuda": "13.0", "devices": []},
            "environ": {"PATH": "", "CUDA_VISIBLE_DEVICES": ""},
        },
        "hides them",
        "unset",
    ),
    "threads": ({"environ": {"PATH": "", "OMP_NUM_THREADS": "4"}, "ranks": 2}, "4 x 2 ranks", "OMP_NUM_THREADS=2"),
    "ranks": ({"environ": {"PATH": "", "OMP_NUM_THREADS": "1"}, "ranks": 8}, "more ranks than cores", "at most 4"),
    "no number": ({"environ": {"PATH": "", "OMP_NUM_THREADS": "many"}}, "no number", "unset"),
    "Docker's /dev/shm": ({"memory": {"shm_bytes": 2**26, "shm_free_bytes": 2**26}}, "64 MiB", "--shm-size"),
    "full /dev/shm": ({"memory": {"shm_bytes": 2**33, "shm_free_bytes": 2**20}}, "1 MiB free", "allreduce_buffer"),
    "no /dev/shm": ({"memory": {"shm_bytes": None}}, "not there", "mount"),
    "open files": ({"memory": HEALTHY["memory"] | {"open_files": 256}}, "only 256 open files", "ulimit -n"),
    "pickles": ({"environ": {"PATH": "", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}}, "refuses to work", "unset"),
    "accelerator": ({"environ": {"PATH": "", "DS_ACCELERATOR": "cuda"}}, "sees no GPU", "unset"),
    "wandb": ({"environ": {"PATH": "", "WANDB_MODE": "online", "HOME": "/no"}}, "without WANDB_API_KEY", "wandb login"),
    **{
        name: ({"environ": {"PATH": "", name: values[0]}}, f"{name}={values[0]}", f"unset {name}")
        for name, (values, _) in HURTFUL.items()
    },
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_found_with_its_mend(name: str) -> None:
    changes, found, mend = FAULTY[name]
    faults = find_faults(Facts(**HEALTHY | changes))
    assert len(faults) == 1, faults
    assert found in faults[0].found and mend in faults[0].mend


def test_wandb_with_a_login(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password made-up\n", encoding="utf-8")
    (tmp_path / ".netrc").chmod(0o600)
    for environ in ({"WANDB_API_KEY": "made-up"}, {"HOME": str(tmp_path)}, {"WANDB_MODE": "offline"}):
        assert find_faults(Facts(**HEALTHY | {"environ": {"PATH": "", "WANDB_MODE": "online"} | environ})) == []


def test_two_ninjas(tmp_path: Path) -> None:
    program(tmp_path / "old" / "ninja", "1.11.1")
    program(tmp_path / "new" / "ninja", "1.13.2")

    def found(*folders: str, ours: str = "none") -> list[Any]:
        path = os.pathsep.join(str(tmp_path / folder) for folder in folders)
        return find_faults(Facts(**HEALTHY | {"environ": {"PATH": path}, "programs": tmp_path / ours}))

    assert "1.11.1" in found("old", "new")[0].found
    assert found("old", "old") == found("new") == found("missing") == []
    assert found("new", "old", ours="new") == []  # our commands put it first as well


def test_a_lock_that_a_killed_build_left(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    with lock.open("w", encoding="utf-8"):
        assert find_faults(Facts(**HEALTHY | {"extensions": tmp_path})) == []  # its builder is alive
    faults = find_faults(Facts(**HEALTHY | {"extensions": tmp_path}))
    assert len(faults) == 1 and faults[0].mend == f"rm {lock}"


@pytest.mark.parametrize(
    ("environ", "gpus", "ranks"),
    [({}, 0, 1), ({}, 4, 4), ({"LOCAL_WORLD_SIZE": "2"}, 4, 2), ({"SLURM_NTASKS_PER_NODE": "8(x2)"}, 0, 8)],
)
def test_ranks_on_this_machine(environ: dict[str, str], gpus: int, ranks: int) -> None:
    assert doctor.ranks_here(environ, gpus) == ranks


def test_pins_are_those_of_requirements() -> None:
    pins = software.pins()
    assert pins["torch"] == "2.13.0" and pins["deepspeed"] == "0.19.8" and "jsonargparse" in pins
