"""A head that comes with the first weights: its shape tells settings of the run, and a file without it is named."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from eve_ds.config import FinetuneConfig
from eve_ds.engine import first_weights, setup
from eve_ds.options import is_section_file, values_of
from eve_ds.recipes import parse_value, read_run_config, split_options
from eve_ds.tasks.spec import stored_section
from eve_ds.weights.load import read_shapes
from eve_ds.weights.model_folder import ModelFolder
from eve_ds.weights.published import retrieval_heads
from preprocessing.errors import UserError

SECTION = "objective"
_log = logging.getLogger(__name__)


def settle_head(config: FinetuneConfig, argv: Sequence[str], num_classes: int) -> None:
    """Set those settings of ``config.objective`` that the shape of the head to be loaded tells.

    They win over recipes, which are written for training, but not over the command line. Nothing happens unless the
    run evaluates, has ``load_head`` or is a branch.

    Args:
        config: of the run.
        argv: the command line that it was read from.
        num_classes: of the data.
    Raises:
        UserError: the file has no such head, or one for other answers than the data have, or an option says something
            else.
    """
    if not (config.evaluate or config.load_head or config.resume_from):
        return
    files = first_weights.source(config)
    if files is None:
        return
    found = _of_run(config, files) if files.is_checkpoint else _of_file(config, files, num_classes)
    clash = sorted(found.keys() & _typed(config, argv))
    if clash and not config.resume_from:  # the identity of a branch tells what it must keep
        name = clash[0]
        raise UserError(
            f"{SECTION}.{name}={getattr(config.objective, name)} was given, but the head in {files.weights} has "
            f"{SECTION}.{name}={found[name]}; leave that option out"
        )
    found = {name: value for name, value in found.items() if name not in clash}
    if found:
        config.objective = dataclasses.replace(config.objective, **found)
        values = ", ".join(f"{SECTION}.{name}={value}" for name, value in found.items())
        _log.info("%s: the run takes what its head has, %s", files.weights, values)
    if not config.resume_from and not first_weights.goes_on(config):
        setup.check_head(config)


def _of_file(config: FinetuneConfig, files: ModelFolder, num_classes: int) -> dict[str, Any]:
    """The settings that the head in a file of weights has otherwise than ``config.objective``."""
    spec, shapes = config.spec, retrieval_heads(read_shapes(files.weights))
    try:
        found, classes = spec.settings_of_head(shapes, config.objective), spec.num_classes_of(shapes)
    except KeyError as error:
        raise UserError(first_weights.no_head(spec.name, [str(error.args[0])], shapes, files)) from error
    if classes and num_classes and classes != num_classes:
        raise UserError(
            f"{files.weights}: its head knows {classes} answers, {config.data.home} has {num_classes}; prepare the "
            "data with the answer list of the head (--answer-list)"
        )
    return found


def _of_run(config: FinetuneConfig, files: ModelFolder) -> dict[str, Any]:
    """As ``_of_file``, of a checkpoint: its run's config tells."""
    if files.config is None:
        return {}
    own = read_run_config(files.config, SECTION)[SECTION].keys() & config.spec.head_settings
    stored = stored_section(config.spec.objective, files.config, SECTION, only_own=True)
    return {name: getattr(stored, name) for name in own if getattr(stored, name) != getattr(config.objective, name)}


def _typed(config: FinetuneConfig, argv: Sequence[str]) -> set[str]:
    """The settings of ``objective`` that options on the command line name."""
    found = set()
    for name, value in values_of(split_options(list(argv))[1]):
        if name.startswith(f"{SECTION}."):
            found.add(name.removeprefix(f"{SECTION}."))
        elif name == SECTION and value and not is_section_file(type(config), name, value):
            given = parse_value(value)
            found |= set(given) if isinstance(given, dict) else set()
    return found
