"""What holds for every test: one compute thread a process, compiled operations from the project's own folder."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from hypothesis import settings

from eve_ds.environment import prepare_environment

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share few cores; torch reads it when it is imported
os.environ.setdefault("WANDB_MODE", "offline")
prepare_environment()
settings.register_profile("eve-ds", deadline=None)  # how long a case takes says nothing on a busy machine
settings.load_profile("eve-ds")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What imports made stays: garbage collections while tests are collected find nothing, and later ones skip it."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout; commands in README are typed there."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def assets() -> Path:
    """Small golden files."""
    return Path(__file__).resolve().parent / "assets"
