"""Reads the runs that a comparison shows, and flattens what is compared of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from evaluation.common import InputError, read_json
from eve_ds.report.run_files import STAGES, Stage, newest_start, read_run
from eve_ds.tasks.registry import PRETRAIN
from eve_ds.weights.model_folder import starts

MOST_RUNS = 6  # as many as the page has colors
DEFAULT_TASK = "pretrain"


@dataclass
class Compared:
    """One of the runs.

    Attributes:
        name: the shortest end of its path that no other of the runs has.
        stage: its files.
        config: config.yaml by dotted key; empty if it is missing or cannot be read.
        start: what its newest start recorded; empty if it recorded nothing.
        recorded: of the start, what is compared, by dotted key.
    """

    name: str
    stage: Stage
    config: dict[str, Any]
    start: dict[str, Any]
    recorded: dict[str, Any]

    @property
    def task(self) -> str:
        return str(self.config.get("task", DEFAULT_TASK))

    @property
    def pretrains(self) -> bool:
        return self.task in PRETRAIN


def read_compared(folders: Sequence[Path]) -> list[Compared]:
    """Read two to six training runs.

    Raises:
        InputError: too few, too many, one twice, a folder that is no training run, or a damaged file in it.
    """
    if len(folders) < 2:
        raise InputError(f"{folders[0]}: one run alone cannot be compared; for its report: --run {folders[0]}")
    if len(folders) > MOST_RUNS:
        raise InputError(f"{len(folders)} runs are too many for one page; name at most {MOST_RUNS}")
    seen: dict[Path, Path] = {}
    for folder in folders:
        if before := seen.get(folder.resolve()):
            raise InputError(f"{before} and {folder} are the same folder; name each run once")
        seen[folder.resolve()] = folder
        _check(folder)
    names = _short_names(list(seen))
    return [read_training(folder, name) for folder, name in zip(folders, names, strict=True)]


def _check(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if any((folder / name).is_file() for name in ("metrics.jsonl", "config.yaml")):
        return
    parts = [name for name in STAGES if (folder / name).is_dir()]
    if parts:
        raise InputError(f"{folder}: holds several runs, {', '.join(parts)}; name one of them, as {folder / parts[0]}")
    raise InputError(f"{folder}: holds no run: neither metrics.jsonl nor config.yaml")


def _short_names(paths: list[Path]) -> list[str]:
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def read_training(folder: Path, name: str | None = None) -> Compared:
    """Read the training run in ``folder``, which holds one. ``name``: its own by default.

    Raises:
        InputError: a file is damaged.
    """
    (stage,) = read_run(folder).stages.values()
    try:
        tree = yaml.safe_load(stage.config or "")
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-45
        raise InputError(f"{folder / 'config.yaml'}: is no YAML that can be read ({type(error).__name__})") from error
    start = newest_start(folder)
    return Compared(name or folder.name, stage, flat(tree), start, _recorded(folder, start))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested dictionaries by dotted key; lists are leaves."""
    if not isinstance(tree, dict):
        return {}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _recorded(folder: Path, start: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if start:
        code = _part(start, "code")
        if commit := code.get("commit"):  # not of a start outside of a checkout
            diff = code.get("diff")
            found = {"code.commit": str(commit)[:12], "code.branch": code.get("branch")}
            found["code.uncommitted changes"] = f"yes, SHA-256 {_hash(diff)}" if diff else "no"
        ranks = [rank for rank in _list(start, "ranks") if isinstance(rank, dict)]
        found["hosts"] = ", ".join(sorted({str(rank.get("host")) for rank in ranks}))
        found |= flat({key: start.get(key) for key in ("topology", "machine", "versions", "deepspeed_config")})
        found |= {"starts": len(starts(folder)), "command": start.get("command")}
        found = {key: value for key, value in found.items() if value is not None}
    path = folder / "identity.json"  # of runs that recorded no start, too
    identity = read_json(path) if path.is_file() else {}
    inputs = _part(identity if isinstance(identity, dict) else {}, "inputs")
    for name, value in inputs.items():
        known = value if isinstance(value, dict) else {}
        found[f"input: {name}"] = f"SHA-256 {str(known.get('hash'))[:12]}, {known.get('size')}" if known else None
    return found


def _part(tree: dict[str, Any], name: str) -> dict[str, Any]:
    found = tree.get(name)
    return found if isinstance(found, dict) else {}


def _list(tree: dict[str, Any], name: str) -> list[Any]:
    found = tree.get(name)
    return found if isinstance(found, list) else []


def _hash(text: Any) -> str:
    return hashlib.sha256(str(text).encode(errors="surrogatepass")).hexdigest()[:12]


def shown(value: Any) -> str:
    """A value of a config in a table."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
