"""Hardware, versions and kernels of this machine, and known problems: ``python -m eve_ds.doctor``.

It works with packages missing or broken: it imports the standard library only, and tries torch and the other libraries
in child processes. Exit codes: 0 no known problem; 1 at least one, each printed with its remedy; 2 bad usage.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import platform
import secrets
import sys
from pathlib import Path
from typing import Any

from evaluation.common import Parser, printable
from eve_ds.doctor import hardware, software
from eve_ds.doctor.known_faults import Facts, find_faults
from eve_ds.doctor.screen import screen
from eve_ds.environment import extensions_folder, prepare_environment

NAMED = ("torch", "deepspeed", "triton", "pyarrow", "apex", "mpi4py")
RANKS_PER_NODE = ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")


def main() -> None:
    parser = Parser(prog="python -m eve_ds.doctor", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="F", help="write all that was found to this file too")
    parser.add_argument("--ranks", type=int, metavar="N", help="ranks that will run here (default: one a GPU, or one)")
    options = parser.parse_args()
    if options.ranks is not None and options.ranks < 1:
        parser.error(f"--ranks {options.ranks}: at least 1 is needed")
    found = examine(options.ranks)
    try:
        print(screen(found), flush=True)
    except BrokenPipeError:  # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if options.json:
        try:
            write(options.json, json.dumps(found, indent=1) + "\n")
        except OSError as error:
            message = printable(f"error: --json {options.json}: {error.strerror}; choose another place")
            parser.exit(2, f"{message}\n")
    sys.exit(1 if found["faults"] else 0)


def examine(ranks: int | None = None) -> dict[str, Any]:
    """All findings, as written to JSON. Sizes are in bytes, speeds per second.

    Args:
        ranks: how many will run on this machine. None: as the launcher's variables say, else one per GPU, else one.
    """
    environ = dict(os.environ)  # as the user set it: prepare_environment changes it
    prepare_environment()
    packages = software.packages()
    side, torch_problem = software.torch_side(measure=True)
    cpu, memory, nvidia = hardware.cpu(), hardware.memory(), hardware.nvidia()
    operations = {name.removeprefix("operations."): side[name] for name in side if name.startswith("operations.")}
    torch = side.get("torch", {})
    pins = software.pins()
    facts = Facts(
        environ=environ,
        pins=pins,
        versions={name: software.version(name) for name in {*pins, *NAMED}},
        packages=packages,
        triton_wanted=software.triton_wanted(),
        torch=torch,
        torch_problem=torch_problem,
        operations=operations,
        nvidia=nvidia,
        memory=memory,
        cores=cpu["usable_cores"],
        ranks=ranks or ranks_here(environ, len(torch.get("devices", []))),
        extensions=extensions_folder(),
    )
    return {
        "versions": named_versions(facts),
        "cpu": cpu,
        "memory": memory,
        "torch": torch,
        "speeds": side.get("speeds", {}),
        "operations": operations,
        "notes": notes(facts),
        "faults": [dataclasses.asdict(fault) for fault in find_faults(facts)],
    }


def named_versions(facts: Facts) -> dict[str, str | None]:
    named = {"python": platform.python_version(), **{name: facts.versions[name] for name in NAMED}}
    if named["mpi4py"] and facts.packages["mpi4py"].detail:
        named["mpi4py"] = f"{named['mpi4py']} ({facts.packages['mpi4py'].detail.split(', ')[0]})"
    return named | {
        "NCCL": facts.torch.get("nccl"),
        "CUDA": facts.torch.get("cuda"),
        "nvcc": hardware.toolkit(),
        "driver": facts.nvidia.get("driver"),
    }


def ranks_here(environ: dict[str, str], gpus: int) -> int:
    """Ranks on this machine, from the launcher's variables, else one per GPU, else one."""
    set_by_launcher = next((environ[name] for name in RANKS_PER_NODE if name in environ), "")
    number = set_by_launcher.split("(")[0]  # Slurm writes 8(x2)
    return int(number) if number.isdigit() and int(number) else max(gpus, 1)


def notes(facts: Facts) -> list[str]:
    """Remarks that are no faults."""
    found = []
    mpi = facts.packages["mpi4py"]
    if mpi.problem:
        lack = "finds no MPI library" if "MPI library" in mpi.problem else f"does not load ({mpi.problem})"
        found.append(f"mpi4py {lack}: under mpirun, set MASTER_ADDR and MASTER_PORT, or apt-get install openmpi-bin")
    load = os.getloadavg()[0]
    if load > facts.cores / 2:
        found.append(f"load average {load:.1f} on {facts.cores} usable cores: the speeds are those of a busy machine")
    return found


def write(path: Path, text: str) -> None:
    """Write a file atomically. Unlike preprocessing.local_files.write_atomic it raises OSError, not UserError."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "is no regular file; name another one", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


if __name__ == "__main__":
    main()
