"""A small prepared data set of a task, and its scores by random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from eve_ds.config import FinetuneConfig
from eve_ds.engine import setup
from eve_ds.engine.scoring import Scorer
from eve_ds.engine.signals import StopRequest
from eve_ds.model.backbone import Backbone
from eve_ds.tasks import Task
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.vqa import VQA
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.__main__ import main
from tests.support.shards import image_of, tiny_tokenizer
from tests.support.tiny_tasks import tiny_config

LOST = 3  # the number of the image that is not there


def records(task: str) -> list[dict[str, Any]]:
    """Six images, or pairs of them, with two captions, questions or statements each."""
    made: list[dict[str, Any]] = []
    texts = [(i, text) for i in range(6) for text in (f"image {i} is red", f"a square in image {i}")]
    for i, text in texts:
        if task == "nlvr":
            pair = {"images": [f"{i}.png", "0.png"], "identifier": f"test1-{i}-0-{len(made) % 2}"}
            made.append(pair | {"sentence": text, "label": "True"})
        elif task == "vqa":
            made.append({"image": f"{i}.png", "question": text, "question_id": len(made), "answer": "yes"})
        else:
            made.append({"image": f"{i}.png", "caption": text})
    return made


def prepare(folder: Path, task: str, *options: str, lost: int | None = LOST) -> int:
    (folder / "images").mkdir(exist_ok=True)
    for i in range(6):
        if i != lost:
            (folder / f"images/{i}.png").write_bytes(image_of(i))
    if not (folder / "raw.json").exists():
        (folder / "raw.json").write_text(json.dumps(records(task)))
    (folder / "answers.json").write_text('["yes", "no"]')
    words = ["json", "--task", task, "--annotations", f"{folder}/raw.json", "--images", f"{folder}/images"]
    words += ["--split", "test", "--out", f"{folder}/data", "--answer-list", f"{folder}/answers.json"]
    return main([*words, *options])


def scorer(folder: Path, task: str, nan: str = "none", checkpoint: Path | None = None) -> tuple[Scorer, Task]:
    """With random weights, though it says that it scores ``checkpoint``; those named ``nan...`` are NaN."""
    config = FinetuneConfig()
    config.task = {"retrieval": "itr_coco"}.get(task, task)
    config.data.path, config.data.val_split = str(folder / "data"), "test"
    config.model = tiny_config()
    config.model.vocab_size = 512
    tokenizer = tiny_tokenizer()
    samples = setup.build_dataset(config, "test", tokenizer, train=False)
    backbone = Backbone(config.model)
    tasks = {"nlvr": NLVR, "vqa": lambda backbone: VQA(backbone, 2), "retrieval": Retrieval}
    made: Task = tasks[task](backbone).eval()
    for name, parameter in made.named_parameters():
        if name.startswith(nan):
            parameter.data.fill_(torch.nan)
    files = None
    if checkpoint is not None:
        config.init_from, config.evaluate = str(checkpoint), True
        files = ModelFolder.find(checkpoint)
    return Scorer(config, {"test": samples}, torch.device("cpu"), StopRequest(), files), made


def score(folder: Path, task: str, out: Path, nan: str = "none") -> None:
    ours, made = scorer(folder, task, nan)
    out.mkdir(exist_ok=True)
    ours.score(made, "test", out)
