"""Scores of a fine-tuned model on a split. The task computes them (eve_ds/tasks); here they are gathered and written.

Files written below the run folder, rank 0 alone:

    scores_<split>.json                       the metrics, their intervals, and what they are of (score_record.py)
    predictions_<split>.{npz,json,csv}        retrieval score arrays, VQA v2 results, NLVR2 identifier,prediction lines
    details_<split>.parquet                   each prediction with its confidence, for the page of errors
    predictions_<split>_reranked.npz          retrieval score arrays after re-ranking
    samples/                                  examples for the report
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from evaluation.bootstrap import shown
from evaluation.common import InputError
from eve_ds.config import FinetuneConfig
from eve_ds.data.samples import Samples
from eve_ds.engine import score_record
from eve_ds.engine.best_weights import load_best
from eve_ds.engine.distributed import launched_world
from eve_ds.engine.evaluation import EvaluationFeed
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.watchdog import mark
from eve_ds.errors import OUTPUT
from eve_ds.tasks.base import Task
from eve_ds.tasks.feed import Arrays
from eve_ds.tasks.spec import Thumbnails
from eve_ds.weights.model_card import renew_card
from eve_ds.weights.model_folder import MODEL, MODEL_BEST, ModelFolder
from preprocessing.errors import UserError
from preprocessing.local_files import write_atomic, write_json

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

Scores = dict[str, float]
Best = Mapping[str, Any] | None
_output = logging.getLogger(OUTPUT)


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """The errors of the package ``evaluation``, as of scores that are NaN, become those of this one."""
    try:
        yield
    except InputError as error:
        raise UserError(str(error)) from error


class Scorer:
    """Predicts splits of one dataset with whatever weights the task has.

    Args:
        config: the resolved tree.
        datasets: {split: its dataset, with evaluation transforms}.
        device: this rank's.
        stop: asked between batches; all ranks raise StopError where one of them was asked to stop.
        files: what the first weights were read from; None where they were not.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        datasets: Mapping[str, Samples],
        device: torch.device,
        stop: StopRequest,
        files: ModelFolder | None = None,
    ) -> None:
        self.config, self.datasets, self.device, self.stop = config, datasets, device, stop
        scored = files if config.evaluate else None
        self._origin = score_record.origin(config.init_from, scored) if launched_world()[0] == 0 else {}

    def predict(self, task: Task, split: str, limit: int | None = None) -> Arrays | None:
        """Predictions in sample order on rank 0, None elsewhere. Called by all ranks."""
        feed = EvaluationFeed(self.config, self.device, self.stop)
        return self.config.spec.predict(task, self.datasets[split], feed, limit)

    @_user_errors()
    def while_training(self, trainer: Trainer, limit: int | None = None) -> Scores:
        """Metrics on the validation split, of ``limit`` samples, for the log; empty but on rank 0."""
        split = self.config.data.val_split
        if split is None:
            return {}
        with trainer.whole_weights():
            arrays = self.predict(trainer.task, split, limit or self.config.logging.eval_samples)
        scores = self.config.spec.metrics(arrays, self.datasets[split]) if arrays else {}
        return {f"val/{group}{name}": value for group, own in _groups(scores) for name, value in own.items()}

    def score_trained(self, task: Task, split: str, folder: Path, step: int) -> None:
        """``score`` with the best weights of the run if it has a ``checkpoint.best``, which then stay in ``task``."""
        best = load_best(task, self.config)
        self.score(task, split, folder, best["step"] if best else step, best)

    @_user_errors()
    def score(self, task: Task, split: str, folder: Path, step: int | None = None, best: Best = None) -> None:
        """Predict ``split`` and write predictions, metrics and examples. Called by all ranks.

        Args:
            task: with the weights to score.
            split: of the dataset.
            folder: the run's.
            step: of the run in training that scores its weights; None for those that ``--checkpoint`` names.
            best: of the weights, if they are not the last ones (eve_ds/engine/best_weights.py).
        """
        mark(f"the scoring of {split}")
        with self.stop.deferred():
            arrays = self.predict(task, split)
        if arrays is None:
            return
        spec, dataset = self.config.spec, self.datasets[split]
        scores, lack = spec.metrics(arrays, dataset), incomplete(dataset, spec.counts(dataset))
        intervals = spec.intervals(arrays, dataset) if scores else {}
        official = spec.official_split(dataset)
        named = f"{split} ({official})" if official else split
        if scores:  # logged before anything is written: the disk may be full
            for group, own in _groups(scores):
                within = dict(_groups(intervals)).get(group, {})
                values = "  ".join(f"{name} {shown(value, within.get(name), '.4g')}" for name, value in own.items())
                what = named + (f", {group[:-1]}" if group else "")
                _output.info("%s: %s%s%s", what, values, _incomplete_note(lack), _best_note(best))
        suffix, content = spec.predictions(arrays, dataset)
        write_atomic(folder / f"predictions_{split}.{suffix}", content)
        for ending, further in spec.more_predictions(arrays, dataset).items():
            write_atomic(folder / f"predictions_{split}_{ending}", further)
        if details := spec.details(arrays, dataset):
            write_atomic(folder / f"details_{split}.parquet", parquet(details, dataset.split.fingerprint))
        if not scores:
            _output.info(
                "%s: predictions written; the split has no answers to score them by%s", named, _incomplete_note(lack)
            )
            return
        thumbnails = Thumbnails(folder)
        if examples := spec.examples(arrays, dataset, self.config.logging.samples, thumbnails):
            write_json(thumbnails.folder / "samples.json", examples)
        model = folder / (MODEL_BEST if best else MODEL)
        exported = None if step is None else (step, model.name)
        record = score_record.about(self.config, dataset, split, spec.counts(dataset), folder, self._origin, exported)
        beside: dict[str, Any] = {"official_split": official, score_record.INTERVALS: intervals}
        beside |= {score_record.INCOMPLETE: lack, "best": best, score_record.ABOUT: record}
        found = {name: value for name, value in beside.items() if value}
        if step is not None:
            renew_card(model, step, {split: scores})
        write_json(folder / f"scores_{split}.json", scores | found)


def parquet(columns: Mapping[str, Any], fingerprint: str) -> bytes:
    """A Parquet file of columns of one length; its metadata name the data that it is of."""
    buffer = pa.BufferOutputStream()
    table = pa.table(dict(columns), metadata={"data": fingerprint})
    pq.write_table(table, buffer, compression="zstd")
    content: bytes = buffer.getvalue().to_pybytes()
    return content


def incomplete(dataset: Samples, counts: Mapping[str, int]) -> dict[str, Any]:
    """What a prepared split lacks of its raw data: {"questions": {"scored": n, "of": N}, "dropped": {reason: count}}.

    Empty where it is whole, or where nobody knows: shards by other scripts have no manifest. ``counts``: what is
    scored, {"questions": n}.
    """
    manifest = getattr(dataset.split, "manifest", {})
    dropped = {reason: count for reason, count in manifest.get("dropped", {}).items() if count}
    if not dropped:
        return {}
    source = manifest.get("source", {})
    known = any(source.get(name, 0) > count for name, count in counts.items())
    lost = 0 if known else sum(dropped.values())  # records at fault, which no count of the raw data has
    found = {name: {"scored": count, "of": max(count + lost, source.get(name, 0))} for name, count in counts.items()}
    return found | {"dropped": dropped}


def _groups(scores: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """("", the scores of their own) and ("NAME/", those of group NAME)."""
    own = {name: value for name, value in scores.items() if not isinstance(value, Mapping)}
    return [("", own), *((f"{name}/", dict(value)) for name, value in scores.items() if isinstance(value, Mapping))]


def _best_note(best: Best) -> str:
    return "  (weights of step {step}, the best by {metric}: {value:.4g})".format(**best) if best else ""


def _incomplete_note(lack: Mapping[str, Any]) -> str:
    if not lack:
        return ""
    whole = ", ".join(f"{part['scored']} of {part['of']} {name}" for name, part in lack.items() if name != "dropped")
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(lack["dropped"].items()))
    return f"  (over {whole}; dropped in preparation: {why})"
