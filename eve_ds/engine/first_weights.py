"""Where the first weights of a run come from, what they bring with them, and their way into the task."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine import resume
from eve_ds.engine.checkpoint import identity_in
from eve_ds.engine.checkpoint_record import Manifest
from eve_ds.engine.distributed import decide
from eve_ds.engine.identity import Identity, Input, place, summarized
from eve_ds.engine.run_folder import stored_identity
from eve_ds.engine.watchdog import mark
from eve_ds.engine.whole_weights import ShardedState
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import read_run_config
from eve_ds.tasks.base import Task
from eve_ds.weights.load import load_state, load_weights, resize_positions
from eve_ds.weights.model_folder import COMPLETE, MissingError, ModelFolder, checkpoints, exported_step, run_of, step_of
from eve_ds.weights.published import from_published, is_published
from preprocessing.errors import UserError, listed

Config = PretrainConfig | FinetuneConfig
BLOCKS, BLOCK_BYTES = 64, 1 << 14  # of a file of weights that its hash looks at
# What changes the model's function and no tensor's shape: weights trained with one value fit any other, and go wrong.
SHAPE_INDEPENDENT = ("num_heads", "top_k", "modality_to_experts", "activation", "norm_eps")


def goes_on(config: Config) -> bool:
    """Whether the run has a checkpoint of its own in ``output_dir``: then it needs no first weights."""
    trains = not (isinstance(config, FinetuneConfig) and config.evaluate)
    return bool(trains and config.checkpoint.resume and config.output_dir and checkpoints(Path(config.output_dir)))


def source(config: Config) -> ModelFolder | None:
    """What the run starts from; where that is gone, and the run goes on, its own newest checkpoint.

    Raises:
        UserError: there is nothing that holds weights.
    """
    if not config.resume_from and not config.init_from:
        return None
    try:
        return _named(config)
    except MissingError:
        if not goes_on(config):
            raise
        return ModelFolder.checkpoint(config.output_dir)


def _named(config: Config) -> ModelFolder:
    """Raises UserError if there is nothing."""
    if not config.resume_from:
        return ModelFolder.find(config.init_from or "", unfinished=True)
    try:
        return ModelFolder.checkpoint(config.resume_from)
    except UserError as error:
        raise type(error)(f"--resume_from {error}") from error


def origin(config: Config) -> dict[str, Input | None]:
    """The first weights as inputs of the run (``identity``); where they are gone, their place alone."""
    option = "resume_from" if config.resume_from else "init_from"
    none: dict[str, Input | None] = {} if config.resume_from else {"resume_from": None}
    named = config.resume_from or config.init_from
    if not named:
        return {"init_from": None, **none}
    try:
        files = _named(config)
    except MissingError:
        return {option: Input(place(named), ""), **none}  # ``source`` has said so, unless the run goes on
    step = step_of(files.weights) if files.is_checkpoint else exported_step(files.weights.parent)
    return {option: Input(place(named), weights_hash(files), "" if step is None else f"step {step}"), **none}


def weights_hash(files: ModelFolder) -> str:
    """SHA-256 of a checkpoint's manifest, which has its files' hashes; of a file, of its size and of blocks all over
    it: a training step changes them all, and to read a file of many gigabytes takes long."""
    if files.is_checkpoint:
        return hashlib.sha256((files.weights / COMPLETE).read_bytes()).hexdigest()
    size = files.weights.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(files.weights, "rb") as stream:
        for block in range(BLOCKS):
            stream.seek(block * max(size - BLOCK_BYTES, 0) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def load_first_weights(task: Task, config: Config, load_head: bool) -> ModelFolder | None:
    """Copy the weights that ``init_from`` names into ``task``, unless the run goes on from a checkpoint or branches.

    Of an unfinished run they are the fp32 weights of its newest checkpoint. Called by all ranks.

    Returns:
        what they were read from; None if it did not.
    Raises:
        UserError: as ``load_initial`` and ``resume.check``.
    """
    if config.resume_from or not config.init_from or decide(lambda: goes_on(config)):
        return None
    mark(f"the reading of {config.init_from}")
    files = decide(lambda: ModelFolder.find(config.init_from or "", unfinished=True))
    if not files.is_checkpoint:
        _load_file(task, files, load_head)
        return files
    state = ShardedState(files.weights, resume.check(files.weights))
    if load_head:
        _check_head(task, state.names, files)
    names = [name for name in state.names if name.startswith(wanted(task, load_head))]
    copy_initial(task, {name: state.whole(name) for name in names}, files, load_head)
    return files


def branch_point(config: Config, identity: Identity, total_steps: int) -> tuple[Path, Manifest] | None:
    """The checkpoint that ``resume_from`` names, checked; None without one. Called by all ranks.

    Raises:
        UserError: as ``resume.check``, or the branch could not take its tensors (the differences are
            named), or would end before it.
    """
    if not config.resume_from:
        return None
    path = decide(lambda: _named(config)).weights
    manifest = resume.check(path)
    before = decide(lambda: branched_from(path, manifest))
    if found := before.for_a_branch().differences(identity.for_a_branch()):
        raise UserError(
            f"--resume_from {path}: {summarized(found)}; a branch keeps these; with other ones start a new run from "
            "the weights: --init_from"
        )
    if manifest.step >= total_steps:
        raise UserError(
            f"--resume_from {path}: is at step {manifest.step}, and this run has {total_steps} in all; raise "
            "optimizer.total_steps (or epochs), or name an earlier checkpoint"
        )
    return path, manifest


def branched_from(path: Path, manifest: Manifest) -> Identity:
    """Of the run that wrote a checkpoint; where an older version stored no settings, its run's config tells them."""
    found = identity_in(path, manifest)
    run = run_of(path)
    return found if found.settings or run is None else Identity(stored_identity(run).settings, found.inputs)


def load_initial(task: Task, checkpoint: str | Path, load_head: bool) -> None:
    """Copy weights into ``task``; an expert-parallel rank takes its experts, positions are interpolated.

    Args:
        task: built for its own image size and head.
        checkpoint: a run folder, a model folder, or a weights file in EVE's published naming or EVE-DS's own.
        load_head: the head comes from there too, and must be there; else it keeps its initial values.
    Raises:
        UserError: nothing there, unreadable, or of another model; the message names file and tensors.
        UserError: the config beside the weights has other values of ``SHAPE_INDEPENDENT`` settings.
    """
    _load_file(task, ModelFolder.find(checkpoint), load_head)


def _load_file(task: Task, files: ModelFolder, load_head: bool) -> None:
    state = load_weights(files.weights)
    if is_published(state):
        try:
            state = from_published(state, task.config)
        except UserError as error:
            raise UserError(f"{files.weights}: {error} (--vlmo_config names EVE's JSON for these weights)") from error
    if load_head:
        _check_head(task, state, files)
    copy_initial(task, state, files, load_head)


def _check_head(task: Task, names: Collection[str], files: ModelFolder) -> None:
    missing = [name for name in task.state_dict() if name.startswith(task.heads) and name not in names]
    if missing:
        raise UserError(no_head(type(task).__name__, missing, names, files))


def no_head(task: str, missing: Collection[str], names: Collection[str], files: ModelFolder) -> str:
    """The message for weights that lack the tensors ``missing`` of the head for ``task``; ``names``: what they hold."""
    heads = {name.split(".")[0] for name in names if not name.startswith("backbone.")}
    held = f"beside the backbone it holds {listed(heads)}" if heads else "it holds the backbone alone"
    trained = None if files.config is None else read_run_config(files.config).get("task")
    whose = f", of a run of task {trained}" if trained else ""
    return (
        f"{files.weights}: holds no whole head for task {task.lower()}; missing: {listed(missing)}; {held}{whose}; "
        "name a model that was fine-tuned for this task, or train a head: without --evaluate and --load_head"
    )


def wanted(task: Task, load_head: bool) -> tuple[str, ...]:
    """How the names of the weights begin that ``task`` starts from."""
    return ("backbone.", *task.heads) if load_head else ("backbone.",)


def copy_initial(task: Task, state: dict[str, Tensor], files: ModelFolder, load_head: bool) -> None:
    """As ``load_initial``, of weights that have been read: ``state`` (EVE-DS names), from ``files``."""
    if files.config is not None:
        _check_settings(task.config, files.config)
    own = {name: tensor for name, tensor in state.items() if name.startswith(wanted(task, load_head))}
    load_state(task, resize_positions(own, task.config), files.weights, () if load_head else task.heads)


def _check_settings(config: ModelConfig, stored: Path) -> None:
    trained = read_run_config(stored, "model")["model"]
    for name in SHAPE_INDEPENDENT:
        before, now = trained.get(name, getattr(ModelConfig, name)), getattr(config, name)
        if before != now:
            raise UserError(
                f"model.{name} is {now} here, but the weights were trained with {before} ({stored}); "
                f"set --model.{name} {str(before).lower() if isinstance(before, bool) else before}"
            )
