"""What a file of scores says beside the metrics: what was scored, by which weights, code and settings, and when.

``scores_SPLIT.json`` has the metrics at its top and under

    intervals     {metric: [low, high]}: 95 % confidence intervals, by bootstrap (evaluation/bootstrap.py)
    incomplete    what the split lacks of its raw data, if so
    about         {"task", "split", "examples": {name: count}, "checkpoint", "config_sha256", "data", "commit", "dirty",
                  "version", "date"}

``checkpoint`` is {"path", "weights", "sha256", "step"}: what was named, what was read, its SHA-256, and the step that
it was at. Of a run that scores what it has just trained: its folder, its exported model, and that file's hash (null
where it exports none).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from eve_ds.config import FinetuneConfig
from eve_ds.data.samples import Samples
from eve_ds.engine import checkout
from eve_ds.engine.identity import place
from eve_ds.weights.model_folder import (
    COMPLETE,
    CONFIG,
    WEIGHTS,
    ModelFolder,
    exported_step,
    file_hash,
    read_hashes,
    step_of,
)
from preprocessing.errors import without_secrets

ABOUT, INCOMPLETE, INTERVALS = "about", "incomplete", "intervals"


def origin(named: str | None, files: ModelFolder | None) -> dict[str, Any]:
    """Those parts of ``about`` that may change while a split is scored: the weights and the code.

    Args:
        named: what ``--checkpoint`` names.
        files: what was loaded from there; None of a run that trains.
    """
    state = checkout.code(checkout.ROOT)
    return {
        "checkpoint": None if named is None or files is None else _loaded(named, files),
        "commit": state.get("commit"),
        "dirty": state.get("dirty"),
        "version": checkout.own_version(),
    }


def about(
    config: FinetuneConfig,
    dataset: Samples,
    split: str,
    counts: Mapping[str, int],
    folder: Path,
    begun: Mapping[str, Any],
    exported: tuple[int, str] | None = None,
) -> dict[str, Any]:
    """The value under ``about``.

    Args:
        config: the resolved tree.
        dataset: of the split.
        split: its name.
        counts: what is scored, as {"questions": n}.
        folder: the run's, with its ``config.yaml``.
        begun: of ``origin``, from before.
        exported: step of the weights of a run in training, and the folder of the run that has them; None for those that
            ``--checkpoint`` names.
    """
    stored = folder / CONFIG
    return {
        "task": config.task,
        "split": split,
        "examples": dict(counts),
        "config_sha256": file_hash(stored) if stored.is_file() else None,
        "data": {
            "path": ", ".join(without_secrets(place(name)) for name, _ in dataset.split.parts),
            "fingerprint": dataset.split.fingerprint,
        },
        **begun,
        **({} if exported is None else {"checkpoint": _of_run(folder, *exported)}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _of_run(run: Path, step: int, name: str) -> dict[str, Any]:
    """Of the run in training, which has exported its weights as ``name``, if it exports any."""
    weights = run / name / WEIGHTS
    if not weights.is_file() or exported_step(weights.parent) != step:
        return {"path": str(run), "weights": None, "sha256": None, "step": step}
    return _read(str(run), weights, read_hashes(weights.parent).get(WEIGHTS), step)


def _loaded(path: str, files: ModelFolder) -> dict[str, Any]:
    try:
        if files.is_checkpoint:  # whose record has the hashes of all its files
            return _read(path, files.weights / COMPLETE, None, step_of(files.weights))
        hashes = read_hashes(files.weights.parent)
        return _read(path, files.weights, hashes.get(files.weights.name), exported_step(files.weights.parent))
    except FileNotFoundError:  # removed since, by a run that goes on there
        return {"path": path, "weights": place(files.weights), "sha256": None, "step": None}


def _read(path: str, weights: Path, sha256: str | None, step: int | None) -> dict[str, Any]:
    return {"path": path, "weights": place(weights), "sha256": sha256 or file_hash(weights), "step": step}
