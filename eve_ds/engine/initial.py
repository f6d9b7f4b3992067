"""Where the first weights of a run come from, what they bring with them, and their way into the task."""

from __future__ import annotations

import hashlib
from pathlib import Path

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine import soundness
from eve_ds.engine.agreement import decide
from eve_ds.engine.identity import Input, place
from eve_ds.engine.universal import ShardedState
from eve_ds.tasks.base import Task
from eve_ds.tasks.initial import copy_initial, load_initial, wanted
from eve_ds.weights.model_folder import COMPLETE, ModelFolder, checkpoints, exported_step, step_of
from preprocessing.schema import DataError

Config = PretrainConfig | FinetuneConfig
BLOCKS, BLOCK_BYTES = 64, 1 << 14  # of a file of weights that its hash looks at


def goes_on(config: Config) -> bool:
    """Whether the run has a checkpoint of its own in ``output_dir``: then it needs no first weights."""
    trains = not (isinstance(config, FinetuneConfig) and config.evaluate)
    return bool(trains and config.checkpoint.resume and config.output_dir and checkpoints(Path(config.output_dir)))


def source(config: Config) -> ModelFolder | None:
    """What the run starts from; where that is gone, and the run goes on, its own newest checkpoint.

    Raises:
        DataError: there is nothing that holds weights.
    """
    if not config.init_from:
        return None
    try:
        return ModelFolder.find(config.init_from, unfinished=True)
    except DataError:
        if not goes_on(config):
            raise
        return ModelFolder.find(checkpoints(Path(config.output_dir))[-1], unfinished=True)


def origin(config: Config) -> dict[str, Input | None]:
    """The first weights as an input of the run (``identity``); missing where they are gone."""
    if not config.init_from:
        return {"init_from": None}
    try:
        files = ModelFolder.find(config.init_from, unfinished=True)
    except DataError:
        return {}  # ``source`` has said so, unless the run goes on
    step = step_of(files.weights) if files.is_checkpoint else exported_step(files.weights.parent)
    return {"init_from": Input(place(config.init_from), weights_hash(files), "" if step is None else f"step {step}")}


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


def load_first_weights(task: Task, config: Config, load_head: bool) -> bool:
    """Copy the weights that ``init_from`` names into ``task``, unless the run goes on from a checkpoint of its own.

    Of an unfinished run they are the fp32 weights of its newest checkpoint. Called by all ranks.

    Returns:
        whether it did.
    Raises:
        UserError, DataError, WeightsError: as ``load_initial`` and ``soundness.check``.
    """
    if not config.init_from or decide(lambda: goes_on(config)):
        return False
    files = decide(lambda: ModelFolder.find(config.init_from or "", unfinished=True))
    if not files.is_checkpoint:
        load_initial(task, config.init_from, load_head)
        return True
    state = ShardedState(files.weights, soundness.check(files.weights))
    names = [name for name in state.names if name.startswith(wanted(task, load_head))]
    copy_initial(task, {name: state.whole(name) for name in names}, files, load_head)
    return True
