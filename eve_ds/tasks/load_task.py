"""A trained task from its files, ready to predict: no DeepSpeed, no process group."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from eve_ds.errors import UserError
from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import read_run_config, section_of
from eve_ds.tasks.base import TASKS, Task
from eve_ds.tasks.masked import MaskedModeling, ObjectiveConfig
from eve_ds.tasks.nlvr import NLVR
from eve_ds.tasks.retrieval import Retrieval
from eve_ds.tasks.vqa import VQA
from eve_ds.weights.errors import WeightsError
from eve_ds.weights.load import load_state, load_weights
from eve_ds.weights.model_folder import ModelFolder
from eve_ds.weights.names import from_published, is_published
from eve_ds.weights.positions import resize_positions
from eve_ds.weights.published import published_config
from preprocessing.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
State = dict[str, Tensor]
Config = TypeVar("Config", ModelConfig, ObjectiveConfig)


def load_task_model(
    task: str,
    checkpoint: str | Path,
    vlmo_config: str | Path | None = None,
    image_size: int | None = None,
    capacity_factor: float | None = None,
    published_routing: bool = False,
) -> Task:
    """Build a task and load its weights; evaluation mode, fp32, on the CPU.

    Args:
        task: pretrain, retrieval, vqa or nlvr.
        checkpoint: a run folder, a model folder, or a weights file in EVE's published naming or EVE-DS's own. The size
            of the task's head is read off its tensors.
        vlmo_config: EVE's ``config_vlmo*.json``; None reads the ``config.yaml`` beside the weights.
        image_size: images' side, pixels; positions are interpolated to it. None: as the weights have it.
        capacity_factor: None drops no token; see ``ModelConfig``.
        published_routing: pad texts to 40 tokens, and route and count the padding, as the published code does.
    Raises:
        UserError: unknown task, or no config.
        WeightsError, DataError, ModelConfigError: weights missing, unreadable or of another model; a bad config.
    """
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}: choose one of {', '.join(sorted(TASKS))}")
    files = ModelFolder.find(checkpoint)
    state = load_weights(files.weights)
    config = replace(_model_config(files, vlmo_config, image_size, state), capacity_factor=capacity_factor)
    if is_published(state):
        try:
            state = from_published(state, config)
        except WeightsError as error:
            raise WeightsError(f"{files.weights}: {error}") from error
    backbone = Backbone(config, published_routing=published_routing)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the file lacks has the same first values at each call
        model = build_for(task, backbone, state, files)
    may_lack = model.heads if task == "pretrain" else ()
    if may_lack and not any(name.startswith(may_lack) for name in state):
        log.warning(
            "%s holds no decoders of pre-training: they have first values; use the backbone alone", files.weights
        )
    own = {name: tensor for name, tensor in state.items() if name.startswith(("backbone.", *model.heads))}
    load_state(model, resize_positions(own, config), files.weights, may_lack)
    model.pad_text_to = config.max_text_length if published_routing else None
    return model.eval()


def build_for(task: str, backbone: Backbone, state: State, files: ModelFolder) -> Task:
    """The task with first values, its head of the size that the tensors in ``state`` (EVE-DS names) have.

    Raises:
        WeightsError: the tensors that tell the head's size are missing.
    """
    try:
        return _BUILDERS[task](backbone, state, files)
    except KeyError as missing:
        raise WeightsError(f"{files.weights}: no head for task {task}: {missing} is missing") from missing


def _model_config(
    files: ModelFolder, vlmo_config: str | Path | None, image_size: int | None, state: State
) -> ModelConfig:
    if vlmo_config is not None:
        return published_config(vlmo_config, state, image_size)
    if files.config is None:
        raise UserError(f"{files.weights}: no config.yaml beside it; name EVE's config_vlmo JSON with vlmo_config")
    config = _stored(ModelConfig, files.config, "model")
    config = replace(config, image_size=image_size or config.image_size)
    config.check()
    return config


def _stored(kind: type[Config], path: Path, section: str) -> Config:
    """A section of the config that a run stores."""
    return section_of(kind, read_run_config(path, section)[section], f"{path}: {section}")


def _pretrain(backbone: Backbone, state: State, files: ModelFolder) -> MaskedModeling:
    """Decoders that the file does not hold have default sizes and first values (published files have none)."""
    objective = ObjectiveConfig()
    if files.config is not None and "pixel_decoder.embed.weight" in state:
        objective = _stored(ObjectiveConfig, files.config, "objective")
    mask_id = Tokenizer.load(files.tokenizer).mask_id if files.tokenizer is not None else DEFAULT_MASK_ID
    return MaskedModeling(backbone, objective, mask_id)


def _retrieval(backbone: Backbone, state: State, files: ModelFolder) -> Retrieval:
    return Retrieval(backbone, embed_dim=state["itc_vision_proj_head.weight"].shape[0])


def _vqa(backbone: Backbone, state: State, files: ModelFolder) -> VQA:
    return VQA(backbone, state["output.3.weight"].shape[0], head_hidden=state["output.0.weight"].shape[0])


def _nlvr(backbone: Backbone, state: State, files: ModelFolder) -> NLVR:
    if "attn1.in_proj_weight" in state:
        return NLVR(backbone, biattn=True)
    return NLVR(backbone, head_hidden=state["output.0.weight"].shape[0])


DEFAULT_MASK_ID = 4  # [MASK] of the tokenizers that EVE-DS trains

_BUILDERS: dict[str, Callable[[Backbone, State, ModelFolder], Task]] = {
    "pretrain": _pretrain,
    "retrieval": _retrieval,
    "vqa": _vqa,
    "nlvr": _nlvr,
}
