"""The feed on the CPU, where it looks ahead if told to: what it gives, and what of a batch shows before it is asked."""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Generator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eve_ds.config import FinetuneConfig
from eve_ds.data.batch_reader import collate, stack, to_batch
from eve_ds.data.data_config import DataSource
from eve_ds.data.loader import build_loader
from eve_ds.data.samples import CaptionSamples
from eve_ds.data.shards import Split
from eve_ds.data.sources import JoinedSplit
from eve_ds.data.transforms import build_transform, normalize, normalize_on_device
from eve_ds.engine import batches as engine_batches
from eve_ds.engine import watchdog
from eve_ds.engine.batches import TrainingBatches
from eve_ds.engine.device_feed import DeviceFeed, on_device
from eve_ds.engine.signals import StopRequest
from eve_ds.engine.trainer import Trainer
from eve_ds.errors import RankError
from tests.support.shards import image_of, tiny_tokenizer, write_split

CPU = torch.device("cpu")
TOKENIZER = tiny_tokenizer()


def _samples(root: Path, corrupt: tuple[int, ...] = (3, 11)) -> CaptionSamples:
    """Two sources of 12 and 8 rows, of which the same numbers are corrupt."""
    splits = []
    for name, count in (("a", 12), ("b", 8)):
        rows = [
            {
                "image": image_of(i, 16)[: 60 if i in corrupt else None],
                "caption": ["a", "b"],
                "image_id": str(i),
                "split": "train",
            }
            for i in range(count)
        ]
        splits.append(Split(write_split(root / name / "train", "caption", rows)))
    return CaptionSamples(JoinedSplit(splits), TOKENIZER, build_transform(16, train=True), 12)


def _config(workers: int = 0, max_corrupt: float = 0.5) -> FinetuneConfig:
    config = FinetuneConfig(task="itr_coco")
    config.engine.global_batch_size = 4
    config.data.sources = [DataSource("a"), DataSource("b")]
    config.data.num_workers, config.data.max_corrupt = workers, max_corrupt
    return config


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def _given(*batches: Any, seconds: float = 0.0) -> Generator[Any, None, None]:
    for batch in batches:
        time.sleep(seconds)
        if isinstance(batch, Exception):
            raise batch
        yield batch


def test_normalize_on_device_gives_the_same_bits() -> None:
    images = np.random.default_rng(0).permutation(np.arange(256, dtype=np.uint8).repeat(6)).reshape(2, 16, 16, 3)
    out = normalize_on_device(torch.from_numpy(images))
    assert out.dtype == torch.float32 and out.is_contiguous()
    assert torch.equal(out.view(torch.int32), normalize(images).view(torch.int32))
    assert normalize_on_device(torch.empty(0, 16, 16, 3, dtype=torch.uint8)).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_it_gives_what_the_loader_gives_normalized(tmp_path: Path, workers: int) -> None:
    options: dict[str, Any] = {"seed": 1, "num_workers": workers, "max_corrupt": 0.5}
    samples = _samples(tmp_path)
    normalized = list(itertools.islice(build_loader(samples, 4, **options), 12))
    feed = DeviceFeed(iter(build_loader(samples, 4, raw=True, **options)), CPU)  # type: ignore[arg-type]
    fed = list(itertools.islice(feed, 12))
    feed.close()
    assert all(_equal(one, other) for one, other in zip(normalized, fed, strict=True))


def test_one_batch_alone_is_as_the_loader_would_give_it(tmp_path: Path) -> None:
    samples = _samples(tmp_path, corrupt=())
    rows = [samples[index, 0] for index in (3, 0, 7)]
    found = on_device(to_batch(stack(rows, samples.pad_id, 12), raw=True), CPU)
    assert found["images"].shape == (3, 3, 16, 16) and found["images"].dtype == torch.float32
    assert _equal(found, collate(rows, samples.pad_id, 12))


def test_raw_images_stay_until_the_next_batch_is_asked_for(tmp_path: Path) -> None:
    """What an asynchronous copy from the loader's memory relies on."""
    loader = build_loader(_samples(tmp_path), 4, num_workers=1, prefetch=1, max_corrupt=0.5, raw=True)
    batches: Any = iter(loader)
    images = next(batches)["images"]
    assert images.shape == (4, 16, 16, 3) and images.dtype == torch.uint8
    before = images.clone()
    time.sleep(0.3)  # the worker fills each slot that it may
    assert torch.equal(images, before)
    next(batches)
    next(batches)
    assert not torch.equal(images, before)  # so there was something to lose
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_read_ahead_counts_when_it_is_used(tmp_path: Path, workers: int) -> None:
    samples = _samples(tmp_path)
    plain, ahead = (TrainingBatches(_config(workers), samples, 0) for _ in range(2))
    resumed = TrainingBatches(_config(), samples, 5)
    seen = []
    for step in range(12):
        one, other = next(plain), next(ahead)
        ahead.look_ahead()
        ahead.look_ahead()  # one batch, however often
        assert _equal(one, other) and ahead.counts() == plain.counts()
        assert step < 5 or _equal(other, next(resumed))
        seen.append(plain.counts())
    assert all(a["data/samples/a"] + a["data/samples/b"] == 4 * (i + 1) for i, a in enumerate(seen))
    assert seen[-1]["data/replaced"] > 0
    for batches in (plain, ahead, resumed):
        batches.close()
    assert not multiprocessing.active_children()


def test_an_error_belongs_to_its_batch(tmp_path: Path) -> None:
    samples = _samples(tmp_path, (11,))
    plain, ahead = (TrainingBatches(_config(max_corrupt=0), samples, 0) for _ in range(2))
    sound = 0
    with pytest.raises(RankError, match=r"rank 0: .*decoded") as expected:
        for _ in plain:
            sound += 1
    assert 0 < sound < 10
    for _ in range(sound):
        next(ahead)
        ahead.look_ahead()
    counts = ahead.counts()
    assert counts == plain.counts()
    with pytest.raises(RankError) as found:
        next(ahead)
    assert str(found.value) == str(expected.value)
    ahead.close()


def test_the_end_of_the_batches_is_met_where_it_is() -> None:
    batch = {"sample_id": torch.arange(2)}
    feed = DeviceFeed(_given(batch, batch), CPU)
    found = 0
    for _ in feed:
        feed.look_ahead()
        found += 1
        assert feed.is_ahead  # at the end: of its being the end
    assert found == 2 and not feed.is_ahead


def test_a_batch_read_ahead_is_lost_with_the_feed() -> None:
    source = _given({"sample_id": torch.arange(2)}, ValueError("of a batch that no one asks for"))
    feed = DeviceFeed(source, CPU)
    next(feed)
    feed.look_ahead()
    feed.close()
    assert not feed.is_ahead and next(source, None) is None


def test_waiting_is_for_the_source_alone() -> None:
    batch = {"images": torch.zeros(1, 4, 4, 3, dtype=torch.uint8)}
    feed = DeviceFeed(_given(*[batch] * 3, seconds=0.05), CPU)
    next(feed)
    feed.look_ahead()
    assert feed.wait_seconds >= 0.1
    before = feed.wait_seconds
    time.sleep(0.1)
    assert next(feed)["images"].shape == (1, 3, 4, 4)
    assert feed.wait_seconds == before


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_the_watchdog_knows_when_a_rank_waits_for_data(
    reads_ahead: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that hangs is told of by the last mark: it must be of data while the source is asked, and only then."""
    dog = watchdog.Watchdog(tmp_path, 0, 1, 600)
    monkeypatch.setattr(watchdog, "_watchdog", dog)
    seen: list[tuple[str, str]] = []
    told = engine_batches._told_by_rank

    def source(loader: Any) -> Generator[Any, None, None]:
        batches = told(loader)
        while True:
            seen.append(("source", dog.doing))
            yield next(batches)

    class Engine:
        def __call__(self, batch: Any) -> Any:
            seen.append(("forward", dog.doing))
            return SimpleNamespace(loss=torch.zeros(()), metrics={})

        def backward(self, loss: Any) -> None:
            seen.append(("backward", dog.doing))

        def step(self) -> None:
            seen.append(("step", dog.doing))

    monkeypatch.setattr(engine_batches, "_told_by_rank", source)
    batches = TrainingBatches(_config(), _samples(tmp_path), 0)
    assert not batches.reads_ahead  # on the CPU, where it would gain nothing
    batches.reads_ahead = reads_ahead
    trainer = Trainer.__new__(Trainer)
    trainer.engine, trainer.device, trainer.stop, trainer._hooks = Engine(), CPU, StopRequest(), {"backward_end": []}
    trainer.step, trainer.world_size, trainer.accumulation_steps = 6, 1, 2
    trainer._accumulate(batches)
    reading, computing = ("source", "step 7, reading a batch"), "step 7, computing"
    ahead = [("source", "step 7, reading the next batch")] * reads_ahead
    passes = [("forward", computing), ("backward", computing), *ahead, ("step", computing)]
    assert seen == [reading, *passes, *[reading] * (not reads_ahead), *passes]
    trainer.stop.requested = True  # a batch that no step will take is not waited for
    seen.clear()
    trainer._accumulate(batches)
    assert [each for each in seen if each[0] == "source"] == [reading] * (2 - reads_ahead)
    batches.close()


def test_callbacks_are_closed_where_the_batches_cannot_be() -> None:
    """As on a GPU that has failed: all that asks it for anything raises."""

    def fails(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    closed: list[Any] = []
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.stop = _config(), StopRequest()
    trainer._hooks = {"fit_start": [fails], "close": [closed.append]}
    batches: Any = SimpleNamespace(samples_per_epoch=8, close=fails)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        trainer.fit(batches)
    assert closed == [trainer]
