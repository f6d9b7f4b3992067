"""Output of ``--dry_run``, which builds and checks everything that a run does, and writes nothing."""

from __future__ import annotations

import logging
from pathlib import Path

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data.samples import Samples
from eve_ds.engine import first_weights
from eve_ds.engine.agreement import decide, rank_and_world
from eve_ds.engine.batches import TrainingBatches
from eve_ds.engine.distributed import launched_world
from eve_ds.engine.trainer import Trainer
from eve_ds.logs import OUTPUT
from eve_ds.tasks.base import Task
from eve_ds.weights.model_folder import checkpoints, step_of

Config = PretrainConfig | FinetuneConfig
_output = logging.getLogger(OUTPUT)


def tell_training(config: Config, trainer: Trainer, training: Samples) -> int:
    """Read one micro-batch, check the checkpoint of a branch, and print what would run. Called by all ranks.

    Returns:
        the exit code, 0.
    Raises:
        UserError: as training itself would, at its start.
    """
    branch = None
    if not decide(lambda: first_weights.goes_on(config)):
        branch = first_weights.branch_point(config, trainer.identity, trainer.total_steps)
    step, begins = _beginning(config, branch[0] if branch else None)
    batches = TrainingBatches(config, training, step)
    try:
        next(batches)
    finally:
        batches.close()
    ranks, accumulated = trainer.world_size, trainer.accumulation_steps
    micro = trainer.micro_batch_of_all_ranks // ranks
    _say(
        f"{trainer.task_name} on {ranks} rank(s), ZeRO {trainer.topology.zero_stage}, {config.engine.precision}",
        f"data    {training.split.name}: {training.rows} rows, {len(training)} samples",
        f"model   {parameters(trainer.task):,} parameters, {begins}",
        f"steps   {step} to {trainer.total_steps}, each {accumulated} x {micro} samples a rank = "
        f"{config.engine.global_batch_size}",
        f"output  {config.output_dir}",
    )
    return 0


def tell_scoring(config: FinetuneConfig, task: Task, scored: Samples) -> int:
    """Print what ``--evaluate`` would score. Returns the exit code, 0."""
    _say(
        f"score {config.task} on {rank_and_world()[1]} rank(s), {config.engine.precision}",
        f"data    {scored.split.name}: {scored.rows} rows, {len(scored)} samples",
        f"model   {parameters(task):,} parameters, from {config.init_from}",
        f"output  {config.output_dir}",
    )
    return 0


def parameters(task: Task) -> int:
    """Number of parameters of the whole model, with the experts of all ranks."""
    local = {name: int(getattr(value, "ds_numel", value.numel())) for name, value in task.named_parameters()}
    spread = {f"{name}.experts.": layer.ep_size for name, layer in task.named_modules() if hasattr(layer, "ep_size")}
    return sum(
        count * next((size for prefix, size in spread.items() if name.startswith(prefix)), 1)
        for name, count in local.items()
    )


def _beginning(config: Config, branch: Path | None) -> tuple[int, str]:
    """(first step, source of the weights in words)."""
    if first_weights.goes_on(config):
        newest = checkpoints(Path(config.output_dir))[-1]
        return step_of(newest), f"going on from {newest}"
    if branch is not None:
        return step_of(branch), f"branching from {branch}"
    return 0, f"from {config.init_from}" if config.init_from else "from initial values"


def _say(*lines: str) -> None:
    if launched_world()[0] == 0:
        for line in ("dry run: all is in order, nothing was written", *(f"  {line}" for line in lines)):
            _output.info("%s", line)
