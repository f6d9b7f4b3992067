"""Floating-point operations per sample, and bytes that a rank sends in an optimizer step.

Traffic is that of ring algorithms: of n ranks each sends (n - 1) / n of what is gathered or reduced and scattered, and
twice that for an all-reduce (Patarasuk and Yuan, JPDC 2009). DeepSpeed 0.19.8's ZeRO 1 and 2 reduce gradients by
all-reduce (use_multi_rank_bucket_allreduce), ZeRO 3 by reduce-scatter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from eve_ds.model.flops import count_flops
from eve_ds.model.model_config import ModelConfig
from eve_ds.plan.live_bytes import WithoutValues
from eve_ds.plan.memory import Batch
from eve_ds.plan.meta_model import Config, even_batch, prepare
from eve_ds.plan.zero_states import Group, Zero
from eve_ds.tasks.base import Task
from eve_ds.tasks.masked_modeling import WORD_ROW_MULTIPLE
from eve_ds.tasks.spec import Pass

Among = Literal["all", "expert_parallel", "same_experts"]


@dataclass(frozen=True)
class Sent:
    """What a rank sends in an optimizer step by one kind of collective.

    Attributes:
        label: as it is printed.
        size: bytes.
        among: the ranks that take part: "all", "expert_parallel" (those that share experts' tokens) or
            "same_experts" (those that hold the same ones).
    """

    label: str
    size: int
    among: Among = "all"


def passes(config: Config, batch: Batch) -> list[Pass]:
    """Those of one micro-batch."""
    return config.spec.passes(config.model, config.objective, batch.rows, batch.text_length)


def flops_per_sample(config: Config, task: Task, text_length: int, num_answers: int) -> float:
    """Forward and backward of a pair, question or statement. The task runs on the meta device, see ``count_flops``.

    It runs on so many rows that no masked words are padded and the experts' load is even. Retrieval's similarities are
    those of a batch of as many rows (less than 0.01 %). In bf16 the gradients of experts' biases are products
    (``grouped_mm``) and count: 0.04 % of EVE-Base.

    Args:
        config: the run.
        task: from ``meta_model.build`` with all experts, without activation checkpointing; it is changed.
        text_length: tokens of each text.
        num_answers: VQA's classes.
    """
    prepare(task, on_gpu=False)
    for layer in task.backbone.moe_layers():
        layer.experts.use_grouped_mm = True  # fewer operations to run
    rows = WORD_ROW_MULTIPLE * config.model.num_experts
    inputs = even_batch(config, rows, text_length, num_answers)
    selected = config.spec.selected_rows(config.objective, rows, text_length)

    with torch.device("meta"), WithoutValues(selected, scalar=text_length):
        return count_flops(lambda: task(inputs).loss.backward()) / rows


def traffic(config: Config, zero: Zero, groups: list[Group], batch: Batch) -> list[Sent]:
    """What one rank sends in an optimizer step."""
    sent = [Sent("tokens to experts and back (all-to-all)", _token_bytes(config, zero, batch), "expert_parallel")]
    kind = "reduce-scatter" if zero.stage == 3 else "all-reduce"
    for name, experts in (("dense", False), ("expert", True)):
        among: Among = "same_experts" if experts else "all"
        gradients = weights = 0.0
        for group in groups:
            if group.experts == experts:
                share = group.elements * zero.itemsize * (group.ranks - 1) / group.ranks
                gradients += share * _reductions(zero)
                weights += share * _gathers(zero, groups)
        sent.append(Sent(f"{name} gradients ({kind})", round(gradients), among))
        sent.append(Sent(f"{name} weights (all-gather)", round(weights), among))
    for name, values in config.spec.gathered_values(config.model, batch.rows).items():
        size = (zero.world_size - 1) * values * zero.itemsize * zero.accumulation
        sent.append(Sent(f"{name} (all-gather)", size))
    return sent


def _reductions(zero: Zero) -> int:
    """How often a step's gradients are scattered: ZeRO 1 accumulates first; an all-reduce counts as two."""
    if zero.stage == 3:
        return zero.accumulation
    return 2 * (zero.accumulation if zero.stage == 2 else 1)


def _gathers(zero: Zero, groups: list[Group]) -> int:
    """How often a step gathers each weight: after the update, or at ZeRO 3 in each micro-batch, once or twice."""
    if zero.stage < 3:
        return 1
    whole = sum(group.elements for group in groups)
    stay = whole <= min(zero.setting("stage3_max_live_parameters"), zero.setting("stage3_max_reuse_distance"))
    return (1 if stay else 2) * zero.accumulation


def _token_bytes(config: Config, zero: Zero, batch: Batch) -> int:
    """Every token to its k experts and back, forward and backward, on each softly routing layer."""
    model: ModelConfig = config.model
    away = (zero.ep_size - 1) / zero.ep_size
    tokens = sum(p.tokens for p in passes(config, batch))
    ways = 2 * (3 if model.checkpoint_activations else 2)  # recomputing a block sends its tokens once more
    one_way = tokens * model.top_k * model.dim * zero.itemsize * away
    return round(one_way * ways * len(model.soft_layers) * zero.accumulation)


def days(samples: float, flops_per_sample: float, world_size: int, peak_tflops: float, mfu: float) -> float:
    """Days for ``samples`` at a share ``mfu`` of the devices' peak (dense bf16, not the figure with sparsity)."""
    return samples * flops_per_sample / (world_size * peak_tflops * 1e12 * mfu) / 86400
