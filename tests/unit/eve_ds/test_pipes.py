"""Pipes and devices where training expects files: refused by name, not waited at; files outside of a checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed
import pytest

from eve_ds.config import PretrainConfig, parse
from eve_ds.config_sections import EngineConfig, OptimizerConfig
from eve_ds.data.mapping import MappedFile
from eve_ds.engine.checkpoint_record import Manifest, Topology
from eve_ds.engine.deepspeed_config import load_deepspeed_config
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import read_yaml
from eve_ds.tasks.vqa import read_answer_list
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import UserError

READERS: dict[str, Callable[[Path], object]] = {
    "recipe.yaml": read_yaml,
    "vlmo.json": ModelConfig.from_vlmo,
    "deepspeed.json": lambda path: load_deepspeed_config(f"{path}", EngineConfig(), OptimizerConfig(), 1),
    "answer_list.json": lambda path: read_answer_list(path.parent),
    "shard.arrow": lambda path: MappedFile(path, 0),
    "complete.json": lambda path: Manifest.read(path.parent),
    "checkpoints/step_1/complete.json": lambda path: ModelFolder.find(path.parents[2], unfinished=True),
    "config.yaml": lambda path: parse(PretrainConfig, ["--config", f"{path}"], "eve"),
}


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    signal.alarm(60)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("name", READERS)
def test_pipes_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a pipe, a socket or a device; write its content to a file"):
        READERS[name](tmp_path / name)


@pytest.mark.parametrize("name", ["../other.pt", "/etc/hostname", "a/../../b.pt", ""])
def test_a_checkpoint_names_only_its_own_files(tmp_path: Path, name: str) -> None:
    manifest = Manifest(1, Topology(1, 1, 1), {}, deepspeed.__version__, {}, {name: (1, "0")})
    manifest.write(tmp_path)
    with pytest.raises(UserError, match=r"complete\.json names a file outside of the checkpoint"):
        Manifest.read(tmp_path)
