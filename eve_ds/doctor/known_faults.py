"""Settings and versions that are known to make a run fail, hang or slow down, each with its remedy."""

from __future__ import annotations

import netrc
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eve_ds.doctor.hardware import held_open
from eve_ds.doctor.software import Package, last_line, run

NCCL_SHM = 2**30  # what NCCL's documentation asks for in a container, where Docker's default is 64 MiB
LEAST_FREE_SHM = 2**24  # semaphores of loader workers
FEWEST_FILES = 1024
WANDB_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # names of one server: wandb 0.31's own, and the older one
OPTIONAL = ("mpi4py",)  # read only by ranks that mpirun started without MASTER_ADDR

# Variables that slow every step or take safety away, with the values that do.
HURTFUL = {
    "NCCL_P2P_DISABLE": (("1",), "GPUs of a node exchange data through host memory"),
    "NCCL_SHM_DISABLE": (("1",), "ranks of a node exchange data through the network"),
    "NCCL_IB_DISABLE": (("1",), "InfiniBand lies idle"),
    "NCCL_SOCKET_IFNAME": (("lo", "=lo"), "nodes cannot reach each other over the loopback interface"),
    "NCCL_DEBUG": (("INFO", "TRACE"), "each rank logs thousands of lines"),
    "CUDA_LAUNCH_BLOCKING": (("1",), "each kernel waits for the one before"),
    "TORCH_NCCL_BLOCKING_WAIT": (("1",), "collectives no longer overlap with computation"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": (("0",), "a failed collective hangs for ever"),
    "TORCH_DISTRIBUTED_DEBUG": (("DETAIL",), "each collective is checked by another one"),
}


@dataclass(frozen=True)
class Fault:
    """A known problem that this machine has.

    Attributes:
        found: what is wrong, with the values seen.
        mend: what to do.
    """

    found: str
    mend: str


@dataclass
class Facts:
    """What the probes found, and how many ranks the user wants to run here."""

    environ: Mapping[str, str]
    pins: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str | None] = field(default_factory=dict)
    packages: dict[str, Package] = field(default_factory=dict)
    triton_wanted: str | None = None
    torch: dict[str, Any] = field(default_factory=dict)
    torch_problem: str = ""
    operations: dict[str, Any] = field(default_factory=dict)
    nvidia: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int | None] = field(default_factory=dict)
    cores: int = 1
    ranks: int = 1
    extensions: Path = Path("/nonexistent")
    programs: Path = Path(sys.prefix) / "bin"
    shared_memory: Path = Path("/dev/shm")


def find_faults(facts: Facts) -> list[Fault]:
    """All faults, the most serious kinds first."""
    return [fault for check in CHECKS for fault in check(facts)]


def pinned_versions(facts: Facts) -> list[Fault]:
    found = []
    for name, pin in facts.pins.items():
        installed = facts.versions.get(name)
        if installed is None and name not in OPTIONAL:
            found.append(Fault(f"{name} is not installed", "pip install -r requirements.txt"))
        elif installed is not None and installed.split("+")[0] != pin:
            private = ": expert parallelism reaches into its private API" if name == "deepspeed" else ""
            found.append(Fault(f"{name} is {installed}, tested with {pin}{private}", f"pip install {name}=={pin}"))
    return found


def broken_packages(facts: Facts) -> list[Fault]:
    found = []
    if facts.torch_problem and facts.versions.get("torch"):
        mend = "pip install --force-reinstall torch==" + facts.pins.get("torch", "VERSION")
        found.append(Fault(f"torch does not work: {facts.torch_problem}", mend))
    for name, package in facts.packages.items():
        if package.problem and name == "torchvision":
            found.append(
                Fault(f"torchvision is of another build than torch: {package.problem}", "pip uninstall torchvision")
            )
        elif package.problem and name not in OPTIONAL:
            pin = facts.pins.get(name) or facts.triton_wanted if name == "triton" else facts.pins.get(name)
            again = f"{name}=={pin}" if pin else name
            found.append(Fault(f"{name} does not load: {package.problem}", f"pip install --force-reinstall {again}"))
    triton = facts.versions.get("triton")
    if triton and facts.triton_wanted and triton != facts.triton_wanted:
        wanted = f"triton=={facts.triton_wanted}"
        found.append(Fault(f"triton is {triton}, torch wants {facts.triton_wanted}", f"pip install {wanted}"))
    return found


def unrelated_apex(facts: Facts) -> list[Fault]:
    alternatives = facts.operations.get("layer_norm", {}).get("alternatives", [])
    return [Fault(a["reason"], a["how"]) for a in alternatives if "web toolkit" in a["reason"]]


def gpu_without_torch(facts: Facts) -> list[Fault]:
    if not facts.nvidia or not facts.torch or facts.torch["devices"]:
        return []
    gpus = f"{len(facts.nvidia['gpus'])} x {facts.nvidia['gpus'][0]}"
    if facts.torch["cuda"] is None:
        pin = facts.pins.get("torch", "VERSION")
        index = f"pip install --force-reinstall torch=={pin} --index-url https://pypi.org/simple"
        return [Fault(f"{gpus} are here, but torch is a CPU build ({facts.torch['version']})", index)]
    if facts.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [Fault(f"{gpus} are here, but CUDA_VISIBLE_DEVICES hides them", "unset CUDA_VISIBLE_DEVICES")]
    built = f"torch is built for CUDA {facts.torch['cuda']}, driver {facts.nvidia['driver']}"
    return [Fault(f"{gpus} are here, but torch cannot use them: {built}", "install a driver for that CUDA version")]


def two_ninjas(facts: Facts) -> list[Fault]:
    """A compiled operation is rebuilt whenever the first ninja on PATH is another version.

    No fault if this environment's own comes first: EVE-DS puts it there itself (eve_ds/environment.py).
    """
    found: dict[str, str] = {}  # version: first place
    for folder in facts.environ.get("PATH", os.defpath).split(os.pathsep):
        program = shutil.which("ninja", path=folder) if folder else None
        if program:
            code, output, _ = run([program, "--version"], 30)
            found.setdefault(output.strip() if code == 0 else "of no version", program)
    if len(found) < 2 or next(iter(found.values())) == str(facts.programs / "ninja"):
        return []
    listed = ", ".join(f"{program} ({version})" for version, program in found.items())
    mend = f"remove all but one, or export PATH={facts.programs}:$PATH in each shell that starts DeepSpeed"
    return [Fault(f"two versions of ninja on PATH rebuild each other's work: {listed}", mend)]


def left_locks(facts: Facts) -> list[Fault]:
    """Locks of killed builds: every later run waits for such a lock, without a message."""
    return [
        Fault(f"{lock} was left by a killed build; runs that need it hang", f"rm {lock}")
        for lock in sorted(facts.extensions.glob("*/lock"))
        if not held_open(lock)
    ]


def hurtful_variables(facts: Facts) -> list[Fault]:
    found = []
    for name, (values, harm) in HURTFUL.items():
        value = facts.environ.get(name)
        if value is not None and value.upper() in [v.upper() for v in values]:
            found.append(Fault(f"{name}={value}: {harm}", f"unset {name}"))
    wanted = facts.environ.get("DS_ACCELERATOR")
    if wanted == "cuda" and facts.torch and not facts.torch["devices"]:
        found.append(Fault("DS_ACCELERATOR=cuda, but torch sees no GPU", "unset DS_ACCELERATOR"))
    return found


def too_many_threads(facts: Facts) -> list[Fault]:
    text = facts.environ.get("OMP_NUM_THREADS", "")
    first = text.split(",")[0].strip()
    if not text:
        return []
    if not first.isdigit() or int(first) < 1:
        return [Fault(f"OMP_NUM_THREADS={text} is no number of threads", "unset OMP_NUM_THREADS")]
    if int(first) * facts.ranks <= facts.cores:
        return []
    most = max(1, facts.cores // facts.ranks)
    found = f"OMP_NUM_THREADS={text} x {facts.ranks} ranks on {facts.cores} usable cores"
    if facts.ranks > facts.cores:
        return [Fault(f"{found}: more ranks than cores", f"start at most {facts.cores} ranks, one thread each")]
    return [Fault(f"{found}: they take each other's time", f"export OMP_NUM_THREADS={most}, or unset it")]


def small_limits(facts: Facts) -> list[Fault]:
    found = []
    total, free = facts.memory.get("shm_bytes"), facts.memory.get("shm_free_bytes")
    if total is None:
        found.append(Fault(f"{facts.shared_memory} is not there", "mount a tmpfs there: loader workers need it"))
    elif total < NCCL_SHM and facts.nvidia:
        mend = "start the container with --shm-size=8g or --ipc=host"
        found.append(Fault(f"{facts.shared_memory} has {total / 2**20:.0f} MiB: NCCL needs more", mend))
    elif free is not None and free < LEAST_FREE_SHM:
        held = f"{facts.shared_memory} has {free / 2**20:.0f} MiB free: loader workers need more"
        found.append(Fault(held, "remove the files in it that no process uses, or enlarge it"))
    files = facts.memory.get("open_files")
    if files is not None and 0 <= files < FEWEST_FILES:
        found.append(Fault(f"only {files} open files are allowed", f"ulimit -n {FEWEST_FILES * 16}"))
    return found


def wandb_without_login(facts: Facts) -> list[Fault]:
    """Online mode without a key: wandb gives up after a minute, and the curves of the run are lost."""
    if facts.environ.get("WANDB_MODE") != "online" or facts.environ.get("WANDB_API_KEY"):
        return []
    path = Path(facts.environ.get("NETRC") or Path(facts.environ.get("HOME", "~")).expanduser() / ".netrc")
    own = facts.environ.get("WANDB_BASE_URL", "").split("//")[-1].split("/")[0].split(":")[0]
    hosts = (own,) if own else WANDB_HOSTS
    try:
        if any(netrc.netrc(path).authenticators(host) for host in hosts):
            return []
        reason = f"{path} has no login for {' or '.join(hosts)}"
    except (OSError, netrc.NetrcParseError) as error:
        reason = last_line(str(error)) or str(path)
    mend = "wandb login, or export WANDB_MODE=offline and `wandb sync` later"
    return [Fault(f"WANDB_MODE=online without WANDB_API_KEY ({reason})", mend)]


CHECKS: tuple[Callable[[Facts], list[Fault]], ...] = (
    pinned_versions,
    broken_packages,
    unrelated_apex,
    gpu_without_torch,
    left_locks,
    two_ninjas,
    hurtful_variables,
    too_many_threads,
    small_limits,
    wandb_without_login,
)
