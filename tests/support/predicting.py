"""Tiny exported models of every fine-tuning task, whose tokenizer and weights go together, and image files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from eve_ds.model.backbone import Backbone
from preprocessing.local_files import dump_json, write_atomic
from preprocessing.shards.schema import ANSWER_LIST
from tests.support.model_folder import write_model_folder
from tests.support.shards import image_of
from tests.support.tiny_tasks import NUM_ANSWERS, TASKS, tiny_config

ANSWERS = ["yes", "no", "red", "green", "blue", "yellow", "two words"]
assert len(ANSWERS) == NUM_ANSWERS


def exported(folder: Path, task: str, seed: int = 0) -> Path:
    """A model folder of a task of ``tiny_tasks``, with weights large enough for outputs that differ. Returns it."""
    torch.manual_seed(seed)
    made = TASKS[task](Backbone(replace(tiny_config(), vocab_size=400)))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    if task == "vqa":
        write_atomic(folder / ANSWER_LIST, dump_json(ANSWERS))
    return write_model_folder(folder, made)


def image_files(folder: Path, count: int, first: int = 0) -> list[str]:
    """Image files, of several sizes. Returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"image_{first + i:04d}.png" for i in range(count)]
    for number, path in enumerate(paths, first):
        path.write_bytes(image_of(number, 32 + 8 * (number % 3)))
    return [str(path) for path in paths]
