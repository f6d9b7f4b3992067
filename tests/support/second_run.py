"""A run with a second place: its folder, its config, and what a module logs meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from eve_ds.config import PretrainConfig
from eve_ds.engine.identity import Identity

ANY = Identity({}, {})
LIMIT = 120.0  # seconds; a hang


def make_run(folder: Path) -> Path:
    """The files of a run that has no checkpoint yet, a hidden one among them."""
    (folder / "provenance").mkdir(parents=True)
    (folder / "provenance" / "start_1.json").write_text("{}\n")
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    (folder / ".lock").write_text("")
    return folder


def ignore(_: int) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def told(level: str, module: ModuleType) -> Iterator[list[str]]:
    """What the module logs at that level."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module._log, level, lambda text, *values: lines.append(text % values))
        yield lines


def config_of(run: Path, uri: str) -> PretrainConfig:
    config = PretrainConfig(output_dir=str(run))
    config.checkpoint.second_place = uri
    return config
