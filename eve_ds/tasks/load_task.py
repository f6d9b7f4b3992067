"""A trained task from its files, ready to predict: no DeepSpeed, no process group."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks.base import Task
from eve_ds.tasks.registry import find_spec
from eve_ds.tasks.spec import TaskSpec, stored_section
from eve_ds.weights.load import load_state, load_weights
from eve_ds.weights.model_folder import ModelFolder
from eve_ds.weights.names import from_published, is_published
from eve_ds.weights.positions import resize_positions
from eve_ds.weights.published import published_config
from preprocessing.errors import UserError

log = logging.getLogger(__name__)
State = dict[str, Tensor]


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
        task: pretrain, retrieval, vqa or nlvr; or the import path of another task's spec, ``module:name``.
        checkpoint: a run folder, a model folder, or a weights file in EVE's published naming or EVE-DS's own. The size
            of the task's head is read off its tensors.
        vlmo_config: EVE's ``config_vlmo*.json``; None reads the ``config.yaml`` beside the weights.
        image_size: images' side, pixels; positions are interpolated to it. None: as the weights have it.
        capacity_factor: None drops no token; see ``ModelConfig``.
        published_routing: pad texts to 40 tokens, and route and count the padding, as the published code does.
    Raises:
        UserError: unknown task, or no config.
        UserError: weights missing, unreadable or of another model; a bad config.
    """
    spec = find_spec(task)
    files = ModelFolder.find(checkpoint)
    state = load_weights(files.weights)
    config = replace(_model_config(files, vlmo_config, image_size, state), capacity_factor=capacity_factor)
    if is_published(state):
        try:
            state = from_published(state, config)
        except UserError as error:
            raise UserError(f"{files.weights}: {error}") from error
    backbone = Backbone(config, published_routing=published_routing)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what the file lacks has the same initial values at each call
        model = build_for(spec, backbone, state, files)
    may_lack = model.heads if spec.head_may_be_missing else ()
    if may_lack and not any(name.startswith(may_lack) for name in state):
        log.warning(
            "%s holds no decoders of pre-training: they have initial values; use the backbone alone", files.weights
        )
    own = {name: tensor for name, tensor in state.items() if name.startswith(("backbone.", *model.heads))}
    load_state(model, resize_positions(own, config), files.weights, may_lack)
    model.pad_text_to = config.max_text_length if published_routing else None
    return model.eval()


def build_for(spec: TaskSpec, backbone: Backbone, state: State, files: ModelFolder) -> Task:
    """The task with initial values, its head of the size that the tensors in ``state`` (EVE-DS names) have.

    Raises:
        UserError: the tensors that tell the head's size are missing.
    """
    try:
        return spec.build_for_weights(backbone, state, files)
    except KeyError as missing:
        raise UserError(f"{files.weights}: no head for task {spec.name}: {missing} is missing") from missing


def _model_config(
    files: ModelFolder, vlmo_config: str | Path | None, image_size: int | None, state: State
) -> ModelConfig:
    if vlmo_config is not None:
        return published_config(vlmo_config, state, image_size)
    if files.config is None:
        raise UserError(f"{files.weights}: no config.yaml beside it; name EVE's config_vlmo JSON with vlmo_config")
    config: ModelConfig = stored_section(ModelConfig, files.config, "model")
    config = replace(config, image_size=image_size or config.image_size)
    config.check()
    return config
