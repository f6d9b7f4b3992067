"""What lines of EVE's README and ``run.py`` (github.com/ssyze/EVE) hold beyond options that have a key here: names of
tasks and files, options whose work another part does, and the recipe that a line without ``--config`` means."""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import replace
from pathlib import Path

from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import find_recipe, read_run_config, section_of
from eve_ds.tasks.registry import FINETUNE
from preprocessing.errors import UserError, shortened

# Tasks of EVE's and X-VLM's run.py, by how they begin, whose name is another one here.
TASKS = {"NLVR_vit_lr": "nlvr", "vqa_480": "vqa"}
_PRETRAIN = "pre-training is a command of its own: deepspeed --module eve_ds.pretrain --config pretrain_base"
_NO_SUCH = "EVE has no such task; choose one of " + ", ".join(FINETUNE)
OTHER_TASKS = {
    "itr_2_tasks": "trains two models; give two commands, with --task itr_coco and --task itr_flickr",
    "BPretrain": _PRETRAIN,
    "pretrain_": _PRETRAIN,
    "refcoco": _NO_SUCH,
    "coco_captioning": _NO_SUCH,
}
_OBJECTIVE = "is of pre-training: an objective of eve_ds.pretrain (docs/objectives.md)"
REFUSED = {
    "load_ckpt_from": "name the weights with --checkpoint",
    "vlmo_ckpt": "name the weights with --checkpoint",
    "mitc_ratio": _OBJECTIVE,
    "mitm_ratio": _OBJECTIVE,
    "mitc_detach": _OBJECTIVE,
    "decoder_depth": "is of pre-training: --objective.decoder_depth of eve_ds.pretrain",
    "fs": "states are sharded by ZeRO; choose its stage with --deepspeed_config zero2 (the default) or zero3",
}
DIST = re.compile(r"all|1|f4|gpu[0-8]")
# EVE's files by the names that its README has, for those who do not have them: the recipe that has the same values.
SHAPES = {
    "config_vlmoB_base64k": "pretrain_base",
    "config_vlmoL_base64k": "pretrain_large",
    "config_vlmoB_base64": "pretrain_base",  # as the YAML file of NLVR2 spells it
}
YAMLS = {
    "Retrieval_coco_ft": "itr_coco",
    "Retrieval_flickr_ft": "itr_flickr",
    "VQA_beit_480_vg": "vqa",
    "NLVR_vit_lrtest_5e-5": "nlvr",
}
SIZES = {768: "Base", 1024: "Large"}  # by width
LARGE = {"itr_coco": "itr_coco_large", "itr_flickr": "itr_flickr_large"}  # where Large differs from Base
_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare those options of ``run.py`` that have no key in the config tree."""
    parser.add_argument("--task")
    parser.add_argument("--dist")
    parser.add_argument("--beit", action="store_true")
    for name in REFUSED:
        parser.add_argument(f"--{name}", nargs="?", const="")


def check_arguments(given: argparse.Namespace) -> None:
    """Say in a line what has no effect here.

    Raises:
        UserError: an option that is refused; names its replacement.
    """
    for name, mend in REFUSED.items():
        if getattr(given, name) is not None:
            raise UserError(f"--{name}: {mend}")
    if given.dist is not None:
        if not DIST.fullmatch(given.dist):
            raise UserError(f"--dist {shortened(given.dist)}: expected all, 1, f4 or gpu0 to gpu8, or leave it out")
        _log.info(
            "--dist %s has no effect: the launcher says which GPUs take part, as in deepspeed --num_gpus 8 or "
            "--hostfile (docs/launching.md)",
            given.dist,
        )
    if given.beit:
        _log.info("--beit has no effect: there is no other backbone")


def task_name(typed: str) -> str:
    """The name here of a task of ``--task``; one's own is returned as it is.

    Raises:
        UserError: a task of EVE's or X-VLM's that fine-tuning does not have; names its replacement.
    """
    for start, mend in OTHER_TASKS.items():
        if typed.startswith(start) and ":" not in typed:
            raise UserError(f"--task {shortened(typed)}: {mend}")
    return next((ours for start, ours in TASKS.items() if typed.startswith(start)), typed)


def model_shape(vlmo_config: str) -> ModelConfig:
    """The model of ``--vlmo_config``: a file, one in ``configs/`` as EVE has it, or the published file of that name.

    Raises:
        UserError: there is none, or it is not EVE's.
    """
    for path in (Path(vlmo_config), Path("configs") / vlmo_config):
        if path.exists():
            return ModelConfig.from_vlmo(path, tell=_log.info)
    named = Path(vlmo_config)
    recipe = SHAPES.get(named.name.removesuffix(".json"))
    if recipe is None or str(named.parent) not in (".", "configs"):
        raise UserError(f"--vlmo_config {vlmo_config}: no such file; known by name are {', '.join(list(SHAPES)[:2])}")
    path = find_recipe(recipe)
    config = section_of(ModelConfig, read_run_config(path, "model")["model"], f"{path}: model")
    return replace(config, checkpoint_activations=False)  # which stands in --gc


def stand_in(path: str) -> str | None:
    """The recipe of EVE-Base with the values of a YAML file of EVE's README that is not there; None for other files."""
    named = Path(path)
    if named.exists() or str(named.parent) not in (".", "configs"):
        return None
    return YAMLS.get(named.name.removesuffix(".yaml"))


def recipe_name(task: str, width: int) -> str:
    """The recipe with EVE's hyper-parameters of a task, for a model of that width."""
    return LARGE.get(task, task) if SIZES.get(width) == "Large" else task


def recipe_of(task: str | None, width: int) -> str | None:
    """The recipe's file for a line without ``--config``, which is told in a line; None where EVE has none."""
    if task not in FINETUNE or width not in SIZES:
        return None
    name = recipe_name(task or "", width)
    _log.info(
        "no --config: takes the recipe %s, EVE's hyper-parameters of this task for EVE-%s (docs/from_eve.md)",
        name,
        SIZES[width],
    )
    return str(find_recipe(name))
