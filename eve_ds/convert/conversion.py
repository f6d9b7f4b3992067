"""The conversions of ``eve_ds.convert``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from eve_ds import config as config_tree
from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import RECIPES, find_recipe, read_run_config, read_yaml, suggest_file
from eve_ds.tasks.registry import BY_NAME, PRETRAIN, build_for, find_spec
from eve_ds.weights.beit import fill_from_beit
from eve_ds.weights.load import check_fit, load_weights
from eve_ds.weights.model_folder import (
    CONFIG,
    HASHED,
    WEIGHTS,
    ModelFolder,
    checkpoint_at,
    metadata,
    newest_checkpoint,
    step_of,
    write_hashes,
)
from eve_ds.weights.published import PREFIX, from_published, is_published, published_config, sized_as, to_published
from eve_ds.weights.save import check_out, replacing, write_weights
from preprocessing.errors import UserError, listed, printable
from preprocessing.local_files import write_json, write_text
from preprocessing.text.tokenizer import FILE_NAME as TOKENIZER
from preprocessing.text.tokenizer import Tokenizer

State = dict[str, Tensor]
PUBLISHED_METADATA = {"format": "pt"}


def published_to_folder(
    checkpoint: str,
    out: str,
    vlmo_config: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
    drop: str = "",
    overwrite: bool = False,
) -> None:
    """Convert a file in EVE's published naming to a model folder, for finetune --checkpoint and load_task_model.

    Args:
        checkpoint: .th, .pt, .pth, .bin (``{"model": ...}`` or bare) or .safetensors.
        out: model folder to write.
        vlmo_config: EVE's config_vlmo*.json of the file.
        config: instead of vlmo_config, a YAML file with a model section: a recipe or a run's config.yaml.
        tokenizer: folder with the tokenizer.json to copy into the model folder; finetune needs one.
        drop: comma-separated prefixes of names to leave out.
        overwrite: replace an existing model folder at --out.
    """
    target, source = Path(out), Path(checkpoint)
    check_out(target, overwrite, folder=True)
    state = _without(load_weights(source), drop)
    if not is_published(state):
        raise UserError(
            f"--checkpoint {source}: holds no {PREFIX}encoder.layers.*, so it is not in EVE's published naming"
        )
    model = _given_config(state, vlmo_config, config)
    try:
        ours = from_published(state, model)
    except UserError as error:
        raise UserError(f"--checkpoint {source}: {error}") from error
    files = ModelFolder(source, find_recipe(config) if config else None, None)
    tree: dict[str, Any] = {"model": dataclasses.asdict(model)}
    tasks = _tasks_of(ours, model, files)
    if files.config and PRETRAIN.keys() & tasks:  # the shape of decoders is in no tensor
        stored = read_yaml(files.config)
        tree |= {name: stored[name] for name in ("task", "objective") if name in stored}
    _write_folder(target, ours, yaml.safe_dump(tree, sort_keys=False), tokenizer)
    heads = f"with the head of {' and '.join(tasks)}" if tasks else "a backbone without a task's head"
    print(f"{target}: {len(state)} tensors as {len(ours)} of EVE-DS, {heads}")


def folder_to_published(
    checkpoint: str,
    out: str,
    vlmo_config: str | None = None,
    config: str | None = None,
    drop: str = "",
    overwrite: bool = False,
) -> None:
    """Convert EVE-DS weights to one file in EVE's published naming; names of heads and decoders do not change.

    Args:
        checkpoint: a run folder, a model folder, or a file in EVE-DS naming.
        out: file to write: .safetensors, or .th (.pt, .pth, .bin) for ``{"model": ...}``.
        vlmo_config: EVE's config_vlmo*.json, for a file without a config.yaml beside it.
        config: instead of vlmo_config, a YAML file with a model section.
        drop: comma-separated prefixes of names to leave out, as in pixel_decoder.,word_decoder.
        overwrite: replace an existing file at --out.
    """
    target = Path(out)
    check_out(target, overwrite, folder=False)
    files = ModelFolder.find(checkpoint)
    if target.exists() and target.samefile(files.weights):
        raise UserError(f"--out {target}: is the file to convert; choose another place")
    state = _without(load_weights(files.weights), drop)
    if is_published(state):
        raise UserError(f"--checkpoint {files.weights}: is in EVE's published naming already")
    stored = None if vlmo_config or config or files.config is None else str(files.config)
    model = _given_config(state, vlmo_config, config or stored)
    _check_backbone(state, model, files.weights)
    theirs = to_published(state, model)
    with replacing(target) as new:
        write_weights(new, theirs, PUBLISHED_METADATA)
    print(f"{target}: {len(state)} tensors as {len(theirs)} in EVE's published naming")


def deepspeed_to_folder(
    checkpoint: str,
    out: str,
    tokenizer: str | None = None,
    answer_list: str | None = None,
    overwrite: bool = False,
) -> None:
    """Convert a DeepSpeed checkpoint, of any ZeRO stage and expert-parallel size, to the model that its run exports.

    Args:
        checkpoint: a run folder (its newest complete checkpoint), or one checkpoint: RUN/checkpoints/step_N.
        out: model folder to write.
        tokenizer: folder with tokenizer.json; by default that of the run.
        answer_list: VQA only: folder with answer_list.json; by default that of the run.
        overwrite: replace an existing model folder at --out.
    """
    target = Path(out)
    check_out(target, overwrite, folder=True)
    step = _find_checkpoint(Path(checkpoint))
    run = step.absolute().parents[1]
    tree = read_run_config(run / CONFIG, "data")
    tokenizer_folder = _run_tokenizer(run, tree, tokenizer)
    spec, companions = find_spec(str(tree.get("task", "pretrain"))), {}
    for name in spec.companion_files:
        folder = _first_with(name, Path(name).stem, answer_list, run, run / "model", tree["data"].get("path"))
        companions[name] = spec.read_companion(folder, name)
    state = _engine().consolidated_state(step)
    model = _stored_model(run / CONFIG)
    _check_backbone(state, model, step)
    config = (run / CONFIG).read_text(encoding="utf-8")
    _write_folder(target, state, config, str(tokenizer_folder), companions, step_of(step))
    print(f"{target}: {len(state)} tensors of {step}")


def beit_to_folder(
    checkpoint: str,
    out: str,
    vlmo_config: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Convert a BEiT v2 checkpoint (microsoft/unilm beit2) to initial weights for pretrain --init_from.

    Args:
        checkpoint: .pth, .pt (``{"model": ...}``, ``{"module": ...}`` or bare) or .safetensors.
        out: model folder to write.
        vlmo_config: EVE's config_vlmo*.json of the model to initialize.
        config: instead of vlmo_config, a YAML file with a model section: the recipe of the pre-training run.
        tokenizer: folder with the tokenizer.json to copy into the model folder.
        seed: of the random values that BEiT does not provide.
        overwrite: replace an existing model folder at --out.
    """
    target, source = Path(out), Path(checkpoint)
    check_out(target, overwrite, folder=True)
    state = load_weights(source)
    model = _given_config({}, vlmo_config, config)
    torch.manual_seed(seed)
    backbone = Backbone(model)
    try:
        origins = fill_from_beit(backbone, state)
    except UserError as error:
        raise UserError(f"--checkpoint {source}: {error}") from error
    ours = {PREFIX + name: value for name, value in backbone.state_dict().items()}
    tree = yaml.safe_dump({"model": dataclasses.asdict(model)}, sort_keys=False)
    _write_folder(target, ours, tree, tokenizer, initial_words=True)
    print("\n".join(map(printable, origins.lines())))
    counts = f"{len(origins.taken)} tensors taken, {len(origins.left)} left, {len(origins.new)} new"
    print(f"{target}: {counts}")


def _without(state: State, drop: str) -> State:
    prefixes = tuple(name for name in drop.split(",") if name)
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}
    if prefixes and len(kept) == len(state):
        raise UserError(f"--drop {drop}: no name in the file has this prefix")
    return kept


def _given_config(state: State, vlmo_config: str | None, config: str | None) -> ModelConfig:
    """The config given by an option, with the sizes of the tensors."""
    if (vlmo_config is None) == (config is None):
        raise UserError("name the model's shape: give one of --vlmo_config (EVE's JSON) and --config (a YAML file)")
    if vlmo_config is not None:
        return published_config(vlmo_config, state, tell=print)
    file = find_recipe(str(config))
    if not file.exists():
        raise UserError(f"--config {config}: no such file{suggest_file(file, *RECIPES)}")
    return sized_as(_stored_model(file), state)


def _stored_model(path: Path) -> ModelConfig:
    try:
        model = config_tree.load_model_config(path)
        model.check()
    except TypeError as error:
        raise UserError(f"{path}: section 'model' holds a value of the wrong type ({error})") from error
    return model


def _check_backbone(state: State, model: ModelConfig, source: Path) -> None:
    with torch.device("meta"):
        own = {PREFIX + name: value for name, value in Backbone(model).state_dict().items()}
    check_fit(own, {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}, source)


def _tasks_of(state: State, model: ModelConfig, files: ModelFolder) -> list[str]:
    """The tasks whose complete heads are in a state with EVE-DS names.

    Without those whose heads are a part of another task's there; of tasks with the same heads, the last in `BY_NAME`.

    Raises:
        UserError: the backbone does not fit the model, or names belong to no such head (all are listed).
    """
    _check_backbone(state, model, files.weights)
    unplaced = {name for name in state if not name.startswith(PREFIX)}
    complete: dict[str, set[str]] = {}
    for task in BY_NAME:
        if task == "pretrain" and files.config is None:
            continue  # the shape of decoders is only in the config of their run
        with torch.device("meta"):
            try:
                own = build_for(find_spec(task), Backbone(model), state, files).state_dict()
            except UserError as error:
                if isinstance(error.__cause__, KeyError):  # no such head, see build_for
                    continue
                raise
        heads = {name: value for name, value in own.items() if not name.startswith(PREFIX)}
        if all(name in state and state[name].shape == value.shape for name, value in heads.items()):
            complete = {other: names for other, names in complete.items() if not names <= heads.keys()}
            if not any(heads.keys() <= names for names in complete.values()):
                complete[task] = set(heads)
            unplaced -= heads.keys()
    if unplaced:
        raise UserError(
            f"--checkpoint {files.weights}: not part of the model or of a complete head for {', '.join(BY_NAME)}:"
            f" {listed(unplaced)}; leave them out with --drop, or give the --config of their run"
        )
    return list(complete)


def _find_checkpoint(path: Path) -> Path:
    """The DeepSpeed checkpoint at ``path``, or the newest one of the run there."""
    if named := checkpoint_at(path):
        return named
    if path.name.startswith("step_") and path.is_dir():
        return path  # reading it reports what is missing
    if not path.is_dir():
        raise UserError(f"--checkpoint {path}: no such folder; give a run folder or RUN/checkpoints/step_N")
    _engine()

    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    step = newest_checkpoint(folder)
    if step is None:
        raise UserError(
            f"--checkpoint {path}: no complete checkpoint in {folder}; give a run folder that has saved one"
        )
    return step


def _engine() -> Any:
    """The module eve_ds.engine.whole_weights, which needs DeepSpeed and is imported only to read its checkpoints."""
    from eve_ds.environment import prepare_environment

    prepare_environment()
    try:
        from eve_ds.engine import whole_weights
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "deepspeed":
            raise
        raise UserError(
            "reading a DeepSpeed checkpoint needs DeepSpeed; run pip install -r requirements.txt"
        ) from error
    return whole_weights


def _run_tokenizer(run: Path, tree: dict[str, Any], named: str | None) -> Path:
    """Folder of the run's tokenizer: as given, or of the run, its export, its config or its initial model."""
    start = tree.get("init_from") or ""
    initial = [Path(start), Path(start) / "model", Path(start).parent] if start else []
    return _first_with(TOKENIZER, "tokenizer", named, run, run / "model", tree["data"].get("tokenizer"), *initial)


def _first_with(file: str, option: str, named: str | None, *folders: str | Path | None) -> Path:
    """The first of ``folders`` with ``file``; if an option names a folder or file, only that."""
    places = [Path(place) for place in ([named] if named else folders) if place]
    for place in places:
        if place.name == file and place.is_file():
            return place.parent
        if (place / file).is_file():
            return place
    looked = ", ".join(map(str, places)) or "nowhere"
    raise UserError(f"no {file} (looked in {looked}); name its folder with --{option}")


def _write_folder(
    out: Path,
    state: State,
    config: str,
    tokenizer: str | None,
    companions: Mapping[str, Any] | None = None,
    step: int | None = None,
    initial_words: bool = False,
) -> None:
    words = Tokenizer.load(tokenizer) if tokenizer else None
    with replacing(out) as new:
        new.mkdir()
        write_weights(new / WEIGHTS, state, metadata(step, initial_words))
        write_text(new / CONFIG, config)
        if words is not None:
            words.save(new)
        for name, content in (companions or {}).items():
            write_json(new / name, content)
        write_hashes(new, HASHED)
