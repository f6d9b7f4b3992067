"""The task on the meta device, as one rank holds it, and its parameters by kind."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
from eve_ds.kernels.permute import Layout, combine, permute
from eve_ds.model.backbone import Backbone
from eve_ds.model.block import Attention, HardBlock, SoftBlock
from eve_ds.model.experts import Experts
from eve_ds.tasks.base import Task

Config = PretrainConfig | FinetuneConfig
META = torch.device("meta")


@dataclass(frozen=True)
class Parameters:
    """How many parameters there are.

    Attributes:
        dense: on every rank, whatever the expert-parallel size.
        experts: of all experts together; a rank holds 1 / expert_parallel_size of them.
        heads: those of ``dense`` outside the backbone.
        active: of the backbone, that one token passes through: all but the tables of words and positions, the hard
            networks of the other modality, and the experts that it does not visit.
    """

    dense: int
    experts: int
    heads: int
    active: int

    @property
    def total(self) -> int:
        return self.dense + self.experts


def build(config: Config, num_answers: int, ep_size: int = 1) -> Task:
    """The task without values, with one rank's share of the experts, in the run's precision."""
    with META:
        backbone = Backbone(config.model, moe_layer=functools.partial(DeepSpeedMoE, ep_size=ep_size))
        task = config.spec.build(backbone, config.objective, mask_id=0, num_classes=num_answers, seed=0)
    return task.to({"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.engine.precision, torch.float32))


def count_parameters(task: Task) -> Parameters:
    """Counted on a task that holds all experts (``build`` with ep_size 1)."""
    backbone, top_k = task.backbone, task.config.top_k
    experts = sum(_size(layer.experts) for layer in backbone.moe_layers())
    total, inside = _size(task), _size(backbone)
    unused = 0
    for block in backbone.blocks:
        if isinstance(block, HardBlock):
            unused += _size(block.text_mlp) + _size(block.text_norm)  # as large as the image network
        elif isinstance(block, SoftBlock):
            held = _size(block.moe.experts)
            unused += (
                held
                - held * top_k // task.config.num_experts
                + (0 if (vector := block.moe.text_vector) is None else vector.numel())
            )
    image, text = backbone.image_embedding, backbone.text_embedding
    # An image's patch goes through the projection, a word through one row of the table: the latter is not counted.
    tables = _size(text) + image.positions.numel()
    return Parameters(total - experts, experts, total - inside, inside - tables - unused)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class _FusedShape(torch.autograd.Function):
    """What a fused attention keeps for its backward pass: q, k, v, its output and a float32 a row, no N x N matrix."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _fused_attention(module: Attention, x: Tensor, bias: Tensor | None) -> Tensor:
    batch, tokens, dim = x.shape
    qkv = module.qkv(x).view(batch, tokens, 3, module.num_heads, dim // module.num_heads)
    out = _FusedShape.apply(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
    return module.proj(out.transpose(1, 2).reshape(batch, tokens, dim))


class _EvenExperts(nn.Module):
    """A rank's experts when every expert of the group gets as many rows: what is sent away comes back in number."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, tokens: Tensor, weights: Tensor, layout: Layout) -> Tensor:
        order, inverse = layout.order, layout.inverse
        count = len(next(self.experts.parameters()))
        even = [inverse.numel() // count] * count
        sent = permute(tokens, order, inverse, weights.shape[1])
        arrived = sent.clone()  # an exchange has two ends
        done = self.experts(arrived, None, Layout(order, inverse, even))
        return combine(done.clone(), weights, order, inverse)


def prepare(task: Task, on_gpu: bool) -> Task:
    """Make a task from ``build`` run alone: its experts take an even load, they and attention keep what they keep on
    the device (on a GPU of Hopper's or Blackwell's: fused attention, the experts' bf16 products in one launch)."""
    for layer in task.backbone.moe_layers():
        experts = layer.experts
        experts.use_grouped_mm = on_gpu and next(experts.parameters()).dtype == torch.bfloat16
        if layer.ep_size > 1:
            layer.ep_size = 1
            del layer.experts
            layer.experts = _EvenExperts(experts)  # type: ignore[assignment]
    if on_gpu:
        for module in task.modules():
            if isinstance(module, Attention):
                module.forward = functools.partial(_fused_attention, module)  # type: ignore[method-assign]
    return task


def even_batch(config: Config, rows: int, text_length: int, num_answers: int) -> dict[str, Tensor]:
    """A micro-batch without values: every text ``text_length`` tokens long."""
    return config.spec.meta_batch(config.model, rows, text_length, num_answers)
