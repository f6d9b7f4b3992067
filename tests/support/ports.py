"""TCP ports for what a test starts."""

from __future__ import annotations

import random
import socket

# Below those that the kernel gives to connections, one of which could have it before its user comes. None is handed out
# twice, and processes of tests that run at once begin elsewhere.
_candidates = iter(random.SystemRandom().sample(range(20011, 32000), 32000 - 20011))


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
