"""The ``data`` section of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from eve_ds.data.sampler import WINDOW_BLOCKS
from eve_ds.data.transforms import Augmentation
from preprocessing.errors import UserError
from preprocessing.shards.schema import MAX_PIXELS, PILLOW_PIXELS

VERIFY = ("background", "full", "off")
MOST_SECONDS = 30 * 24 * 3600  # longest timeout; timers of torch and of the system overflow far beyond it
_MAX_WINDOW = 2**40  # samples


@dataclass
class DataSource:
    """One of several datasets that a run is trained on.

    Args:
        path: prepared dataset, as ``data.path``.
        weight: relative sampling weight; null in all sources draws every sample equally often.
        modality: pairs; image: its images alone, each once in an epoch; text: its captions alone. What it holds of the
            other modality is not read.
    """

    path: str
    weight: float | None = None
    modality: Literal["pairs", "image", "text"] = "pairs"


@dataclass
class DataConfig:
    """The dataset, its augmentation and its loader.

    Args:
        path: prepared dataset: a folder with a shard folder per split (train, val, test), see preprocessing/README.md;
            or a folder of Arrow files written by ViLT's or EVE's scripts.
        sources: train on several datasets, as in ``[{path: data/coco, weight: 2}, {path: data/cc12m, weight: 3}]``;
            null uses ``path`` only. Held-out splits and the answer list come from ``path``, or from the first source
            (of pairs, if there is one). With ``modality: image`` or ``modality: text`` a source of pre-training is one
            of images or texts alone.
        tokenizer: folder with tokenizer.json; null: fine-tuning uses the one next to its checkpoint.
        train_split: folder under ``path`` to train on.
        val_split: folder under ``path`` for held-out losses and scores; null for none.
        augmentation: none, color (jitter 0.4) or rand (RandAugment 2, 7).
        crop_scale: RandomResizedCrop's range of area fractions, as in [0.5, 1.0]; null does not crop.
        flip: mirror half of the images, except where the text says left or right.
        num_workers: loader processes per rank; 0 decodes in a thread of the training process.
        shuffle_window: shuffle within windows of this many samples, such as 16384, for network file systems: reads stay
            sequential (eve_ds/data/sampler.py); 0 shuffles the whole epoch, best for local disks.
        max_corrupt: fraction of corrupt rows, of the rows seen, above which the run stops; up to it the next sample
            replaces a corrupt one. 0 stops at the first corrupt row.
        timeout_seconds: maximum time to read a batch; after it the run ends (a loader process is stopped, or storage
            hangs). None: half of ``engine.timeout_seconds``. With several ranks at most all of it.
        allow_overlap: continue with a log message, not an error, if images, questions or statements of the training
            split also occur in a scored split, or occur in two of its Arrow files without a manifest.
        verify: when shards are compared with their SHA-256: background (during training, by one low-priority process
            per host; a damaged shard saves and ends the run), full (before the first step), off. Their sizes are always
            checked.
        max_pixels: images with more pixels are corrupt rows; set it to the ``--max-pixels`` of the preparation.
    """

    path: str = ""
    sources: list[DataSource] | None = None
    tokenizer: str | None = None
    train_split: str = "train"
    val_split: str | None = "val"
    augmentation: Augmentation = "none"
    crop_scale: list[float] | None = field(default_factory=lambda: [0.5, 1.0])
    flip: bool = True
    num_workers: int = 0
    shuffle_window: int = 0
    max_corrupt: float = 0.001
    timeout_seconds: int | None = None
    allow_overlap: bool = False
    verify: str | bool = "background"  # YAML reads an unquoted ``off`` as false
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        self.verify = "off" if self.verify is False else self.verify

    @property
    def home(self) -> str:
        """The dataset with the held-out splits and the answer list."""
        pairs_first = sorted(self.sources or (), key=lambda source: source.modality != "pairs")  # else in their order
        return self.path or (pairs_first[0].path if pairs_first else "")

    def check(self) -> None:
        """Raise UserError that names the first invalid setting."""
        if self.num_workers < 0:
            raise UserError(f"data.num_workers={self.num_workers} must be 0 or more")
        if self.timeout_seconds is not None and not 1 <= self.timeout_seconds <= MOST_SECONDS:
            raise UserError(f"data.timeout_seconds={self.timeout_seconds} must be from 1 to {MOST_SECONDS} (30 days)")
        if self.shuffle_window and not WINDOW_BLOCKS <= self.shuffle_window <= _MAX_WINDOW:
            bounds = f"must be 0, or at least {WINDOW_BLOCKS} and at most 2**40"
            raise UserError(f"data.shuffle_window={self.shuffle_window} {bounds}")
        if self.verify not in VERIFY:
            raise UserError(f"data.verify={self.verify}: must be one of {', '.join(VERIFY)}")
        if not 1 <= self.max_pixels <= PILLOW_PIXELS:
            raise UserError(f"data.max_pixels={self.max_pixels} must be between 1 and Pillow's limit, {PILLOW_PIXELS}")
        if not 0 <= self.max_corrupt < 1:
            raise UserError(
                f"data.max_corrupt={self.max_corrupt} is a fraction of the rows: it must be at least 0 and below 1"
            )
        if self.sources is None:
            return
        if not self.sources:
            raise UserError("data.sources is empty; name a dataset, or leave it null and give data.path")
        paths = [Path(source.path).resolve() for source in self.sources]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise UserError(
                f"data.sources names {twice} more than once; name it once, with a larger weight and one modality"
            )
        weights = [source.weight for source in self.sources]
        if None in weights and any(weight is not None for weight in weights):
            raise UserError(f"data.sources: weights are {weights}; give one to every source, or to none")
        if any(weight is not None and not 0 < weight < math.inf for weight in weights):
            raise UserError(f"data.sources: weights are {weights}; each must be positive")
