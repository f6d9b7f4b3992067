"""The short options of EVE's README and run.py, put in terms of the config tree."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import Any

from eve_ds import config as config_tree
from eve_ds import eve_options, eve_yaml
from eve_ds.eve_yaml import EveYaml
from eve_ds.model.model_config import ModelConfig
from eve_ds.options import join_negative_numbers, one_line, values_of
from eve_ds.recipes import find_recipe, has_type, hint_of, parse_value, read_yaml, split_options, type_errors
from eve_ds.weights.load import read_shapes
from eve_ds.weights.model_folder import MissingError, ModelFolder, checkpoints
from eve_ds.weights.published import sized_as
from preprocessing.errors import UserError

VALUE_OPTIONS = {
    "checkpoint": ("init_from", "weights to start from: a run folder, a model folder or a file"),
    "data": ("data.path", "prepared data set: a folder with a shard folder per split"),
    "augmentation": ("data.augmentation", "none, color or rand"),
    "bs": ("engine.global_batch_size", "total batch size, over all ranks"),
    "lr": ("optimizer.lr", "peak learning rate"),
    "lr_mult": ("optimizer.head_lr_mult", "factor on it for the head"),
    "k_test": ("objective.k_test", "retrieval: candidates of every query that --rerank scores"),
    "weight_decay": ("optimizer.weight_decay", "decoupled weight decay"),
    "warmup": ("optimizer.warmup", "share of the steps, below 1, or a number of steps"),
    "epoch": ("optimizer.epochs", "passes over the training split"),
    "seed": ("engine.seed", "of everything that is drawn"),
    "output_hdfs": ("checkpoint.second_place", "URI of a second place for checkpoints and scores"),
}
PLACES = ("init_from", "resume_from", "output_dir")  # which tell what the model is, and go on as they are
FLAGS = {
    "biattn": ("objective.biattn", "NLVR: bi-attention head"),
    "rerank": ("objective.rerank", "retrieval: score the best candidates with the matching head, too"),
    "gc": ("model.checkpoint_activations", "gradient checkpointing: recompute blocks in the backward pass"),
    "load_head": ("load_head", "take the head from the checkpoint, too"),
    "evaluate": ("evaluate", "score --split and train nothing"),
    "zeroshot": ("zeroshot", "retrieval: --evaluate on a data set that the model was not trained for"),
    "published": ("published", "with --evaluate: score as EVE's published code does"),
    "auto_resume": ("checkpoint.resume", "go on with the run in --output_dir: the default"),
}
_log = logging.getLogger(__name__)


def expand_options(argv: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Replace short options by ``--a.b value``; the checkpoint's own model shape becomes the default of ``model``.

    What the recipe or the command line says of the model wins over that default. Without ``--config`` the recipe is
    EVE's for ``--task`` and a model of that width (``eve_options.recipe_of``).

    Returns:
        the remaining command line for ``config.parse``, and the defaults to parse it with.
    Raises:
        UserError: an unreadable checkpoint, recipe or ``--vlmo_config`` file, two checkpoints, or an option, a task or
            a YAML file of EVE's that has no like here.
    """
    given, rest = _parse_short(argv)
    eve_options.check_arguments(given)
    task = eve_options.task_name(given.task) if given.task else None
    rest += ["--task", task] if task else []
    if given.epoch is not None:
        rest.insert(0, "--optimizer.total_steps=null")  # which a recipe may have
    for name, (key, _) in VALUE_OPTIONS.items():
        if (value := getattr(given, name)) is not None:
            rest += [f"--{key}", _checked(name, key, value)]
    for name, (key, _) in FLAGS.items():
        if getattr(given, name):
            rest += [f"--{key}", "true"]
    for name in PLACES:
        if getattr(given, name):
            rest += [f"--{name}", getattr(given, name)]
    files, rest = split_options(rest)
    configs = [_read_config(path, task, given.task) for path in files]
    eves = [one for one in configs if isinstance(one, EveYaml)]
    in_recipes = _places_in_recipes([one for one in configs if isinstance(one, str)])
    named = {**in_recipes, **{name: value for name, value in vars(given).items() if value}}
    named["init_from"] = given.checkpoint or named.get("init_from")
    places = {name: None if named.get(name) == "null" else named.get(name) for name in PLACES}
    model = _known_model(places, given.vlmo_config)
    bare = model is None and places["init_from"] is not None  # a file of weights, as EVE's are
    shape = next((one.vlmo_config for one in eves if one.vlmo_config and bare), None)
    model = eve_options.model_shape(shape) if shape else model
    scores = given.evaluate or given.zeroshot
    scores_own = scores and not bare and not given.vlmo_config  # which a recipe would only get wrong
    width = (model or ModelConfig()).dim
    recipes = [one if isinstance(one, str) else _placed(one, width) for one in configs]
    leaves_open = any(not one.stand_in for one in eves)
    if leaves_open or (not files and not scores_own and (model or bare) and not _shapes_model(rest)):
        recipes = [*_eve_recipe(task, width, leaves_open), *recipes]
    defaults = {} if model is None else {f"model.{key}": value for key, value in dataclasses.asdict(model).items()}
    return [*(f"--config={path}" for path in recipes), *rest], defaults


def _parse_short(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the short options, the rest of the command line)."""
    short = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*VALUE_OPTIONS, "vlmo_config", *PLACES):
        short.add_argument(f"--{name}")
    for name in FLAGS:
        short.add_argument(f"--{name}", action="store_true")
    eve_options.add_arguments(short)
    try:
        given, rest = short.parse_known_args(join_negative_numbers(argv))
    except argparse.ArgumentError as error:
        raise UserError(one_line(error)) from error
    typed = {name for name, _ in values_of(rest)} | ({"init_from"} if given.init_from else set())
    for name, (key, _) in {**VALUE_OPTIONS, **FLAGS}.items():
        if key != name and key in typed and getattr(given, name) not in (None, False):
            raise UserError(f"--{name} and --{key} name the same thing; give one of them")
    return given, rest


def _checked(name: str, key: str, value: str) -> str:
    """The value of a short option for its key. Raises UserError by the name that was typed, if it has another type."""
    if name == "augmentation" and value.lower() in ("", "null", "none"):
        return "none"  # EVE's README has None, its code takes an empty one
    hint = hint_of(config_tree.FinetuneConfig, key)
    for _, what in type_errors(parse_value(value), hint, key) if not has_type("", hint) else ():
        raise UserError(f"--{name}: {what}")
    return value


def _read_config(path: str, task: str | None, typed_task: str | None) -> str | EveYaml:
    """The recipe of a ``--config``, or what a YAML file of EVE's says."""
    if eve_yaml.is_readme_slip(path, typed_task or ""):
        eve_yaml.log_slip(path, task or "")
        return str(find_recipe(task or ""))
    if name := eve_options.stand_in(path):
        return EveYaml(path, {}, stand_in=name)
    tree = read_yaml(path, "--config")
    short = {name: key for name, (key, _) in {**VALUE_OPTIONS, **FLAGS}.items()}
    return eve_yaml.translate(path, tree, task, short) if eve_yaml.is_eve_yaml(tree) else path


def _placed(one: EveYaml, width: int) -> str:
    """The recipe in the place of a YAML file of EVE's, for a model of that width."""
    if one.stand_in is None:
        return one.as_recipe()
    name = eve_options.recipe_name(one.stand_in, width)
    _log.info("--config %s is not here: takes the recipe %s, which has EVE's hyper-parameters", one.path, name)
    return str(find_recipe(name))


def _eve_recipe(task: str | None, width: int, asked_for: bool) -> list[str]:
    """The recipe below a YAML file of EVE's (``asked_for``), or in the place of ``--config``; empty for none."""
    if asked_for:
        name = eve_options.recipe_name(task or "", width)
        _log.info("what the YAML file of EVE's leaves open is as in the recipe %s", name)
        return [str(find_recipe(name))]
    found = eve_options.recipe_of(task, width)
    return [found] if found else []


def _shapes_model(options: list[str]) -> bool:
    """Whether the command line says how wide the model is."""
    return any(name in ("model", "model.dim") for name, _ in values_of(options))


def _places_in_recipes(recipes: list[str]) -> dict[str, str]:
    """PLACES as the last recipe names them; what else is wrong with a recipe is reported when it is parsed."""
    trees = [read_yaml(path, "--config") for path in recipes]
    found = {name: tree[name] for tree in trees if isinstance(tree, dict) for name in PLACES if name in tree}
    return {name: value for name, value in found.items() if isinstance(value, str)}


def _known_model(places: dict[str, str | None], vlmo_config: str | None) -> ModelConfig | None:
    """Of the model that the run starts from; where that is gone, of the run itself, if it goes on."""
    branch, start, run = (places[name] for name in ("resume_from", "init_from", "output_dir"))
    if vlmo_config:
        return _published_model(vlmo_config, None if branch else start)
    if not branch and not start:
        return None
    try:
        files = ModelFolder.checkpoint(branch) if branch else ModelFolder.find(start or "", unfinished=True)
    except MissingError:
        if not run or not checkpoints(Path(run)):
            raise
        files = ModelFolder.checkpoint(run)
    return config_tree.load_model_config(files.config) if files.config else None


def _published_model(vlmo_config: str, start: str | None) -> ModelConfig:
    """EVE's JSON, with the image size and the text positions of the weights file: the JSON does not hold them."""
    model = eve_options.model_shape(vlmo_config)
    try:
        files = ModelFolder.find(start, unfinished=True) if start else None
        return model if files is None or files.is_checkpoint else sized_as(model, read_shapes(files.weights))
    except UserError:  # a run that goes on needs no first weights; else it is told of when they are read
        return model


def help_text() -> str:
    """The short options, a line each, for ``--help``."""
    rows = [(f"--{name}", key, text) for name, (key, text) in {**VALUE_OPTIONS, **FLAGS}.items()]
    rows.append(("--vlmo_config", "model", "EVE's config_vlmo*.json, or its name: the model's shape"))
    rows += [(f"--{name}", "nothing", "of EVE's command lines: taken, and without effect") for name in ("dist", "beit")]
    return "Short options:\n" + "\n".join(f"  {name:<16} {text} (= {key})" for name, key, text in rows)
