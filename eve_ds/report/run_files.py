"""Reads what a run left in its folder. Nothing outside that folder is opened."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation.common import InputError, read_json, read_text
from eve_ds.tasks.registry import FINETUNE, PRETRAIN, find_spec, finetune_spec
from eve_ds.tasks.spec import FinetuneSpec
from eve_ds.weights.model_folder import starts
from preprocessing.errors import UserError, without_secrets
from preprocessing.local_files import load_json

STAGES = {"pretrain": "Pre-training", "itr": "Retrieval", "vqa": "VQA", "nlvr": "NLVR"}
SINGLE = "run"
log = logging.getLogger(__name__)


@dataclass
class Curve:
    """One number over the steps of a run; NaN where it was not finite."""

    steps: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class Stage:
    """One training run.

    Args:
        name: key in STAGES, or SINGLE.
        title: for people.
        folder: where it lies.
        config: text of config.yaml, None if there is none.
        curves: by the name that metrics.jsonl gives.
        damaged: lines of metrics.jsonl that could not be read.
        samples: samples/samples.json, empty if there is none.
    """

    name: str
    title: str
    folder: Path
    config: str | None
    curves: dict[str, Curve]
    damaged: int
    samples: dict[str, Any]

    def file(self, name: str) -> str:
        """A file of this stage as the reader of the report would look for it."""
        return name if self.name == SINGLE else f"{self.name}/{name}"


@dataclass
class Run:
    """All that the report shows.

    Args:
        folder: the run's.
        metrics: metrics.json of the whole run, or a single run's scores under the name of their task.
        tasks: by their section of ``metrics``; of a single run its own task, which may be a user's.
        commands: commands.json.
        versions: versions.json, or of the newest start that recorded them; None if none did.
        stages: by name.
    """

    folder: Path
    metrics: dict[str, Any]
    tasks: dict[str, FinetuneSpec]
    commands: list[dict[str, Any]]
    versions: dict[str, Any] | None
    stages: dict[str, Stage]

    @property
    def single(self) -> bool:
        """Whether this is one training run, not a folder of several."""
        return SINGLE in self.stages


def read_run(folder: Path) -> Run:
    """Read a run's folder: that of the demo with its stages, or that of one training run.

    Raises:
        InputError: no folder, nothing of a run in it, or a file that is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"--run {folder}: no such folder")
    single = any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml"))
    if single:
        stages = {SINGLE: _read_stage(SINGLE, "Training", folder)}
    else:
        found = [name for name in STAGES if (folder / name).is_dir()]
        stages = {name: _read_stage(name, STAGES[name], folder / name) for name in found}
    metrics = optional(folder / "metrics.json", dict) or {}
    tasks = {spec.name: spec for spec in map(finetune_spec, FINETUNE)}
    if not stages and not metrics:
        wanted = ", ".join(f"{name}/" for name in STAGES)
        raise InputError(f"--run {folder}: holds no run: neither metrics.jsonl nor metrics.json nor any of {wanted}")
    if single and not metrics:
        scores = _scores(folder)
        spec = task_of(stages[SINGLE], scores)
        if spec is not None and scores:
            tasks, metrics = {spec.name: spec}, {spec.name: scores}
    return Run(
        folder=folder,
        metrics=metrics,
        tasks=tasks,
        commands=_rows(optional(folder / "commands.json", list) or [], folder / "commands.json"),
        versions=optional(folder / "versions.json", dict) or _recorded_versions(stages.values()),
        stages=stages,
    )


def newest_start(folder: Path) -> dict[str, Any]:
    """What the newest start of the run in ``folder`` recorded; empty if none did, as in older versions."""
    found = starts(folder)
    record: dict[str, Any] = optional(found[-1], dict) if found else {}
    return record


def _recorded_versions(stages: Iterable[Stage]) -> dict[str, Any] | None:
    found = (newest_start(stage.folder).get("versions") for stage in stages)
    return next((versions for versions in found if versions and isinstance(versions, dict)), None)


def _read_stage(name: str, title: str, folder: Path) -> Stage:
    config = folder / "config.yaml"
    curves, damaged = _read_curves(folder / "metrics.jsonl")
    return Stage(
        name=name,
        title=title,
        folder=folder,
        config=without_secrets(read_text(config)) if config.is_file() else None,  # an older run's may hold some
        curves=curves,
        damaged=damaged,
        samples=optional(folder / "samples" / "samples.json", dict) or {},
    )


def _read_curves(path: Path) -> tuple[dict[str, Curve], int]:
    """All numbers of metrics.jsonl by name, and how many lines were damaged (a running job's last one may be)."""
    curves: dict[str, Curve] = {}
    damaged = 0
    if not path.is_file():
        return curves, damaged
    for line in read_text(path).splitlines():
        try:
            record = load_json(line)
            step = float(record["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged += bool(line.strip())
            continue
        for key, value in record.items():
            if (found := math.nan if value is None else number(value)) is not None:
                curve = curves.setdefault(key, Curve())
                curve.steps.append(step)
                curve.values.append(found)
    return curves, damaged


def number(value: Any) -> float | None:
    """The value as a float; None where it is no number, or a whole one beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def task_of(stage: Stage, scores: dict[str, Any]) -> FinetuneSpec | None:
    """The task of a fine-tuning run, as its config says; without one, the built-in task that has such scores.

    None for pre-training, and if the task cannot be imported here.
    """
    named = re.search(r"^task: (\S+)$", stage.config or "", re.MULTILINE)
    if named is None:
        built_in = map(finetune_spec, FINETUNE)
        return next((spec for spec in built_in if any(key in scores for key, _ in spec.measures)), None)
    if named[1] in PRETRAIN:
        return None
    try:
        spec = find_spec(named[1])
        return spec if isinstance(spec, FinetuneSpec) else None
    except UserError as error:
        log.warning("%s: its scores are not shown: %s", stage.folder, error)
        return None


def _scores(folder: Path) -> dict[str, Any]:
    """A fine-tuning run's scores_<split>.json: the test split's, if there are several."""
    paths = sorted(folder.glob("scores_*.json"), key=lambda path: (path.stem != "scores_test", path.name))
    scores: dict[str, Any] = optional(paths[0], dict) if paths else {}
    return scores


def optional(path: Path, kind: type) -> Any:
    """The JSON value of a file, None if there is no such file.

    Raises:
        InputError: it is there and damaged, or holds something else than a ``kind``.
    """
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, kind):
        raise InputError(f"{path}: must hold a JSON {'object' if kind is dict else 'list'}")
    return value


def _rows(value: list[Any], path: Path) -> list[dict[str, Any]]:
    for number, row in enumerate(value):
        if not isinstance(row, dict) or not isinstance(row.get("command"), str):
            raise InputError(f"{path}: entry {number} must be an object with a text 'command'")
    return value
