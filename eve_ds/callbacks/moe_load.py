"""Where tokens go while a run trains: load, imbalance, dead experts, router entropy.

Shapes: S softly routing layers, E experts, 2 modalities (image, text).
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from eve_ds.callbacks.metrics import lines_until
from eve_ds.engine.callback import Callback
from eve_ds.model.moe import MoE, Routed
from eve_ds.model.router import Routing
from eve_ds.parallel import all_reduce_sum
from preprocessing.local_files import write_text

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

FILE = "expert_load.jsonl"
MODALITIES = ("image", "text")
CELL, LABEL = 16, 64  # pixels of the heat map: a cell's side, the width of the labels
BRIGHTEST = 3.0  # load, as a multiple of an even one, from which a cell is white


class MoELoad(Callback):
    """Adds ``moe/...`` to the record of every ``every``-th step, and writes that step's line of ``expert_load.jsonl``.

    Choices per expert are those of all forward passes in training since the last such step, or since this process
    began, on all ranks. The router's entropy is that of the step itself. Forward hooks count; a pass that activation
    checkpointing repeats, an evaluation or a prediction does not count.

    Args:
        every: steps.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._hooks: list[Any] = []
        self._layers: list[MoE] = []
        self._counting = self._with_entropy = False
        self._steps = 0
        self._gates: Tensor | None = None  # [T, E] of the layer that runs

    def fit_start(self, trainer: Trainer) -> None:
        backbone = trainer.task.backbone
        self._layers = backbone.moe_layers()
        experts = backbone.config.num_experts
        options: dict[str, Any] = {"dtype": torch.float64, "device": trainer.device}
        self._choices = torch.zeros(len(self._layers), 2, experts, **options)
        self._entropy = torch.zeros(len(self._layers), 2, **options)  # sums over tokens, nats
        self._tokens = torch.zeros(len(self._layers), 2, **options)
        path = trainer.output_dir / FILE
        if trainer.is_main and path.exists():
            write_text(path, "".join(lines_until(path, trainer.start_step)))
        self._hooks = [
            trainer.task.register_forward_pre_hook(self._begin),
            trainer.task.register_forward_hook(self._end),
        ]
        for number, layer in enumerate(self._layers):
            self._hooks.append(layer.router.register_forward_hook(self._keep_gates))
            self._hooks.append(layer.register_forward_hook(partial(self._count, number)))

    def step_start(self, trainer: Trainer) -> None:
        self._with_entropy = (trainer.step + 1) % self.every == 0

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        """A collective at every ``every``-th step."""
        self._steps += 1
        if trainer.step % self.every or not self._layers:
            return
        parts = (self._choices, self._entropy, self._tokens)
        total = all_reduce_sum(torch.cat([part.flatten() for part in parts])).cpu()
        choices, entropy, tokens = (
            values.view(part.shape) for values, part in zip(total.split([p.numel() for p in parts]), parts, strict=True)
        )
        numbers = sorted(trainer.task.config.soft_layers)
        record |= load_metrics(choices.numpy(), entropy.numpy(), tokens.numpy(), numbers)
        if trainer.is_main:
            line = {
                "step": trainer.step,
                "steps": self._steps,
                "layers": list(numbers),
                "counts": choices.long().tolist(),
            }
            with open(trainer.output_dir / FILE, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            trainer.show_images({"moe/expert_load": heat_map(choices.numpy(), numbers)})
        for part in parts:
            part.zero_()
        self._steps = 0

    def close(self, trainer: Trainer) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _begin(self, task: torch.nn.Module, inputs: Any) -> None:
        self._counting = task.training

    def _end(self, *_: Any) -> None:
        self._counting = False

    def _keep_gates(self, router: torch.nn.Module, inputs: Any, routing: Routing) -> None:
        self._gates = routing.gates.detach() if self._counting and self._with_entropy else None

    @torch.no_grad()
    def _count(self, number: int, layer: MoE, inputs: tuple[Any, ...], output: Any) -> None:
        """After a forward of a layer: its choices by expert, and the entropy of its tokens but padding."""
        gates, self._gates = self._gates, None
        if not self._counting:
            return
        self._choices[number] += layer.last_load
        if isinstance(inputs[0], Routed):  # compiled, the router has no hook
            gates = inputs[0].gates if self._with_entropy else None
        if gates is None:
            return
        if isinstance(inputs[0], Routed):
            kind, valid = inputs[0].modality, inputs[0].counted
        else:
            x, modality, valid = inputs
            kind = modality.expand(x.shape[:2]).flatten()
        entropy = torch.special.entr(gates).sum(dim=1, dtype=torch.float64)
        counted = torch.ones_like(entropy) if valid is None else valid.flatten().double()
        for values, total in ((entropy * counted, self._entropy), (counted, self._tokens)):
            total[number].index_add_(0, kind, values)


def load_metrics(choices: np.ndarray, entropy: np.ndarray, tokens: np.ndarray, layers: list[int]) -> dict[str, float]:
    """The scalars of an interval: of each layer, and over all (the worst imbalance, the mean of the rest).

    Args:
        choices: [S, 2, E], of image and text tokens.
        entropy: [S, 2], summed over tokens, nats.
        tokens: [S, 2], how many tokens that were.
        layers: [S], the blocks' numbers.
    """
    found: dict[str, float] = {}
    experts = choices.shape[2]
    for layer, load, own, count in zip(layers, choices, entropy, tokens, strict=True):
        name = f"moe/layer_{layer}"
        found[f"{name}/load_imbalance"] = _imbalance(load.sum(axis=0))
        for kind, of_kind in zip(MODALITIES, load, strict=True):
            found[f"{name}/load_imbalance_{kind}"] = _imbalance(of_kind)
        found[f"{name}/dead_experts"] = float((load.sum(axis=0) == 0).mean())
        found[f"{name}/router_entropy"] = float(own.sum() / max(count.sum(), 1.0))
    for key in ("load_imbalance", "load_imbalance_image", "load_imbalance_text", "dead_experts", "router_entropy"):
        of_layers = [found[f"moe/layer_{layer}/{key}"] for layer in layers]
        found[f"moe/{key}"] = max(of_layers) if "imbalance" in key else sum(of_layers) / len(layers)
    if experts > 1:
        found["moe/router_entropy_share"] = found["moe/router_entropy"] / math.log(experts)
    return found


def _imbalance(load: np.ndarray) -> float:
    """The largest of [E] over their mean: 1 is even, E is all in one; 0 without any."""
    return float(load.max() / load.mean()) if load.any() else 0.0


def heat_map(choices: np.ndarray, layers: list[int]) -> np.ndarray:
    """uint8 [H, W, 3]: a row for each layer and modality, a column for each expert (figure 6 of the paper).

    The brightness is the share of the modality's choices over an even share; from `BRIGHTEST` on it is white.
    """
    even = choices.mean(axis=2, keepdims=True)
    level = np.clip(choices / np.maximum(even, 1e-12) / BRIGHTEST, 0, 1)  # [S, 2, E]
    rows = (level.swapaxes(0, 1).reshape(-1, choices.shape[2]) * 255).round().astype(np.uint8)  # images first
    cells = np.kron(rows, np.ones((CELL, CELL), dtype=np.uint8))
    image = Image.fromarray(np.pad(cells, ((0, 0), (LABEL, 0))))
    draw = ImageDraw.Draw(image)
    for row in range(len(rows)):
        draw.text((2, row * CELL + 2), f"{MODALITIES[row // len(layers)]} {layers[row % len(layers)]}", fill=255)
    return np.asarray(image.convert("RGB"))
