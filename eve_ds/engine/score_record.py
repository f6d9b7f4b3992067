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
    MODEL,
    WEIGHTS,
    MissingError,
    ModelFolder,
    exported_step,
    file_hash,
    read_hashes,
    step_of,
)
from preprocessing.errors import without_secrets
from preprocessing.local_files import load_json, write_json

ABOUT, INCOMPLETE, INTERVALS = "about", "incomplete", "intervals"


def about(
    config: FinetuneConfig, dataset: Samples, split: str, counts: Mapping[str, int], folder: Path, step: int | None
) -> dict[str, Any]:
    """The value under ``about``.

    Args:
        config: the resolved tree.
        dataset: of the split.
        split: its name.
        counts: what is scored, as {"questions": n}.
        folder: the run's, with its ``config.yaml``.
        step: of the run in training whose weights are scored; None for those that ``--checkpoint`` names.
    """
    stored = folder / CONFIG
    state = checkout.code(checkout.ROOT)
    return {
        "task": config.task,
        "split": split,
        "examples": dict(counts),
        "checkpoint": _named(config.init_from) if step is None else _of_run(folder, step),
        "config_sha256": file_hash(stored) if stored.is_file() else None,
        "data": {
            "path": ", ".join(without_secrets(place(name)) for name, _ in dataset.split.parts),
            "fingerprint": dataset.split.fingerprint,
        },
        "commit": state.get("commit"),
        "dirty": state.get("dirty"),
        "version": checkout.own_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _of_run(run: Path, step: int) -> dict[str, Any]:
    return {"path": str(run), "weights": None, "sha256": None, "step": step}


def _named(path: str | None) -> dict[str, Any] | None:
    """Of what ``--checkpoint`` names; None for initial values, which have no file."""
    if not path:
        return None
    try:
        files = ModelFolder.find(path, unfinished=True)
    except MissingError:  # removed after it was loaded, by a run that goes on there
        return {"path": path, "weights": None, "sha256": None, "step": None}
    if files.is_checkpoint:  # whose record has the hashes of all its files
        return _read(path, files.weights / COMPLETE, None, step_of(files.weights))
    hashes = read_hashes(files.weights.parent)
    return _read(path, files.weights, hashes.get(files.weights.name), exported_step(files.weights.parent))


def _read(path: str, weights: Path, sha256: str | None, step: int | None) -> dict[str, Any]:
    return {"path": path, "weights": place(weights), "sha256": sha256 or file_hash(weights), "step": step}


def add_exported(folder: Path, split: str) -> None:
    """Name the model that the run in ``folder`` has exported, and its hash, in the scores that it wrote before."""
    scores, model = folder / f"scores_{split}.json", folder / MODEL
    if not scores.is_file() or WEIGHTS not in (hashes := read_hashes(model)):
        return
    content = load_json(scores.read_text(encoding="utf-8"))
    content[ABOUT]["checkpoint"] |= {"weights": place(model / WEIGHTS), "sha256": hashes[WEIGHTS]}
    write_json(scores, content)
