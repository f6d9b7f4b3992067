"""What a rank uses of its host: compute threads, a GPU, a port, and the network interface that gloo listens on."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import re
import socket
from collections.abc import Mapping
from pathlib import Path

from eve_ds.launcher_environment import launcher_values
from preprocessing.errors import UserError

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
    told = (re.match(r"\d+", value) for value in launcher_values(LOCAL_WORLD_SIZE, environment))  # Slurm: "8(x2)"
    return next((int(found[0]) for found in told if found), None)


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
