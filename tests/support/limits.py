"""Limits of this process, lowered for a while."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def few_descriptors(spare: int = 0) -> Iterator[None]:
    """So many files can be opened, and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (_lowest_free(spare + 1), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _lowest_free(number: int) -> int:
    """The descriptor that a process gets which opens so many files."""
    opened = [os.dup(0) for _ in range(number)]
    for descriptor in opened:
        os.close(descriptor)
    return max(opened)
