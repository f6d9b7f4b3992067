"""All figures of a plan, as data that JSON can hold."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from eve_ds.engine.checkpoint import checkpoint_bytes
from eve_ds.engine.deepspeed_config import best_precision, load_deepspeed_config
from eve_ds.engine.distributed import check_world
from eve_ds.plan.auto import OF_GPU, OF_HOST, largest_micro_batch
from eve_ds.plan.devices import CARDS
from eve_ds.plan.fit import largest
from eve_ds.plan.memory import GPU_RESERVE, Batch, Memory, Rehearsal, with_checkpointing
from eve_ds.plan.meta_model import Config, build, count_parameters
from eve_ds.plan.speed import Device, expected, step_of
from eve_ds.plan.work import days, flops_per_sample
from eve_ds.plan.zero_states import Zero
from eve_ds.tasks import Task
from preprocessing.errors import UserError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
CPU_MEMORY = 80 * 2**30  # where none is named
MOST_ROWS = 2**16


def make_plan(options: Any) -> dict[str, Any]:
    """Every figure that ``python -m eve_ds.plan`` prints.

    Args:
        options: a ``plan.PretrainPlan`` or ``plan.FinetunePlan``.
    Raises:
        UserError: the run would be refused at its start, or an option of the plan makes no sense.
    """
    config, zero, batch, limit = _prepared(options)
    on_gpu = options.device == "gpu"
    plain = _rehearse(config, zero, options, checkpointing=False)
    recomputed = _rehearse(config, zero, options, checkpointing=True)
    whole = build(with_checkpointing(config, on=False), options.num_answers)
    return {
        "run": _run(config, zero, batch, options),
        "parameters": dataclasses.asdict(count_parameters(whole)),
        "memory": {
            "without_checkpointing": _memory(plain, batch, limit),
            "with_checkpointing": _memory(recomputed, batch, limit),
        },
        "device_memory": _device_memory(options),
        "reserve": GPU_RESERVE if on_gpu else 0,
        "checkpoint": checkpoint_bytes(
            count_parameters(whole).total, config.engine.precision, zero.stage, zero.averages
        ),
        **_work(config, zero, plain.task, batch, options),
    }


def forecast(options: Any) -> dict[str, int]:
    """Of ``make_plan``, the memory without activation checkpointing: bytes by kind, and the largest micro-batch.

    Arguments and errors as there.
    """
    config, zero, batch, limit = _prepared(options)
    return _memory(_rehearse(config, zero, options, checkpointing=False), batch, limit)


def _prepared(options: Any) -> tuple[Config, Zero, Batch, int]:
    """The run, how ZeRO divides it, one rank's micro-batch, and the bytes that it may take."""
    config = _config(options)
    _check(options)
    check_world(config.engine.expert_parallel_size, config.model.num_experts, options.world_size)
    on_gpu = options.device == "gpu"
    limit = _device_memory(options) - (GPU_RESERVE if on_gpu else 0)
    if config.engine.micro_batch_size == "auto":
        may_take = int((OF_GPU if on_gpu else OF_HOST) * limit)
        rows, _ = largest_micro_batch(config, options.num_answers, options.world_size, on_gpu, may_take)
        config.engine = dataclasses.replace(config.engine, micro_batch_size=rows)
    settings = load_deepspeed_config(config.deepspeed_config, config.engine, config.optimizer, options.world_size)
    zero = Zero.of_run(config, settings, options.world_size, on_gpu)
    length = options.text_length or config.model.max_text_length
    batch = Batch(settings["train_micro_batch_size_per_gpu"], length)
    return config, zero, batch, limit


def _config(options: Any) -> Config:
    """The run's tree, with the short options written into it."""
    engine = options.engine
    if options.expert_parallel_size is not None:
        engine = dataclasses.replace(engine, expert_parallel_size=options.expert_parallel_size)
    if options.micro_batch_size is not None:
        engine = dataclasses.replace(engine, micro_batch_size=options.micro_batch_size)
    if options.zero not in (None, 1, 2, 3):
        raise UserError(f"--zero {options.zero}: the stages that ds_configs has files for are 1, 2 and 3")
    file = options.deepspeed_config if options.zero is None else f"ds_configs/zero{options.zero}.json"
    if engine.precision == "auto":
        precision = "bf16" if options.device == "gpu" else best_precision("cpu")
        engine = dataclasses.replace(engine, precision=precision)
    config: Config = dataclasses.replace(options, engine=engine, deepspeed_config=file)
    return config


def _check(options: Any) -> None:
    config = options.model
    fits = {
        "world_size": options.world_size >= 1,
        "mfu": options.mfu is None or 0 < options.mfu <= 1,
        "peak_tflops": options.peak_tflops is None or options.peak_tflops > 0,
        "pairs": options.pairs is None or options.pairs > 0,
        "num_answers": options.num_answers >= 1,
    }
    for name, right in fits.items():
        if not right:
            raise UserError(f"--{name}={getattr(options, name)} is out of range; see --help")
    if options.text_length is not None and not 3 <= options.text_length <= config.max_text_length:
        raise UserError(
            f"--text_length={options.text_length} must lie between 3 and model.max_text_length={config.max_text_length}"
        )


def _device_memory(options: Any) -> int:
    if options.device_memory is not None:
        return parse_bytes(options.device_memory)
    return CARDS[options.card].memory if options.device == "gpu" else CPU_MEMORY


def parse_bytes(text: str) -> int:
    """Bytes in "80GiB", "24e9", "512 MB".

    Raises:
        UserError: no number, or another unit.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    try:
        value = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    except (ValueError, KeyError):
        value = 0.0
    if not 2**20 <= value < 2**63:
        raise UserError(f"--device_memory={text}: give a number of bytes, at least a MiB, as in 80GiB, 24GB or 24e9")
    return int(value)


def _run(config: Config, zero: Zero, batch: Batch, options: Any) -> dict[str, Any]:
    return {
        "task": config.task,
        "world_size": zero.world_size,
        "expert_parallel_size": zero.ep_size,
        "zero_stage": zero.stage,
        "precision": config.engine.precision,
        "device": options.device,
        "global_batch_size": config.engine.global_batch_size,
        "micro_batch_size": batch.rows,
        "micro_batch_size_is_auto": (options.micro_batch_size or options.engine.micro_batch_size) == "auto",
        "gradient_accumulation_steps": zero.accumulation,
        "text_length": batch.text_length,
    }


def _rehearse(config: Config, zero: Zero, options: Any, checkpointing: bool) -> Rehearsal:
    config = with_checkpointing(config, checkpointing)
    return Rehearsal(config, zero, options.num_answers, on_gpu=options.device == "gpu")


def _memory(rehearsal: Rehearsal, batch: Batch, limit: int) -> dict[str, int]:
    @functools.cache
    def of(rows: int) -> Memory:
        return rehearsal.memory(dataclasses.replace(batch, rows=rows))

    memory = of(batch.rows)
    most = largest(lambda rows: of(rows).peak, limit, MOST_ROWS, start=batch.rows)
    return dataclasses.asdict(memory) | {"peak": memory.peak, "largest_micro_batch_size": most}


def _work(config: Config, zero: Zero, task: Task, batch: Batch, options: Any) -> dict[str, Any]:
    """Operations, traffic and time.

    Args:
        config: the run.
        zero: how it is spread.
        task: from ``meta_model.build`` with a rank's experts.
        batch: a rank's micro-batch.
        options: of the plan.
    """
    whole = build(with_checkpointing(config, on=False), options.num_answers)
    per_sample = flops_per_sample(config, whole, batch.text_length, options.num_answers)
    samples = options.pairs
    if samples is None and config.optimizer.total_steps is not None:
        samples = float(config.optimizer.total_steps * config.engine.global_batch_size)
    on_gpu, peak = options.device == "gpu", options.peak_tflops
    if on_gpu and peak is None:
        peak = CARDS[options.card].peak_tflops
    step = step_of(config, zero, batch, task, per_sample, options.num_answers)
    speed = expected(step, zero, Device(options.card if on_gpu else None, peak), options.mfu)
    return {
        "sent_per_step": {sent.label: sent.size for sent in step.exchange},
        "flops_per_sample": per_sample,
        "pairs": samples,
        "mfu": speed.mfu,
        "peak_tflops": peak,
        "days": days(samples, per_sample, zero.world_size, peak, speed.mfu) if samples and speed.mfu else None,
        "speed": dataclasses.asdict(speed),
        "samples_per_second": config.engine.global_batch_size / speed.step_seconds if speed.step_seconds else None,
    }
