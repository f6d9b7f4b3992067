"""The gradient norm by kind of parameter: which part of the model a large or vanishing gradient comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds.engine.callback import Callback

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

# Of a block's own parameters and modules; of what is not here (its other norm and scale), norms.
BLOCK = {
    "attention_norm": "attention",
    "attention": "attention",
    "attention_scale": "attention",
    "image_norm": "image_ffn",
    "image_mlp": "image_ffn",
    "text_norm": "text_ffn",
    "text_mlp": "text_ffn",
    "shared_norm": "shared_ffn",
    "shared_mlp": "shared_ffn",
}


def kind_of(name: str) -> str:
    """The kind of a task's parameter: embeddings, attention, image_ffn, text_ffn, shared_ffn, experts,
    router, norms, heads.

    LayerScale and norms count with their branch; those that both modalities share, and the final norm, are ``norms``.
    """
    place = name.split(".")
    if place[0] != "backbone":
        return "heads"
    if place[1] != "blocks":
        return "norms" if place[1] == "norm" else "embeddings"
    if place[3] == "moe":
        return "experts" if place[4] == "experts" else "router"
    return BLOCK.get(place[3], "norms")


def norms_by_kind(task: nn.Module, optimizer: Any) -> dict[str, float]:
    """{kind: Euclidean norm of its gradient} before clipping, of all ranks together. A collective of one small tensor.

    To be called after the backward pass of a step's last micro-batch and before the optimizer's step: then each rank
    holds a part of the reduced gradient, and no two ranks the same part, of experts or of anything else.

    Args:
        task: as the engine trains it.
        optimizer: DeepSpeed's, of ZeRO 1, 2 or 3 without offload.
    """
    kinds = {id(parameter): kind_of(name) for name, parameter in task.named_parameters()}
    order = sorted(set(kinds.values()))
    squares = {kind: torch.zeros((), dtype=torch.float64, device=optimizer.device) for kind in order}
    for parameter, gradient in _own_parts(optimizer):
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        squares[kinds[id(parameter)]] += norm.to(optimizer.device).double() ** 2
    packed = torch.stack([squares[kind] for kind in order])
    dist.all_reduce(packed)
    return dict(zip(order, (packed.sqrt() / float(optimizer.loss_scale)).tolist(), strict=True))


def _own_parts(optimizer: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each parameter of which this rank has a part, and that part's gradient, as DeepSpeed's own norm takes them
    (``get_grad_norm_direct`` in stage_1_and_2.py and stage3.py)."""
    groups = optimizer.fp16_groups if hasattr(optimizer, "fp16_groups") else optimizer.params_in_partition
    for index, parameters in enumerate(groups):
        gradients = (part for part in optimizer.averaged_gradients[index] if not getattr(part, "_zero_padding", False))
        yield from zip(parameters, gradients, strict=False)


class GradNorms(Callback):
    """Adds ``optim/grad_norm/KIND`` to the record of each ``every``-th step; to be listed before what writes records.

    Args:
        every: steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._found: dict[str, float] = {}

    def backward_end(self, trainer: Trainer) -> None:
        if (trainer.step + 1) % self.every == 0 and trainer.engine.is_gradient_accumulation_boundary():
            self._found = norms_by_kind(trainer.task, trainer.engine.optimizer)

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        record |= {f"optim/grad_norm/{kind}": norm for kind, norm in self._found.items()}
        self._found = {}
