"""Image-text retrieval: contrast (ITC) and matching (ITM) with hard negatives from the global batch.

As in EVE's published fine-tuning code, which follows ALBEF (arXiv 2107.07651). All captions of one image are its
positives and never its negatives.
Legend: b this rank's rows, G rows of the global batch, E width of the contrastive vectors.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation import retrieval
from eve_ds.data.samples import CaptionSamples
from eve_ds.model.backbone import Backbone, BackboneOutput
from eve_ds.model.model_config import ModelConfig
from eve_ds.parallel import gather_with_gradient
from eve_ds.tasks.base import (
    Batch,
    Task,
    TaskOutput,
    evaluating,
    global_counts,
    init_head,
    joint_first_text,
    to_numpy,
    valid_rows,
)
from eve_ds.tasks.masking import NEGATIVE_IMAGES, NEGATIVE_TEXTS, random_bits, uniform
from eve_ds.tasks.spec import Arrays, FinetuneObjective, FinetuneSpec, Pass, Thumbnails, evenly_spaced
from eve_ds.weights.model_folder import ModelFolder

TEMPERATURE_RANGE = (0.001, 0.5)
SHOWN = 5  # best results of an example


@dataclass
class _GlobalRows:
    """The integer columns of every rank's rows: sample_id, image_index [G]; text_ids, text_mask [G, W]."""

    sample_id: Tensor
    image_index: Tensor
    text_ids: Tensor
    text_mask: Tensor


class Retrieval(Task):
    """Two unit vectors to rank by, and a matching head to re-rank by.

    Args:
        backbone: the shared Transformer.
        embed_dim: E.
        temperature: first value of the learned temperature.
        seed: of the drawing of negatives.
    """

    heads = ("itc_temp", "itc_vision_proj_head.", "itc_text_proj_head.", "itm_head.")

    def __init__(self, backbone: Backbone, embed_dim: int = 256, temperature: float = 0.07, seed: int = 0) -> None:
        super().__init__(backbone)
        width = self.config.dim
        self.seed = seed
        self.itc_temp = nn.Parameter(torch.tensor([float(temperature)]))
        self.itc_vision_proj_head = nn.Linear(width, embed_dim, bias=False)
        self.itc_text_proj_head = nn.Linear(width, embed_dim, bias=False)
        self.itm_head = nn.Linear(width, 2)
        for head in (self.itc_vision_proj_head, self.itc_text_proj_head, self.itm_head):
            init_head(head)

    def encode_image(self, images: Tensor, normed: bool = True) -> Tensor:
        """Unit vectors [B, E], float32, of images [B, 3, H, W]: class token after the final norm, projected.

        ``normed=False`` leaves the final norm out, as EVE's published evaluation (not its training) does.
        """
        return self._vector(self.encode(images=images), self.itc_vision_proj_head, normed)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor, normed: bool = True) -> Tensor:
        """Unit vectors [B, E], float32, of texts [B, L], from the first token; ``normed`` as in ``encode_image``."""
        return self._vector(self.encode(text_ids=text_ids, text_mask=text_mask), self.itc_text_proj_head, normed)

    def match(self, images: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits [B, 2] of pairs; index 1: they match."""
        return self.itm_head(joint_first_text(self.encode(images, text_ids, text_mask)))

    def forward(self, batch: Batch) -> TaskOutput:
        """Contrast + matching. ``image_index`` [B] tells which rows show the same image."""
        batch = valid_rows(batch)
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
        temperature = self._temperature()
        to_text, to_image = image_own @ text_all.t() / temperature, text_own @ image_all.t() / temperature
        itc_sum = (contrastive_sum(to_text, same) + contrastive_sum(to_image, same)) / 2

        logits, label, kept, joint = self._match_negatives(batch, rows, to_text.detach(), to_image.detach(), same)
        itm_sum = (F.cross_entropy(logits, label, reduction="none") * kept).sum()
        pairs = torch.tensor(float(same.shape[0]), device=same.device)
        itc_count, itm_count = global_counts(pairs, kept.sum())
        aux, metrics = self.aux_share(vision, text, joint)
        metrics |= {
            "itc_loss": (itc_sum.detach(), pairs),
            "itm_loss": (itm_sum.detach(), kept.sum()),
            "itm_accuracy": (((logits.argmax(dim=1) == label) * kept).sum(), kept.sum()),
        }
        return TaskOutput(itc_sum / itc_count + itm_sum / itm_count + aux, metrics)

    def predict_batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """Vectors to rank by, each image of the batch encoded once.

        ``image`` [U, E] with ``image_index`` [U]; ``text`` [B, E] with ``text_image_index`` and ``sample_id`` [B].
        """
        batch = valid_rows(batch)
        index, inverse = batch["image_index"].unique(return_inverse=True)
        position = torch.arange(inverse.shape[0], device=inverse.device)
        # All captions of an image bring the same pixels: any one row will do.
        row = torch.zeros_like(index).scatter_(0, inverse, position)
        with evaluating(self):
            image = self.encode_image(batch["images"][row])
            text = self.encode_text(batch["text_ids"], batch["text_mask"])
        values = {"image": image, "image_index": index, "text": text}
        return to_numpy(values | {"text_image_index": batch["image_index"], "sample_id": batch["sample_id"]})

    @staticmethod
    def _vector(output: BackboneOutput, head: nn.Linear, normed: bool = True) -> Tensor:
        hidden = output.hidden if normed else output.before_norm
        return F.normalize(head(hidden[:, 0]).float(), dim=-1)

    def _temperature(self) -> Tensor:
        """Clamped for use; the gradient passes the clamp, or the parameter could never come back into the range."""
        value = self.itc_temp.float()
        return value + (value.clamp(*TEMPERATURE_RANGE) - value).detach()

    def _gather_rows(self, batch: Batch) -> _GlobalRows:
        """Ids and texts of all ranks in one gather; texts are brought to one width for it."""
        width = self.config.max_text_length
        missing = width - batch["text_ids"].shape[1]
        text = F.pad(torch.stack([batch["text_ids"], batch["text_mask"].long()], dim=1), (0, missing))
        numbers = torch.stack([batch["sample_id"], batch["image_index"]], dim=1)
        rows = gather_with_gradient(torch.cat([numbers, text.flatten(1)], dim=1))
        text_ids, text_mask = rows[:, 2:].chunk(2, dim=1)
        return _GlobalRows(rows[:, 0], rows[:, 1], text_ids, text_mask.bool())

    def _match_negatives(
        self, batch: Batch, rows: _GlobalRows, to_text: Tensor, to_image: Tensor, same: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, BackboneOutput]:
        """One joint pass over pairs, (image, negative text) and (negative image, text).

        Args:
            to_text, to_image: [b, G] similarity logits without gradient.
            same: [b, G] bool.
        Returns:
            logits [3 b, 2] float32, label [3 b] int64, kept [3 b] float32 (0 for a row that found no negative), output.
        """
        images, sample_id = batch["images"].to(self.dtype), batch["sample_id"][:, None]
        text_bits = random_bits(self.seed, NEGATIVE_TEXTS, sample_id, rows.sample_id)
        image_bits = random_bits(self.seed, NEGATIVE_IMAGES, sample_id, rows.sample_id)
        text_column, found = hard_negatives(to_text, same, text_bits)
        image_column, _ = hard_negatives(to_image, same, image_bits)
        with torch.no_grad():
            all_images = gather_with_gradient(images.flatten(1)).view(-1, *images.shape[1:])
        # A row without a negative takes its own pair, whatever the order of the ranks, and does not count.
        other_images = torch.where(found[:, None, None, None], all_images[image_column], images)
        width = rows.text_ids.shape[1]
        own_ids, own_mask = (
            F.pad(part, (0, width - part.shape[1])) for part in (batch["text_ids"], batch["text_mask"].bool())
        )
        other_ids = torch.where(found[:, None], rows.text_ids[text_column], own_ids)
        other_mask = torch.where(found[:, None], rows.text_mask[text_column], own_mask)
        text_mask = torch.cat([own_mask, other_mask, own_mask])
        # The meta device knows no lengths: all texts are taken to be the longest.
        longest = width if text_mask.is_meta else max(int(text_mask.any(dim=0).sum()), 1)
        output = self.encode(
            torch.cat([images, images, other_images]),
            torch.cat([own_ids, other_ids, own_ids])[:, :longest],
            text_mask[:, :longest],
            noise=self.drop_path_noise(batch["sample_id"], 2, 3, 4),
        )
        logits = self.itm_head(joint_first_text(output)).float()
        label = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        label[: len(images)] = 1
        kept = torch.cat([torch.ones_like(found), found, found]).float()
        return logits, label, kept, output


class RetrievalSpec(FinetuneSpec):
    name = "retrieval"
    title = "Retrieval"
    measures = tuple(
        (f"{query}_r{k}", f"{what} R@{k}") for query, what in (("txt", "text"), ("img", "image")) for k in (1, 5, 10)
    )
    objective = FinetuneObjective

    def build(
        self, backbone: Backbone, objective: FinetuneObjective, *, mask_id: int, num_classes: int, seed: int
    ) -> Retrieval:
        return Retrieval(backbone, objective.embed_dim, objective.temperature, seed)

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> Retrieval:
        return Retrieval(backbone, embed_dim=state["itc_vision_proj_head.weight"].shape[0])

    def metrics(self, arrays: Arrays, dataset: CaptionSamples) -> dict[str, float]:
        return retrieval.recalls(**similarity(arrays))

    def predictions(self, arrays: Arrays, dataset: CaptionSamples) -> tuple[str, bytes]:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **similarity(arrays))
        return "npz", buffer.getvalue()

    def counts(self, dataset: CaptionSamples) -> dict[str, int]:
        return {"images": dataset.rows, **super().counts(dataset)}

    def examples(self, arrays: Arrays, dataset: CaptionSamples, count: int, thumbnails: Thumbnails) -> dict[str, Any]:
        """The best five images for ``count`` captions and the best five captions for as many images."""
        scores = similarity(arrays)
        owner = scores["text_image_index"]

        def shown(image: int) -> str:
            return thumbnails.add(f"image_{image}", dataset.row_image_bytes(image))

        to_image, to_text = [], []
        for text in evenly_spaced(len(owner), count):
            row = scores["text_to_image"][text]
            results = [
                {"image": shown(int(i)), "score": float(row[i]), "correct": bool(owner[text] == i)} for i in _best(row)
            ]
            to_image.append({"query": dataset.text(text), "results": results})
        for image in evenly_spaced(len(scores["image_to_text"]), count):
            row = scores["image_to_text"][image]
            results = [
                {"text": dataset.text(int(t)), "score": float(row[t]), "correct": bool(owner[t] == image)}
                for t in _best(row)
            ]
            to_text.append({"image": shown(image), "results": results})
        return {"text_to_image": to_image, "image_to_text": to_text}

    def passes(self, model: ModelConfig, objective: FinetuneObjective, rows: int, text_length: int) -> list[Pass]:
        patches = model.num_patches
        return [Pass(rows, patches, 0), Pass(rows, 0, text_length), Pass(3 * rows, patches, text_length)]

    def gathered_values(self, model: ModelConfig, rows: int) -> dict[str, int]:
        return {"images for negatives": rows * 3 * model.image_size**2}


def similarity(arrays: Arrays) -> Arrays:
    """Cosine scores of all images and texts: image_to_text [I, T], text_to_image [T, I], text_image_index [T]."""
    rows, first = np.unique(arrays["image_index"], return_index=True)
    image = arrays["image"][first]
    order = np.argsort(arrays["sample_id"], kind="stable")
    scores = image @ arrays["text"][order].T
    index = np.searchsorted(rows, arrays["text_image_index"][order])
    return {"image_to_text": scores, "text_to_image": np.ascontiguousarray(scores.T), "text_image_index": index}


def _best(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:SHOWN]


def contrastive_sum(logits: Tensor, same: Tensor) -> Tensor:
    """Cross entropy of each row with equal weights over the columns that show the same image, summed over rows.

    Args:
        logits: [b, G] float32, similarities / temperature.
        same: [b, G] bool, True where row and column belong to the same image; at least one a row.
    """
    targets = same.float() / same.sum(dim=1, keepdim=True)
    return -(logits.log_softmax(dim=1) * targets).sum()


def hard_negatives(logits: Tensor, same: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one negative a row, the likelier the more similar: softmax(logits) + 1e-5, as in ALBEF and EVE.

    The draw is the largest of log weight + Gumbel noise, so that it depends on the noise of the pairs, not on the
    order or the number of ranks.

    Args:
        logits: [b, G] float32.
        same: [b, G] bool, pairs of the same image; never drawn.
        bits: [b, G] random int64, one a pair.
    Returns:
        column [b] int64, and found [b] bool: False where every column shows the same image.
    """
    noise = -(-uniform(bits).log()).log()
    score = (logits.softmax(dim=1) + 1e-5).log() + noise
    return score.masked_fill(same, -torch.inf).argmax(dim=1), ~same.all(dim=1)


SPEC = RetrievalSpec()
