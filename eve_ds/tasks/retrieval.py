"""Image-text retrieval: contrast (ITC) and matching (ITM) with hard negatives, both from tasks/contrast.py."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from evaluation import retrieval
from eve_ds.data.samples import CaptionSamples
from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks.base import Batch, TaskOutput, valid_rows
from eve_ds.tasks.contrast import CONTRAST_HEADS, MATCHING_HEAD, Contrast
from eve_ds.tasks.spec import Arrays, FinetuneObjective, FinetuneSpec, Pass, Thumbnails, evenly_spaced
from eve_ds.weights.model_folder import ModelFolder

SHOWN = 5  # best results of an example


class Retrieval(Contrast):
    """Two unit vectors to rank by, and a matching head to re-rank by.

    Args:
        backbone: the shared Transformer.
        embed_dim: E.
        temperature: first value of the learned temperature.
        seed: of the drawing of negatives.
    """

    heads = (*CONTRAST_HEADS, MATCHING_HEAD)

    def __init__(self, backbone: Backbone, embed_dim: int = 256, temperature: float = 0.07, seed: int = 0) -> None:
        super().__init__(backbone)
        self.seed = seed
        self.add_pair_heads(embed_dim, temperature)

    def forward(self, batch: Batch) -> TaskOutput:
        """Contrast + matching. ``image_index`` [B] tells which rows show the same image."""
        batch = valid_rows(batch)
        contrast = self.contrast(batch)
        matching = self.match_negatives(batch, contrast)
        return self.sum_losses(contrast.metrics() | matching.metrics(), [*contrast.passes, *matching.passes])


class RetrievalSpec(FinetuneSpec):
    name = "retrieval"
    title = "Retrieval"
    measures = tuple(
        (f"{query}_r{k}", f"{what} R@{k}") for query, what in (("txt", "text"), ("img", "image")) for k in (1, 5, 10)
    )
    objective = FinetuneObjective
    head_settings = ("embed_dim",)

    def settings_of_head(self, state: Mapping[str, Tensor], objective: FinetuneObjective) -> dict[str, Any]:
        width = state["itc_vision_proj_head.weight"].shape[0]
        return {"embed_dim": width} if width != objective.embed_dim else {}

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


SPEC = RetrievalSpec()
