"""TCP ports for what a test starts."""

from __future__ import annotations

import os
import random
import socket

# Below those that the kernel gives to connections, one of which could have it before its user comes. None is handed out
# twice: pytest-xdist's workers, which run tests at once, have ports of their own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = range(20011 + _WORKER, 32000, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
_candidates = iter(random.SystemRandom().sample(_PORTS, len(_PORTS)))


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on and that no other caller has got."""
    return [next(port for port in _candidates if _is_free(port)) for _ in range(count)]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
        return True
