"""What distinguishes one task from another: the interface that training, scoring and planning use.

A task is one module: a ``Task`` (its loss), the dataset of its samples, and an instance of ``FinetuneSpec`` or
``PretrainSpec`` that ties them together. Nothing else in EVE-DS asks which task it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from eve_ds.data.data_config import DataSource
from eve_ds.data.samples import CaptionSamples, Samples
from eve_ds.data.sources import AnySplit
from eve_ds.data.transforms import Transform, decode_image
from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import MOST, ModelConfig
from eve_ds.recipes import read_run_config, section_of
from eve_ds.tasks.base import Batch, Task
from eve_ds.tasks.contrast import check_temperature
from eve_ds.tasks.feed import Arrays, Feed, joined
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import UserError
from preprocessing.local_files import Content, load_json
from preprocessing.shards.schema import PILLOW_PIXELS
from preprocessing.text.tokenizer import Tokenizer

THUMBNAIL = 160  # pixels
DEFAULT_MASK_ID = 4  # [MASK] of the tokenizers that EVE-DS trains


class Thumbnails:
    """Images as the model sees them, shrunk and stored in ``RUN/samples/``, each once.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "samples"
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, data: bytes) -> str:
        """Store the image file ``data`` under ``name``, unless it is there. Returns the file's name."""
        file = self.folder / f"{name}.png"
        if not file.exists():
            small = decode_image(data, PILLOW_PIXELS)
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(file)
        return file.name


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most ``count`` indices below ``total``, evenly spaced."""
    return [i * total // count for i in range(count)] if total > count else list(range(total))


@dataclass
class Objective:
    """Base class of the config's section ``objective``: the fields of a subclass are the settings of a task."""

    def check(self) -> None:
        """Raise UserError naming the first setting that is out of range."""


@dataclass
class FinetuneObjective(Objective):
    """What a fine-tuning task needs beyond the backbone.

    Args:
        biattn: NLVR: bi-attention head in place of the plain one.
        embed_dim: retrieval: width of the contrastive vectors.
        temperature: retrieval: first value of the learned temperature, which stays within 0.001 and 0.5.
        head_hidden: VQA and NLVR: hidden width of the head; null takes twice the backbone's.
        rerank: retrieval: score the most similar candidates of every query with the matching head, too.
        k_test: retrieval: how many candidates that are.
        rerank_score: retrieval: matching, the matching head's logit, as in EVE's published code; sum, that and the
            cosine, as in BLIP's; or odds, the matching head's log-odds and the cosine / temperature.
        even_negatives: retrieval: share of the matching head's negatives that are drawn from the batch with equal
            chances, not the likelier the more similar. 0 as published; more where the head stays at its prior.
        matching_weight: retrieval: of the matching loss, beside the contrast's 1. 1 as published.
    """

    biattn: bool = False
    embed_dim: int = 256
    temperature: float = 0.07
    head_hidden: int | None = None
    rerank: bool = False
    k_test: int = 128
    rerank_score: Literal["matching", "sum", "odds"] = "matching"
    even_negatives: float = 0.0
    matching_weight: float = 1.0

    def check(self) -> None:
        """Raise UserError naming the first setting that is out of range."""
        for name in ("embed_dim", "temperature", "head_hidden", "k_test", "matching_weight"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= MOST:
                raise UserError(f"objective.{name}={value} must be a positive number, at most {MOST}")
        check_temperature(self.temperature)
        if not 0 <= self.even_negatives <= 1:
            raise UserError(f"objective.even_negatives={self.even_negatives} is a share: from 0 to 1")


@dataclass(frozen=True)
class Pass:
    """A pass through the backbone: samples, visible patches of each (0: no image), text tokens of each (0: none)."""

    samples: int
    patches: int
    text: int

    @property
    def tokens(self) -> int:
        return self.samples * ((self.patches + 1 if self.patches else 0) + self.text)


class TaskSpec(ABC):
    """What pre-training objectives and fine-tuning tasks have in common.

    Attributes:
        name: in messages and reports.
        objective: dataclass of the config's section ``objective``.
        samples: class of the dataset; its ``kind`` says which shards it reads.
        head_may_be_missing: ``load_task_model`` takes weights without this task's head, which then has initial values.
        companion_files: names of JSON files that lie beside the prepared data and that the head is of no use without,
            such as a list of answers. A run stores copies of them, and they count for its identity.
    """

    name: str
    objective: type[Objective] = Objective
    samples: type[Samples] = CaptionSamples
    head_may_be_missing: bool = False
    companion_files: tuple[str, ...] = ()

    @abstractmethod
    def build(self, backbone: Backbone, objective: Any, *, mask_id: int, num_classes: int, seed: int) -> Task:
        """The task with initial values.

        Args:
            backbone: the shared Transformer, with its initial values.
            objective: the section of the config, of the class ``self.objective``.
            mask_id: token id of [MASK].
            num_classes: ``num_classes`` of the dataset, or what ``num_classes_of`` finds.
            seed: of the run, for what the task draws at random.
        """

    def num_classes_of(self, state: Mapping[str, Tensor]) -> int:
        """Classes of the head whose weights are in ``state``. Raises KeyError naming a tensor that is missing."""
        return 0

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> Task:
        """The task with initial values and the shapes of the weights in ``state`` (EVE-DS names), read from ``files``.

        Raises:
            KeyError: a tensor that tells the head's shape is missing; names it.
            UserError: the stored config is not that of a run.
        """
        classes = self.num_classes_of(state)  # first: without this head the config may be of another task
        objective = stored_section(self.objective, files.config, "objective") if files.config else self.objective()
        return self.build(backbone, objective, mask_id=stored_mask_id(files), num_classes=classes, seed=0)

    def build_dataset(
        self,
        split: AnySplit,
        tokenizer: Tokenizer,
        transform: Transform,
        model: ModelConfig,
        home: str,
        roots: Sequence[str],
    ) -> Any:
        """The dataset over an open split.

        Args:
            split: the split, of all sources in training.
            tokenizer: of its texts.
            transform: of its images.
            model: the model's shape.
            home: folder of the data set that is scored.
            roots: folders of the data sets that ``split`` is made of.
        Raises:
            UserError: the data are broken, or do not go with the model or with one another.
        """
        return self.samples(split, tokenizer, transform, model.max_text_length, model.vocab_size)

    def check_sources(self, objective: Any, sources: Sequence[DataSource]) -> None:
        """Raise UserError naming a source of a ``modality`` that the task cannot learn from: here all but pairs.

        Args:
            objective: the section of the config.
            sources: of the training data.
        """
        for source in sources:
            if source.modality != "pairs":
                raise UserError(
                    f"data.sources: {source.path} has modality: {source.modality}, and task {self.name} learns from "
                    "pairs alone; leave it out, or take --task pretrain"
                )

    def read_companion(self, folder: str | Path, name: str) -> Any:
        """The content of a companion file in ``folder``. Raises UserError if there is none, or a broken one."""
        return load_json((Path(folder) / name).read_text(encoding="utf-8"))

    def companions(self, folder: str | Path) -> dict[str, Any]:
        """All companion files in ``folder``: {name: content}."""
        return {name: self.read_companion(folder, name) for name in self.companion_files}

    def check_head(self, weights: Path, home: str) -> None:
        """Raise UserError if a companion file in the folder ``weights`` of a head differs from the one in ``home``."""
        for name in self.companion_files:  # published weights come without
            if (weights / name).is_file() and self.read_companion(weights, name) != self.read_companion(home, name):
                raise UserError(f"{weights / name} and {home}/{name} differ; use the data that the head was trained on")

    # For the planner, which runs the task on the meta device. The defaults are those of one pass over image and text.

    def meta_batch(self, model: ModelConfig, rows: int, text_length: int, num_classes: int) -> Batch:
        """A micro-batch without values for ``forward``, every text ``text_length`` tokens long."""
        with torch.device("meta"):
            numbers = torch.empty(rows, dtype=torch.int64)
            return {
                "images": torch.empty(rows, 3, model.image_size, model.image_size),
                "text_ids": torch.empty(rows, text_length, dtype=torch.int64),
                "text_mask": torch.empty(rows, text_length, dtype=torch.bool),
                "sample_id": numbers,
                "image_index": numbers,
            }

    def passes(self, model: ModelConfig, objective: Any, rows: int, text_length: int) -> list[Pass]:
        """The passes through the backbone that a micro-batch takes."""
        return [Pass(rows, model.num_patches, text_length)]

    def selected_rows(self, objective: Any, rows: int, text_length: int) -> int:
        """How many rows an index by a boolean mask picks in ``forward``: without values nobody can count them."""
        return rows

    def gathered_values(self, model: ModelConfig, rows: int) -> dict[str, int]:
        """How many values of a micro-batch the task sends from each rank to all others: {what: values of one rank}."""
        return {}


class FinetuneSpec(TaskSpec):
    """A task that a pre-trained model is fine-tuned on and scored by.

    Attributes:
        title: in the report.
        measures: those metrics that the report shows: (key, what to call it).
        main_measure: the key of the one that a baseline without a key of its own belongs to.
        to_percent: factor from a metric to percent.
        zeroshot: whether ``--zeroshot`` makes sense: a pre-trained model may have the heads that scoring needs.
        head_settings: those settings of ``objective`` that the shapes of a head tell (``settings_of_head``).
    """

    title: str
    measures: tuple[tuple[str, str], ...] = ()
    main_measure: str = ""
    to_percent: float = 1.0
    zeroshot: bool = False
    head_settings: tuple[str, ...] = ()

    def settings_of_head(self, state: Mapping[str, Tensor], objective: Any) -> dict[str, Any]:
        """Those of ``head_settings`` that a head in ``state`` (EVE-DS names; shapes alone count) has otherwise than
        ``objective`` says. Raises KeyError naming a tensor that is missing.
        """
        return {}

    def predict(self, task: Task, dataset: Any, feed: Feed, limit: int | None = None) -> Arrays | None:
        """A pass over a split: what ``metrics`` and ``predictions`` need, on rank 0; None on the others. Called by all
        ranks. Here the rows of ``Task.predict_batch``, joined in rank order; a task may go over its split otherwise.

        Args:
            task: with the weights that are scored.
            dataset: of the split.
            feed: of its batches.
            limit: the first so many samples; None for all.
        """
        return joined([task.predict_batch(batch) for batch in feed.shared(dataset, limit)])

    @abstractmethod
    def metrics(self, arrays: Arrays, dataset: Any) -> dict[str, Any]:
        """The scores of a split, numbers or named groups of numbers; empty if it has no labels to score by.

        Args:
            arrays: what ``predict`` gave.
            dataset: of the split.
        """

    @abstractmethod
    def predictions(self, arrays: Arrays, dataset: Any) -> tuple[str, Content]:
        """The suffix and the content of the file ``predictions_SPLIT.SUFFIX``."""

    def more_predictions(self, arrays: Arrays, dataset: Any) -> dict[str, Content]:
        """Further files: {ENDING: content} is written as ``predictions_SPLIT_ENDING``."""
        return {}

    def examples(self, arrays: Arrays, dataset: Any, count: int, thumbnails: Thumbnails) -> dict[str, Any]:
        """About ``count`` predictions for the report (``samples/samples.json``); empty for none."""
        return {}

    def intervals(self, arrays: Arrays, dataset: Any) -> dict[str, Any]:
        """95 % confidence intervals, [low, high] of each metric, in groups as ``metrics`` has them; or none.
        evaluation/bootstrap.py computes them."""
        return {}

    def details(self, arrays: Arrays, dataset: Any) -> dict[str, Any]:
        """Columns of the file ``details_SPLIT.parquet``, one row a prediction; none for no file.

        eve_ds/report/error_page.py reads ``sample`` (int64), ``prediction``, ``confidence`` (0 to 1, or a similarity)
        and ``score`` (0 to 1, null where the answer is not known).
        """
        return {}

    def official_split(self, dataset: Any) -> str:
        """What papers call the split, where the samples tell: "test-P" of NLVR2's test1. Empty where they do not."""
        return ""

    def counts(self, dataset: Any) -> dict[str, int]:
        """How much is scored, by the names that manifests have in "source"."""
        return {dataset.plural: len(dataset)}


@dataclass
class HeldOutExamples:
    """What a pre-trained model makes of a few samples, for the report.

    Args:
        tree: goes into ``samples/samples.json``.
        images: file name in ``samples/`` -> uint8 [H, W, 3].
    """

    tree: dict[str, Any] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)


class PretrainSpec(TaskSpec):
    """An objective that a model is pre-trained with. It is evaluated by its loss on held-out samples."""

    head_may_be_missing = True

    def held_out_examples(self, task: Any, batch: Batch, dataset: Any, chosen: Sequence[int]) -> HeldOutExamples:
        """Examples for the report. Called by all ranks, since experts may be spread over them.

        Args:
            task: what ``build`` made.
            batch: the samples ``chosen`` of ``dataset``, on the task's device.
            dataset: of the held-out split.
            chosen: numbers of samples.
        """
        return HeldOutExamples()


def stored_section(kind: type[Any], path: Path, section: str, only_own: bool = False) -> Any:
    """A section of the config that a run stores, as a dataclass ``kind``.

    Args:
        kind: the dataclass.
        path: of the config.
        section: its name.
        only_own: settings that ``kind`` does not have are left out: the run may be of another task, with more of them.
    Raises:
        UserError: there is no such section, or it does not fit.
    """
    values = read_run_config(path, section)[section]
    if only_own:
        values = {name: value for name, value in values.items() if name in {own.name for own in fields(kind)}}
    return section_of(kind, values, f"{path}: {section}")


def stored_mask_id(files: ModelFolder) -> int:
    """Token id of [MASK], from the tokenizer beside the weights if there is one."""
    return Tokenizer.load(files.tokenizer).mask_id if files.tokenizer is not None else DEFAULT_MASK_ID
