"""Which implementation of a fused operation runs, and why not the others, for ``python -m eve_ds.doctor``."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Alternative:
    """One implementation of an operation.

    Attributes:
        name: for display.
        available: whether it can run on this machine, with what is installed.
        reason: why it is or is not, in a few words.
        how: how to install it; "" if it is available or cannot be made so.
    """

    name: str
    available: bool
    reason: str
    how: str = ""


@dataclass(frozen=True)
class Choice:
    """An operation and its implementations, in order of preference; the last, in plain PyTorch, is always available."""

    operation: str
    alternatives: tuple[Alternative, ...]

    @property
    def live(self) -> Alternative:
        """The first available one, which runs."""
        return next(alternative for alternative in self.alternatives if alternative.available)


@functools.cache
def triton_state() -> tuple[bool, str, str]:
    """(whether Triton kernels can be compiled or interpreted here, the reason, how to install what is missing).

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


def triton_serves(tensor: Tensor) -> bool:
    """Whether Triton kernels run on this tensor's device."""
    return (tensor.is_cuda or (tensor.device.type == "cpu" and triton_is_interpreted())) and triton_state()[0]


def triton_choice(operation: str, device: torch.device) -> Choice:
    """An operation that a Triton kernel serves on CUDA, plain PyTorch elsewhere."""
    available, reason, how = triton_state()
    if available and device.type != "cuda" and not triton_is_interpreted():
        available, reason, how = False, "for CUDA tensors", ""
    return Choice(
        operation, (Alternative("Triton", available, reason, how), Alternative("plain torch", True, "always runs"))
    )
