"""Which implementation of a fused operation runs, and why not the others: what ``python -m eve_ds.doctor`` prints."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Alternative:
    """One implementation of an operation.

    Attributes:
        name: as a person would call it.
        available: whether it can run on this machine, with what is installed.
        reason: why it is or is not, in a few words.
        how: how to get it; "" if nothing needs to be done or can be.
    """

    name: str
    available: bool
    reason: str
    how: str = ""


@dataclass(frozen=True)
class Choice:
    """An operation and its implementations, the best one first and a plain one, which always runs, last."""

    operation: str
    alternatives: tuple[Alternative, ...]

    @property
    def live(self) -> Alternative:
        """The one that runs: the first that is available."""
        return next(alternative for alternative in self.alternatives if alternative.available)


@functools.cache
def triton_state() -> tuple[bool, str, str]:
    """(whether Triton kernels can be compiled or interpreted here, the reason, how to get there).

    Triton compiles a C stub for each kernel, hence the compiler (triton/runtime/build.py).
    """
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed", "pip install triton==3.7.1 (CUDA builds of torch 2.13.0 bring it)"
    if triton_is_interpreted():
        return True, "TRITON_INTERPRET=1: interpreted, for tests alone", ""
    if "CC" not in os.environ and shutil.which("gcc") is None and shutil.which("clang") is None:
        return False, "triton finds no C compiler", "apt-get install gcc, or set CC"
    return True, "triton is installed", ""


def triton_is_interpreted() -> bool:
    """Whether Triton runs kernels in Python on any device (it reads the variable when a kernel is defined)."""
    return os.environ.get("TRITON_INTERPRET") == "1"
