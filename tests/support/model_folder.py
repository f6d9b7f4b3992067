"""A model folder as a run exports it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import yaml

from eve_ds.tasks import Task
from eve_ds.weights.model_folder import CONFIG, HASHED, WEIGHTS, metadata, write_hashes
from eve_ds.weights.save import write_weights
from tests.support.shards import tiny_tokenizer


def write_model_folder(folder: Path, task: Task) -> Path:
    """Write ``task`` with its config, a tiny tokenizer and hashes. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder / WEIGHTS, {name: value.detach() for name, value in task.state_dict().items()}, metadata())
    (folder / CONFIG).write_text(yaml.safe_dump({"model": dataclasses.asdict(task.config), "data": {}}))
    tiny_tokenizer(folder)
    write_hashes(folder, HASHED)
    return folder
