"""The short options of EVE's README and run.py, put in terms of the config tree."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from eve_ds import config as config_tree
from eve_ds.model.model_config import ModelConfig
from eve_ds.options import join_negative_numbers, one_line
from eve_ds.recipes import has_type, hint_of, parse_value, read_yaml, split_options, type_errors
from eve_ds.weights.model_folder import MissingError, ModelFolder, checkpoints
from preprocessing.errors import UserError

VALUE_OPTIONS = {
    "checkpoint": ("init_from", "weights to start from: a run folder, a model folder or a file"),
    "data": ("data.path", "prepared data set: a folder with a shard folder per split"),
    "augmentation": ("data.augmentation", "none, color or rand"),
    "bs": ("engine.global_batch_size", "total batch size, over all ranks"),
    "lr": ("optimizer.lr", "peak learning rate"),
    "lr_mult": ("optimizer.head_lr_mult", "factor on it for the head"),
    "seed": ("engine.seed", "of everything that is drawn"),
    "output_hdfs": ("checkpoint.second_place", "URI of a second place for checkpoints and scores"),
}
PLACES = ("init_from", "resume_from", "output_dir")  # which tell what the model is, and go on as they are
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
    for name in PLACES:
        short.add_argument(f"--{name}")
    try:
        given, rest = short.parse_known_args(join_negative_numbers(argv))
    except argparse.ArgumentError as error:
        raise UserError(one_line(error)) from error
    for name, (key, _) in VALUE_OPTIONS.items():
        if (value := getattr(given, name)) is not None:
            hint = hint_of(config_tree.FinetuneConfig, key)
            for _, what in type_errors(parse_value(value), hint, key) if not has_type("", hint) else ():
                raise UserError(f"--{name}: {what}")  # by the name that was typed
            rest += [f"--{key}", value]
    for name, (key, _) in FLAGS.items():
        if getattr(given, name):
            rest += [f"--{key}", "true"]
    if given.checkpoint and given.init_from:
        raise UserError("--checkpoint and --init_from name the same thing; give one of them")
    for name in PLACES:
        if getattr(given, name):
            rest += [f"--{name}", getattr(given, name)]
    named = {**_places_in_recipes(rest), **{name: value for name, value in vars(given).items() if value}}
    named["init_from"] = given.checkpoint or named.get("init_from")
    places = {name: None if named.get(name) == "null" else named.get(name) for name in PLACES}
    return rest, _model_defaults(places, given.vlmo_config)


def _places_in_recipes(argv: list[str]) -> dict[str, str]:
    """PLACES as the last recipe names them; what else is wrong with a recipe is reported when it is parsed."""
    trees = [read_yaml(path, "--config") for path in split_options(argv)[0]]
    found = {name: tree[name] for tree in trees if isinstance(tree, dict) for name in PLACES if name in tree}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _model_defaults(places: dict[str, str | None], vlmo_config: str | None) -> dict[str, Any]:
    """Of the model that the run starts from; where that is gone, of the run itself, if it goes on."""
    model: ModelConfig | None = None
    branch, start, run = (places[name] for name in ("resume_from", "init_from", "output_dir"))
    if vlmo_config:
        model = ModelConfig.from_vlmo(vlmo_config)
    elif branch or start:
        try:
            files = ModelFolder.checkpoint(branch) if branch else ModelFolder.find(start or "", unfinished=True)
        except MissingError:
            if not run or not checkpoints(Path(run)):
                raise
            files = ModelFolder.checkpoint(run)
        model = config_tree.load_model_config(files.config) if files.config else None
    if model is None:
        return {}
    return {f"model.{key}": value for key, value in dataclasses.asdict(model).items()}


def help_text() -> str:
    """The short options, a line each, for ``--help``."""
    rows = [(f"--{name}", key, text) for name, (key, text) in {**VALUE_OPTIONS, **FLAGS}.items()]
    rows.append(("--vlmo_config", "model", "EVE's config_vlmo*.json: the model's shape"))
    return "Short options:\n" + "\n".join(f"  {name:<16} {text} (= {key})" for name, key, text in rows)
