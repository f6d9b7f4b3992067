"""This rank's micro-batches: an endless stream for training, each sample once for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data.data_config import DataConfig
from eve_ds.data.loader import Loader, build_loader, check_readers
from eve_ds.data.samples import Samples
from eve_ds.engine.compilation import TEXT_MULTIPLE
from eve_ds.engine.deepspeed_config import batch_shape, share_of_rank
from eve_ds.engine.device_feed import DeviceFeed
from eve_ds.engine.distributed import launched_world
from eve_ds.errors import RankError
from preprocessing.errors import UserError

Config = PretrainConfig | FinetuneConfig
Batch = dict[str, torch.Tensor]
_CPU = torch.device("cpu")


def check_batch(config: Config, rows: int) -> None:
    """Check batch size, ranks and timeouts before a process group is joined.

    Args:
        config: the resolved tree.
        rows: of the training split.
    Raises:
        UserError: they do not fit each other.
        UserError: the split has too few rows for the ranks and their loader workers.
    """
    world_size = launched_world()[1]
    if config.engine.micro_batch_size == "auto":
        share_of_rank(config.engine, world_size)
    else:
        batch_shape(config.engine, world_size)
    if world_size > 1 and loader_seconds(config) > config.engine.timeout_seconds:
        raise UserError(  # the ranks that wait would end the run first, without knowing of the loader
            f"data.timeout_seconds={config.data.timeout_seconds} is above engine.timeout_seconds="
            f"{config.engine.timeout_seconds}, after which the other ranks end the run; lower the former or raise the "
            "latter"
        )
    check_readers(config.data.home, rows, world_size, config.data.num_workers)


class TrainingBatches(Iterator[Batch]):
    """Training batches from optimizer step `start_step` on.

    Args:
        config: the resolved tree.
        samples: of the training split of all sources.
        start_step: optimizer steps done before.
        device: where the batches go.
        compiled: whether the model's blocks run compiled: texts are padded to few lengths then.
    Attributes:
        reads_ahead: whether ``look_ahead`` pays: the device computes while the host reads.
        wait_seconds: total time spent waiting for data, see ``DeviceFeed``.
    Raises:
        RankError: while iterating, for data that perhaps only this rank cannot read.
    """

    def __init__(
        self,
        config: Config,
        samples: Samples,
        start_step: int,
        device: torch.device = _CPU,
        compiled: bool = False,
    ) -> None:
        data = config.data
        self.reads_ahead = device.type == "cuda"
        self._loader = _loader(
            config,
            samples,
            seed=config.engine.seed,
            start_sample=start_step * config.engine.global_batch_size,
            window=data.shuffle_window,
            weights=_weights(data),
            max_corrupt=data.max_corrupt,
            pin=device.type == "cuda",
            pad_to_multiple=TEXT_MULTIPLE if compiled else 1,
        )
        self._feed = DeviceFeed(_told_by_rank(self._loader), device)
        self._counts: dict[str, float] = {}  # from before the batch that is read ahead
        self._names = source_names(data)
        self.samples_per_epoch = len(samples)
        self._per_step = config.engine.global_batch_size

    def __next__(self) -> Batch:
        return next(self._feed)

    def look_ahead(self) -> None:
        """Read the next batch and begin to copy it to the device; for all else it is not read until ``next``."""
        if not self._feed.is_ahead:
            self._counts = self._read_counts()
            self._feed.look_ahead()

    @property
    def wait_seconds(self) -> float:
        return self._feed.wait_seconds

    def close(self) -> None:
        """Stop the loader's workers at once."""
        self._feed.close()

    def samples_of(self, step: int) -> list[int]:
        """Indices, in the training split, of the samples of all ranks in an optimizer step. Steps count from 1."""
        return self._loader.samples_at((step - 1) * self._per_step, self._per_step)

    def counts(self) -> dict[str, float]:
        """Counts of what ``next`` has returned: replaced corrupt samples and, with several sources, samples of each."""
        return self._counts if self._feed.is_ahead else self._read_counts()

    def _read_counts(self) -> dict[str, float]:
        counts = {"data/replaced": float(self._loader.replaced)}
        if len(self._names) > 1:
            drawn = zip(self._names, self._loader.drawn.tolist(), strict=True)
            counts |= {f"data/samples/{name}": float(count) for name, count in drawn}
        return counts


def evaluation_batches(
    config: Config,
    samples: Samples,
    limit: int | None = None,
    alone: bool = False,
    device: torch.device = _CPU,
) -> Iterator[Batch]:
    """This rank's part of a split in order, each sample once, in batches of ``evaluation_batch_size``. Samples repeated
    as a filler have ``valid`` False.

    ``alone``: all of ``samples`` are this rank's. ``device``: where the batches go.
    """
    place = {"rank": 0, "world_size": 1} if alone else {}
    # Not pinned: that takes longer than it saves in a short pass.
    return DeviceFeed(_told_by_rank(_loader(config, samples, train=False, limit=limit, **place)), device)


def evaluation_batch_size(config: Config) -> int:
    """Samples of a rank's forward pass in an evaluation: ``engine.eval_batch_size``, or the micro-batch."""
    return config.engine.eval_batch_size or batch_shape(config.engine, launched_world()[1])[0]


def source_names(data: DataConfig) -> list[str]:
    """Names of the sources in the log: the last part of each path, or the whole paths if those are not unique."""
    paths = [source.path for source in data.sources or ()] or [data.path]
    short = [Path(path).resolve().name for path in paths]
    return short if len(set(short)) == len(short) else paths


def _weights(data: DataConfig) -> tuple[float, ...] | None:
    weights = [source.weight for source in data.sources or () if source.weight is not None]
    return tuple(weights) or None


def loader_seconds(config: Config) -> int:
    """Seconds that a rank waits for a batch: ``data.timeout_seconds``, or half of ``engine.timeout_seconds``."""
    return config.data.timeout_seconds or max(config.engine.timeout_seconds // 2, 1)


def _loader(config: Config, samples: Samples, train: bool = True, **options: Any) -> Loader:
    rank, world_size, _ = launched_world()
    size = batch_shape(config.engine, world_size)[0] if train else evaluation_batch_size(config)
    workers, timeout = config.data.num_workers, loader_seconds(config)
    shared: dict[str, Any] = {"world_size": world_size, "rank": rank, "num_workers": workers, "timeout": timeout}
    return build_loader(samples, micro_batch_size=size, train=train, raw=True, **(shared | options))


def _told_by_rank(loader: Loader) -> Any:
    """Turn UserError into RankError: perhaps only this rank reads that row, so it must report it itself."""
    try:
        yield from loader
    except UserError as error:
        raise RankError(f"rank {launched_world()[0]}: {error}") from error
