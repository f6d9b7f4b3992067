"""The doctor: each probe with its object missing, each known fault. tests/e2e/test_doctor.py has whole runs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from eve_ds.doctor import __main__ as doctor
from eve_ds.doctor import hardware, software
from eve_ds.doctor.known_faults import HURTFUL, Facts, find_faults
from eve_ds.doctor.screen import screen
from eve_ds.doctor.software import Package
from tests.support.healthy import HEALTHY


def test_no_ranks_is_a_mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--ranks", "0"])
    with pytest.raises(SystemExit) as stopped:
        doctor.main()
    assert stopped.value.code == 2 and "--ranks 0" in capsys.readouterr().err


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
    "Docker's /dev/shm": (
        {
            "memory": {"shm_bytes": 2**26, "shm_free_bytes": 2**26},
            "nvidia": TWO_GPUS,
            "torch": {"version": "2.13.0", "cuda": "13.0", "devices": ["H200", "H200"]},
        },
        "64 MiB",
        "--shm-size",
    ),
    "full /dev/shm": ({"memory": {"shm_bytes": 2**33, "shm_free_bytes": 2**20}}, "1 MiB free", "enlarge"),
    "no /dev/shm": ({"memory": {"shm_bytes": None}}, "not there", "mount"),
    "open files": ({"memory": HEALTHY["memory"] | {"open_files": 256}}, "only 256 open files", "ulimit -n"),
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
    def found(**environ: str) -> list[Any]:
        return find_faults(Facts(**HEALTHY | {"environ": {"PATH": "", "WANDB_MODE": "online"} | environ}))

    assert found(WANDB_API_KEY="made-up") == found(WANDB_MODE="offline") == []
    for host in ("api.wandb.ai", "api.forge.coreweave.com"):
        (tmp_path / ".netrc").write_text(f"machine {host} login user password made-up\n", encoding="utf-8")
        (tmp_path / ".netrc").chmod(0o600)
        assert found(HOME=str(tmp_path)) == []
        (fault,) = found(HOME=str(tmp_path), WANDB_BASE_URL="https://wandb.example.org:8080")
        assert "has no login for wandb.example.org)" in fault.found


def test_nothing_but_a_file_is_written_over(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="is no regular file"):
        doctor.write(tmp_path / "pipe", "")
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


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
