"""Contrast (ITC) and matching (ITM) with hard negatives from the global batch, for every task that has them.

As in EVE's published fine-tuning code, which follows ALBEF (arXiv 2107.07651). All captions of one image are its
positives and never its negatives.
Legend: b this rank's rows, G rows of the global batch, E width of the contrastive vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.model.backbone import BackboneOutput
from eve_ds.model.counter_random import random_bits, uniform
from eve_ds.parallel import gather_with_gradient
from eve_ds.tasks.base import (
    Batch,
    Metrics,
    Task,
    TaskOutput,
    global_counts,
    init_head,
    joint_first_text,
)
from eve_ds.tasks.masking import NEGATIVE_IMAGES, NEGATIVE_TEXTS
from preprocessing.errors import UserError

CONTRAST_HEADS = ("itc_temp", "itc_vision_proj_head.", "itc_text_proj_head.")
MATCHING_HEAD = "itm_head."
TEMPERATURE_RANGE = (0.001, 0.5)
DROP_PATH_USES = 5  # of ``drop_path_noise``: those below this number are taken here


@dataclass
class GlobalRows:
    """The integer columns of every rank's rows: sample_id, image_index [G]; text_ids, text_mask [G, W]."""

    sample_id: Tensor
    image_index: Tensor
    text_ids: Tensor
    text_mask: Tensor


@dataclass
class ContrastOutput:
    """What the image-only and the text-only pass give.

    Attributes:
        loss_sum: over this rank's pairs, with its gradient.
        to_text, to_image: [b, G] similarities / temperature, without gradient.
        same: [b, G] bool, True where two rows show the same image.
        rows: of the global batch.
        passes: through the backbone.
    """

    loss_sum: Tensor
    to_text: Tensor
    to_image: Tensor
    same: Tensor
    rows: GlobalRows
    passes: list[BackboneOutput]

    def metrics(self) -> Metrics:
        """Cross entropy (nats; with its gradient), mean of both directions, summed over pairs."""
        return {"itc_loss": (self.loss_sum, torch.full((), float(self.same.shape[0]), device=self.same.device))}


@dataclass
class MatchingOutput:
    """What the joint pass over 3 b pairs gives.

    Attributes:
        logits: [3 b, 2] float32.
        label: [3 b] int64, 1 where image and text belong together.
        kept: [3 b] float32, 0 for a row that found no negative.
        passes: through the backbone.
    """

    logits: Tensor
    label: Tensor
    kept: Tensor
    passes: list[BackboneOutput]

    def metrics(self) -> Metrics:
        """Cross entropy (nats; with its gradient) and right answers, summed over the pairs that count."""
        count = self.kept.sum()
        entropy = (F.cross_entropy(self.logits, self.label, reduction="none") * self.kept).sum()
        right = ((self.logits.argmax(dim=1) == self.label) * self.kept).sum()
        return {"itm_loss": (entropy, count), "itm_accuracy": (right, count)}


class Contrast(Task):
    """A task with vectors to rank by and, if it wants one, a matching head.

    It has no ``__init__`` of its own, so that it can stand beside another task among the bases of a class.

    Attributes:
        negatives_seed: draws the negatives; None for ``seed``.
        even_negatives: share of them that is drawn with equal chances.
        loss_weights: of losses whose weight is not 1.
        normed_vectors: whether the vectors to rank by come after the final norm, as those of training do.
    """

    in_batch_negatives = True
    negatives_seed: int | None = None
    even_negatives: float = 0.0
    loss_weights: Mapping[str, float] = MappingProxyType({})
    normed_vectors: bool = True

    def add_pair_heads(self, embed_dim: int, temperature: float, matching: bool = True) -> None:
        """Make the heads: vectors of width E = ``embed_dim``; ``temperature`` is the first value of the learned one."""
        width = self.config.dim
        self.itc_temp = nn.Parameter(torch.tensor([float(temperature)]))
        self.itc_vision_proj_head = nn.Linear(width, embed_dim, bias=False)
        self.itc_text_proj_head = nn.Linear(width, embed_dim, bias=False)
        heads = [self.itc_vision_proj_head, self.itc_text_proj_head]
        if matching:
            self.itm_head = nn.Linear(width, 2)
            heads.append(self.itm_head)
        for head in heads:
            init_head(head)

    def evaluate_as_published(self) -> None:
        super().evaluate_as_published()
        self.normed_vectors = False

    def encode_image(self, images: Tensor, normed: bool | None = None) -> Tensor:
        """Unit vectors [B, E], float32, of images [B, 3, H, W]: class token after the final norm, projected.

        ``normed=False`` leaves the final norm out, as EVE's published evaluation (not its training) does; None: as
        ``normed_vectors`` says.
        """
        return self._vector(self.encode(images=images), self.itc_vision_proj_head, self._normed(normed))

    def encode_text(self, text_ids: Tensor, text_mask: Tensor, normed: bool | None = None) -> Tensor:
        """Unit vectors [B, E], float32, of texts [B, L], from the first token; ``normed`` as in ``encode_image``."""
        output = self.encode(text_ids=text_ids, text_mask=text_mask)
        return self._vector(output, self.itc_text_proj_head, self._normed(normed))

    def match(self, images: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits [B, 2] of pairs, float32 at any precision, or many would tie in bf16; index 1: they match."""
        head = self.itm_head
        hidden = joint_first_text(self.encode(images, text_ids, text_mask))
        return F.linear(hidden.float(), head.weight.float(), head.bias.float())

    def contrast(self, batch: Batch) -> ContrastOutput:
        """An image-only and a text-only pass. ``image_index`` [b] tells which rows show the same image."""
        sample_id = batch["sample_id"]
        vision = self.encode(images=batch["images"], noise=self.drop_path_noise(sample_id, 0))
        text = self.encode(
            text_ids=batch["text_ids"], text_mask=batch["text_mask"], noise=self.drop_path_noise(sample_id, 1)
        )
        image_own = self._vector(vision, self.itc_vision_proj_head)
        text_own = self._vector(text, self.itc_text_proj_head)
        image_all, text_all = gather_with_gradient(torch.cat([image_own, text_own], dim=1)).chunk(2, dim=1)
        rows = self._gather_rows(batch)
        same = batch["image_index"][:, None] == rows.image_index
        temperature = self.temperature()
        to_text, to_image = image_own @ text_all.t() / temperature, text_own @ image_all.t() / temperature
        loss_sum = (contrastive_sum(to_text, same) + contrastive_sum(to_image, same)) / 2
        return ContrastOutput(loss_sum, to_text.detach(), to_image.detach(), same, rows, [vision, text])

    def match_negatives(self, batch: Batch, contrast: ContrastOutput) -> MatchingOutput:
        """One joint pass over pairs, (image, negative text) and (negative image, text)."""
        text_column, image_column, found = self._draw_negatives(batch["sample_id"], contrast)
        images = batch["images"].to(self.dtype)
        own_ids, own_mask, other_ids, other_mask = texts_at(text_column, batch, contrast.rows, found)
        text_mask = torch.cat([own_mask, other_mask, own_mask])
        # The meta device knows no lengths: all texts are taken to be the longest.
        longest = text_mask.shape[1] if text_mask.is_meta else max(int(text_mask.any(dim=0).sum()), 1)
        output = self.encode(
            torch.cat([images, images, images_at(image_column, images, found)]),
            torch.cat([own_ids, other_ids, own_ids])[:, :longest],
            text_mask[:, :longest],
            noise=self.drop_path_noise(batch["sample_id"], 2, 3, 4),
        )
        logits = self.itm_head(joint_first_text(output)).float()
        label = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        label[: len(images)] = 1
        kept = torch.cat([torch.ones_like(found), found, found]).float()
        return MatchingOutput(logits, label, kept, [output])

    def _draw_negatives(self, sample_id: Tensor, contrast: ContrastOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Column [b] of a negative text and of a negative image for each row; found [b], False where there is none."""
        seed = self.seed if self.negatives_seed is None else self.negatives_seed
        pairs = sample_id[:, None], contrast.rows.sample_id
        text_bits = random_bits(seed, NEGATIVE_TEXTS, *pairs)
        image_bits = random_bits(seed, NEGATIVE_IMAGES, *pairs)
        text_column, found = hard_negatives(contrast.to_text, contrast.same, text_bits, self.even_negatives)
        image_column, _ = hard_negatives(contrast.to_image, contrast.same, image_bits, self.even_negatives)
        return text_column, image_column, found

    def sum_losses(self, measured: Metrics, passes: Sequence[BackboneOutput]) -> TaskOutput:
        """Every ``*_loss`` of ``measured`` by its weight, as a mean over the global batch; + the auxiliary loss."""
        losses = {name: pair for name, pair in measured.items() if name.endswith("_loss")}
        counts = global_counts(*(count for _, count in losses.values()))
        loss, metrics = self.aux_share(*passes)
        means = {name: total / count for (name, (total, _)), count in zip(losses.items(), counts, strict=True)}
        shares = [mean * self.loss_weights.get(name, 1.0) for name, mean in means.items()]
        metrics |= {name: (total.detach(), count) for name, (total, count) in measured.items()}
        return TaskOutput(sum(shares[1:], shares[0]) + loss, metrics)

    def _normed(self, asked: bool | None) -> bool:
        return self.normed_vectors if asked is None else asked

    @staticmethod
    def _vector(output: BackboneOutput, head: nn.Linear, normed: bool = True) -> Tensor:
        hidden = output.hidden if normed else output.before_norm
        return F.normalize(head(hidden[:, 0]).float(), dim=-1)

    def temperature(self) -> Tensor:
        """[1] float32, clamped; a gradient passes, or the parameter could never come back into the range."""
        value = self.itc_temp.float()
        return value + (value.clamp(*TEMPERATURE_RANGE) - value).detach()

    def _gather_rows(self, batch: Batch) -> GlobalRows:
        """Ids and texts of all ranks in one gather; texts are brought to one width for it."""
        width = self.config.max_text_length
        missing = width - batch["text_ids"].shape[1]
        text = F.pad(torch.stack([batch["text_ids"], batch["text_mask"].long()], dim=1), (0, missing))
        numbers = torch.stack([batch["sample_id"], batch["image_index"]], dim=1)
        rows = gather_with_gradient(torch.cat([numbers, text.flatten(1)], dim=1))
        text_ids, text_mask = rows[:, 2:].chunk(2, dim=1)
        return GlobalRows(rows[:, 0], rows[:, 1], text_ids, text_mask.bool())


def check_temperature(temperature: float) -> None:
    """Raise UserError for a first value that the clamp would replace."""
    least, most = TEMPERATURE_RANGE
    if not least <= temperature <= most:
        raise UserError(
            f"objective.temperature={temperature} is out of range: the learned temperature stays within {least} and "
            f"{most}"
        )


def contrastive_sum(logits: Tensor, same: Tensor) -> Tensor:
    """Cross entropy of each row with equal weights over the columns that show the same image, summed over rows.

    Args:
        logits: [b, G] float32, similarities / temperature.
        same: [b, G] bool, True where row and column belong to the same image; at least one a row.
    """
    targets = same.float() / same.sum(dim=1, keepdim=True)
    return -(logits.log_softmax(dim=1) * targets).sum()


def images_at(column: Tensor, images: Tensor, found: Tensor) -> Tensor:
    """Images [b, 3, H, W] of the global batch's rows ``column``. A collective; no gradient passes.

    A row without a negative takes its own pair, whatever the order of the ranks, and does not count.
    """
    with torch.no_grad():
        all_images = gather_with_gradient(images.flatten(1)).view(-1, *images.shape[1:])
    return torch.where(found[:, None, None, None], all_images[column], images)


def texts_at(column: Tensor, batch: Batch, rows: GlobalRows, found: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids and mask [b, W] of this rank's texts, and of those of the global batch's rows ``column``, as `images_at`."""
    width = rows.text_ids.shape[1]
    own_ids, own_mask = (
        F.pad(part, (0, width - part.shape[1])) for part in (batch["text_ids"], batch["text_mask"].bool())
    )
    other_ids = torch.where(found[:, None], rows.text_ids[column], own_ids)
    other_mask = torch.where(found[:, None], rows.text_mask[column], own_mask)
    return own_ids, own_mask, other_ids, other_mask


def hard_negatives(logits: Tensor, same: Tensor, bits: Tensor, even: float = 0.0) -> tuple[Tensor, Tensor]:
    """Draw one negative a row, the likelier the more similar: softmax(logits) + 1e-5, as in ALBEF and EVE.

    The draw is the largest of log weight + Gumbel noise, so that it depends on the noise of the pairs, not on the
    order or the number of ranks.

    Args:
        logits: [b, G] float32.
        same: [b, G] bool, pairs of the same image; never drawn.
        bits: [b, G] random int64, one a pair.
        even: share of the draws with equal chances for all that may be drawn.
    Returns:
        column [b] int64, and found [b] bool: False where every column shows the same image.
    """
    noise = -(-uniform(bits).log()).log()
    weight = logits.softmax(dim=1) + 1e-5
    if even:
        weight = weight.masked_fill(same, 0)
        shares = weight / weight.sum(dim=1, keepdim=True), (~same).float() / (~same).sum(dim=1, keepdim=True)
        weight = (1 - even) * shares[0] + even * shares[1]  # NaN in a row without any, where nothing is found
    score = weight.log() + noise
    return score.masked_fill(same, -torch.inf).argmax(dim=1), ~same.all(dim=1)
