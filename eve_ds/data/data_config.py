"""The ``data`` section of the configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from eve_ds.data.sampler import WINDOW_BLOCKS
from eve_ds.data.transforms import Augmentation
from preprocessing.errors import DataError
from preprocessing.images.limits import MAX_PIXELS, PILLOW_PIXELS

VERIFY = ("background", "full", "off")
MOST_SECONDS = 30 * 24 * 3600  # of patience: the clocks of torch and of the system overflow far beyond it
_MOST_WINDOW = 2**40  # samples, more than there are


@dataclass
class DataSource:
    """One of several data sets that a run is trained on.

    Args:
        path: prepared data set, as ``data.path``.
        weight: it is drawn in proportion to this; null in all sources draws every sample equally often.
    """

    path: str
    weight: float | None = None


@dataclass
class DataConfig:
    """Where the samples come from and how images are varied.

    Args:
        path: prepared data set: a folder with a shard folder per split (train, val, test), see preprocessing/README.md;
            or a folder of Arrow files by ViLT's or EVE's scripts.
        sources: train on several data sets, as in ``[{path: data/coco, weight: 2}, {path: data/cc12m, weight: 3}]``;
            null takes ``path`` alone. Held-out data and answer lists are those of ``path``, or of the first source.
        tokenizer: folder with tokenizer.json; a fine-tuning run takes the one beside its checkpoint if this is null.
        train_split: folder under ``path`` to train on.
        val_split: folder under ``path`` for held-out losses and scores; null for none.
        augmentation: none, color (jitter 0.4) or rand (RandAugment 2, 7).
        crop_scale: RandomResizedCrop's range of areas, as in [0.5, 1.0]; null keeps whole images.
        flip: mirror half the images, but not where the text says left or right.
        num_workers: loader processes per rank; 0 decodes in a thread of the training process.
        shuffle_window: shuffle within windows of so many samples, such as 16384, for network file systems: reads stay
            sequential (eve_ds/data/sampler.py); 0 shuffles the whole epoch, best for local disks.
        max_corrupt: share of corrupt rows, of those seen, at which the run stops; until then a neighbor stands in for
            each. 0 stops at the first one.
        timeout_seconds: a batch that takes longer to read ends the run: a reader was stopped, or storage hangs. None:
            half of ``engine.timeout_seconds``. With several ranks at most all of it.
        allow_overlap: train and score although images, questions or statements of the training split stand in a split
            that is scored, too, or in two of its Arrow files without a manifest; they are logged.
        verify: when shards are compared with their SHA-256: background (while the run trains, by a process a host that
            gives way to it; damage saves and ends the run), full (before the first step), off. Sizes always are.
        max_pixels: images of more are corrupt rows; what ``--max-pixels`` was in preparation.
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
    verify: str | bool = "background"  # YAML reads an unquoted `off` as false
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        self.verify = "off" if self.verify is False else self.verify

    @property
    def home(self) -> str:
        """The data set whose held-out splits and answer list count."""
        return self.path or (self.sources[0].path if self.sources else "")

    def check(self) -> None:
        """Raise DataError naming the first setting that no loader takes."""
        if self.num_workers < 0:
            raise DataError(f"data.num_workers={self.num_workers} must be 0 or more")
        if self.timeout_seconds is not None and not 1 <= self.timeout_seconds <= MOST_SECONDS:
            raise DataError(f"data.timeout_seconds={self.timeout_seconds} must be from 1 to {MOST_SECONDS} (30 days)")
        if self.shuffle_window and not WINDOW_BLOCKS <= self.shuffle_window <= _MOST_WINDOW:
            told = f"must be 0, or at least {WINDOW_BLOCKS} and at most 2**40"
            raise DataError(f"data.shuffle_window={self.shuffle_window} {told}")
        if self.verify not in VERIFY:
            raise DataError(f"data.verify={self.verify}: must be one of {', '.join(VERIFY)}")
        if not 1 <= self.max_pixels <= PILLOW_PIXELS:
            raise DataError(f"data.max_pixels={self.max_pixels} must be between 1 and Pillow's bound, {PILLOW_PIXELS}")
        if not 0 <= self.max_corrupt < 1:
            raise DataError(f"data.max_corrupt={self.max_corrupt} is a share of the rows: from 0 to below 1")
        if self.sources is None:
            return
        if not self.sources:
            raise DataError("data.sources is empty; name a data set, or leave it null and give data.path")
        paths = [Path(source.path).resolve() for source in self.sources]
        if len(set(paths)) < len(paths):
            twice = next(path for path in paths if paths.count(path) > 1)
            raise DataError(f"data.sources names {twice} more than once; name it once, with a greater weight")
        weights = [source.weight for source in self.sources]
        if None in weights and any(weight is not None for weight in weights):
            raise DataError(f"data.sources: weights are {weights}; give one to every source, or to none")
        if any(weight is not None and not 0 < weight < math.inf for weight in weights):
            raise DataError(f"data.sources: weights are {weights}; each must be positive")
