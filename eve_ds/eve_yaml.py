"""EVE's YAML files (``configs/*.yaml`` of github.com/ssyze/EVE, and X-VLM's, which they come from) as recipes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eve_ds import config as config_tree
from eve_ds.recipes import format_value, hint_of, type_errors
from preprocessing.errors import UserError

MARKS = {"schedular", "image_res", "vlmo_config", "train_file"}  # keys that no recipe of EVE-DS has
SECTIONS = ("optimizer", "schedular", "accelerator")
KINDS = {"itr_coco": "retrieval", "itr_flickr": "retrieval", "vqa": "vqa", "nlvr": "nlvr"}
KEYS = {  # beside those that are also short options
    "image_res": "model.image_size",
    "max_tokens": "model.max_text_length",
    "gateloss_weight": "model.aux_loss_weight",
    "itc_proj_dim": "objective.embed_dim",
    "ckpt_frequent_step": "checkpoint.every",
    "optimizer.lr": "optimizer.lr",
    "optimizer.lr_mult": "optimizer.head_lr_mult",
    "optimizer.weight_decay": "optimizer.weight_decay",
    "schedular.sched": "optimizer.schedule",
    "schedular.epochs": "optimizer.epochs",
    "schedular.num_warmup_steps": "optimizer.warmup",
    "accelerator.CLIP_GRAD_NORM": "optimizer.gradient_clipping",
}
SHORT = ("augmentation", "biattn", "load_head", "k_test", "rerank")
SCHEDULES = {"linear": "linear", "cos": "cosine"}
_RAW = "raw data: --data names the prepared data that python -m preprocessing json makes of it"
_PER_GPU = "per GPU; --bs is the total"
_TOKENIZER = "the checkpoint's tokenizer, or --data.tokenizer"
WHY = {  # of keys that are not used
    **dict.fromkeys(("train_file", "val_file", "test_file", "image_root", "vqa_root", "vg_root", "answer_list"), _RAW),
    **dict.fromkeys(("batch_size", "batch_size_train"), _PER_GPU),
    **dict.fromkeys(("text_encoder", "use_roberta"), _TOKENIZER),
}


@dataclass
class EveYaml:
    """What a file says here.

    Attributes:
        path: of the file.
        settings: {key of the config tree: value}.
        vlmo_config: the file that it names of the model's shape.
        stand_in: the recipe of EVE-Base that has the settings of a file that is not there.
    """

    path: str
    settings: dict[str, Any]
    vlmo_config: str | None = None
    stand_in: str | None = None

    def as_recipe(self) -> str:
        """The settings as a recipe: the path of a pipe, as that of ``<(command)``."""
        tree: dict[str, Any] = {}
        for name, value in self.settings.items():
            section, _, key = name.rpartition(".")
            (tree.setdefault(section, {}) if section else tree)[key] = value
        reader, writer = os.pipe()  # the reader stays open: the path is read when the command line is parsed
        with open(writer, "w", encoding="utf-8") as file:
            yaml.safe_dump(tree, file)
        return f"/dev/fd/{reader}"


def is_eve_yaml(tree: Any) -> bool:
    """Whether a YAML file is EVE's, by its keys."""
    return isinstance(tree, dict) and bool(MARKS & tree.keys()) and not {"model", "data", "engine"} & tree.keys()


def kind_of(tree: Mapping[str, Any]) -> str | None:
    """retrieval, vqa or nlvr, by the keys that only files of that task have; None if there are none."""
    marks = {"vqa": ("vqa_root", "answer_list"), "retrieval": ("k_test", "itc_type", "batch_size_test_text")}
    for kind, keys in marks.items():
        if any(key in tree for key in keys):
            return kind
    return "nlvr" if "batch_size" in tree else None


def is_readme_slip(path: str, typed_task: str) -> bool:
    """EVE's README has the YAML file of VQA in its line for NLVR2, at which EVE's own code stops."""
    return Path(path).name == "VQA_beit_480_vg.yaml" and typed_task.startswith("NLVR_vit_lr")


def log_slip(path: str, task: str) -> None:
    """Tell of ``is_readme_slip``."""
    logging.getLogger(__name__).warning(
        "--config %s: is EVE's file for VQA, which EVE's README has in its line for NLVR2 by mistake: not used; takes "
        "the recipe %s, EVE's hyper-parameters of NLVR2",
        path,
        task,
    )


def translate(path: str, tree: Mapping[str, Any], task: str | None, short: Mapping[str, str]) -> EveYaml:
    """Put a file in terms of the config tree, and log a line that names what is not used.

    Args:
        path: for messages.
        tree: the content of the file.
        task: of ``--task``.
        short: {short option: key of the config tree}.
    Raises:
        UserError: a file of another task, a value of the wrong type, or a setting that has no like here.
    """
    if task not in KINDS:
        raise UserError(
            f"--config {path}: is a YAML file of EVE's, which names no task; give --task one of {', '.join(KINDS)}"
        )
    kind = kind_of(tree)
    if kind and kind != KINDS[task]:
        others = " or ".join(name for name, of in KINDS.items() if of == kind)
        raise UserError(
            f"--config {path}: is EVE's file for {kind} ({others}), and --task is {task}; leave --config out to take "
            "the recipe of the task"
        )
    keys = KEYS | {name: short[name] for name in SHORT if name in short}
    if task == "vqa":
        del keys["augmentation"]  # EVE always trains VQA with RandAugment
    values = dict(_flat(path, tree))
    settings: dict[str, Any] = {}
    unused = []
    for name, value in values.items():
        if name == "rerank" and not value:  # EVE re-ranks after the last epoch all the same
            unused.append(name)
        elif name in keys:
            ours = _checked(path, name, value)
            for _, what in type_errors(ours, hint_of(config_tree.FinetuneConfig, keys[name]), name):
                raise UserError(f"{path}: {name}: {what}")
            settings[keys[name]] = ours
        elif name not in ("vlmo_config", "optimizer.opt") and not _says_no_more(name, values):
            unused.append(name)
    _check_optimizer(path, values)
    _log_use(path, settings, unused)
    named = values.get("vlmo_config")
    return EveYaml(path, settings, named if isinstance(named, str) else None)


def _flat(path: str, tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if name in SECTIONS:
            if not isinstance(value, dict):
                raise UserError(f"{path}: {name}: expected a mapping, got {format_value(value)}")
            yield from ((f"{name}.{key}", item) for key, item in value.items())
        else:
            yield str(name), value


def _checked(path: str, name: str, value: Any) -> Any:
    """The value that the key has here."""
    if name == "augmentation" and value is None:
        return "none"
    if name == "schedular.sched":
        if value not in SCHEDULES:
            raise UserError(f"{path}: {name}={format_value(value)} is none of EVE's ({', '.join(SCHEDULES)})")
        return SCHEDULES[value]
    return value


def _check_optimizer(path: str, values: Mapping[str, Any]) -> None:
    opt = values.get("optimizer.opt", "adamW")
    if str(opt).lower() != "adamw":
        raise UserError(f"{path}: optimizer.opt={format_value(opt)}: there is AdamW alone, as in EVE")


def _says_no_more(name: str, values: Mapping[str, Any]) -> bool:
    """The learning rate, which stands there twice."""
    return name == "schedular.lr" and values[name] == values.get("optimizer.lr")


def _log_use(path: str, settings: Mapping[str, Any], unused: Iterable[str]) -> None:
    groups: dict[str, list[str]] = {}
    for name in unused:
        groups.setdefault(WHY.get(name, ""), []).append(name)
    told = [", ".join(names) + (f" ({why})" if why else "") for why, names in groups.items()]
    logging.getLogger(__name__).info(
        "--config %s is a YAML file of EVE's: sets %s; not used: %s",
        path,
        ", ".join(f"{key}={format_value(value)}" for key, value in settings.items()) or "nothing",
        "; ".join(told) or "nothing",
    )
