"""Scores of a fine-tuned model on a split: predictions in the official formats, metrics from ``evaluation``, examples.

Files written below the run folder, rank 0 alone:

    scores_<split>.json                       the metrics; "incomplete" says what the split lacks of its raw data, if so
    predictions_<split>.{npz,json,csv}        retrieval score arrays, VQA v2 results, NLVR2 identifier,prediction lines
    samples/                                  examples for the report
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evaluation import nlvr, retrieval
from eve_ds import examples
from eve_ds.config import FinetuneConfig
from eve_ds.data.samples import CaptionSamples, NlvrSamples, Samples, VqaSamples, read_answer_list
from eve_ds.engine import batches
from eve_ds.engine.evaluation import Arrays, predict
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.watchdog import mark
from eve_ds.files import write_json, write_text
from eve_ds.tasks.base import Task
from preprocessing.local_files import write_atomic

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

Scores = dict[str, float]
_SAMPLES = {"caption": "captions", "vqa": "questions", "nlvr": "statements"}  # as manifests count them in "source"


class Scorer:
    """Predicts splits of one data set with whatever weights the task has.

    Args:
        config: the resolved tree.
        samples: {split: its samples, with evaluation transforms}.
        device: this rank's.
        stop: asked between batches; all ranks raise StopError where one of them was asked to stop.
    """

    def __init__(
        self, config: FinetuneConfig, samples: Mapping[str, Samples], device: torch.device, stop: StopRequest
    ) -> None:
        self.config, self.samples, self.device, self.stop = config, samples, device, stop

    def predict(self, task: Task, split: str, limit: int | None = None) -> Arrays | None:
        """Predictions in sample order on rank 0, None elsewhere. Called by all ranks."""
        found = batches.evaluation_batches(self.config, self.samples[split], limit)
        return predict(task, found, self.device, self.stop)

    def while_training(self, trainer: Trainer) -> Scores:
        """Metrics on the validation split for the log; empty but on rank 0."""
        split = self.config.data.val_split
        if split is None:
            return {}
        with trainer.whole_weights():
            arrays = self.predict(trainer.task, split, self.config.logging.eval_samples)
        return {f"val/{name}": value for name, value in self._metrics(arrays, split).items()} if arrays else {}

    def score(self, task: Task, split: str, folder: Path) -> None:
        """Predict ``split`` and write predictions, metrics and examples. Called by all ranks."""
        mark(f"the scoring of {split}")
        with self.stop.deferred():
            arrays = self.predict(task, split)
        if arrays is None:
            return
        samples = self.samples[split]
        scores, lack = self._metrics(arrays, split), incomplete(samples)
        if scores:  # told before anything is written: the disk may be full
            told = "  ".join(f"{name} {value:.4g}" for name, value in scores.items())
            print(f"{split}: {told}{_told(lack)}", flush=True)
        if isinstance(samples, CaptionSamples):
            buffer = io.BytesIO()
            np.savez(buffer, allow_pickle=False, **similarity(arrays))
            write_atomic(folder / f"predictions_{split}.npz", buffer.getvalue())
        elif isinstance(samples, VqaSamples):
            rows = vqa_rows(arrays, read_answer_list(self.config.data.home))
            write_json(folder / f"predictions_{split}.json", rows)
        elif isinstance(samples, NlvrSamples):
            predictions = nlvr_predictions(arrays, samples)
            write_text(folder / f"predictions_{split}.csv", "".join(f"{k},{v}\n" for k, v in predictions.items()))
        if scores:
            self._write_examples(samples, arrays, folder)
            write_json(folder / f"scores_{split}.json", scores | ({"incomplete": lack} if lack else {}))
        else:
            told = f"predictions written; the split has no answers to score them by{_told(lack)}"
            print(f"{split}: {told}", flush=True)

    def _write_examples(self, samples: Samples, arrays: Arrays, folder: Path) -> None:
        count = self.config.logging.samples
        if isinstance(samples, CaptionSamples):
            examples.write_retrieval(folder, samples, similarity(arrays), count)
        elif isinstance(samples, VqaSamples):
            rows = vqa_rows(arrays, read_answer_list(self.config.data.home))
            examples.write_vqa(folder, samples, rows, count)
        elif isinstance(samples, NlvrSamples):
            examples.write_nlvr(folder, samples, arrays, count)

    def _metrics(self, arrays: Arrays, split: str) -> Scores:
        samples = self.samples[split]
        if isinstance(samples, CaptionSamples):
            return retrieval.recalls(**similarity(arrays))
        if isinstance(samples, VqaSamples):
            if not arrays["known"].any():  # a test split without answers
                return {}
            return {"soft_accuracy": 100 * float(arrays["score"].mean())}
        assert isinstance(samples, NlvrSamples)
        if (arrays["label"] < 0).any():  # a test split without labels
            return {}
        predictions = nlvr_predictions(arrays, samples)
        labels = dict(zip(predictions, arrays["label"].tolist(), strict=True))
        return nlvr.score(
            predictions, [{"identifier": key, "label": str(bool(label))} for key, label in labels.items()]
        )


def incomplete(samples: Samples) -> dict[str, Any]:
    """What a prepared split lacks of its raw data: {"questions": {"scored": n, "of": N}, "dropped": {reason: count}}.

    Empty where it is whole, or where nobody knows: shards by other scripts have no manifest.
    """
    manifest = getattr(samples.split, "manifest", {})
    dropped = {reason: count for reason, count in manifest.get("dropped", {}).items() if count}
    if not dropped:
        return {}
    counts = {"images": samples.rows} if isinstance(samples, CaptionSamples) else {}
    counts[_SAMPLES[samples.kind]] = len(samples)
    source = manifest.get("source", {})
    known = any(source.get(name, 0) > count for name, count in counts.items())
    lost = 0 if known else sum(dropped.values())  # records at fault, which no count of the raw data has
    found = {name: {"scored": count, "of": max(count + lost, source.get(name, 0))} for name, count in counts.items()}
    return found | {"dropped": dropped}


def _told(lack: Mapping[str, Any]) -> str:
    if not lack:
        return ""
    whole = ", ".join(f"{part['scored']} of {part['of']} {name}" for name, part in lack.items() if name != "dropped")
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(lack["dropped"].items()))
    return f"  (over {whole}; dropped in preparation: {why})"


def similarity(arrays: Arrays) -> Arrays:
    """Cosine scores of all images and texts: image_to_text [I, T], text_to_image [T, I], text_image_index [T]."""
    rows, first = np.unique(arrays["image_index"], return_index=True)
    image = arrays["image"][first]
    order = np.argsort(arrays["sample_id"], kind="stable")
    scores = image @ arrays["text"][order].T
    index = np.searchsorted(rows, arrays["text_image_index"][order])
    return {"image_to_text": scores, "text_to_image": np.ascontiguousarray(scores.T), "text_image_index": index}


def vqa_rows(arrays: Arrays, answers: list[str]) -> list[dict[str, Any]]:
    """VQA v2 result rows, by question id; ``answers`` is the answer list."""
    order = np.argsort(arrays["question_id"], kind="stable")
    pairs = zip(arrays["question_id"][order].tolist(), arrays["answer"][order].tolist(), strict=True)
    return [{"question_id": question, "answer": answers[answer]} for question, answer in pairs]


def nlvr_predictions(arrays: Arrays, samples: NlvrSamples) -> dict[str, str]:
    """{official identifier: "True" or "False"}, in the order of the arrays."""
    pairs = zip(arrays["question_index"].tolist(), arrays["prediction"].tolist(), strict=True)
    return {samples.identifier(index): str(bool(prediction)) for index, prediction in pairs}
