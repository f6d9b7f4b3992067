"""What both entry points build from the config: samples, batches, the task with its experts in place."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data.loader import build_loader
from eve_ds.data.samples import CaptionSamples, NlvrSamples, Samples, VqaSamples, read_answer_list
from eve_ds.data.transforms import build_transform
from eve_ds.engine.deepspeed_config import batch_shape
from eve_ds.engine.distributed import launched_world
from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
from eve_ds.errors import RankError, UserError
from eve_ds.model.backbone import Backbone
from eve_ds.tasks import NLVR, VQA, MaskedModelling, Retrieval, Task
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.schema import ANSWER_LIST, DataError
from preprocessing.tokenizer import Tokenizer

Config = PretrainConfig | FinetuneConfig
Batches = Iterator[dict[str, torch.Tensor]]


def tokenizer(config: Config) -> Tokenizer:
    """The tokenizer named in the config, or the one beside the weights that the run starts from."""
    path: str | Path | None = config.data.tokenizer
    if path is None and config.init_from:
        path = ModelFolder.find(config.init_from).tokenizer
    if path is None:
        raise UserError(
            "--data.tokenizer is missing; name the folder that `python -m preprocessing tokenizer train` wrote"
        )
    return Tokenizer.load(path)


def samples(config: Config, split: str, tokenizer: Tokenizer, train: bool) -> Samples:
    """The samples of a split of ``data.path``, of the kind that the task needs."""
    if not config.data.path:
        raise UserError(
            "--data.path is missing; name a prepared data set (preprocessing/README.md says how to make one)"
        )
    data, model = config.data, config.model
    scale = data.crop_scale if train else None
    transform = build_transform(model.image_size, train, data.augmentation, scale, data.flip, config.engine.seed)
    folder, arguments = Path(data.path) / split, (tokenizer, transform, model.max_text_length, model.vocab_size)
    task = getattr(config, "task", "pretrain")
    if task == "vqa":
        return VqaSamples(folder, *arguments, num_answers=len(read_answer_list(data.path)))
    return NlvrSamples(folder, *arguments) if task == "nlvr" else CaptionSamples(folder, *arguments)


def total_steps(config: Config, count: int) -> int:
    """Optimizer steps of the run: ``optimizer.total_steps``, or ``optimizer.epochs`` passes over ``count`` samples."""
    optimizer = config.optimizer
    if (optimizer.total_steps is None) == (optimizer.epochs is None):
        raise UserError("give one of optimizer.total_steps and optimizer.epochs, and leave the other null")
    if optimizer.total_steps is not None:
        steps = optimizer.total_steps
    else:
        steps = math.ceil(float(optimizer.epochs or 0) * count / config.engine.global_batch_size)
    if steps < 1:
        raise UserError(f"the run has {steps} steps; optimizer.total_steps and optimizer.epochs must be positive")
    return steps


def check_batch(config: Config, rows: int) -> None:
    """Raise UserError, before anything is joined, if the batch or the ranks do not fit the world or the data."""
    world_size = launched_world()[1]
    batch_shape(config.engine, world_size)
    workers = max(config.data.num_workers, 1)
    if world_size * workers > rows:
        raise UserError(
            f"{config.data.path}: {rows} rows are fewer than {world_size} ranks x {workers} workers; use fewer ranks, "
            "lower data.num_workers, or prepare more data"
        )


def training_batches(config: Config, samples: Samples, start_step: int) -> Batches:
    """This rank's micro-batches from optimizer step ``start_step`` on, without end."""
    start = start_step * config.engine.global_batch_size
    return _batches(config, samples, seed=config.engine.seed, start_sample=start)


def evaluation_batches(config: Config, samples: Samples, limit: int | None = None) -> Batches:
    """This rank's part of a split in order, each sample once (repeats that make ranks even have ``valid`` False)."""
    return _batches(config, samples, train=False, limit=limit)


def _batches(config: Config, samples: Samples, **options: Any) -> Batches:
    """A row that this rank alone reads is this rank's to complain of."""
    rank, world_size, _ = launched_world()
    micro, _ = batch_shape(config.engine, world_size)
    workers = config.data.num_workers
    try:
        yield from build_loader(
            samples, micro_batch_size=micro, world_size=world_size, rank=rank, num_workers=workers, **options
        )
    except DataError as error:
        raise RankError(f"rank {rank}: {error}") from error


def check_answer_list(config: FinetuneConfig) -> None:
    """Raise UserError if the head was trained on other answers than ``data.path`` has, or on another order of them."""
    head = ModelFolder.find(config.init_from or "").weights.parent
    if not (head / ANSWER_LIST).is_file():
        return  # published files come without
    trained, prepared = read_answer_list(head), read_answer_list(config.data.path)
    if trained != prepared:
        place = next((i for i, pair in enumerate(zip(trained, prepared, strict=False)) if pair[0] != pair[1]), None)
        where = "their lengths" if place is None else f"answer {place}: {trained[place]!r} and {prepared[place]!r}"
        raise UserError(
            f"{head / ANSWER_LIST} and {config.data.path}/{ANSWER_LIST} differ in {where}; prepare the data with "
            "--answer-list, naming the former"
        )


def join_expert_groups(task: Task) -> None:
    """What ``deepspeed.initialize`` does for a task that trains: give each MoE layer its expert-parallel group."""
    for layer in task.backbone.moe_layers():
        if isinstance(layer, DeepSpeedMoE):
            layer.set_deepspeed_parallelism()


def build_task(config: Config, tokenizer: Tokenizer, samples: Samples | None = None) -> Task:
    """The task with this rank's part of the experts; all other initial weights are the same on every rank."""
    ep_size = config.engine.expert_parallel_size
    torch.manual_seed(config.engine.seed)
    layer = functools.partial(DeepSpeedMoE, ep_size=ep_size, ep_rank=launched_world()[0] % ep_size)
    backbone = Backbone(config.model, moe_layer=layer)
    if isinstance(config, PretrainConfig):
        objective = dataclasses.replace(config.objective, seed=config.objective.seed + config.engine.seed)
        return MaskedModelling(backbone, objective, tokenizer.mask_id)
    if isinstance(samples, VqaSamples):
        return VQA(backbone, samples.num_answers, config.objective.head_hidden)
    if isinstance(samples, NlvrSamples):
        return NLVR(backbone, config.objective.biattn, config.objective.head_hidden)
    return Retrieval(backbone, config.objective.embed_dim, config.objective.temperature, config.engine.seed)
