"""``--dry_run``: builds and checks everything that a run does, takes trial steps at full size, and writes nothing."""

from __future__ import annotations

import datetime
import logging
from pathlib import Path

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data.samples import Samples
from eve_ds.engine import first_weights
from eve_ds.engine.batches import TrainingBatches
from eve_ds.engine.checkpoint import checkpoint_bytes
from eve_ds.engine.distributed import decide, launched_world, rank_and_world
from eve_ds.engine.memory_gauge import Gauge, size
from eve_ds.engine.schedule import Cooldown, cooldown_of
from eve_ds.engine.trainer import Trainer
from eve_ds.errors import OUTPUT, RankError
from eve_ds.rank_failure import is_lost_rank
from eve_ds.tasks.base import Task
from eve_ds.weights.model_folder import checkpoints, step_of

Config = PretrainConfig | FinetuneConfig
TRIAL_STEPS = 2  # the first one starts loader processes, loads or compiles kernels, makes the optimizer's states
_output = logging.getLogger(OUTPUT)
_log = logging.getLogger(__name__)


def describe_training(config: Config, trainer: Trainer, training: Samples, gauge: Gauge) -> int:
    """Check the checkpoint of a branch, take trial steps, and print what would run. Called by all ranks.

    The steps are real ones: forward, backward and the optimizer's, of as many samples as the run takes. What they do to
    the weights ends with the process. The weights are those that the run would start from; of a run that goes on or
    branches they are initial values, which take as much time and memory.

    Args:
        config: the resolved tree.
        trainer: its callbacks are not called but for the hooks of a step, since they would write.
        training: the dataset.
        gauge: made before the model was built.
    Returns:
        the exit code, 0.
    Raises:
        UserError: as training itself would, at its start or in these steps.
        RankError: another rank ended in these steps, most likely for want of memory.
    """
    branch = cooldown = None
    if not decide(lambda: first_weights.goes_on(config)):
        branch = first_weights.branch_point(config, trainer.identity, trainer.total_steps)
        if branch:
            state = branch[1].state.get("schedule", {})
            cooldown = cooldown_of(state, branch[1].step, config.optimizer, own=False)
    step, begins = decide(lambda: _beginning(config, branch[0] if branch else None))
    trainer._cooldown = cooldown or Cooldown(step, 1.0)  # of a run that goes on: any, as its weights are not loaded
    ranks, accumulated = trainer.world_size, trainer.accumulation_steps
    micro = trainer.micro_batch_of_all_ranks // ranks
    count = parameters(trainer.task)
    lines = [
        f"{trainer.task_name} on {ranks} rank(s), ZeRO {trainer.topology.zero_stage}, {config.engine.precision}",
        f"data    {training.split.name}: {training.rows} rows, {len(training)} samples",
        f"model   {count:,} parameters, {begins}",
        f"steps   {step} to {trainer.total_steps}, each {accumulated} x {micro} samples a rank = "
        f"{config.engine.global_batch_size}",
    ]
    lines += _trial(config, trainer, training, step)
    if found := gauge.report():
        memory, warnings = found
        saved = checkpoint_bytes(
            count, config.engine.precision, trainer.topology.zero_stage, averages=config.optimizer.ema > 0
        )
        kept = f"{config.checkpoint.keep} are kept, and one more while saving"
        lines += [f"memory  {memory}", f"saved   a checkpoint takes {size(saved)}; {kept}"]
        for warning in warnings:
            _log.warning("%s", warning)
    verdict = "the trial steps were NOT finite" if trainer.nonfinite_streak else "all is in order"
    _say(verdict, *lines, f"output  {config.output_dir}")
    return 0


def describe_scoring(config: FinetuneConfig, task: Task, scored: Samples) -> int:
    """Print what ``--evaluate`` would score. Returns the exit code, 0."""
    _say(
        "all is in order",
        f"score {config.task} on {rank_and_world()[1]} rank(s), fp32",
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


def _trial(config: Config, trainer: Trainer, training: Samples, step: int) -> list[str]:
    """Take the trial steps, each as the one after ``step``. Returns lines on time."""
    batches = TrainingBatches(config, training, step, trainer.device, trainer.compiled)
    records = []
    try:
        for _ in range(TRIAL_STEPS):
            trainer.step = step
            records.append(trainer._train_step(batches))
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        # Not exit code 3: here the likely reason is one that all ranks share.
        raise RankError(f"rank {trainer.rank}: another rank has ended in a trial step; its message says why") from error
    finally:
        batches.close()
    first, warm = records[0]["step_seconds"], records[-1]["step_seconds"]
    waited = f"{records[-1]['data/wait_fraction']:.0%} of it waiting for data"
    speed = f"{records[-1]['samples_per_second']:.4g} samples/s"
    left = (trainer.total_steps - step) * warm
    return [
        f"time    {warm:.3g} s a step ({waited}), {speed}; the first one {first:.3g} s",
        f"left    {left / 3600:.2f} h without evaluations and saves: until {_date(left)} if it began now",
    ]


def _date(seconds: float) -> str:
    """The local date and time in so many seconds."""
    try:
        return f"{datetime.datetime.now() + datetime.timedelta(seconds=seconds):%Y-%m-%d %H:%M}"
    except OverflowError:
        return "after the year 9999"


def _beginning(config: Config, branch: Path | None) -> tuple[int, str]:
    """(first step, source of the weights in words)."""
    if first_weights.goes_on(config):
        newest = checkpoints(Path(config.output_dir))[-1]
        return step_of(newest), f"going on from {newest}"
    if branch is not None:
        return step_of(branch), f"branching from {branch}"
    return 0, f"from {config.init_from}" if config.init_from else "from initial values"


def _say(found: str, *lines: str) -> None:
    if launched_world()[0] == 0:
        for line in (f"dry run: {found}, nothing was written", *(f"  {line}" for line in lines)):
            _output.info("%s", line)
