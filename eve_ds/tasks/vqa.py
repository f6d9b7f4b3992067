"""Visual question answering as classification over an answer list with soft scores (EVE, as published)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.bootstrap import Parts, confidence, numbered
from eve_ds.data.samples import Key, Pending, Sample, Samples, row_text
from eve_ds.data.shards import Row
from eve_ds.data.sources import AnySplit, JoinedSplit, answers_in_shards
from eve_ds.data.transforms import Transform, may_mirror
from eve_ds.model.backbone import Backbone, BackboneOutput
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
from eve_ds.tasks.spec import Arrays, FinetuneObjective, FinetuneSpec, Thumbnails, evenly_spaced
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import UserError
from preprocessing.local_files import check_regular, json_text, load_json
from preprocessing.shards.schema import ANSWER_LIST, ANSWER_LIST_HASH, answers_sha256
from preprocessing.text.tokenizer import Tokenizer


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
            batch["images"], batch["text_ids"], batch["text_mask"], self.drop_path_noise(batch["sample_id"], 0)
        )
        targets = batch["answer_targets"].float()
        loss_sum = F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum")
        rows = torch.full((), float(targets.shape[0]), device=targets.device)
        (count,) = global_counts(rows)
        aux, metrics = self.aux_share(output)
        score = targets.gather(1, logits.argmax(dim=1, keepdim=True)).sum()
        metrics |= {"vqa_loss": (loss_sum.detach(), rows), "vqa_score": (score, rows)}
        return TaskOutput(loss_sum / count + aux, metrics)

    def predict_batch(self, batch: Batch) -> dict[str, np.ndarray]:
        """``sample``, ``question_id``, ``answer`` (its index) and its ``probability``, soft ``score``, ``known`` (has
        answers); [B] each."""
        batch = valid_rows(batch)
        with evaluating(self):
            logits = self.predict(batch["images"], batch["text_ids"], batch["text_mask"])
        probability, answer = logits.float().sigmoid().max(dim=1)
        values = {
            "sample": batch["sample_id"],
            "question_id": batch["question_id"],
            "answer": answer,
            "probability": probability,
            "known": batch["answer_targets"].sum(dim=1) > 0,
            "score": batch["answer_targets"].float().gather(1, answer[:, None]).squeeze(1),
        }
        return to_numpy(values)

    def _logits(
        self, images: Tensor, text_ids: Tensor, text_mask: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, BackboneOutput]:
        output = self.encode(images, text_ids, text_mask, noise=noise)
        return self.output(joint_first_text(output)), output


class VqaSamples(Samples):
    """Images with questions; a sample is one question with its image.

    Args:
        answer_list: A answers in the order of their labels; the classes of the head.

    dataset[sample, epoch] -> images, text_ids, sample_id, question_id, answer_targets [A] float32 soft scores (zeros
    where the answers are unknown or none is in the list)
    """

    kind = "vqa"
    plural = "questions"

    def __init__(
        self,
        directory: str | os.PathLike[str] | AnySplit,
        tokenizer: Tokenizer,
        transform: Transform,
        max_text_length: int,
        vocab_size: int | None = None,
        *,
        answer_list: Sequence[str],
    ) -> None:
        super().__init__(directory, tokenizer, transform, max_text_length, vocab_size)
        self.answer_list = answer_list
        self.num_classes = len(answer_list)

    def describe(self, key: Key) -> Sample:
        _, row, item = self.split.sample(int(key[0]))
        sample_id = self.sample_id(key)
        question = row_text(row, "questions", item)
        mirror = may_mirror([question, *_known(row, "answers", item)])
        return {
            "images": Pending(row, sample_id, mirror),
            "text_ids": self.tokenize(question),
            "sample_id": sample_id,
            "question_id": int(row.item("question_id", item)),
            "answer_targets": self._targets(row, item),
        }

    def _targets(self, row: Row, item: int) -> np.ndarray:
        targets = np.zeros(self.num_classes, dtype=np.float32)
        labels = _known(row, "answer_labels", item)
        if labels and not 0 <= min(labels) <= max(labels) < self.num_classes:
            raise UserError(
                f"{row.where}: answer label {max(labels)} is not in the answer list of {self.num_classes}; use the "
                f"{ANSWER_LIST} that the split was prepared with"
            )
        targets[labels] = _known(row, "answer_scores", item)
        return targets

    def question_id(self, sample: int) -> int:
        """The official id of a question."""
        _, row, item = self.split.sample(sample)
        return int(row.item("question_id", item))

    def answers(self, sample: int) -> dict[str, float]:
        """Those answers to a question that are in the answer list, with their soft scores."""
        _, row, item = self.split.sample(sample)
        return dict(zip(_known(row, "answers", item), _known(row, "answer_scores", item), strict=True))


def read_answer_list(directory: str | os.PathLike[str]) -> list[str]:
    """The answers of a prepared VQA dataset, in the order of their labels. Raises UserError naming the file.

    ViLT's and EVE's scripts write no list: there it is put together from what the shards say.
    """
    path = Path(directory) / ANSWER_LIST
    check_regular(path)
    try:
        answers = load_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (found := answers_in_shards(Path(directory))):
            return found
        raise UserError(f"{path}: {error.strerror}; prepare the data set with a VQA converter") from None
    except ValueError as error:
        raise UserError(f"{path}: invalid JSON ({error}); prepare the data set again") from None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{path}: is no list of answers; prepare the data set again")
    return answers


def _known(row: Row, column: str, item: int) -> list[Any]:
    """A question's answers, labels or scores; none where the cell is empty, as ViLT's scripts leave it on test."""
    return row.item(column, item) or [] if row.entries(column) else []


class VqaSpec(FinetuneSpec):
    name = "vqa"
    title = "VQA"
    measures = (("overall", "accuracy"), ("soft_accuracy", "accuracy over the answer list"))
    main_measure = "overall"
    objective = FinetuneObjective
    samples = VqaSamples
    companion_files = (ANSWER_LIST,)
    head_settings = ("head_hidden",)

    def num_classes_of(self, state: Mapping[str, Tensor]) -> int:
        return state["output.3.weight"].shape[0]

    def settings_of_head(self, state: Mapping[str, Tensor], objective: FinetuneObjective) -> dict[str, Any]:
        hidden, width = state["output.0.weight"].shape
        return {"head_hidden": hidden} if hidden != (objective.head_hidden or 2 * width) else {}

    def build(
        self, backbone: Backbone, objective: FinetuneObjective, *, mask_id: int, num_classes: int, seed: int
    ) -> VQA:
        return VQA(backbone, num_classes, objective.head_hidden)

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> VQA:
        return VQA(backbone, self.num_classes_of(state), head_hidden=state["output.0.weight"].shape[0])

    def read_companion(self, folder: str | Path, name: str) -> list[str]:
        return read_answer_list(folder)

    def build_dataset(
        self,
        split: AnySplit,
        tokenizer: Tokenizer,
        transform: Transform,
        model: ModelConfig,
        home: str,
        roots: Sequence[str],
    ) -> VqaSamples:
        answers = read_answer_list(home)
        for root in roots:
            if root != home and read_answer_list(root) != answers:
                raise UserError(
                    f"{root}/{ANSWER_LIST} and {home}/{ANSWER_LIST} differ; prepare the former with "
                    f"--answer-list {home}/{ANSWER_LIST}"
                )
        for opened in split.splits if isinstance(split, JoinedSplit) else [split]:
            if opened.manifest.get(ANSWER_LIST_HASH, answers_sha256(answers)) != answers_sha256(answers):
                raise UserError(
                    f"{home}/{ANSWER_LIST}: is not the list that {opened.name} was labeled by; put that one "
                    "back, or prepare the split again"
                )
        return VqaSamples(split, tokenizer, transform, model.max_text_length, model.vocab_size, answer_list=answers)

    def check_head(self, weights: Path, home: str) -> None:
        """Raise UserError if the head was trained on other answers than the data have, or in another order."""
        if not (weights / ANSWER_LIST).is_file():
            return  # published files come without
        trained, prepared = read_answer_list(weights), read_answer_list(home)
        if trained != prepared:
            place = next((i for i, pair in enumerate(zip(trained, prepared, strict=False)) if pair[0] != pair[1]), None)
            where = "their lengths" if place is None else f"answer {place}: {trained[place]!r} and {prepared[place]!r}"
            raise UserError(
                f"{weights / ANSWER_LIST} and {home}/{ANSWER_LIST} differ in {where}; prepare the data with "
                "--answer-list, naming the former"
            )

    def metrics(self, arrays: Arrays, dataset: VqaSamples) -> dict[str, float]:
        if not arrays["known"].any():  # a test split without answers
            return {}
        return {"soft_accuracy": 100 * float(arrays["score"].mean())}

    def intervals(self, arrays: Arrays, dataset: VqaSamples) -> dict[str, list[float]]:
        image = numbered(dataset.split.sample_rows()[arrays["sample"]].tolist())  # questions about it are one cluster
        column = {"soft_accuracy": (100 * arrays["score"].astype(np.float64), image)}
        return confidence(Parts(column, int(image.max()) + 1))

    def details(self, arrays: Arrays, dataset: VqaSamples) -> dict[str, Any]:
        known = arrays["known"].astype(bool)
        return {
            "sample": arrays["sample"],
            "question_id": arrays["question_id"],
            "prediction": [dataset.answer_list[answer] for answer in arrays["answer"].tolist()],
            "confidence": arrays["probability"],
            "score": pa.array(arrays["score"], mask=~known),
        }

    def predictions(self, arrays: Arrays, dataset: VqaSamples) -> tuple[str, bytes]:
        return "json", json_text(result_rows(arrays, dataset.answer_list)).encode()

    def examples(self, arrays: Arrays, dataset: VqaSamples, count: int, thumbnails: Thumbnails) -> dict[str, Any]:
        """Half of them right, half wrong, as far as there are such."""
        answer_of = {row["question_id"]: row["answer"] for row in result_rows(arrays, dataset.answer_list)}
        found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for sample in evenly_spaced(len(dataset), 20 * count):
            answers, predicted = dataset.answers(sample), answer_of[dataset.question_id(sample)]
            score = float(answers.get(predicted, 0.0))
            alike = found[score > 0]
            if len(alike) < (count + 1) // 2:
                alike.append(
                    {
                        "image": thumbnails.add(f"sample_{sample}", dataset.image_bytes(sample)),
                        "question": dataset.text(sample),
                        "predicted": predicted,
                        "answers": list(answers),
                        "score": score,
                    }
                )
        return {"examples": found[True] + found[False]}

    def meta_batch(self, model: ModelConfig, rows: int, text_length: int, num_classes: int) -> Batch:
        targets = torch.empty(rows, num_classes, device="meta")
        return super().meta_batch(model, rows, text_length, num_classes) | {"answer_targets": targets}


def result_rows(arrays: Arrays, answers: Sequence[str]) -> list[dict[str, Any]]:
    """Rows in VQA v2's format of results, by question id; ``answers`` is the answer list."""
    order = np.argsort(arrays["question_id"], kind="stable")
    pairs = zip(arrays["question_id"][order].tolist(), arrays["answer"][order].tolist(), strict=True)
    return [{"question_id": question, "answer": answers[answer]} for question, answer in pairs]


SPEC = VqaSpec()
