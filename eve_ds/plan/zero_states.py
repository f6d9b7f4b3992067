"""What DeepSpeed 0.19.8's ZeRO holds on one rank beside activations: weights, master copy, moments, gradient buffers.

Read off runtime/zero/stage_1_and_2.py and stage3.py. All sizes are bytes unless they are called elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.config_sections import OptimizerConfig
from eve_ds.engine.optim import parameter_groups
from eve_ds.plan.live_bytes import LiveBytes

Config = PretrainConfig | FinetuneConfig
FP32, FP64 = 4, 8
# DeepSpeed's defaults (runtime/zero/config.py), for what a DeepSpeed file leaves out.
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}


@dataclass(frozen=True)
class Group:
    """A parameter group as ZeRO partitions it.

    Attributes:
        sizes: elements of its parameters, in order, on one rank.
        ids: of these parameters.
        ranks: among which it is partitioned: all, or for experts those that hold the same ones.
        experts: whether it holds experts.
    """

    sizes: list[int]
    ids: list[int]
    ranks: int
    experts: bool

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    @property
    def partition(self) -> int:
        """Elements of one rank's part."""
        return math.ceil(self.elements / self.ranks)

    def touched(self, place: int) -> list[int]:
        """Indices of the parameters that the part of rank ``place`` has at least one element of."""
        first, last = place * self.partition, (place + 1) * self.partition
        found, start = [], 0
        for index, size in enumerate(self.sizes):
            if start < last and start + size > first:
                found.append(index)
            start += size
        return found

    def busiest(self) -> list[int]:
        """``touched`` of the rank for which those parameters are largest: they are copied whole."""
        return max(
            (self.touched(place) for place in range(self.ranks)), key=lambda found: sum(self.sizes[i] for i in found)
        )


@dataclass(frozen=True)
class Zero:
    """The settings that decide memory and traffic.

    Attributes:
        stage: 1, 2 or 3.
        world_size: ranks.
        ep_size: ranks that share the experts.
        itemsize: bytes of a weight: 4 in fp32, 2 in bf16 and fp16.
        accumulation: micro-batches an optimizer step.
        settings: the DeepSpeed file's ``zero_optimization``.
        whole_buffers: reserved memory counts, as on a GPU; else only what is written, as in resident memory of a CPU.
        averages: of the weights are kept (``optimizer.ema``).
    """

    stage: int
    world_size: int
    ep_size: int
    itemsize: int
    accumulation: int
    settings: dict[str, Any]
    whole_buffers: bool
    averages: bool = False

    @classmethod
    def of_run(cls, config: Config, settings: dict[str, Any], world_size: int, on_gpu: bool) -> Zero:
        """Of a run with ``settings``, as ``load_deepspeed_config`` returns them; ``engine.precision`` is not auto."""
        return cls(
            stage=settings["zero_optimization"]["stage"],
            world_size=world_size,
            ep_size=config.engine.expert_parallel_size,
            itemsize=4 if config.engine.precision == "fp32" else 2,
            accumulation=settings["gradient_accumulation_steps"],
            settings=settings["zero_optimization"],
            whole_buffers=on_gpu,
            averages=config.optimizer.ema > 0,
        )

    def setting(self, name: str) -> int:
        return int(self.settings.get(name, DEFAULTS[name]))

    @property
    def buckets(self) -> int:
        """Buffers that gradients are gathered in."""
        return 2 if self.stage < 3 and self.settings.get("overlap_comm", False) else 1

    @property
    def offload(self) -> bool:
        return self.settings.get("offload_optimizer", {}).get("device", "none") != "none"


def groups_of(task: nn.Module, optimizer: OptimizerConfig, zero: Zero) -> list[Group]:
    """The groups that the engine would make of a task as one rank holds it."""
    found = []
    for group in parameter_groups(task, optimizer):
        experts = bool(group.get("moe", False))
        ranks = zero.world_size // zero.ep_size if experts else zero.world_size
        parameters = group["params"]
        found.append(Group([p.numel() for p in parameters], [id(p) for p in parameters], ranks, experts))
    return found


def steady(groups: list[Group], zero: Zero) -> dict[str, int]:
    """Bytes held from the first step to the last: weights, optimizer, gradients, communication; host if ZeRO offloads.

    ZeRO 3 alone keeps gradients' parts from step to step, and a bucket where it offloads.
    """
    whole = sum(group.elements for group in groups)
    part = sum(group.partition for group in groups)
    weights, gradients, bucket, master = whole, 0, 0, part * FP32
    if zero.stage == 3:
        threshold = zero.setting("stage3_param_persistence_threshold")
        kept = sum(size for group in groups for size in group.sizes if size <= threshold)
        live = min(whole, zero.setting("stage3_max_live_parameters"), zero.setting("stage3_max_reuse_distance"))
        # Small models stay gathered from the forward pass to the backward: nothing is beyond the reuse distance.
        weights, gradients = part + max(live, kept), part
        bucket = zero.setting("reduce_bucket_size") if zero.offload else 0
        bucket = bucket if zero.whole_buffers else min(bucket, whole)
        master = part * FP32 if zero.itemsize != FP32 else 0  # fp32 weights are their own master copy
    optimizer = master + (2 + zero.averages) * part * FP32
    return {
        "weights": weights * zero.itemsize,
        "gradients": gradients * zero.itemsize,
        "communication": bucket * zero.itemsize,
        "optimizer": 0 if zero.offload else optimizer,
        "host": optimizer + part * FP32 if zero.offload else 0,
    }


def step_peak(groups: list[Group], zero: Zero) -> int:
    """The most that the optimizer step holds beyond ``steady``: gradients kept, copied flat and made fp32."""
    if zero.offload:
        return max((max(group.sizes, default=0) for group in groups), default=0) * zero.itemsize
    copies = max(group.partition for group in groups) * (zero.itemsize + (FP32 if zero.itemsize != FP32 else 0))
    if zero.stage == 3:
        return copies
    kept = sum(group.sizes[i] for group in groups for i in group.busiest()) * zero.itemsize
    # The norm is taken parameter by parameter in fp64.
    norm = max(min(size, group.partition) for group in groups for size in group.sizes) * FP64
    return kept + max(copies, norm)


class GradientBuckets:
    """What becomes of each gradient once autograd has made it, acted out on a ``LiveBytes``.

    It waits until those that wait fill a bucket. Then they are copied into that and freed (by ZeRO 3: not copied, and
    freed after the reduction), what is reduced is copied flat, and what belongs to this rank's part is kept. Where ZeRO
    offloads, none waits. ZeRO 1 that does not overlap does this only when the last micro-batch's backward pass has
    ended. Gradients have the dtype of the weights: a DeepSpeed file's ``data_types`` and ``communication_data_type`` do
    not count.

    Args:
        groups: of the task.
        zero: settings.
        meter: counts the bytes.
    """

    def __init__(self, groups: list[Group], zero: Zero, meter: LiveBytes) -> None:
        self.groups, self.zero, self.meter = groups, zero, meter
        self.capacity = zero.setting("reduce_bucket_size")
        # What is still to be kept, by id: of ZeRO 3 and of offloading, nothing.
        kept = () if zero.stage == 3 or zero.offload else groups
        self.own = {group.ids[i]: group.sizes[i] for group in kept for i in group.busiest()}
        self.filled = self.index = 0
        self.written = [0] * zero.buckets
        self.waiting: list[Tensor] = []
        self.late = zero.stage == 1 and not zero.settings.get("overlap_comm", False)
        self.made: list[Tensor] = []  # weights with a gradient that is late

    @contextmanager
    def attached(self, task: nn.Module) -> Iterator[None]:
        """Within it, every gradient that is made is taken."""
        trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(self._made) for parameter in trained]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def begin(self) -> None:
        """Before the backward pass: buffers, and what earlier micro-batches of this step have left."""
        if self.zero.accumulation > 1:
            if self.zero.stage == 1:
                self._hold(sum(group.elements for group in self.groups), "gradients")
            elif self.zero.stage == 2:
                self._hold(sum(self.own.values()), "gradients")
        if self.zero.whole_buffers and self.zero.stage < 3:
            self._hold(self.zero.buckets * self.capacity, "communication")

    def end(self) -> None:
        """After the backward pass."""
        for parameter in self.made:
            self._take(parameter)
        self._reduce()

    def _hold(self, elements: int, kind: str) -> None:
        self.meter.hold(elements * self.zero.itemsize, kind)

    def _made(self, parameter: Tensor) -> None:
        if not self.late:
            self._take(parameter)
            return
        self.made.append(parameter)
        parameter.grad = None
        if self.zero.accumulation == 1:  # else the sum that it is added to is held already
            self._hold(parameter.numel(), "gradients")

    def _take(self, parameter: Tensor) -> None:
        elements = parameter.numel()
        if self.filled and self.filled + elements > self.capacity:
            self._reduce()
            self.index = (self.index + 1) % self.zero.buckets
        self.waiting.append(parameter)
        self.filled += elements
        if elements <= self.capacity:
            fresh = self.zero.stage < 3 and not self.zero.whole_buffers
            if fresh and self.filled > self.written[self.index]:
                self._hold(self.filled - self.written[self.index], "communication")
                self.written[self.index] = self.filled
            if self.zero.offload:
                self._free(parameter)

    def _goes_into_bucket(self, parameter: Tensor) -> bool:
        return parameter.numel() <= self.capacity and (self.zero.stage < 3 or self.zero.offload)

    def _free(self, parameter: Tensor) -> None:
        """A gradient that is in the bucket, or has been reduced where it lay."""
        if self.late:
            self._hold(-parameter.numel(), "gradients")
        parameter.grad = None

    def _reduce(self) -> None:
        for parameter in self.waiting:
            if self._goes_into_bucket(parameter) and not self.zero.offload:
                self._free(parameter)
        self.meter.spike(self.filled * self.zero.itemsize)
        for parameter in self.waiting:
            kept = self.own.pop(id(parameter), 0)
            if kept and self.zero.whole_buffers:  # one buffer of all, made with the first
                kept += sum(self.own.values())
                self.own.clear()
            self._hold(kept, "gradients")
            if not self._goes_into_bucket(parameter):
                self._free(parameter)
        self.waiting, self.filled = [], 0
