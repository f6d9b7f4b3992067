"""The short options of EVE's README and run.py, put in terms of the config tree."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from eve_ds import config as config_tree
from eve_ds.errors import UserError
from eve_ds.model.config import ModelConfig
from eve_ds.recipes import read_yaml, split_options
from eve_ds.weights.model_folder import ModelFolder

VALUE_OPTIONS = {
    "checkpoint": ("init_from", "weights to start from: a run folder, a model folder or a file"),
    "data": ("data.path", "prepared data set: a folder with a shard folder per split"),
    "augmentation": ("data.augmentation", "none, color or rand"),
    "bs": ("engine.global_batch_size", "total batch size, over all ranks"),
    "lr": ("optimizer.lr", "peak learning rate"),
    "lr_mult": ("optimizer.head_lr_mult", "factor on it for the head"),
    "seed": ("engine.seed", "of everything that is drawn"),
}
FLAGS = {
    "biattn": ("objective.biattn", "NLVR: bi-attention head"),
    "gc": ("model.checkpoint_activations", "gradient checkpointing: recompute blocks in the backward pass"),
    "load_head": ("load_head", "take the head from the checkpoint, too"),
    "evaluate": ("evaluate", "score --split and train nothing"),
}


def expand_options(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Replace short options by ``--a.b value``; the checkpoint's own model shape becomes the default of ``model``.

    What the recipe or the command line says of the model wins over that default.

    Returns:
        the remaining command line for ``config.parse``, and the defaults to parse it with.
    Raises:
        UserError: an unreadable checkpoint, recipe or ``--vlmo_config`` file, or two checkpoints.
    """
    short = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in VALUE_OPTIONS:
        short.add_argument(f"--{name}")
    for name in FLAGS:
        short.add_argument(f"--{name}", action="store_true")
    short.add_argument("--vlmo_config")
    short.add_argument("--init_from")
    try:
        given, rest = short.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    for name, (key, _) in VALUE_OPTIONS.items():
        if getattr(given, name) is not None:
            rest += [f"--{key}", getattr(given, name)]
    for name, (key, _) in FLAGS.items():
        if getattr(given, name):
            rest += [f"--{key}", "true"]
    if given.checkpoint and given.init_from:
        raise UserError("--checkpoint and --init_from name the same thing; give one of them")
    if given.init_from:
        rest += ["--init_from", given.init_from]
    source = given.checkpoint or given.init_from or _source_in_recipes(rest)
    return rest, _model_defaults(None if source == "null" else source, given.vlmo_config)


def _source_in_recipes(argv: list[str]) -> str | None:
    """``init_from`` of the last recipe that has it; what else is wrong with a recipe is told when it is parsed."""
    trees = [read_yaml(path, "--config") for path in split_options(argv)[0]]
    named = [tree["init_from"] for tree in trees if isinstance(tree, dict) and "init_from" in tree]
    return named[-1] if named and isinstance(named[-1], str) else None


def _model_defaults(source: str | None, vlmo_config: str | None) -> dict[str, Any]:
    model: ModelConfig | None = None
    if vlmo_config:
        model = ModelConfig.from_vlmo(vlmo_config)
    elif source:
        stored = ModelFolder.find(source).config
        model = config_tree.load_model_config(stored) if stored else None
    if model is None:
        return {}
    return {f"model.{key}": value for key, value in dataclasses.asdict(model).items()}


def help_text() -> str:
    """The short options, a line each, for ``--help``."""
    rows = [(f"--{name}", key, text) for name, (key, text) in {**VALUE_OPTIONS, **FLAGS}.items()]
    rows.append(("--vlmo_config", "model", "EVE's config_vlmo*.json: the model's shape"))
    return "Short options:\n" + "\n".join(f"  {name:<16} {text} (= {key})" for name, key, text in rows)
