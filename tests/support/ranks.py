"""Start an entry point as several ranks, as a launcher would: one process each, environment variables, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.support.ports import free_ports

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 480  # seconds; a hang, not a slow machine


def start(module: str, arguments: list[str], world_size: int, last: Sequence[str] = ()) -> list[subprocess.Popen[str]]:
    """Ranks 0 .. world_size-1 of ``python -m module arguments``, output joined with errors.

    ``last``: a command that starts the last rank, which is given the rank's own as arguments.
    """
    port = free_ports(1)[0]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    shared |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    return [
        subprocess.Popen(
            [*(last if rank == world_size - 1 else ()), sys.executable, "-m", module, *arguments],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(ranks: list[subprocess.Popen[str]]) -> tuple[list[int], str]:
    """Wait for all ranks; when rank 0 fails, end the others, as launchers do.

    Returns their exit codes and what they printed, rank after rank.
    """
    try:
        outputs = [ranks[0].communicate(timeout=LIMIT)[0]]
        if ranks[0].returncode:
            for rank in ranks[1:]:
                rank.terminate()
        outputs += [rank.communicate(timeout=LIMIT)[0] for rank in ranks[1:]]
    finally:
        for rank in ranks:
            rank.kill()
    return [rank.returncode for rank in ranks], "".join(outputs)


def run(module: str, arguments: list[str], world_size: int = 2) -> str:
    """Start, wait, and insist on exit code 0; returns the output."""
    codes, output = finish(start(module, arguments, world_size))
    assert codes == [0] * world_size, f"{module}: exit codes {codes}\n{output}"
    return output
