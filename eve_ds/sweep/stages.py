"""The commands of a sweep: a pre-training per row and seed, then a fine-tuning per task, each an ordinary command."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eve_ds.config import FinetuneConfig, PretrainConfig, parse
from eve_ds.demo import FIRST_VALUES
from eve_ds.finetune_options import expand_options
from eve_ds.model.model_config import ModelConfig
from eve_ds.recipes import find_recipe, read_yaml
from eve_ds.sweep.tables import Row, Table
from eve_ds.weights.model_folder import HASHES, MODEL
from preprocessing.errors import UserError

MARKER = "sweep.json"  # in the folder of a sweep: {"table": its name}
PRETRAIN, FINETUNE = "eve_ds.pretrain", "eve_ds.finetune"


@dataclass(frozen=True)
class Settings:
    """What the runs of a sweep have in common.

    Args:
        out: folder of the sweep.
        config: recipe of the pre-training.
        data: prepared captions.
        tokenizer: its folder.
        tasks: {a fine-tuning's --task: (its recipe, its data)}.
        steps: of the pre-training; None as the recipe has it.
        finetune_steps: likewise.
        ranks: processes of a run; above 1 they are started by torchrun.
        extra: options of every pre-training.
    """

    out: Path
    config: str
    data: str
    tokenizer: str
    tasks: Mapping[str, tuple[str, str]]
    steps: int | None = None
    finetune_steps: int | None = None
    ranks: int = 1
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        title: row, seed and kind of the run.
        command: as it is typed; "python" is this interpreter.
        folder: of the run.
        product: the file that the run writes last.
    """

    title: str
    command: list[str]
    folder: Path
    product: Path

    @property
    def shown(self) -> str:
        return shlex.join(self.command)

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    @property
    def record(self) -> Path:
        """{"command", "seconds" of its processes that have ended}. Not there for a run that was started by hand."""
        return self.folder.with_suffix(".json")


def run_folder(out: Path, row: str, seed: int, kind: str) -> Path:
    """Of a row's pre-training (``kind`` pretrain) or of a fine-tuning (``kind`` is its task)."""
    return out / row / f"seed_{seed}" / kind


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no file. Raises UserError for one that is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is damaged; delete it, and repeat the sweep")
    return found


def scores_file(folder: Path) -> Path:
    """Of a fine-tuning, which scores the split ``test``."""
    return folder / "scores_test.json"


def lanes(settings: Settings, table: Table, rows: Collection[str], seeds: int, check: bool = True) -> list[list[Stage]]:
    """A lane for each seed and row: pre-training, fine-tunings. Seed by seed, so that half a sweep compares all rows.

    Args:
        settings: of all runs.
        table: which sweep it is.
        rows: names of the chosen rows; FIRST_VALUES is the fine-tuning without pre-training.
        seeds: number of seeds; they are 0, 1, ...
        check: parse all options now, not only when their run starts.
    Raises:
        UserError: the recipe or an option is not one, or the options of a row do not fit the recipe.
    """
    model = _parse(settings, []).model
    chosen = {row.name: options(row, model) for row in table.rows if row.name in rows}
    if check:
        for own in chosen.values():
            _parse(settings, own)
        for stage in _finetunings(settings, FIRST_VALUES, 0, model):
            argv, defaults = expand_options(_arguments(stage, FINETUNE))
            parse(FinetuneConfig, argv, f"python -m {FINETUNE}", defaults)
    found = []
    for seed in range(seeds):
        if FIRST_VALUES in rows:
            found.append(_finetunings(settings, FIRST_VALUES, seed, model))
        for name, own in chosen.items():
            pretraining = _pretraining(settings, name, seed, own)
            found.append([pretraining, *_finetunings(settings, name, seed, pretraining.folder)])
    return found


def options(row: Row, model: ModelConfig) -> list[str]:
    """The options of a row for a recipe with this model. Raises UserError if the model has no such blocks."""
    last = model.soft_layers
    if "{" in row.options and not last:
        raise UserError(f"model.soft_layers of the recipe is empty; row {row.name} is about the blocks in it")
    values = {"last": last, "later": [layer + 1 for layer in last], "deeper": model.depth + 1}
    compact = {name: json.dumps(value, separators=(",", ":")) for name, value in values.items()}
    return shlex.split(row.options.format(**compact))


def shape(model: ModelConfig, recipe: str) -> str:
    """The value of ``--model`` for a fine-tuning without a checkpoint: what differs from the defaults.

    What the fine-tuning's recipe sets of the model is left out: the recipe wins, as it does over a checkpoint.
    """
    tree = read_yaml(find_recipe(recipe), "--finetune_config")
    decided = (tree.get("model") if isinstance(tree, dict) else None) or {}
    values = {name: value for name, value in asdict(model).items() if value != getattr(ModelConfig(), name)}
    return json.dumps({name: value for name, value in values.items() if name not in decided})


def _parse(settings: Settings, own: list[str]) -> PretrainConfig:
    stage = _pretraining(settings, "row", 0, own)
    return parse(PretrainConfig, _arguments(stage, PRETRAIN), f"python -m {PRETRAIN}")


def _arguments(stage: Stage, module: str) -> list[str]:
    return stage.command[stage.command.index(module) + 1 :]


def _pretraining(settings: Settings, row: str, seed: int, own: list[str]) -> Stage:
    """A later option wins: ``extra`` over --steps and the seed, the row's ``own`` over ``extra``."""
    folder = run_folder(settings.out, row, seed, "pretrain")
    words = ["--config", settings.config, "--data.path", settings.data, "--data.tokenizer", settings.tokenizer]
    words += [*_common(settings, seed, settings.steps), *settings.extra, *own, "--output_dir", str(folder)]
    command = [*launcher(settings.ranks), PRETRAIN, *words]
    return Stage(f"{row}, seed {seed}: pre-training", command, folder, folder / MODEL / HASHES)


def _finetunings(settings: Settings, row: str, seed: int, start: Path | ModelConfig) -> list[Stage]:
    """``start``: the run to start from, or the model to start with initial values."""
    found = []
    for task, (config, data) in settings.tasks.items():
        folder = run_folder(settings.out, row, seed, task)
        words = ["--config", config, "--task", task, "--data", data]
        if isinstance(start, Path):
            words += ["--checkpoint", str(start)]
        else:
            words += ["--init_from", "null", "--model", shape(start, config), "--data.tokenizer", settings.tokenizer]
        words += [*_common(settings, seed, settings.finetune_steps), "--output_dir", str(folder)]
        command = [*launcher(settings.ranks), FINETUNE, *words]
        found.append(Stage(f"{row}, seed {seed}: fine-tuning on {task}", command, folder, scores_file(folder)))
    return found


def launcher(ranks: int) -> list[str]:
    """What stands before the module of a run of so many processes."""
    if ranks == 1:
        return ["python", "-m"]
    # The guard sends signals to the ranks themselves: torchrun would kill them while they save.
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--module"]
    return ["python", "-m", "eve_ds.launching", "python", "-m", *torchrun]


def _common(settings: Settings, seed: int, steps: int | None) -> list[str]:
    words = ["--engine.seed", str(seed)]
    if steps is not None:
        words += ["--optimizer.total_steps", str(steps)]
    if settings.ranks == 1:
        words += ["--engine.expert_parallel_size", "1"]  # the demo's recipes have 2, which one rank cannot hold
    return words


def check_folder(out: Path, name: str) -> None:
    """Raise UserError unless the folder is new, empty or that of a sweep of this table."""
    marker = read_json(out / MARKER)
    if not marker and out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: holds files that no sweep wrote; name another folder")
    if marker and marker.get("table") != name:
        raise UserError(f"--out {out}: holds the sweep of another table, {marker.get('table')}; name another folder")


def number(most: int | None = None) -> Callable[[str], int]:
    """The type of an option that is a whole number from 1 to ``most``."""

    def parsed(text: str) -> int:
        value = int(text) if text.isascii() and text.isdigit() else 0
        if not 1 <= value <= (most or value):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on{f' to {most}' if most else ''}")
        return value

    return parsed
