"""Images cross to a GPU as bytes, ahead of the step that needs them, and are what the CPU makes of them, to the bit."""

from __future__ import annotations

import itertools
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from eve_ds.data.batch_reader import collate, stack, to_batch
from eve_ds.data.loader import build_loader
from eve_ds.data.samples import CaptionSamples
from eve_ds.data.transforms import build_transform, normalize, normalize_on_device
from eve_ds.engine.device_feed import DeviceFeed, on_device
from tests.support.retrieval_passes import arrays_of, retrieval_task, uneven_split
from tests.support.shards import make_caption_set, tiny_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
LONG = 500_000_000  # cycles, a fourth of a second or more


def test_normalizing_is_one_kernel_with_the_same_bits() -> None:
    images = np.random.default_rng(0).permutation(np.arange(256, dtype=np.uint8).repeat(6)).reshape(2, 16, 16, 3)
    raw = torch.from_numpy(images).to(CUDA)
    normalize_on_device(raw)  # makes its constants
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        out = normalize_on_device(raw)
        torch.cuda.synchronize()
    assert out.is_contiguous() and torch.equal(out.cpu().view(torch.int32), normalize(images).view(torch.int32))
    calls = ("cudaLaunchKernel", "cudaMemcpy", "cudaMemset")
    launched = [event.name for event in found.events() if event.name.startswith(calls)]
    assert len(launched) == 1, launched


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_cpu(tmp_path: Path, workers: int) -> None:
    """With few slots, workers that are ready, copies and a device that lag: memory that is reused too early shows."""
    data = CaptionSamples(
        make_caption_set(tmp_path, rows=40, image_size=64),
        tiny_tokenizer(),
        build_transform(64, train=True),
        12,
    )
    expected = list(itertools.islice(build_loader(data, 8, seed=1), 20))
    pin = workers > 0
    loader: Any = build_loader(data, 8, seed=1, num_workers=workers, prefetch=1, raw=True, pin=pin)
    feed, kept = DeviceFeed(iter(loader), CUDA), []
    assert feed._copies is not None
    for _ in expected:
        batch = next(feed)
        with torch.cuda.stream(feed._copies._stream):
            torch.cuda._sleep(LONG // 50)  # the next copy waits for it
        torch.cuda._sleep(LONG // 20)
        kept.append({name: value * 1 for name, value in batch.items()})  # read on the device, after the sleep
        del batch
        feed.look_ahead()
    feed.close()
    for one, other in zip(expected, kept, strict=True):
        assert set(one) == set(other)
        assert all(torch.equal(one[name], other[name].cpu()) for name in one if one[name].dtype != torch.bool)
        assert torch.equal(one["text_mask"], other["text_mask"].cpu().bool())


def test_the_slots_of_the_loader_are_pinned(tmp_path: Path) -> None:
    data = CaptionSamples(make_caption_set(tmp_path, rows=8), tiny_tokenizer(), build_transform(32, train=True), 12)
    batches: Any = iter(build_loader(data, 4, num_workers=1, raw=True, pin=True))
    images = next(batches)["images"]
    assert images.is_pinned()
    batches.close()
    assert not images.is_pinned()


def test_one_batch_alone_is_that_of_the_cpu(tmp_path: Path) -> None:
    data = CaptionSamples(make_caption_set(tmp_path, rows=8), tiny_tokenizer(), build_transform(32, train=False), 12)
    rows = [data[index, 0] for index in range(5)]
    found = on_device(to_batch(stack(rows, data.pad_id, 12), raw=True), CUDA)
    for name, value in collate(rows, data.pad_id, 12).items():
        assert found[name].device.type == "cuda" and torch.equal(found[name].cpu(), value), name


def test_reranking_finds_what_the_cpu_finds(tmp_path: Path) -> None:
    """With all candidates of each query, so that no tie leaves one out. Batches of pairs are made on the device."""
    folder, task = uneven_split(tmp_path), retrieval_task(rerank=True, k_test=100)
    expected, found = arrays_of(task, folder), arrays_of(task.to(CUDA), folder, device="cuda")
    assert expected is not None and found is not None
    for name in ("text", "image"):
        scores = []
        for arrays in (expected, found):
            order = arrays[f"{name}_candidates"].argsort(axis=1)
            scores.append(np.take_along_axis(arrays[f"{name}_scores"], order, axis=1))
        np.testing.assert_allclose(scores[1], scores[0], atol=1e-4, rtol=0)


def _slow(seconds: float) -> Generator[dict[str, torch.Tensor], None, None]:
    while True:
        time.sleep(seconds)
        yield {"sample_id": torch.arange(4)}


def test_waiting_counts_while_the_device_is_idle_alone() -> None:
    feed = DeviceFeed(_slow(0.02), CUDA)
    next(feed)
    torch.cuda.synchronize()
    before = feed.wait_seconds
    assert before >= 0.02
    torch.cuda._sleep(LONG)
    feed.look_ahead()
    assert feed.wait_seconds == before
    torch.cuda.synchronize()
    next(feed)
    feed.look_ahead()
    assert feed.wait_seconds >= before + 0.02
    feed.close()
