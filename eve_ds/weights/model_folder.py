"""What a user may mean by "this checkpoint": a run folder, a model folder, or a single file of weights."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from eve_ds.weights.hashes import HASHES, WEIGHTS, check_hash, read_hashes
from preprocessing.errors import DataError
from preprocessing.local_files import check_regular
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.text.tokenizer import FILE_NAME as TOKENIZER

CONFIG = "config.yaml"
HASHED = (WEIGHTS, CONFIG, TOKENIZER, ANSWER_LIST)
FILES = (*HASHED, HASHES)  # all that a model folder may hold
FORMAT = "eve-ds"
MODEL, CHECKPOINTS = "model", "checkpoints"  # folders of a run
COMPLETE = "complete.json"  # in a checkpoint that was written to its end
_MOST_LINKS = 42  # the system's own bound is 40
_CHECKPOINT = re.compile(r"step_\d+")


def metadata(step: int | None = None) -> dict[str, str]:
    """Of a model.safetensors of EVE-DS; ``step``: of the training that it comes from.

    One entry: safetensors writes several in any order, and equal weights shall be equal files.
    """
    return {"format": FORMAT if step is None else f"{FORMAT} step {step}"}


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return whole(run / CHECKPOINTS)


def tagged(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first, also those that a killed run left half.

    Here and below: raises OSError where the folder cannot be looked at, which says nothing of what is in it.
    """
    return sorted((path for path in entries(folder) if _CHECKPOINT.fullmatch(path.name)), key=step_of)


def whole(folder: Path) -> list[Path]:
    """Those of them that were saved to the end."""
    return [path for path in tagged(folder) if is_there(path / COMPLETE)]


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in ``folder``, or None."""
    return next(reversed(whole(folder)), None)


def entries(folder: Path) -> list[Path]:
    """What is in a folder, which need not be there. Not by glob: that finds nothing in what cannot be read."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        return []


def is_there(path: Path) -> bool:
    """Whether there is such a path. Not by Path.exists: that of Python 3.14 says no where it cannot tell."""
    try:
        path.stat()
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False


def step_of(checkpoint: Path) -> int:
    """Of a folder step_NNNNNNNN."""
    return int(checkpoint.name.removeprefix("step_"))


def run_of(checkpoint: Path) -> Path | None:
    """The run that RUN/checkpoints/step_N, a whole checkpoint, belongs to; None for another path."""
    found = checkpoint_at(checkpoint)
    return None if found is None else found.absolute().parents[1]


def checkpoint_at(path: Path) -> Path | None:
    """The whole checkpoint, by its own name, that a path is or that a link there leads to; None for another path."""
    names = [path, path.absolute()]  # "." has no name
    while names[-1].is_symlink() and len(names) < _MOST_LINKS:
        last = names[-1]
        names.append(Path(os.path.normpath(os.path.realpath(last.parent) / Path(os.readlink(last)))))
    names.append(Path(os.path.realpath(path)))
    found = [each for each in names if _CHECKPOINT.fullmatch(each.name) and (each / COMPLETE).is_file()]
    return next((each for each in found if each.absolute().parent.name == CHECKPOINTS), next(iter(found), None))


def exported_step(model: Path) -> int | None:
    """The step that a model folder was exported at; None if unknown, as for published weights.

    What an older version exported does not say it; but its run ended there, and its config may say when.
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
    """The newest checkpoint of a run, if the model that the run exported is older than it or there is none."""
    last = newest(run / CHECKPOINTS)
    if last is None or not (run / MODEL / WEIGHTS).is_file():
        return last
    exported = exported_step(run / MODEL)
    return last if exported is not None and exported < step_of(last) else None


@dataclass(frozen=True)
class ModelFolder:
    """Where the parts of a model lie; config and tokenizer are None for a bare file of weights.

    Attributes:
        weights: a file; or the folder of a DeepSpeed checkpoint (``is_checkpoint``).
    """

    weights: Path
    config: Path | None
    tokenizer: Path | None

    @property
    def is_checkpoint(self) -> bool:
        return self.weights.is_dir()

    @property
    def folder(self) -> Path:
        """Where what belongs to the weights lies, such as VQA's answer list: of a checkpoint its run's folder."""
        return (run_of(self.weights) if self.is_checkpoint else None) or self.weights.parent

    @classmethod
    def find(cls, path: str | Path, unfinished: bool = False) -> ModelFolder:
        """Look for weights at ``path``, in it, or in its folder ``model``.

        Args:
            path: a file of weights, a model folder, or a run's folder.
            unfinished: of a run that has not exported its newest state take the newest checkpoint; and take any
                checkpoint, RUN/checkpoints/step_N, that is named.
        Raises:
            DataError: nothing there that holds weights; or they are a checkpoint, and the caller cannot read such.
        """
        path = Path(path)
        if path.is_file() and run_of(path.parent):
            raise DataError(f"{path}: is one file of a checkpoint; name the whole of it, {path.parent}")
        if path.is_file():
            return cls._beside(path)
        if (path / WEIGHTS).is_file():
            return cls._beside(path / WEIGHTS)
        checkpoint = checkpoint_at(path) or newer_checkpoint(path)
        if checkpoint is not None:
            if not unfinished:
                raise DataError(_unfinished(path, checkpoint))
            return cls._of_checkpoint(checkpoint)
        if (path / MODEL / WEIGHTS).is_file():
            return cls._beside(path / MODEL / WEIGHTS)
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; give a run folder, a model folder or a weights file")
        if path.name == CHECKPOINTS and checkpoints(path.parent):
            raise DataError(f"{path}: holds all checkpoints; name one of them, or the run, {path.parent}")
        raise DataError(
            f"{path}: no {WEIGHTS} here or in its folder {MODEL}, and no whole checkpoint; give a run that has saved "
            "one, a model folder or a weights file"
        )

    @classmethod
    def checkpoint(cls, path: str | Path) -> ModelFolder:
        """The checkpoint RUN/checkpoints/step_N at ``path``, or the newest one of the run there.

        Raises:
            DataError: there is none, or it is not whole.
        """
        path = Path(path)
        found = checkpoint_at(path) or next(reversed(checkpoints(path)), None)
        if found is None:
            raise DataError(f"{path}: no whole checkpoint; give RUN/checkpoints/step_N, or RUN for its newest one")
        return cls._of_checkpoint(found)

    @classmethod
    def _beside(cls, weights: Path) -> ModelFolder:
        """The folder of ``weights``; its small files have their hashes (load.py looks at that of the weights)."""
        for name, sha256 in read_hashes(weights.parent).items():
            if name in HASHED and name != WEIGHTS:
                check_hash(weights.parent / name, sha256)
        return cls(weights, _if_file(weights.parent / CONFIG), _if_file(weights.parent / TOKENIZER))

    @classmethod
    def _of_checkpoint(cls, checkpoint: Path) -> ModelFolder:
        check_regular(checkpoint / COMPLETE)
        run = run_of(checkpoint)
        if run is None:  # a folder, say
            raise DataError(f"{checkpoint / COMPLETE}: is no file; name another checkpoint")
        return cls(checkpoint, _if_file(run / CONFIG), _tokenizer_of(run))


def _tokenizer_of(run: Path) -> Path | None:
    """The run's own copy, that beside its export, or the one that its config names."""
    found = _if_file(run / TOKENIZER) or _if_file(run / MODEL / TOKENIZER)
    if found is not None:
        return found
    named = stored_setting(run, "data", "tokenizer")
    return Path(named) if isinstance(named, str) and Path(named).exists() else None


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _unfinished(path: Path, checkpoint: Path) -> str:
    """Why weights are not taken, and what to do."""
    state = (
        "a checkpoint of DeepSpeed"
        if checkpoint == checkpoint_at(path)
        else f"its newest state is a checkpoint, {checkpoint}"
    )
    older = ""
    if (path / MODEL / WEIGHTS).is_file():
        older = f" (its model is of step {exported_step(path / MODEL)}; name {path / MODEL} to take that)"
    return (
        f"{path}: {state}{older}; make a model of it first: "
        f"python -m eve_ds.convert from-deepspeed --checkpoint {path} --out MODEL"
    )
