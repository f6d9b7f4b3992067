"""What both entry points build from the config: samples, batches, the task with its experts in place."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data.overlap import SplitIds
from eve_ds.data.samples import CaptionSamples, NlvrSamples, Samples, VqaSamples, read_answer_list
from eve_ds.data.shards import Split
from eve_ds.data.sources import JoinedSplit, open_split
from eve_ds.data.transforms import build_transform
from eve_ds.engine import agreement, first_weights
from eve_ds.engine.distributed import launched_world
from eve_ds.engine.identity import Identity, Input, identity_of, place
from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
from eve_ds.errors import UserError
from eve_ds.files import write_json
from eve_ds.model.backbone import Backbone
from eve_ds.tasks import NLVR, VQA, MaskedModeling, Retrieval, Task
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.errors import DataError
from preprocessing.redaction import printable
from preprocessing.shards.manifest import ANSWER_LIST_HASH, answers_sha256
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.text.tokenizer import Tokenizer

Config = PretrainConfig | FinetuneConfig
_log = logging.getLogger(__name__)


def tokenizer(config: Config) -> Tokenizer:
    """The tokenizer named in the config, or the one beside the weights that the run starts from."""
    path: str | Path | None = config.data.tokenizer
    weights, source = first_weights.source(config), config.resume_from or config.init_from
    trained = weights.tokenizer if weights else None
    if path is None and trained is None:
        raise UserError(
            "--data.tokenizer is missing; name the folder that `python -m preprocessing tokenizer train` wrote"
        )
    found = Tokenizer.load(path or trained or "")
    if path is not None and trained is not None and (difference := found.difference(Tokenizer.load(trained))):
        raise UserError(
            f"--data.tokenizer {path} is not the tokenizer that {source} was trained with ({trained}): "
            f"{difference}; leave --data.tokenizer out to take the latter"
        )
    weights_without_tokenizer = isinstance(config, FinetuneConfig) and config.init_from is not None and trained is None
    if weights_without_tokenizer and found.vocab_size < config.model.vocab_size * 15 // 16:
        # Weights that come without their tokenizer: their vocabulary may be padded a little, no more.
        raise UserError(
            f"--data.tokenizer {path}: has {found.vocab_size} entries, the model {config.model.vocab_size}; name the "
            "tokenizer that the weights were trained with"
        )
    return found


def samples(config: Config, split: str, tokenizer: Tokenizer, train: bool) -> Samples:
    """The samples of a split, of the kind that the task needs: in training those of all sources."""
    data, model = config.data, config.model
    if not data.home:
        raise UserError(
            "--data.path is missing; name a prepared data set (preprocessing/README.md says how to make one)"
        )
    scale = data.crop_scale if train else None
    transform = build_transform(
        model.image_size, train, data.augmentation, scale, data.flip, config.engine.seed, max_pixels=data.max_pixels
    )
    roots = [source.path for source in data.sources] if train and data.sources else [data.home]
    task = getattr(config, "task", "pretrain")
    kinds: dict[str, type[Samples]] = {"vqa": VqaSamples, "nlvr": NlvrSamples}
    samples = kinds.get(task, CaptionSamples)
    splits = [open_split(root, split, samples.kind) for root in roots]
    joined = splits[0] if len(splits) == 1 else JoinedSplit(splits)
    arguments = (joined, tokenizer, transform, model.max_text_length, model.vocab_size)
    if samples is VqaSamples:
        answers = read_answer_list(data.home)
        for root in roots:
            if root != data.home and read_answer_list(root) != answers:
                raise UserError(
                    f"{root}/{ANSWER_LIST} and {data.home}/{ANSWER_LIST} differ; prepare the former with "
                    f"--answer-list {data.home}/{ANSWER_LIST}"
                )
        for opened in splits:
            if opened.manifest.get(ANSWER_LIST_HASH, answers_sha256(answers)) != answers_sha256(answers):
                raise UserError(
                    f"{data.home}/{ANSWER_LIST}: is not the list that {opened.name} was labeled by; put that one "
                    "back, or prepare the split again"
                )
        return VqaSamples(*arguments, num_answers=len(answers))
    return samples(*arguments)


def check_apart(config: Config, training: Samples | None, held_out: Mapping[str, Samples]) -> None:
    """Raise DataError where what is trained on is scored, too, or anything is trained on or scored twice.
    ``data.allow_overlap`` lets it pass, but for questions and statements that would be scored twice.

    Compared are splits of one data set: in another one, the same id may be another image's. ``training`` is None where
    a model is scored alone: then it is the data set's training split, if there is one, that it must not hold.
    """
    home = Path(config.data.home).resolve()
    opened = {name: SplitIds(one.split) for name, one in held_out.items() if isinstance(one.split, Split)}
    for scored in opened.values():
        scored.check_once()
    trained = [SplitIds(split) for split in _training_splits(config, training)]
    for read in (*(trained if training is not None else ()), *opened.values()):
        found, mostly = read.doubled()
        _refuse(config, found, "move one of these files away", few=not mostly)
    own = next((one for one in trained if home in _folders(one.split)), None)
    for name, scored in opened.items():
        if own is not None and name != config.data.train_split:  # that one, as the user says
            mend = "leave them out of one of these (preprocessing --exclude; of ViLT's own files, move one away)"
            found, is_fault = own.shared(scored)
            _refuse(config, found, mend, few=not is_fault)


def _refuse(config: Config, found: str, mend: str, few: bool = False) -> None:
    """Raise DataError where something was found, unless it is ``few`` or ``data.allow_overlap`` lets it pass."""
    if found and not (few or config.data.allow_overlap):
        raise DataError(f"{found}; {mend}, or say that it is meant: --data.allow_overlap true")
    if found and launched_world()[0] == 0:
        why = "so few are let pass" if few else "data.allow_overlap lets that pass"
        _log.warning("%s; %s", printable(found), why)


def _training_splits(config: Config, training: Samples | None) -> list[Split]:
    if training is not None:
        return training.split.splits if isinstance(training.split, JoinedSplit) else [training.split]
    kind = {"vqa": "vqa", "nlvr": "nlvr"}.get(getattr(config, "task", ""), "caption")
    try:
        return [open_split(config.data.home, config.data.train_split, kind)]
    except DataError:
        return []  # only what is scored need be there


def _folders(split: Split) -> tuple[Path, Path]:
    """Where a split lies, and the data set's folder unless that is where it lies."""
    folder = split.directory.resolve()
    return folder, folder.parent


def identity(config: Config, samples: Samples) -> Identity:
    """Of the run that trains on ``samples``, or scores them."""
    scored = isinstance(config, FinetuneConfig) and config.evaluate
    data = f"data of split {config.split}" if scored else "training data"  # type: ignore[union-attr]
    split, words = samples.split, samples.tokenizer
    places = ", ".join(place(name) for name, _ in split.parts)
    inputs = {
        "tokenizer": Input(place(words.path or ""), words.fingerprint, f"{words.vocab_size} entries"),
        data: Input(places, split.fingerprint, f"{split.rows} rows"),
        **first_weights.origin(config),
    }
    if isinstance(samples, VqaSamples):
        answers = json.dumps(read_answer_list(config.data.home))
        inputs["answer list"] = Input(place(config.data.home), hashlib.sha256(answers.encode()).hexdigest())
    return identity_of(config, inputs)


def store_words(config: Config, samples: Samples) -> None:
    """Copy into ``output_dir`` what the weights are of no use without: tokenizer and VQA's answers. Called by all."""
    agreement.decide(lambda: samples.tokenizer.save(config.output_dir))
    if isinstance(samples, VqaSamples):
        answers = read_answer_list(config.data.home)
        agreement.decide(lambda: write_json(Path(config.output_dir) / ANSWER_LIST, answers))


def total_steps(config: Config, count: int) -> int:
    """Optimizer steps of the run: ``optimizer.total_steps``, or ``optimizer.epochs`` passes over ``count`` samples."""
    optimizer = config.optimizer
    if (optimizer.total_steps is None) == (optimizer.epochs is None):
        raise UserError("give one of optimizer.total_steps and optimizer.epochs, and leave the other null")
    if optimizer.total_steps is not None:
        steps = optimizer.total_steps
    else:
        exact = float(optimizer.epochs or 0) * count / config.engine.global_batch_size
        if not math.isfinite(exact):
            raise UserError(f"optimizer.epochs={optimizer.epochs} makes a run without end; give a finite number")
        steps = math.ceil(exact)
    if steps < 1:
        raise UserError(f"the run has {steps} steps; optimizer.total_steps and optimizer.epochs must be positive")
    return steps


def check_answer_list(config: FinetuneConfig) -> None:
    """Raise UserError if the head was trained on other answers than the data have, or on another order of them."""
    head = ModelFolder.find(config.init_from or "", unfinished=True).folder
    if not (head / ANSWER_LIST).is_file():
        return  # published files come without
    trained, prepared = read_answer_list(head), read_answer_list(config.data.home)
    if trained != prepared:
        place = next((i for i, pair in enumerate(zip(trained, prepared, strict=False)) if pair[0] != pair[1]), None)
        where = "their lengths" if place is None else f"answer {place}: {trained[place]!r} and {prepared[place]!r}"
        raise UserError(
            f"{head / ANSWER_LIST} and {config.data.home}/{ANSWER_LIST} differ in {where}; prepare the data with "
            "--answer-list, naming the former"
        )


def join_expert_groups(task: Task) -> None:
    """What ``deepspeed.initialize`` does for a task that trains: give each MoE layer its expert-parallel group."""
    for layer in task.backbone.moe_layers():
        if isinstance(layer, DeepSpeedMoE):
            layer.set_deepspeed_parallelism()


def build_task(config: Config, tokenizer: Tokenizer, samples: Samples | None = None) -> Task:
    """The task with this rank's part of the experts; all other initial weights are the same on every rank."""
    ep_size = config.engine.expert_parallel_size
    torch.manual_seed(config.engine.seed)
    layer = functools.partial(DeepSpeedMoE, ep_size=ep_size, ep_rank=launched_world()[0] % ep_size)
    task = _task(config, Backbone(config.model, moe_layer=layer), tokenizer, samples)
    task.seed = config.engine.seed
    return task


def _task(config: Config, backbone: Backbone, tokenizer: Tokenizer, samples: Samples | None) -> Task:
    if isinstance(config, PretrainConfig):
        objective = dataclasses.replace(config.objective, seed=config.objective.seed + config.engine.seed)
        return MaskedModeling(backbone, objective, tokenizer.mask_id)
    if isinstance(samples, VqaSamples):
        return VQA(backbone, samples.num_answers, config.objective.head_hidden)
    if isinstance(samples, NlvrSamples):
        return NLVR(backbone, config.objective.biattn, config.objective.head_hidden)
    return Retrieval(backbone, config.objective.embed_dim, config.objective.temperature, config.engine.seed)
