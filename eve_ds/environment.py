"""A process and its environment: what its launcher set, what DeepSpeed and torch read, and the threads, GPU and ports
of a rank. Imports the standard library and preprocessing.errors only."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import ipaddress
import logging
import math
import os
import random
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from preprocessing.errors import UserError

RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")  # torchrun's and deepspeed's, mpirun's, srun's
_log = logging.getLogger(__name__)
# How many ranks the launcher started on this host: torchrun, deepspeed, mpirun, srun (of the step, then of the job).
LOCAL_WORLD_SIZE = (
    "LOCAL_WORLD_SIZE",
    "LOCAL_SIZE",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "SLURM_STEP_TASKS_PER_NODE",
    "SLURM_NTASKS_PER_NODE",
)
# Below the ports of launchers and launch/slurm, and below those that the kernel gives to connections: a connection
# could take one of these before the ranks meet.
PORTS = range(12000, 20000)


def launcher_values(names: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The values of those variables of ``names`` that a launcher set for this process, in the same order.

    Slurm also sets its variables in a batch script, which srun did not start. Only with SLURM_STEP_ID do they count.
    """
    in_step = "SLURM_STEP_ID" in environment
    return [environment[name] for name in names if name in environment and (in_step or not name.startswith("SLURM_"))]


def launched_rank() -> int:
    """The rank that the launcher gave this process; 0 if it was started by hand."""
    return int(next(iter(launcher_values(RANK, os.environ)), 0))


def extensions_folder() -> Path:
    """The folder of this Python environment's compiled operations: TORCH_EXTENSIONS_DIR if set, else one of our own.

    In a checkout that is ``.torch_extensions``; an installed package uses the user's cache, because its own folder may
    be shared or read-only. Each environment has a subfolder: ninja rebuilds an operation, without a message, whenever
    the path of Python or torch changes.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    versions = f"python {sys.version.split()[0]}, torch {version('torch')}, deepspeed {version('deepspeed')}"
    digest = hashlib.sha256(f"{versions}, {sys.prefix}".encode()).hexdigest()[:8]
    checkout = Path(__file__).resolve().parents[1]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = checkout if (checkout / "pyproject.toml").is_file() else cache / "eve-ds"
    return folder / ".torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}-{digest}"


def version(package: str) -> str:
    """The installed version of ``package``, or "absent"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def prepare_environment() -> None:
    """Set the variables that DeepSpeed and torch read. Call it before deepspeed is imported and before the first tensor
    is made. A second call changes nothing.

    - TORCH_EXTENSIONS_DIR: the folder of compiled operations (``extensions_folder``). A value that is set is kept.
    - TORCH_FORCE_WEIGHTS_ONLY_LOAD=1: DeepSpeed calls torch.load with ``weights_only=False``, which can run code from
      the file; this forbids it. TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is removed with a message on stderr, because torch
      loads nothing when both are set.
    - DS_ACCELERATOR=cpu with a CPU build of torch: DeepSpeed then does not search for one and warn that it found none.
    - THP_MEM_ALLOC_ENABLE=1: torch allocates large CPU tensors in huge pages. Page faults on fresh memory cost more
      than elementwise arithmetic (measured: SiLU on 140 MB takes 77 ms with small pages, 36 ms with huge ones).
    - PATH: this environment's bin first, so that its ninja is found. Another version rebuilds compiled operations.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", ""):
        _log.warning("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is ignored: weights are loaded without running code")
    if version("torch").endswith("+cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    programs = str(Path(sys.prefix) / "bin")
    path = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry != programs]
    os.environ["PATH"] = os.pathsep.join([programs, *path])


@contextlib.contextmanager
def late_imports() -> Iterator[None]:
    """Context for the imports of a training: ``prepare_environment``, and no garbage collection.

    Imports make 400,000 objects, and most of them stay. The collector goes through them again and again: measured, 0.2
    of the 0.6 s that DeepSpeed and our own modules take after torch. Later collections leave them out (``gc.freeze``).
    """
    prepare_environment()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def prepare_nccl(seconds: float) -> None:
    """Set what torch's NCCL group reads, so that it leaves the end of a run to us. What is set already is kept. Call it
    before the group is made.

    A thread of torch's checks NCCL's collectives, and another one that thread; both end the process by SIGABRT, after
    pages of output.

    - TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC: of the second thread, 480 by default, which is before our watchdog's line. It
      stays as the last resort.
    - TORCH_NCCL_RETHROW_CUDA_ERRORS=0: the first thread, which meets an error of CUDA within 0.1 s, does not end the
      process; the main thread meets the same error at its next call and says it in a line.
    - TORCH_NCCL_DUMP_ON_TIMEOUT=0: no file in /tmp of each rank's last collectives, and no question each second to rank
      0's store, which fails with a page each once rank 0 has ended.
    - TORCH_NCCL_LOG_CPP_STACK_ON_UNCLEAN_SHUTDOWN=0: no stacks of C++ from the last resort.

    Args:
        seconds: timeout of collectives, above that of the watchdog.
    """
    os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(math.ceil(seconds)))
    for name in ("RETHROW_CUDA_ERRORS", "DUMP_ON_TIMEOUT", "LOG_CPP_STACK_ON_UNCLEAN_SHUTDOWN"):
        os.environ.setdefault(f"TORCH_NCCL_{name}", "0")


def compute_threads(cores: int, world_size: int, environment: Mapping[str, str]) -> int:
    """Compute threads of torch on this rank: OMP_NUM_THREADS, or the rank's share of the host's cores.

    Never more than ``cores``, the number that the process may run on.
    """
    if asked := re.match(r"\d+", environment.get("OMP_NUM_THREADS", "")):
        return max(1, min(int(asked[0]), cores))
    return max(1, cores // max(1, local_world_size(environment) or world_size))


def device_ordinal(local_rank: int, visible: int, environment: Mapping[str, str]) -> int:
    """The index of this rank's GPU among the ``visible`` ones.

    If the scheduler gives each task its own GPU (``--gpus-per-task=1``), every rank sees one, with index 0.

    Raises:
        UserError: the host has more ranks than GPUs.
    """
    if visible == 1 and "CUDA_VISIBLE_DEVICES" in environment:
        return 0
    if local_rank >= visible:
        raise UserError(
            f"rank {local_rank} of this host has no GPU: {visible} are visible here; start one rank for each GPU"
        )
    return local_rank


def local_world_size(environment: Mapping[str, str]) -> int | None:
    """Ranks on this host; None if the launcher does not say."""
    counts = (re.match(r"\d+", value) for value in launcher_values(LOCAL_WORLD_SIZE, environment))  # Slurm: "8(x2)"
    return next((int(found[0]) for found in counts if found), None)


def listen_where_others_reach(master_address: str) -> str | None:
    """Make gloo listen on the interface that leads to the other hosts. Call it if ranks run on several hosts.

    gloo listens at the address of the host's own name. By Debian's defaults that is 127.0.1.1, which no other host can
    reach. Nothing changes if GLOO_SOCKET_IFNAME is set, if the host's name has an address that others reach, or if
    MASTER_ADDR is a loopback address.

    Returns:
        the interface, if one had to be chosen.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or not _is_loopback(socket.gethostname(), unknown=True):
        return None
    if _is_address(master_address) and _is_loopback(master_address):
        return None  # several "hosts" on one machine
    # On rank 0's own host, MASTER_ADDR may resolve to 127.0.1.1, too. Then take the interface of the default route.
    meets_here = _is_loopback(master_address)
    name = _default_interface() if meets_here else _interface_towards(master_address)
    if name:
        os.environ["GLOO_SOCKET_IFNAME"] = name
    return name


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_loopback(host: str, unknown: bool = False) -> bool:
    """Whether ``host`` has a loopback address; ``unknown`` if it has no address (gloo then listens on loopback)."""
    try:
        return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_loopback
    except OSError:
        return unknown


def _interface_towards(host: str) -> str | None:
    """The interface that packets to ``host`` leave by. Nothing is sent."""
    try:
        family, _, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            own = probe.getsockname()[0]
    except OSError:
        return None
    import psutil  # a requirement of DeepSpeed

    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == own for address in addresses):
            return name
    return None


def _default_interface() -> str | None:
    """The interface of the default route, or the only one that has a route."""
    routes = [line.split() for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]]
    names = [fields[0] for fields in routes if fields[1] == "00000000"] or sorted({fields[0] for fields in routes})
    return names[0] if len(names) == 1 else None


def free_port() -> int:
    """A free port of ``PORTS``. Raises UserError if there is none."""
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            return port
    raise UserError(f"no port from {PORTS[0]} to {PORTS[-1]} is free; set MASTER_ADDR and MASTER_PORT to one that is")
