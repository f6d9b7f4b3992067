"""Visual question answering as classification over an answer list with soft scores (EVE, as published)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.model.backbone import Backbone, BackboneOutput
from eve_ds.tasks.base import (
    Batch,
    Task,
    TaskOutput,
    classifier,
    evaluating,
    global_counts,
    joint_first_text,
    register,
    to_numpy,
    valid_rows,
)


@register("vqa")
class VQA(Task):
    """Answer scores from the first text token of a joint pass.

    Args:
        backbone: the shared Transformer.
        num_answers: A, length of the answer list.
        head_hidden: hidden width of the head; None takes twice the backbone's, as published.
    """

    heads = ("output.",)

    def __init__(self, backbone: Backbone, num_answers: int, head_hidden: int | None = None) -> None:
        super().__init__(backbone)
        width = self.config.dim
        self.output = classifier(width, head_hidden or 2 * width, num_answers)

    def predict(self, images: Tensor, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits [B, A] of images [B, 3, H, W] and questions [B, L]."""
        return self._logits(images, text_ids, text_mask)[0]

    def forward(self, batch: Batch) -> TaskOutput:
        """Binary cross entropy summed over answers, mean over questions; ``answer_targets`` [B, A] are soft scores."""
        batch = valid_rows(batch)
        logits, output = self._logits(
            batch["images"], batch["text_ids"], batch["text_mask"], self.draws(batch["sample_id"], 0)
        )
        targets = batch["answer_targets"].float()
        loss_sum = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
        rows = torch.tensor(float(targets.shape[0]), device=targets.device)
        (count,) = global_counts(rows)
        aux, metrics = self.aux_share(output)
        score = targets.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
        metrics |= {"vqa_loss": (loss_sum.detach(), rows), "vqa_score": (score, rows)}
        return TaskOutput(loss_sum / count + aux, metrics)

    def predict_batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """``question_id``, ``answer`` (its index), ``probability``, soft ``score``, ``known`` (has answers); [B]."""
        batch = valid_rows(batch)
        with evaluating(self):
            logits = self.predict(batch["images"], batch["text_ids"], batch["text_mask"])
        probability, answer = logits.float().sigmoid().max(dim=1)
        values = {
            "question_id": batch["question_id"],
            "answer": answer,
            "probability": probability,
            "known": batch["answer_targets"].sum(dim=1) > 0,
            "score": batch["answer_targets"].float().gather(1, answer[:, None]).squeeze(1),
        }
        return to_numpy(values)

    def _logits(
        self, images: Tensor, text_ids: Tensor, text_mask: Tensor, draws: Tensor | None = None
    ) -> tuple[Tensor, BackboneOutput]:
        output = self.encode(images, text_ids, text_mask, draws=draws)
        return self.output(joint_first_text(output)), output
