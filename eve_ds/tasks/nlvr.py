"""NLVR2: is a statement true of two images? EVE's two heads, plain and bi-attention, as published.

Legend: B statements, N tokens of a joint pass (class token, patches, text), D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation import nlvr
from evaluation.bootstrap import confidence, nlvr_parts
from eve_ds.data.samples import Key, Pending, Sample, Samples, row_text
from eve_ds.data.shards import Row
from eve_ds.data.transforms import may_mirror
from eve_ds.model.backbone import Backbone, BackboneOutput
from eve_ds.model.block import key_bias
from eve_ds.model.model_config import ModelConfig
from eve_ds.tasks.base import (
    Batch,
    Task,
    TaskOutput,
    classifier,
    evaluating,
    global_counts,
    joint_first_text,
    to_numpy,
    valid_rows,
)
from eve_ds.tasks.spec import Arrays, FinetuneObjective, FinetuneSpec, Pass, Thumbnails, evenly_spaced
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import UserError


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another; parameters named as in ``nn.MultiheadAttention``.

    Args:
        dim: D.
        heads: attention heads; divides ``dim``.
        dropout: on the attention weights, in training.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = nn.Dropout(dropout)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, own: Tensor, other: Tensor, other_mask: Tensor) -> Tensor:
        """own, other: [B, N, D]; other_mask: [B, N] bool, True for tokens that may be attended to. Gives [B, N, D]."""
        dim = own.shape[-1]
        query = F.linear(own, self.in_proj_weight[:dim], self.in_proj_bias[:dim])
        key, value = F.linear(other, self.in_proj_weight[dim:], self.in_proj_bias[dim:]).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        scores = query @ key.transpose(2, 3) * key.shape[-1] ** -0.5 + key_bias(other_mask, own.dtype)
        weights = self.dropout(scores.softmax(dim=-1, dtype=torch.float32)).to(own.dtype)
        return self.out_proj((weights @ value).transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """A learned weighted mean of the tokens.

    Args:
        dim: D.
        dropout: on the weights, in training.
    """

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(dim, 1), nn.ReLU())
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens: [B, N, D]; mask: [B, N] bool, False for padding. Gives [B, D]."""
        score = self.fc(tokens).squeeze(-1).float() - 1e4 * (~mask)
        weights = self.dropout(score.softmax(dim=1)).to(tokens.dtype)
        return (weights.unsqueeze(1) @ tokens).squeeze(1)


class NLVR(Task):
    """True or false, from the joint passes of both images with the statement.

    Args:
        backbone: the shared Transformer.
        biattn: the bi-attention head: each pass attends to the other, then both are pooled; else the first text
            tokens of both passes go through a classifier.
        head_hidden: hidden width of the plain head; None takes twice the backbone's, as published.
        head_dropout: in the bi-attention head, in training; published: 0.1 (the plain head has none).
    """

    heads = ("output.", "attn1.", "attn2.", "fc.", "attn_pool.", "nlvr2_output.")

    def __init__(
        self, backbone: Backbone, biattn: bool = False, head_hidden: int | None = None, head_dropout: float = 0.1
    ) -> None:
        super().__init__(backbone)
        width, heads = self.config.dim, self.config.num_heads
        self.biattn = biattn
        if not biattn:
            self.output = classifier(2 * width, head_hidden or 2 * width, 2)
            return
        self.attn1 = CrossAttention(width, heads, head_dropout)
        self.attn2 = CrossAttention(width, heads, head_dropout)
        self.fc = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Dropout(head_dropout))
        self.attn_pool = AttentionPool(width, head_dropout)
        self.nlvr2_output = nn.Linear(2 * width, 2)

    def predict(self, images: tuple[Tensor, Tensor], text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Logits [B, 2] (index 1: true) of two images [B, 3, H, W] each and a statement [B, L]."""
        return self._logits(images, text_ids, text_mask)[0]

    def forward(self, batch: Batch) -> TaskOutput:
        """Cross entropy, mean over the statements whose ``label`` is known (not -1)."""
        batch = valid_rows(batch)
        label = batch["label"]
        images = (batch["images_0"], batch["images_1"])
        logits, output = self._logits(
            images, batch["text_ids"], batch["text_mask"], self.drop_path_noise(batch["sample_id"], 0, 1)
        )
        loss_sum = F.cross_entropy(logits.float(), label, ignore_index=-1, reduction="sum")
        rows = (label >= 0).sum().float()
        (count,) = global_counts(rows)
        aux, metrics = self.aux_share(output)
        right = (logits.argmax(dim=1) == label).sum().float()
        metrics |= {"nlvr_loss": (loss_sum.detach(), rows), "nlvr_accuracy": (right, rows)}
        return TaskOutput(loss_sum / count + aux, metrics)

    def predict_batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """``question_index`` [B], ``prediction`` [B] (1: true), ``probability`` of true [B], ``label`` [B]."""
        batch = valid_rows(batch)
        images = (batch["images_0"], batch["images_1"])
        with evaluating(self):
            logits = self.predict(images, batch["text_ids"], batch["text_mask"]).float()
        values = {
            "question_index": batch["question_index"],
            "prediction": logits.argmax(dim=1),
            "probability": logits.softmax(dim=1)[:, 1],
            "label": batch["label"],
        }
        return to_numpy(values)

    def _logits(
        self, images: tuple[Tensor, Tensor], text_ids: Tensor, text_mask: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, BackboneOutput]:
        """Both images go through the backbone as one batch of 2 B."""
        output = self.encode(torch.cat(images), text_ids.repeat(2, 1), text_mask.repeat(2, 1), noise=noise)
        if not self.biattn:
            return self.output(torch.cat(joint_first_text(output).chunk(2), dim=1)), output
        mask = F.pad(text_mask.bool(), (output.num_image_tokens, 0), value=True)
        mask = F.pad(mask, (0, output.hidden.shape[1] - mask.shape[1]))
        left, right = output.hidden.chunk(2)
        left_seen = self.fc(torch.cat([self.attn1(left, right, mask), left], dim=-1))
        right_seen = self.fc(torch.cat([self.attn2(right, left, mask), right], dim=-1))
        pooled = torch.cat([self.attn_pool(left_seen, mask), self.attn_pool(right_seen, mask)], dim=-1)
        return self.nlvr2_output(pooled), output


class NlvrSamples(Samples):
    """Pairs of images with statements; a sample is one statement with its pair.

    dataset[sample, epoch] -> images_0 (left), images_1 (right), text_ids, sample_id, label (1 true, 0 false, -1
    unknown), question_index (the sample)
    """

    kind = "nlvr"
    plural = "statements"
    images = ("images_0", "images_1")

    def describe(self, key: Key) -> Sample:
        _, row, item = self.split.sample(int(key[0]))
        sample_id = self.sample_id(key)
        text = row_text(row, "questions", item)
        mirror = may_mirror([text])
        return {
            "images_0": Pending(row, sample_id, mirror, 0),
            "images_1": Pending(row, sample_id, mirror, 1),
            "text_ids": self.tokenize(text),
            "sample_id": sample_id,
            "label": _label(row, item),
            "question_index": int(key[0]),
        }

    def identifier(self, sample: int) -> str:
        """The official identifier of a statement, `split-set-PAIR-sentence`."""
        _, row, item = self.split.sample(sample)
        return str(row.item("identifier", item))

    def label(self, sample: int) -> int:
        """1 true, 0 false, -1 unknown."""
        _, row, item = self.split.sample(sample)
        return _label(row, item)


def _label(row: Row, item: int) -> int:
    answer = row.item("answers", item) if row.entries("answers") else None
    return {"true": 1, "false": 0}.get(str(answer).lower(), -1)


class NlvrSpec(FinetuneSpec):
    name = "nlvr"
    title = "NLVR"
    measures = (("accuracy", "accuracy"), ("consistency", "consistency"))
    main_measure = "accuracy"
    to_percent = 100.0
    objective = FinetuneObjective
    samples = NlvrSamples
    head_settings = ("biattn", "head_hidden")

    def settings_of_head(self, state: Mapping[str, Tensor], objective: FinetuneObjective) -> dict[str, Any]:
        biattn = "attn1.in_proj_weight" in state
        found = {"biattn": biattn} if biattn != objective.biattn else {}
        if biattn:
            return found
        if len(state["output.3.weight"]) != 2:
            raise KeyError("output.3.weight of two classes")
        hidden, inputs = state["output.0.weight"].shape
        return found | ({"head_hidden": hidden} if hidden != (objective.head_hidden or inputs) else {})

    def build(
        self, backbone: Backbone, objective: FinetuneObjective, *, mask_id: int, num_classes: int, seed: int
    ) -> NLVR:
        return NLVR(backbone, objective.biattn, objective.head_hidden)

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> NLVR:
        if "attn1.in_proj_weight" in state:
            return NLVR(backbone, biattn=True)
        return NLVR(backbone, head_hidden=state["output.0.weight"].shape[0])

    def metrics(self, arrays: Arrays, dataset: NlvrSamples) -> dict[str, float]:
        if (arrays["label"] < 0).any():  # a test split without labels
            return {}
        found = identified(arrays, dataset)
        labels = zip(found, arrays["label"].tolist(), strict=True)
        return nlvr.score(found, [{"identifier": key, "label": str(bool(label))} for key, label in labels])

    def intervals(self, arrays: Arrays, dataset: NlvrSamples) -> dict[str, list[float]]:
        sentences = [nlvr.sentence_of(identifier) for identifier in identified(arrays, dataset)]
        return confidence(nlvr_parts((arrays["prediction"] == arrays["label"]).tolist(), sentences))

    def details(self, arrays: Arrays, dataset: NlvrSamples) -> dict[str, Any]:
        true, known = arrays["probability"], arrays["label"] >= 0
        right = (arrays["prediction"] == arrays["label"]).astype(np.float32)
        return {
            "sample": arrays["question_index"],
            "identifier": list(identified(arrays, dataset)),
            "prediction": [str(bool(prediction)) for prediction in arrays["prediction"].tolist()],
            "confidence": np.where(arrays["prediction"] == 1, true, 1 - true),
            "score": pa.array(right, mask=~known),
        }

    def official_split(self, dataset: NlvrSamples) -> str:
        return nlvr.official_split(dataset.identifier(sample) for sample in range(len(dataset)))

    def predictions(self, arrays: Arrays, dataset: NlvrSamples) -> tuple[str, bytes]:
        lines = [f"{identifier},{prediction}\n" for identifier, prediction in identified(arrays, dataset).items()]
        return "csv", "".join(lines).encode()

    def examples(self, arrays: Arrays, dataset: NlvrSamples, count: int, thumbnails: Thumbnails) -> dict[str, Any]:
        """Half of them right, half wrong, as far as there are such."""
        right = arrays["prediction"] == arrays["label"]
        examples = []
        for wanted in (True, False):
            places = np.flatnonzero(right == wanted)
            for place in places[evenly_spaced(len(places), (count + 1) // 2)]:
                sample = int(arrays["question_index"][place])
                images = [
                    thumbnails.add(f"sample_{sample}_{side}", dataset.image_bytes(sample, side)) for side in (0, 1)
                ]
                examples.append(
                    {
                        "image_0": images[0],
                        "image_1": images[1],
                        "statement": dataset.text(sample),
                        "predicted": bool(arrays["prediction"][place]),
                        "label": bool(arrays["label"][place]),
                    }
                )
        return {"examples": examples}

    def meta_batch(self, model: ModelConfig, rows: int, text_length: int, num_classes: int) -> Batch:
        batch = super().meta_batch(model, rows, text_length, num_classes)
        images = batch.pop("images")
        return batch | {"images_0": images, "images_1": torch.empty_like(images), "label": batch["sample_id"]}

    def passes(self, model: ModelConfig, objective: FinetuneObjective, rows: int, text_length: int) -> list[Pass]:
        return [Pass(2 * rows, model.num_patches, text_length)]


def identified(arrays: Arrays, dataset: NlvrSamples) -> dict[str, str]:
    """Predictions {official identifier: "True" or "False"}, in the order of the arrays.

    Raises:
        UserError: two statements have one identifier, as shards by other scripts may; names the second.
    """
    found: dict[str, str] = {}
    for index, prediction in zip(arrays["question_index"].tolist(), arrays["prediction"].tolist(), strict=True):
        identifier = dataset.identifier(index)
        if identifier in found:
            where = dataset.split.sample(index)[1].where
            raise UserError(f"{where}: identifier {identifier} occurs twice in the split; make identifiers unique")
        found[identifier] = str(bool(prediction))
    return found


SPEC = NlvrSpec()
