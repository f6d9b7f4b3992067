"""What both entry points build from the config: tokenizer, datasets, the task with its experts in place."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data.data_config import DataSource
from eve_ds.data.modalities import SPLITS
from eve_ds.data.overlap import SplitIds
from eve_ds.data.samples import Samples
from eve_ds.data.shards import Split
from eve_ds.data.sources import JoinedSplit, open_split
from eve_ds.data.transforms import build_transform
from eve_ds.engine import distributed, first_weights
from eve_ds.engine.distributed import launched_world
from eve_ds.engine.identity import Identity, Input, identity_of, place
from eve_ds.engine.moe_deepspeed import DeepSpeedMoE
from eve_ds.model.backbone import Backbone
from eve_ds.tasks.base import Task
from eve_ds.weights.model_folder import ModelFolder, has_initial_words
from preprocessing.errors import UserError, printable
from preprocessing.local_files import write_json
from preprocessing.text.tokenizer import Tokenizer

Config = PretrainConfig | FinetuneConfig
_log = logging.getLogger(__name__)


def build_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer named in the config, or the one beside the weights that the run starts from.

    It may have fewer entries than ``model.vocab_size``: the other vectors of words are not used. Weights with trained
    vectors go with their own tokenizer alone; where they come without it, the number of its entries must tell.
    """
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
    few = found.vocab_size < config.model.vocab_size * 15 // 16  # a vocabulary may be padded a little
    if few and weights is not None and trained is None and not has_initial_words(weights.weights) and _begins(config):
        raise UserError(
            f"--data.tokenizer {path}: has {found.vocab_size} entries, the model {config.model.vocab_size}; name the "
            "tokenizer that the weights were trained with"
        )
    return found


def _begins(config: Config) -> bool:
    """Whether the weights that the config names are those that the run starts from, not those of a checkpoint."""
    return not (config.resume_from or first_weights.goes_on(config))


def build_dataset(config: Config, split: str, tokenizer: Tokenizer, train: bool) -> Samples:
    """The task's dataset over a split: in training that of all sources."""
    data, model = config.data, config.model
    if not data.home:
        raise UserError(
            "--data.path is missing; name a prepared data set: --data DIR (preprocessing/README.md says how to make "
            "one; of EVE's JSON files: python -m preprocessing json)"
        )
    scale = data.crop_scale if train else None
    transform = build_transform(
        model.image_size, train, data.augmentation, scale, data.flip, config.engine.seed, max_pixels=data.max_pixels
    )
    sources = data.sources if train and data.sources else [DataSource(data.home)]
    kind = config.spec.samples.kind
    splits = [open_split(one.path, split, kind, made_as=SPLITS[one.modality]) for one in sources]
    joined = splits[0] if len(splits) == 1 else JoinedSplit(splits)
    roots = [one.path for one in sources]
    dataset: Samples = config.spec.build_dataset(joined, tokenizer, transform, model, data.home, roots)
    return dataset


def check_apart(config: Config, training: Samples | None, held_out: Mapping[str, Samples]) -> None:
    """Raise UserError where what is trained on is scored, too, or anything is trained on or scored twice.
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


def check_classes(training: Samples, held_out: Samples | None) -> None:
    """Raise UserError where a held-out split has other classes than the head that is trained."""
    if held_out is not None and held_out.num_classes != training.num_classes:
        raise UserError(
            f"{held_out.split.name}: has {held_out.num_classes} classes, {training.split.name} has "
            f"{training.num_classes}; prepare both alike, or leave it out: --data.val_split null"
        )


def _refuse(config: Config, found: str, mend: str, few: bool = False) -> None:
    """Raise UserError where something was found, unless it is ``few`` or ``data.allow_overlap`` lets it pass."""
    if found and not (few or config.data.allow_overlap):
        raise UserError(f"{found}; {mend}, or say that it is meant: --data.allow_overlap true")
    if found and launched_world()[0] == 0:
        why = "so few are let pass" if few else "data.allow_overlap lets that pass"
        _log.warning("%s; %s", printable(found), why)


def _training_splits(config: Config, training: Samples | None) -> list[Split]:
    if training is not None:
        return training.split.splits if isinstance(training.split, JoinedSplit) else [training.split]
    try:
        return [open_split(config.data.home, config.data.train_split, config.spec.samples.kind)]
    except UserError:
        return []  # only what is scored need be there


def _folders(split: Split) -> tuple[Path, Path]:
    """Where a split lies, and the data set's folder unless that is where it lies."""
    folder = split.directory.resolve()
    return folder, folder.parent


def identity(config: Config, dataset: Samples) -> Identity:
    """Of the run that trains on ``dataset``, or scores it."""
    return identity_of(config, input_fingerprints(config, dataset))


def input_fingerprints(config: Config, dataset: Samples) -> dict[str, Input | None]:
    """What the run reads, by content: data, tokenizer, first weights, companion files of the task."""
    scored = isinstance(config, FinetuneConfig) and config.evaluate
    data = f"data of split {config.split}" if scored else "training data"  # type: ignore[union-attr]
    split, tokenizer = dataset.split, dataset.tokenizer
    places = ", ".join(place(name) for name, _ in split.parts)
    inputs = {
        "tokenizer": Input(place(tokenizer.path or ""), tokenizer.fingerprint, f"{tokenizer.vocab_size} entries"),
        data: Input(places, split.fingerprint, f"{split.rows} rows"),
        **first_weights.origin(config),
    }
    for file, content in config.spec.companions(config.data.home).items():
        name = Path(file).stem.replace("_", " ")
        inputs[name] = Input(place(config.data.home), hashlib.sha256(json.dumps(content).encode()).hexdigest())
    return inputs


def store_companions(config: Config, tokenizer: Tokenizer) -> None:
    """Copy into ``output_dir`` what the weights are of no use without: the tokenizer and the task's companion files.
    Called by all ranks.
    """
    distributed.decide(lambda: tokenizer.save(config.output_dir))
    for file, content in config.spec.companions(config.data.home).items():
        distributed.decide(functools.partial(write_json, Path(config.output_dir) / file, content))


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


def check_head(config: FinetuneConfig) -> None:
    """Raise UserError if the head in ``init_from`` does not go with the data, such as one trained on other answers."""
    config.spec.check_head(ModelFolder.find(config.init_from or "", unfinished=True).folder, config.data.home)


def join_expert_groups(task: Task) -> None:
    """What ``deepspeed.initialize`` does for a task that trains: give each MoE layer its expert-parallel group."""
    for layer in task.backbone.moe_layers():
        if isinstance(layer, DeepSpeedMoE):
            layer.set_deepspeed_parallelism()


def build_task(config: Config, tokenizer: Tokenizer, num_classes: int = 0) -> Task:
    """The task with this rank's part of the experts; all other initial weights are the same on every rank.

    ``num_classes``: that of the dataset.
    """
    ep_size, seed = config.engine.expert_parallel_size, config.engine.seed
    torch.manual_seed(seed)
    layer = functools.partial(DeepSpeedMoE, ep_size=ep_size, ep_rank=launched_world()[0] % ep_size)
    published = isinstance(config, FinetuneConfig) and config.published
    backbone = Backbone(config.model, moe_layer=layer, published_routing=published)
    task = config.spec.build(backbone, config.objective, mask_id=tokenizer.mask_id, num_classes=num_classes, seed=seed)
    task.seed = seed
    if isinstance(config, FinetuneConfig) and config.evaluate:
        task.score_only()
    if published:
        task.evaluate_as_published()
    task.use_tokenizer(tokenizer)
    return task
