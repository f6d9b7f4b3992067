"""Resolve a ``--checkpoint`` path: a run folder, a model folder, or a single file of weights.

``hashes.json`` of a model folder, {file name: SHA-256}, keeps corrupted files from being loaded silently. A folder
without it (from an older version, or made by hand) is loaded unchecked, and so is a file that it does not list. Only
the weights must be listed, since every writer lists them.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from preprocessing.errors import UserError
from preprocessing.local_files import check_regular, dump_json, load_json, write_atomic
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.text.tokenizer import FILE_NAME as TOKENIZER

HASHES, WEIGHTS = "hashes.json", "model.safetensors"
CONFIG = "config.yaml"
HASHED = (WEIGHTS, CONFIG, TOKENIZER, ANSWER_LIST)
CARD = "README.md"  # see model_card.py; its owner may edit it
FILES = (*HASHED, HASHES, CARD)  # every file of a model folder
FORMAT = "eve-ds"
INITIAL_WORDS = f"{FORMAT} initial words"
MODEL, CHECKPOINTS = "model", "checkpoints"  # folders of a run
MODEL_EMA = "model_ema"  # as MODEL, with the moving averages of the weights (``optimizer.ema``)
MODEL_BEST = "model_best"  # as MODEL, with the weights of the best evaluation (``checkpoint.best``)
BEST = "best.json"  # in MODEL_BEST: {"metric", "mode", "value", "step"}
COMPLETE = "complete.json"  # written last: marks a complete checkpoint
PROVENANCE = "provenance"  # folder of a run: a file for each start
_MAX_LINKS = 42  # the limit of Linux is 40
_CHECKPOINT = re.compile(r"step_\d+")


def write_hashes(folder: Path, names: tuple[str, ...]) -> None:
    """Write the hashes of those files ``names`` that exist in ``folder``, atomically; call it last."""
    write_atomic(
        folder / HASHES, dump_json({name: file_hash(folder / name) for name in names if (folder / name).is_file()})
    )


def read_hashes(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of a folder's files; empty without ``hashes.json``. Raises UserError if that is damaged."""
    path = folder / HASHES
    if not path.is_file():
        return {}
    try:
        found = load_json(path.read_bytes())
    except (OSError, ValueError) as error:
        found = error
    sound = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    if not sound or (WEIGHTS not in found and (folder / WEIGHTS).is_file()):
        raise UserError(f"{path}: is damaged; copy the folder again, or delete that file to load without a check")
    return found


def check_hash(path: Path, sha256: str) -> None:
    """Raise UserError unless the file exists and has this hash."""
    try:
        same = file_hash(path) == sha256
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, but {HASHES} names it; copy the folder again") from None
    if not same:
        raise UserError(
            f"{path}: its SHA-256 is not the one in {HASHES} beside it: its bytes have changed; copy the folder again "
            f"(after an intended edit, delete {HASHES})"
        )


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def metadata(step: int | None = None, initial_words: bool = False) -> dict[str, str]:
    """Metadata of a model.safetensors of EVE-DS; ``step``: the training step of the weights; ``initial_words``: the
    vectors of words have initial values, so that any tokenizer goes with them.

    It has a single entry, because safetensors writes several in random order, and equal weights must be equal files.
    """
    if initial_words:
        return {"format": INITIAL_WORDS}
    return {"format": FORMAT if step is None else f"{FORMAT} step {step}"}


def has_initial_words(weights: Path) -> bool:
    """Whether a file of weights says that its vectors of words have initial values (``metadata``)."""
    try:
        with safe_open(weights, framework="numpy") as file:
            return (file.metadata() or {}).get("format") == INITIAL_WORDS
    except (OSError, SafetensorError):
        return False  # load_weights says what is wrong with the file


def starts(folder: Path) -> list[Path]:
    """What the starts of the run in ``folder`` recorded, ``provenance/start_N.json``, the newest last."""
    found = [path for path in (folder / PROVENANCE).glob("start_*.json") if re.fullmatch(r"start_\d+", path.stem)]
    return sorted(found, key=start_number)


def start_number(record: Path) -> int:
    """N of ``start_N.json``."""
    return int(record.stem.removeprefix("start_"))


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return complete_checkpoints(run / CHECKPOINTS)


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first, including incomplete ones of a killed run.

    Like the functions below, it raises OSError if the folder cannot be read: its content is then unknown.
    """
    return [folder / name for name in checkpoint_names(path.name for path in list_folder(folder))]


def checkpoint_names(names: Iterable[str]) -> list[str]:
    """Those of ``names`` that checkpoints have, oldest first."""
    return sorted((name for name in names if _CHECKPOINT.fullmatch(name)), key=lambda name: step_of(Path(name)))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, oldest first."""
    return [path for path in all_checkpoints(folder) if path_exists(path / COMPLETE)]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint in ``folder``, or None."""
    return next(reversed(complete_checkpoints(folder)), None)


def list_folder(folder: Path) -> list[Path]:
    """Content of a folder; [] if it does not exist. (glob returns nothing, without an error, if it cannot be read.)"""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def path_exists(path: Path) -> bool:
    """Whether a path exists. (Path.exists of Python 3.14 returns False if that cannot be determined.)"""
    try:
        path.stat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint folder ``step_NNNNNNNN``."""
    return int(checkpoint.name.removeprefix("step_"))


def run_of(checkpoint: Path) -> Path | None:
    """RUN of a complete checkpoint RUN/checkpoints/step_N; None for any other path."""
    found = checkpoint_at(checkpoint)
    return None if found is None else found.absolute().parents[1]


def checkpoint_at(path: Path) -> Path | None:
    """The complete checkpoint, with its own name, at a path or behind links; None if there is none."""
    names = [path, path.absolute()]  # "." has no name
    while names[-1].is_symlink() and len(names) < _MAX_LINKS:
        last = names[-1]
        names.append(Path(os.path.normpath(os.path.realpath(last.parent) / Path(os.readlink(last)))))
    names.append(Path(os.path.realpath(path)))
    found = [each for each in names if _CHECKPOINT.fullmatch(each.name) and (each / COMPLETE).is_file()]
    return next((each for each in found if each.absolute().parent.name == CHECKPOINTS), next(iter(found), None))


def exported_step(model: Path) -> int | None:
    """The step at which a model folder was exported; None if unknown, as for published weights.

    Older versions did not store it; they exported at the end of the run, so it is ``total_steps`` of the config.
    """
    try:
        with safe_open(model / WEIGHTS, framework="numpy") as file:
            step: Any = (file.metadata() or {}).get("format", "").removeprefix(f"{FORMAT} step ")
        if step in ("", FORMAT):
            step = stored_setting(model, "optimizer", "total_steps")
        return None if step is None else int(step)
    except (OSError, SafetensorError, TypeError, ValueError):
        return None  # load_weights says what is wrong with the file


def stored_setting(folder: Path, section: str, key: str) -> Any:
    """A value of the config.yaml in a run's or model's folder; None if it cannot be read or does not hold it.

    ``recipes.read_run_config`` is for callers that need it: it says what is wrong.
    """
    try:
        return yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))[section][key]
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError):
        return None


def newer_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint of a run, if it is newer than the exported model or there is no exported model."""
    last = newest_checkpoint(run / CHECKPOINTS)
    if last is None or not (run / MODEL / WEIGHTS).is_file():
        return last
    exported = exported_step(run / MODEL)
    return last if exported is not None and exported < step_of(last) else None


class MissingError(UserError):
    """No weights are there (any more): a run that goes on from a checkpoint of its own does not need them."""


@dataclass(frozen=True)
class ModelFolder:
    """Paths of the parts of a model; config and tokenizer are None for a bare weights file.

    Attributes:
        weights: a file, or the folder of a DeepSpeed checkpoint (``is_checkpoint``).
    """

    weights: Path
    config: Path | None
    tokenizer: Path | None

    @property
    def is_checkpoint(self) -> bool:
        return self.weights.is_dir()

    @property
    def folder(self) -> Path:
        """Folder of the files that belong to the weights, such as VQA's answer list; of a checkpoint: its run."""
        return (run_of(self.weights) if self.is_checkpoint else None) or self.weights.parent

    @classmethod
    def find(cls, path: str | Path, unfinished: bool = False) -> ModelFolder:
        """Find weights at ``path``, in it, or in its folder ``model``.

        Args:
            path: a file of weights, a model folder, or a run's folder.
            unfinished: accept checkpoints, too: RUN/checkpoints/step_N, and for a run that has not exported its newest
                state the newest checkpoint.
        Raises:
            MissingError: no weights there.
            UserError: a checkpoint, and ``unfinished`` is False; or ``hashes.json`` says that it is damaged.
        """
        path = Path(path)
        if path.is_file() and run_of(path.parent):
            raise UserError(f"{path}: is one file of a checkpoint; name its folder, {path.parent}")
        if path.is_file():
            return cls._beside(path)
        if (path / WEIGHTS).is_file():
            return cls._beside(path / WEIGHTS)
        checkpoint = checkpoint_at(path) or newer_checkpoint(path)
        if checkpoint is not None:
            if not unfinished:
                raise UserError(_not_exported(path, checkpoint))
            return cls._of_checkpoint(checkpoint)
        if (path / MODEL / WEIGHTS).is_file():
            return cls._beside(path / MODEL / WEIGHTS)
        if not path.exists():
            raise MissingError(f"{path}: no such file or folder; give a run folder, a model folder or a weights file")
        if path.name == CHECKPOINTS and checkpoints(path.parent):
            raise UserError(f"{path}: holds all checkpoints; name one of them, or the run, {path.parent}")
        raise MissingError(
            f"{path}: no {WEIGHTS} here or in its folder {MODEL}, and no complete checkpoint; give a run that has "
            "saved one, a model folder or a weights file"
        )

    @classmethod
    def checkpoint(cls, path: str | Path) -> ModelFolder:
        """The checkpoint RUN/checkpoints/step_N at ``path``, or the newest one of the run there.

        Raises:
            MissingError: there is none, or it is incomplete.
            UserError: its ``complete.json`` is no file.
        """
        path = Path(path)
        found = checkpoint_at(path) or next(reversed(checkpoints(path)), None)
        if found is None:
            raise MissingError(
                f"{path}: no complete checkpoint; give RUN/checkpoints/step_N, or RUN for its newest one"
            )
        return cls._of_checkpoint(found)

    @classmethod
    def _beside(cls, weights: Path) -> ModelFolder:
        """The model folder of ``weights``. Checks the hashes of the small files; load.py checks that of the weights."""
        for name, sha256 in read_hashes(weights.parent).items():
            if name in HASHED and name != WEIGHTS:
                check_hash(weights.parent / name, sha256)
        return cls(weights, _if_file(weights.parent / CONFIG), _if_file(weights.parent / TOKENIZER))

    @classmethod
    def _of_checkpoint(cls, checkpoint: Path) -> ModelFolder:
        check_regular(checkpoint / COMPLETE)
        run = run_of(checkpoint)
        if run is None:  # COMPLETE is a folder, for example
            raise UserError(f"{checkpoint / COMPLETE}: is not a file; name another checkpoint")
        return cls(checkpoint, _if_file(run / CONFIG), _tokenizer_of(run))


def _tokenizer_of(run: Path) -> Path | None:
    """The tokenizer in the run folder, in its exported model, or named in its config."""
    found = _if_file(run / TOKENIZER) or _if_file(run / MODEL / TOKENIZER)
    if found is not None:
        return found
    named = stored_setting(run, "data", "tokenizer")
    return Path(named) if isinstance(named, str) and Path(named).exists() else None


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _not_exported(path: Path, checkpoint: Path) -> str:
    """Error message for a checkpoint that is not an exported model."""
    state = (
        "a checkpoint of DeepSpeed"
        if checkpoint == checkpoint_at(path)
        else f"its newest state is a checkpoint, {checkpoint}"
    )
    older = ""
    if (path / MODEL / WEIGHTS).is_file():
        older = f" (its model is of step {exported_step(path / MODEL)}; name {path / MODEL} to take that)"
    return (
        f"{path}: {state}{older}; convert it to a model first: "
        f"python -m eve_ds.convert from-deepspeed --checkpoint {path} --out MODEL"
    )
