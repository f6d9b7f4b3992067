"""The most bytes that a rank holds in training: ZeRO's states, and a micro-batch acted out without values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from eve_ds.model.model_config import ModelConfig
from eve_ds.parallel import alone
from eve_ds.plan.live_bytes import LiveBytes
from eve_ds.plan.meta_model import Config, build, even_batch, prepare
from eve_ds.plan.zero_states import GradientBuckets, Zero, groups_of, steady, step_peak

# Of a GPU, not worked out: CUDA context, NCCL's channels, cuBLAS workspaces, the allocator's unused remains. A guess.
GPU_RESERVE = 4 * 2**30


@dataclass(frozen=True)
class Batch:
    """What one rank puts through at once.

    Attributes:
        rows: micro-batch: pairs, questions, statements.
        text_length: tokens of each text.
    """

    rows: int
    text_length: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: by kind at the moment of the forward or backward pass when most is held; and in the step.

    Attributes:
        weights: in the run's precision; gathered ones at ZeRO 3 included.
        optimizer: master copy and moments.
        gradients: those that ZeRO keeps.
        communication: buffers in which gradients are sent.
        activations: all else: what the forward pass keeps, intermediate results, gradients while they are made.
        forward: of the activations, what is kept when the forward pass ends.
        step: the most that is held beyond weights and optimizer in the optimizer step.
        host: on the host, where ZeRO offloads.
    """

    weights: int
    optimizer: int
    gradients: int
    communication: int
    activations: int
    forward: int
    step: int
    host: int

    @property
    def peak(self) -> int:
        passes = self.gradients + self.communication + self.activations
        return self.weights + self.optimizer + max(passes, self.step)


class Rehearsal:
    """A rank's training step, acted out without values.

    The load of the experts is taken to be even, and every text to have ``text_length`` tokens.

    Args:
        config: the run; ``model.checkpoint_activations`` counts.
        zero: stage, ranks, buffers.
        num_answers: VQA's classes.
        on_gpu: one of Hopper's or Blackwell's; else every attention keeps its N x N weights (model/block.py), and
            experts take turns.
    """

    def __init__(self, config: Config, zero: Zero, num_answers: int, on_gpu: bool) -> None:
        self.config, self.zero, self.num_answers = config, zero, num_answers
        self.task = prepare(build(config, num_answers, zero.ep_size), on_gpu)
        self.groups = groups_of(self.task, config.optimizer, zero)

    def memory(self, batch: Batch) -> Memory:
        """What the rank holds with this micro-batch."""
        inputs = even_batch(self.config, batch.rows, batch.text_length, self.num_answers)
        selected = self.config.spec.selected_rows(self.config.objective, batch.rows, batch.text_length)
        known = [*self.task.parameters(), *self.task.buffers(), *inputs.values()]
        meter = LiveBytes(known, selected=selected, scalar=batch.text_length)
        buckets = GradientBuckets(self.groups, self.zero, meter)
        # In a run the other ranks do not take part, and what they send is in _gathered.
        with torch.device("meta"), alone(), meter, buckets.attached(self.task):
            loss = self.task(inputs).loss
            forward = meter.live
            buckets.begin()
            loss.backward()
            buckets.end()
        held, moment = steady(self.groups, self.zero), meter.held_at_peak
        return Memory(
            weights=held["weights"],
            optimizer=held["optimizer"],
            gradients=held["gradients"] + moment.get("gradients", 0),
            communication=held["communication"] + moment.get("communication", 0),
            activations=meter.peak - sum(moment.values()) + _gathered(self.config, self.zero, batch),
            forward=forward,
            step=held["gradients"] + held["communication"] + step_peak(self.groups, self.zero),
            host=held["host"],
        )


def _gathered(config: Config, zero: Zero, batch: Batch) -> int:
    """Bytes of what a task brings from all ranks to each, twice while they are put together."""
    values = sum(config.spec.gathered_values(config.model, batch.rows).values())
    return 2 * (zero.world_size - 1) * values * zero.itemsize


def with_checkpointing(config: Config, on: bool) -> Config:
    """The same run with activation checkpointing on or off."""
    model: ModelConfig = dataclasses.replace(config.model, checkpoint_activations=on)
    return dataclasses.replace(config, model=model)
