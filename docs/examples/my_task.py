"""A fine-tuning task of your own: which color was taken out of the caption?

    python -m eve_ds.finetune --task docs.examples.my_task:SPEC --checkpoint RUN --data DIR --output_dir OUT

DIR holds captions, prepared as for retrieval. The model sees the image and the caption without its color.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.data.samples import CaptionSamples, Key, Sample
from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks import FinetuneSpec, Objective, Task, TaskOutput
from eve_ds.tasks.base import (
    Batch,
    evaluating,
    global_counts,
    init_head,
    joint_first_text,
    to_numpy,
    valid_rows,
)
from eve_ds.tasks.spec import Arrays, Thumbnails, evenly_spaced
from preprocessing.errors import UserError

COLORS = ("red", "green", "blue", "yellow")
COLOR = re.compile(rf"\b({'|'.join(COLORS)})\b")
NO_COLOR = -1


@dataclass
class ColorObjective(Objective):
    """The settings: ``--objective.label_smoothing 0.1``.

    Args:
        label_smoothing: share of the target that is spread over all colors.
    """

    label_smoothing: float = 0.0

    def check(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing={self.label_smoothing} must be at least 0 and below 1")


class ColorSamples(CaptionSamples):
    """dataset[sample, epoch] -> what captions have, the text without its color; color (-1: the caption names none)."""

    num_classes = len(COLORS)

    def describe(self, key: Key) -> Sample:
        text = self.text(int(key[0]))
        words = self.tokenize(COLOR.sub("", text))
        return super().describe(key) | {"text_ids": words, "color": color_of(text), "sample": int(key[0])}


class ColorTask(Task):
    """A linear classifier on the first text token of a joint pass."""

    heads = ("color_head.",)

    def __init__(self, backbone: Backbone, num_colors: int, label_smoothing: float) -> None:
        super().__init__(backbone)
        self.label_smoothing = label_smoothing
        self.color_head = nn.Linear(self.config.dim, num_colors)
        init_head(self.color_head)

    def forward(self, batch: Batch) -> TaskOutput:
        batch = valid_rows(batch)  # without the rows that only make the ranks even
        noise = self.drop_path_noise(batch["sample_id"], 0)
        output = self.encode(batch["images"], batch["text_ids"], batch["text_mask"], noise=noise)
        logits, color = self.color_head(joint_first_text(output)).float(), batch["color"]
        loss_sum = F.cross_entropy(
            logits, color, ignore_index=NO_COLOR, reduction="sum", label_smoothing=self.label_smoothing
        )
        rows = (color != NO_COLOR).sum().float()
        (count,) = global_counts(rows)  # of all ranks: each gives its share of the mean
        aux, metrics = self.aux_share(output)
        right = (logits.argmax(dim=1) == color).sum().float()
        metrics |= {"color_loss": (loss_sum.detach(), rows), "color_accuracy": (right, rows)}
        return TaskOutput(loss_sum / count + aux, metrics)

    def predict(self, images: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits [B, colors]."""
        logits: Tensor = self.color_head(joint_first_text(self.encode(images, text_ids, text_mask)))
        return logits

    def predict_batch(self, batch: Batch) -> Arrays:
        batch = valid_rows(batch)
        with evaluating(self):
            logits = self.predict(batch["images"], batch["text_ids"], batch["text_mask"])
        return to_numpy({"sample": batch["sample"], "color": batch["color"], "prediction": logits.argmax(dim=1)})


class ColorSpec(FinetuneSpec):
    name = "color"
    title = "Color"
    measures = (("color_accuracy", "accuracy"),)
    objective = ColorObjective
    samples = ColorSamples

    def build(
        self, backbone: Backbone, objective: ColorObjective, *, mask_id: int, num_classes: int, seed: int
    ) -> ColorTask:
        return ColorTask(backbone, len(COLORS), objective.label_smoothing)

    def metrics(self, arrays: Arrays, dataset: ColorSamples) -> dict[str, float]:
        known = arrays["color"] != NO_COLOR
        if not known.any():
            return {}
        return {"color_accuracy": 100 * float(np.mean(arrays["prediction"][known] == arrays["color"][known]))}

    def predictions(self, arrays: Arrays, dataset: ColorSamples) -> tuple[str, bytes]:
        pairs = zip(arrays["sample"].tolist(), arrays["prediction"].tolist(), strict=True)
        return "csv", "".join(f"{sample},{COLORS[color]}\n" for sample, color in sorted(pairs)).encode()

    # The rest is optional: examples for samples/samples.json, and what `python -m eve_ds.plan` needs.

    def examples(self, arrays: Arrays, dataset: ColorSamples, count: int, thumbnails: Thumbnails) -> dict[str, Any]:
        """In the layout of VQA's examples, which the report shows."""
        rows = []
        for place in evenly_spaced(len(arrays["sample"]), count):
            sample = int(arrays["sample"][place])
            image = thumbnails.add(f"sample_{sample}", dataset.image_bytes(sample))
            color, predicted = arrays["color"][place], arrays["prediction"][place]
            rows.append(
                {
                    "image": image,
                    "question": COLOR.sub("…", dataset.text(sample)),
                    "predicted": COLORS[predicted],
                    "answers": [COLORS[color]] if color != NO_COLOR else [],
                    "score": float(predicted == color),
                }
            )
        return {"examples": rows}

    def meta_batch(self, model: ModelConfig, rows: int, text_length: int, num_classes: int) -> Batch:
        color = torch.empty(rows, dtype=torch.int64, device="meta")
        return super().meta_batch(model, rows, text_length, num_classes) | {"color": color}


def color_of(text: str) -> int:
    """The number in COLORS of the first color that a text names; NO_COLOR if it names none."""
    found = COLOR.search(text)
    return COLORS.index(found[1]) if found else NO_COLOR


SPEC = ColorSpec()
