"""The tasks by name: those that come with EVE-DS by their short names, a user's own by import path, and a trained one
from its files. A task is imported when it is asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.options import import_object
from eve_ds.tasks.base import Task
from eve_ds.tasks.spec import FinetuneSpec, PretrainSpec, TaskSpec, stored_section
from eve_ds.weights.load import load_state, load_weights, resize_positions
from eve_ds.weights.model_folder import ModelFolder
from eve_ds.weights.published import from_published, is_published, published_config
from preprocessing.errors import UserError

_TASKS = "eve_ds.tasks"
PRETRAIN = {
    "pretrain": f"{_TASKS}.masked_modeling:SPEC",
    "itc_itm": f"{_TASKS}.itc_itm:SPEC",
    "itc_itm_mlm": f"{_TASKS}.itc_itm_mlm:SPEC",
    "itc_itm_mlm_mim": f"{_TASKS}.itc_itm_mlm_mim:SPEC",
    "itc_mlm_mim": f"{_TASKS}.itc_mlm_mim:SPEC",
    "mlm_mim_codes": f"{_TASKS}.mlm_mim_codes:SPEC",
}
FINETUNE = {
    "itr_coco": f"{_TASKS}.retrieval:SPEC",
    "itr_flickr": f"{_TASKS}.retrieval:SPEC",
    "vqa": f"{_TASKS}.vqa:SPEC",
    "nlvr": f"{_TASKS}.nlvr:SPEC",
}
# By the names that ``load_task_model`` takes: a fine-tuning task's is that of its module.
BY_NAME = PRETRAIN | {path.removeprefix(f"{_TASKS}.").removesuffix(":SPEC"): path for path in sorted(FINETUNE.values())}
log = logging.getLogger(__name__)
State = dict[str, Tensor]


def finetune_spec(name: str, option: str = "--task") -> FinetuneSpec:
    """The fine-tuning task that ``--task`` names: a key of FINETUNE, or ``module:name`` of a FinetuneSpec.

    Raises:
        UserError: there is none; the message names ``option``, which is where the name stands.
    """
    found: FinetuneSpec = _imported(name, FinetuneSpec, FINETUNE, option)
    return found


def pretrain_spec(name: str, option: str = "--task") -> PretrainSpec:
    """The pre-training objective of that name, as ``finetune_spec``."""
    found: PretrainSpec = _imported(name, PretrainSpec, PRETRAIN, option)
    return found


def find_spec(name: str) -> TaskSpec:
    """Any task: by a short name of ``--task``, by the name that ``load_task_model`` takes, or by import path.

    Raises:
        UserError: there is none.
    """
    known = {**FINETUNE, **PRETRAIN, **BY_NAME}
    if name not in known and ":" not in name:
        raise UserError(
            f"unknown task {name!r}: choose one of {', '.join(sorted(BY_NAME))}, or module:name of your own"
        )
    found: TaskSpec = _imported(name, TaskSpec, known, "task")
    return found


def _imported(name: str, kind: type, short: Mapping[str, str], option: str) -> Any:
    if name not in short and ":" not in name:
        raise UserError(
            f"{option}: expected one of {', '.join(short)}, or the import path of your own task, as in "
            f"my_package.my_task:SPEC, got {name!r}"
        )
    found = import_object(short.get(name, name), option)
    if not isinstance(found, kind):
        raise UserError(
            f"{option} {name}: expected an instance of eve_ds.tasks.{kind.__name__}, this is of type "
            f"{type(found).__name__}; see docs/extending.md"
        )
    return found


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
        task: a key of BY_NAME (pretrain, itc_itm, retrieval, vqa ...), or the import path of another task's spec,
            ``module:name``.
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
