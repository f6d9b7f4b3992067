"""How long a step is expected to take, from measured efficiencies, and what takes the time."""

from __future__ import annotations

from dataclasses import dataclass

from eve_ds.plan import devices
from eve_ds.plan.devices import CARDS, MEASURED_CARD, RANKS_PER_NODE, Card
from eve_ds.plan.memory import Batch
from eve_ds.plan.meta_model import Config, even_batch
from eve_ds.plan.work import Sent, passes, traffic
from eve_ds.plan.zero_states import Zero, groups_of
from eve_ds.tasks.base import Task

RECOMPUTED = 4 / 3  # operations with activation checkpointing over those without: forward is a third


@dataclass(frozen=True)
class Device:
    """What the ranks run on.

    Attributes:
        card: its name; None for a CPU.
        peak_tflops: dense, in the run's precision; None if it is not known.
    """

    card: str | None
    peak_tflops: float | None


@dataclass(frozen=True)
class Speed:
    """Of a run.

    Attributes:
        mfu: share of the devices' peak that the model's operations reach; None without a peak, as are the fields
            computed from it: ``step_seconds``, ``bottleneck`` and ``loader_processes``.
        source: where ``mfu`` comes from; "; " stands between its lines.
        mfu_forward_backward: that of the forward and backward passes alone; None without a peak, on a CPU, and where
            ``mfu`` was given.
        step_seconds: of an optimizer step.
        seconds: of a step, by what takes them: data, host, exchange, arithmetic, as far as they are known.
        bottleneck: the one that takes longest.
        loader_processes: as many as a rank needs so that it does not wait for data.
    """

    mfu: float | None
    source: str
    mfu_forward_backward: float | None
    step_seconds: float | None
    seconds: dict[str, float]
    bottleneck: str | None
    loader_processes: float | None


@dataclass(frozen=True)
class Step:
    """What a rank has to do in an optimizer step.

    Attributes:
        flops: operations of the model, forward and backward; what is recomputed does not count.
        recompute_factor: operations that are done over ``flops``: 1, or with activation checkpointing 4/3.
        micro_batches: accumulated.
        blocks: that a micro-batch goes through.
        gradients: number of the task's parameter tensors.
        images: to decode.
        loaders: processes of the rank that decode them.
        exchange: what it sends.
    """

    flops: float
    recompute_factor: float
    micro_batches: int
    blocks: int
    gradients: int
    images: int
    loaders: int
    exchange: list[Sent]


def step_of(config: Config, zero: Zero, batch: Batch, task: Task, per_sample: float, num_answers: int) -> Step:
    """Of a run.

    Args:
        config: the run.
        zero: how it is spread.
        batch: a rank's micro-batch.
        task: from ``meta_model.build`` with a rank's experts.
        per_sample: operations.
        num_answers: VQA's classes.
    """
    inputs = even_batch(config, batch.rows, batch.text_length, num_answers).values()
    return Step(
        flops=per_sample * batch.rows * zero.accumulation,
        recompute_factor=RECOMPUTED if config.model.checkpoint_activations else 1.0,
        micro_batches=zero.accumulation,
        blocks=len(passes(config, batch)) * config.model.depth,
        gradients=len(list(task.parameters())),
        images=sum(len(tensor) for tensor in inputs if tensor.ndim == 4) * zero.accumulation,
        loaders=max(config.data.num_workers, 1),
        exchange=traffic(config, zero, groups_of(task, config.optimizer, zero), batch),
    )


def expected(step: Step, zero: Zero, device: Device, mfu: float | None) -> Speed:
    """How fast the step is. ``mfu`` counts in place of what was measured, if it is given."""
    seconds = step_parts(step, zero, device)
    if device.peak_tflops is None:
        return Speed(None, "--peak_tflops is not given", None, None, seconds, None, None)
    peak = device.peak_tflops * 1e12
    alone = None
    if mfu is not None:
        source = "--mfu"
        fed = taken = step.flops / (mfu * peak)
    else:
        source = _source(device)
        fed = seconds["arithmetic"]  # the time of a step that never waits for data
        if device.card:
            fed = _passes_seconds(devices.LOOP_MICRO_BATCH, step, peak) + _fixed_seconds(step) + seconds["exchange"]
            alone = step.flops / (_passes_seconds(devices.FORWARD_BACKWARD, step, peak) * peak)
        taken = max(fed, seconds["data"])
        mfu = step.flops / (taken * peak)
    return Speed(
        mfu=mfu,
        source=source,
        mfu_forward_backward=alone,
        step_seconds=taken,
        seconds=seconds,
        bottleneck=max(seconds, key=lambda name: seconds[name]),
        loader_processes=step.images / fed / devices.IMAGES_PER_WORKER,
    )


def step_parts(step: Step, zero: Zero, device: Device) -> dict[str, float]:
    """Seconds of a step by what takes them, as far as they are known."""
    card = CARDS[device.card] if device.card else None
    seconds = {"data": step.images / (step.loaders * devices.IMAGES_PER_WORKER)}
    if card:
        launches = devices.LAUNCH_SECONDS * step.blocks * step.recompute_factor * step.micro_batches
        seconds["host"] = launches + _fixed_seconds(step)
        seconds["exchange"] = exchange_seconds(step.exchange, zero, card)
    if device.peak_tflops is not None:
        share = devices.DEVICE_SHARE if card else devices.CPU_SHARE
        seconds["arithmetic"] = step.flops * step.recompute_factor / (share * device.peak_tflops * 1e12)
    return seconds


def _passes_seconds(curve: devices.Curve, step: Step, peak: float) -> float:
    """Of all micro-batches of a step."""
    one = devices.micro_batch_seconds(curve, step.flops / step.micro_batches, step.blocks, peak)
    return one * step.recompute_factor * step.micro_batches


def _fixed_seconds(step: Step) -> float:
    """What a step takes once, however many micro-batches it accumulates."""
    return devices.FIXED_SECONDS / devices.GRADIENTS * step.gradients


def _source(device: Device) -> str:
    if device.card is None:
        return "from EVE-Base, forward and backward, on a CPU with AVX-512 (docs/benchmarks.md)"
    lines = [
        "from EVE-Base in the training loop on one H100 at commit 0e234b1 (docs/benchmarks.md), by operations a block",
        "today's code should be faster, by how much is not measured",
    ]
    measured = CARDS[MEASURED_CARD].peak_tflops
    if (device.card, device.peak_tflops) != (MEASURED_CARD, measured):
        lines.append(f"scaled by the peak, {device.peak_tflops:g} to {measured:g} TFLOP/s")
    return "; ".join(lines)


def exchange_seconds(exchange: list[Sent], zero: Zero, card: Card) -> float:
    """Seconds that a rank sends in a step, one collective after the other, at the links' full speed.

    Ranks that share experts are neighbors, and those with the same ones ``ep_size`` apart.
    """
    crosses_nodes = zero.world_size > RANKS_PER_NODE
    total = 0.0
    for sent in exchange:
        if sent.among == "expert_parallel":
            speed = card.network if zero.ep_size > RANKS_PER_NODE else card.nvlink
        else:
            apart = zero.ep_size if sent.among == "same_experts" else 1
            speed = devices.link_speed(card, max(RANKS_PER_NODE // apart, 1), crosses_nodes)
        total += sent.size / speed
    return total
