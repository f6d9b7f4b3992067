"""Scores of a fine-tuned model on a split. The task computes them (eve_ds/tasks); here they are gathered and written.

Files written below the run folder, rank 0 alone:

    scores_<split>.json                       the metrics, their intervals, and what they are of (score_record.py)
    predictions_<split>.{npz,json,csv}        retrieval score arrays, VQA v2 results, NLVR2 identifier,prediction lines
    details_<split>.parquet                   each prediction with its confidence, for the page of errors
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
from eve_ds.engine import batches, score_record
from eve_ds.engine.distributed import launched_world
from eve_ds.engine.evaluation import Arrays, predict
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.watchdog import mark
from eve_ds.errors import OUTPUT
from eve_ds.tasks.base import Task
from eve_ds.tasks.spec import Thumbnails
from preprocessing.errors import UserError
from preprocessing.local_files import write_atomic, write_json

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

Scores = dict[str, float]
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
    """

    def __init__(
        self, config: FinetuneConfig, datasets: Mapping[str, Samples], device: torch.device, stop: StopRequest
    ) -> None:
        self.config, self.datasets, self.device, self.stop = config, datasets, device, stop

    def predict(self, task: Task, split: str, limit: int | None = None) -> Arrays | None:
        """Predictions in sample order on rank 0, None elsewhere. Called by all ranks."""
        found = batches.evaluation_batches(self.config, self.datasets[split], limit)
        return predict(task, found, self.device, self.stop)

    @_user_errors()
    def while_training(self, trainer: Trainer) -> Scores:
        """Metrics on the validation split for the log; empty but on rank 0."""
        split = self.config.data.val_split
        if split is None:
            return {}
        with trainer.whole_weights():
            arrays = self.predict(trainer.task, split, self.config.logging.eval_samples)
        scores = self.config.spec.metrics(arrays, self.datasets[split]) if arrays else {}
        return {f"val/{name}": value for name, value in scores.items()}

    @_user_errors()
    def score(self, task: Task, split: str, folder: Path, step: int | None = None) -> None:
        """Predict ``split`` and write predictions, metrics and examples. Called by all ranks.

        Args:
            task: with the weights to score.
            split: of the dataset.
            folder: the run's.
            step: of the run in training that scores its weights; None for those that ``--checkpoint`` names.
        """
        mark(f"the scoring of {split}")
        with self.stop.deferred():
            arrays = self.predict(task, split)
        if arrays is None:
            return
        spec, dataset = self.config.spec, self.datasets[split]
        scores, lack = spec.metrics(arrays, dataset), incomplete(dataset, spec.counts(dataset))
        intervals = spec.intervals(arrays, dataset) if scores else {}
        if scores:  # logged before anything is written: the disk may be full
            values = "  ".join(f"{name} {shown(value, intervals.get(name), '.4g')}" for name, value in scores.items())
            _output.info("%s: %s%s", split, values, _incomplete_note(lack))
        suffix, content = spec.predictions(arrays, dataset)
        write_atomic(folder / f"predictions_{split}.{suffix}", content)
        if details := spec.details(arrays, dataset):
            write_atomic(folder / f"details_{split}.parquet", parquet(details, dataset.split.fingerprint))
        if not scores:
            _output.info(
                "%s: predictions written; the split has no answers to score them by%s", split, _incomplete_note(lack)
            )
            return
        thumbnails = Thumbnails(folder)
        if examples := spec.examples(arrays, dataset, self.config.logging.samples, thumbnails):
            write_json(thumbnails.folder / "samples.json", examples)
        record = score_record.about(self.config, dataset, split, spec.counts(dataset), folder, step)
        beside = {score_record.INTERVALS: intervals, score_record.INCOMPLETE: lack, score_record.ABOUT: record}
        found = {name: value for name, value in beside.items() if value}
        write_json(folder / f"scores_{split}.json", scores | found)

    def add_exported(self, split: str, folder: Path) -> None:
        """Name the model that the run in ``folder`` has exported in the scores that it wrote before. On rank 0."""
        if launched_world()[0] == 0:
            score_record.add_exported(folder, split)


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


def _incomplete_note(lack: Mapping[str, Any]) -> str:
    if not lack:
        return ""
    whole = ", ".join(f"{part['scored']} of {part['of']} {name}" for name, part in lack.items() if name != "dropped")
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(lack["dropped"].items()))
    return f"  (over {whole}; dropped in preparation: {why})"
