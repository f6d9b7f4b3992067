"""How long a step is expected to take, from measured efficiencies, and what takes the time."""

from __future__ import annotations

from dataclasses import dataclass

from eve_ds.plan import devices
from eve_ds.plan.devices import CARDS, MEASURED_CARD, RANKS_PER_NODE, Card
from eve_ds.plan.memory import Batch
from eve_ds.plan.meta_model import Config, even_batch
from eve_ds.plan.work import passes, traffic
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
        mfu: share of the devices' peak that the model's operations reach; None without a peak, as what follows from it.
        source: where ``mfu`` comes from.
        mfu_forward_backward: that of the forward and backward passes alone; None where ``mfu`` was given.
        step_seconds: of an optimizer step.
        seconds: of a step, by what takes them: data, host, exchange, arithmetic, as far as they are known.
        bottleneck: the one that takes longest; None if that of arithmetic is not known.
        loader_processes: that feed a rank at that speed.
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
        flops: operations of the model, forward and backward.
        recomputed: operations that are done over these, with activation checkpointing.
        micro_batches: accumulated.
        blocks: that a micro-batch goes through.
        gradients: parameters of the task.
        images: to decode.
        loaders: processes of the rank that decode them.
        exchange: bytes that it sends, by collective.
    """

    flops: float
    recomputed: float
    micro_batches: int
    blocks: int
    gradients: int
    images: int
    loaders: int
    exchange: dict[str, int]


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
        recomputed=RECOMPUTED if config.model.checkpoint_activations else 1.0,
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
    taken = alone = None
    source = "--peak_tflops is not given"
    if device.peak_tflops is not None:
        peak = device.peak_tflops * 1e12
        source = "--mfu" if mfu is not None else _source(device)
        if mfu is None:
            alone = _share(devices.FORWARD_BACKWARD, step, device, peak) if device.card else None
            taken = step.flops / (_share(devices.LOOP, step, device, peak) * peak) + seconds.get("exchange", 0.0)
            taken = max(taken, seconds["data"])
            mfu = step.flops / (taken * peak)
        taken = step.flops / (mfu * peak)
    return Speed(
        mfu=mfu if taken else None,
        source=source,
        mfu_forward_backward=alone,
        step_seconds=taken,
        seconds=seconds,
        bottleneck=max(seconds, key=lambda name: seconds[name]) if "arithmetic" in seconds else None,
        loader_processes=step.images / taken / devices.IMAGES_PER_WORKER if taken else None,
    )


def step_parts(step: Step, zero: Zero, device: Device) -> dict[str, float]:
    """Seconds of a step by what takes them, as far as they are known."""
    card = CARDS.get(device.card or "")
    seconds = {"data": step.images / (step.loaders * devices.IMAGES_PER_WORKER)}
    if card:
        launches = devices.LAUNCH_SECONDS * step.blocks * step.recomputed * step.micro_batches
        seconds["host"] = launches + devices.ENGINE_SECONDS * step.gradients
        seconds["exchange"] = exchange_seconds(step.exchange, zero, card)
    if device.peak_tflops is not None:
        share = devices.DEVICE_SHARE if card else devices.CPU_SHARE
        seconds["arithmetic"] = step.flops * step.recomputed / (share * device.peak_tflops * 1e12)
    return seconds


def _share(curve: devices.Curve, step: Step, device: Device, peak: float) -> float:
    """The share of the peak that the model's operations reach, those that are done again not counted."""
    share = devices.CPU_SHARE
    if device.card:
        share = devices.share_of_peak(curve, step.flops / step.micro_batches, step.blocks, peak)
    return share / step.recomputed


def _source(device: Device) -> str:
    if device.card is None:
        return "from EVE-Base, forward and backward, on a CPU with AVX-512 (docs/benchmarks.md)"
    base = "from EVE-Base in the training loop on one H100, by operations a block (docs/benchmarks.md)"
    measured = CARDS[MEASURED_CARD].peak_tflops
    if (device.card, device.peak_tflops) == (MEASURED_CARD, measured):
        return base
    return f"{base}; scaled by the peak, {device.peak_tflops:g} to {measured:g} TFLOP/s"


def exchange_seconds(sent: dict[str, int], zero: Zero, card: Card) -> float:
    """Seconds that a rank sends in a step, one collective after the other, at the links' full speed.

    Ranks that share experts are neighbors, and those with the same ones ``ep_size`` apart.
    """
    beyond = zero.world_size > RANKS_PER_NODE
    total = 0.0
    for name, size in sent.items():
        if name.startswith("tokens"):
            speed = card.network if zero.ep_size > RANKS_PER_NODE else card.nvlink
        else:
            apart = zero.ep_size if name.startswith("expert") else 1
            speed = devices.link_speed(card, max(RANKS_PER_NODE // apart, 1), beyond)
        total += size / speed
    return total
