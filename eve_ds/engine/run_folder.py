"""The folder of a run: the same config resumes in it, and another one is refused."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import re
from pathlib import Path

from eve_ds import config as config_tree
from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine import watchdog
from eve_ds.engine.distributed import agree, broadcast, decide, place, prove_shared
from eve_ds.engine.identity import Identity, summarized
from eve_ds.recipes import read_run_config
from eve_ds.weights.model_folder import (
    BEST,
    CHECKPOINTS,
    CONFIG,
    FILES,
    MODEL,
    MODEL_BEST,
    MODEL_EMA,
    PROVENANCE,
    checkpoints,
    newer_checkpoint,
    run_of,
    step_of,
)
from preprocessing.errors import UserError
from preprocessing.local_files import make_folder, write_json
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.text.tokenizer import FILE_NAME as TOKENIZER

_log = logging.getLogger(__name__)
MODELS = (MODEL, MODEL_EMA, MODEL_BEST)
LOCK, IDENTITY = ".lock", "identity.json"
OF_A_START = {CONFIG, IDENTITY, TOKENIZER, ANSWER_LIST, watchdog.FOLDER, PROVENANCE}  # what a failed start leaves
_held: list[int] = []  # descriptors of locks: closing one releases its lock


def claim(config: PretrainConfig | FinetuneConfig, identity: Identity, total_steps: int | None = None) -> Identity:
    """Lock ``config.output_dir`` for this run and store the resolved config and the identity in it.

    Settings that do not change what is learned may differ from the stored ones. So may the length of the run: a longer
    one continues along the longer schedule. Called by all ranks; only rank 0 reads and writes the folder.

    Args:
        config: the resolved tree. With ``dry_run`` the folder is checked and not changed.
        identity: of the run.
        total_steps: optimizer steps of the whole run; None if it does not train.
    Returns:
        the identity, with the inputs that only the folder knew.
    Raises:
        UserError: no folder is named; it holds another run (the message lists the differences) or files of no run;
            another process uses it; its run is beyond ``total_steps``; the ranks see different folders; or they read
            different inputs.
    """
    _check_same_on_all_ranks(identity)
    identity = decide(lambda: _look(config, identity, total_steps))
    if config.dry_run:
        return identity
    decide(lambda: _take(Path(config.output_dir)))
    prove_shared(Path(config.output_dir), f"--output_dir {config.output_dir}")
    decide(lambda: _store(config, identity))
    return identity


def _look(config: PretrainConfig | FinetuneConfig, identity: Identity, total_steps: int | None) -> Identity:
    if not config.output_dir:
        raise UserError("--output_dir is missing; name a folder for checkpoints, metrics and the resolved config")
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder}: is a file; name a folder")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {folder}: {above} is no folder that can be written to; choose another one")
    if folder.absolute().parent.name == CHECKPOINTS and (folder.absolute().parents[1] / CONFIG).is_file():
        raise UserError(
            f"--output_dir {folder}: is among the checkpoints of a run, which removes what is not its own there; take "
            "one outside of it"
        )
    if config.resume_from and _run(config.resume_from) == folder.resolve():
        raise UserError(
            f"--resume_from {config.resume_from}: lies in --output_dir itself; a branch needs a folder of its own, and "
            "without --resume_from the run goes on from its newest checkpoint"
        )
    if holds_run(folder):
        if not config.checkpoint.resume:
            raise UserError(f"--output_dir {folder} holds a run and checkpoint.resume is false; choose another folder")
        before = stored_identity(folder)
        if found := before.differences(identity):
            raise UserError(f"--output_dir {folder} holds {_another(config, before, found)}")
        identity = before.merged(identity)
        newest = next(reversed(checkpoints(folder)), None)
        if total_steps is not None and newest is not None and step_of(newest) > total_steps:
            raise UserError(
                f"--output_dir {folder}: the run is at step {step_of(newest)}, and is to have {total_steps} in all; "
                "raise optimizer.total_steps (or epochs), or branch from an earlier checkpoint, --resume_from "
                f"{folder}/checkpoints/step_N, with another --output_dir"
            )
    elif _contents(folder):
        raise UserError(f"--output_dir {folder} holds files but no run (no config.yaml); choose an empty or new folder")
    return identity


def _another(config: PretrainConfig | FinetuneConfig, before: Identity, found: list[str]) -> str:
    """For a message: which run ``output_dir`` holds, the differences ``found``, and what to do."""
    folder = Path(config.output_dir)
    newest = next(reversed(checkpoints(folder)), None)
    if isinstance(config, FinetuneConfig) and config.evaluate and not before.settings.get("evaluate", False):
        told_of = "a training run; scores go into a folder of their own, so choose another --output_dir"
        if newer_checkpoint(folder):
            return f"{told_of} (the run is unfinished: --checkpoint {folder} scores its newest checkpoint, {newest})"
        if (folder / MODEL).is_dir():
            return f"{told_of} (--checkpoint {folder / MODEL} scores the run's model)"
        return f"{told_of} (the run has saved nothing yet that could be scored)"
    branch = f" (there, --resume_from {folder} branches from its newest checkpoint)" if newest else ""
    return f"another run: {summarized(found)}; make these equal to go on, or choose another folder{branch}"


def _run(checkpoint: str) -> Path:
    """The folder of the run that ``--resume_from`` names."""
    return (run_of(Path(checkpoint)) or Path(checkpoint)).resolve()


def _take(folder: Path) -> None:
    if not _lock(folder):
        raise UserError(
            f"--output_dir {folder}: another process trains or scores in it; wait for its end, or choose another folder"
        )


def _store(config: PretrainConfig | FinetuneConfig, identity: Identity) -> None:
    folder = Path(config.output_dir)
    of_models, of_scores = (
        "|".join(map(re.escape, (*FILES, BEST))),
        r"(predictions|details)_[\w-]+\.(npz|json|csv|parquet)",
    )
    names = rf"\.({of_models}|{of_scores})\.[0-9a-f]{{8}}"
    exported = [left for model in MODELS for left in (folder / model).glob(".*")]
    for left in (*folder.glob(".predictions_*"), *folder.glob(".details_*"), *exported):
        if re.fullmatch(names, left.name):  # of write_atomic, from an export or a scoring that was killed
            with contextlib.suppress(OSError):
                left.unlink()
    if not config.optimizer.ema and (folder / MODEL_EMA).exists():
        _log.warning("%s stays as it is: this run keeps no averages (optimizer.ema=0)", folder / MODEL_EMA)
    if config.checkpoint.best is None and (folder / MODEL_BEST).exists():
        _log.warning("%s stays as it is: this run follows no metric (checkpoint.best=null)", folder / MODEL_BEST)
    watchdog.forget(folder)
    config_tree.save(config, folder / CONFIG)
    write_json(folder / IDENTITY, identity.tree())


def _check_same_on_all_ranks(identity: Identity) -> None:
    """Raise UserError on all ranks if a rank has other settings than rank 0, or reads other inputs on its host."""
    found = broadcast(identity).differences(identity)
    agree(f"{place()} reads other things than rank 0: {summarized(found)} (there: rank 0)" if found else None)


def stored_identity(folder: Path) -> Identity:
    """The identity of the run in ``folder``. If it cannot be read (older versions stored none), that of its config.

    Raises:
        UserError: neither can be read.
    """
    try:
        return Identity.from_tree(json.loads((folder / IDENTITY).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, RecursionError):
        stored = folder / CONFIG
    try:
        return Identity.from_config(read_run_config(stored))
    except ValueError as error:  # UserError is one
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise UserError(f"{stored}: not the readable config of a run; choose another --output_dir") from error


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in the folder. A failed start leaves only what ``OF_A_START`` lists."""
    return (folder / CONFIG).is_file() and bool(_contents(folder))


def _contents(folder: Path) -> set[str]:
    """Names of what a run wrote. Hidden files do not count: killed starts and file systems leave them."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    return {name for name in names - OF_A_START if not name.startswith(".")}


def _lock(folder: Path) -> bool:
    """Lock the folder until this process ends. False if another process holds the lock.

    On a file system without locks this always succeeds.
    """
    make_folder(folder)
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loader processes would inherit that
    except OSError as error:
        os.close(descriptor)
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    _held.append(descriptor)
    return True
