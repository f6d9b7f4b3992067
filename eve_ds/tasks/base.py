"""What every objective is: a module that owns a backbone and turns a batch into this rank's share of the loss."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.model.backbone import Backbone, BackboneOutput
from eve_ds.model.counter_random import random_uniform
from eve_ds.parallel import all_reduce_sum, world_size
from eve_ds.tasks.masking import DROP_PATH, ROUTER_JITTER
from preprocessing.text.tokenizer import Tokenizer

Batch = dict[str, Tensor]
Metrics = dict[str, tuple[Tensor, Tensor]]  # named (sum, count) pairs of this rank, scalars
ROUTING = ("aux_loss", "router_z_loss")  # metrics of the routers, not of what a task is scored by


@dataclass
class TaskOutput:
    """What a task's forward gives.

    Args:
        loss: this rank's share of the global loss, scalar fp32: local sum / all-reduced count + weighted auxiliary
            share. Shares add up over ranks to the loss of the whole batch.
        metrics: named (sum, count) pairs of this rank, detached scalars; sum of sums / sum of counts is the mean.
    """

    loss: Tensor
    metrics: Metrics = field(default_factory=dict)


class Task(nn.Module):
    """An objective over a backbone.

    Args:
        backbone: the shared Transformer.

    Attributes:
        heads: prefixes of the names of what the task adds to the backbone.
        in_batch_negatives: whether the loss of a sample depends on the others of its micro-batch, of all ranks.
        seed: of drop path.
        pad_text_to: pad every text to this length first, as the published code does; None leaves it as it comes.
        held_out: True within ``measuring_held_out``: ``forward`` adds the metrics that only validation pays for, if the
            task has any. Not a method beside forward: with ZeRO 3 the weights are there only in the engine's forward.
    """

    heads: ClassVar[tuple[str, ...]] = ()
    in_batch_negatives: ClassVar[bool] = False

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = backbone.config
        self.seed = 0
        self.pad_text_to: int | None = None
        self.held_out = False

    def use_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Take from the tokenizer what the task needs to know of its vocabulary: here nothing. Called before training.

        Raises:
            UserError: it does not tell.
        """

    def score_only(self) -> None:
        """Drop heads that scoring does not need, before weights are loaded that may lack them. Here none."""

    def evaluate_as_published(self) -> None:
        """Predict as EVE's published code does: texts padded. The backbone's part is ``Backbone.published_routing``."""
        self.pad_text_to = self.config.max_text_length

    def forward(self, batch: Batch) -> TaskOutput:
        """Loss share and metrics of one micro-batch; random choices depend on ``batch["sample_id"]`` alone."""
        raise NotImplementedError

    def predict_batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """What evaluation needs of one batch, on the CPU; rows where ``batch["valid"]`` is False are left out.

        Pre-training has none: its evaluation is ``forward`` on held-out pairs. Nor has a task whose
        ``FinetuneSpec.predict`` is its own, as retrieval's.
        """
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of what goes through them."""
        return self.backbone.image_embedding.class_token.dtype

    def encode(
        self,
        images: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        patch_keep: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> BackboneOutput:
        """The backbone's forward, with texts padded if ``pad_text_to`` asks for it."""
        output: BackboneOutput = self.backbone(images, *self._padded(text_ids, text_mask), patch_keep, noise)
        return output

    def encode_several(self, passes: Sequence[tuple[Tensor | None, ...]]) -> list[BackboneOutput]:
        """``encode`` for each pass, given by its five arguments; together where that is better."""
        if len(passes) == 1 or not self.backbone.better_together:
            return [self.encode(*each) for each in passes]
        given = [(images, *self._padded(ids, mask), keep, noise) for images, ids, mask, keep, noise in passes]
        outputs: list[BackboneOutput] = self.backbone(*itertools.chain(*given))
        return outputs

    def _padded(self, text_ids: Tensor | None, text_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if text_ids is not None and text_mask is not None and self.pad_text_to is not None:
            missing = max(self.pad_text_to - text_ids.shape[1], 0)
            text_ids, text_mask = F.pad(text_ids, (0, missing)), F.pad(text_mask, (0, missing))
        return text_ids, text_mask

    def drop_path_noise(self, sample_id: Tensor, *uses: int) -> Tensor | None:
        """Random numbers for drop path and router jitter: a function of the sample alone, whatever rank it lies on.

        Args:
            sample_id: [B] int64.
            uses: a number for each time that a step encodes the sample. Several, each the next number, stand for a pass
                of so many times B rows: the samples for the first use, then for the second, and so on.
        Returns:
            [2 depth, B x uses] float32 for the backbone, with router jitter [3 depth, B x uses]; None where nothing is
            random.
        """
        jitters = self.config.router_jitter > 0
        if not self.training or (self.config.drop_path == 0 and not jitters):
            return None
        branches = 2 * self.config.depth
        places = torch.arange(uses[0] * branches, (uses[-1] + 1) * branches, device=sample_id.device)
        second = places.view(len(uses), branches).t()[:, :, None]
        noise = random_uniform(self.seed, DROP_PATH, sample_id, second)
        if jitters:
            more = random_uniform(self.seed, ROUTER_JITTER, sample_id, second[: self.config.depth])
            noise = torch.cat([noise, more])
        return noise.flatten(1)

    def aux_share(self, *passes: BackboneOutput) -> tuple[Tensor, Metrics]:
        """Weighted shares of the routers' losses (means over the step's passes, as in EVE's code), and their metrics.

        The router z-loss is among them if its weight is above 0.
        """
        aux = torch.stack([output.aux_loss.float() for output in passes]).mean()
        one = torch.full((), 1.0 / world_size(), device=aux.device)
        loss, metrics = self.config.aux_loss_weight * aux, {"aux_loss": (aux.detach(), one)}
        if (weight := self.config.router_z_loss_weight) > 0:
            z = torch.stack([output.router_z_loss.float() for output in passes]).mean()
            loss, metrics["router_z_loss"] = loss + weight * z, (z.detach(), one)
        return loss, metrics


def joint_first_text(output: BackboneOutput) -> Tensor:
    """[B, D] the first text token ([CLS]) of a joint pass, which EVE's heads read."""
    return output.hidden[:, output.num_image_tokens]


def valid_rows(batch: Batch) -> Batch:
    """The batch without the rows that an evaluation loader repeated only to make the ranks even (``valid`` False)."""
    if "valid" not in batch:
        return batch
    rows = batch["valid"].nonzero().squeeze(1)  # once for all columns: the host waits for it
    return {name: value[rows] for name, value in batch.items() if name != "valid"}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; what was before is restored."""
    was_training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(was_training)


@contextmanager
def measuring_held_out(task: Task) -> Iterator[None]:
    """In it ``task.forward`` also gives the metrics that cost passes of their own. Entered by all ranks or by none."""
    task.held_out = True
    try:
        yield
    finally:
        task.held_out = False


def global_counts(*local: Tensor) -> list[Tensor]:
    """Sum each count over all ranks, in one all-reduce; never below 1, so that an empty batch divides cleanly."""
    total = all_reduce_sum(torch.stack([count.to(torch.float64) for count in local]))
    return list(total.clamp(min=1).float().unbind())


def to_numpy(values: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Detached arrays on the CPU; floats as float32."""
    return {
        name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().numpy()
        for name, value in values.items()
    }


def init_head(module: nn.Module) -> None:
    """EVE's initial values for task heads: normal with deviation 0.02, biases 0, norms the identity."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def classifier(width: int, hidden: int, classes: int) -> nn.Sequential:
    """EVE's classification head: Linear, LayerNorm (epsilon 1e-5), GELU, Linear."""
    head = nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, classes))
    init_head(head)
    return head
