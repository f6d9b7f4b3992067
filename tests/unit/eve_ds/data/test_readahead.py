"""Reading ahead under a windowed shuffle: each process asks once for what it will read itself, in the file's order."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from eve_ds.data import shards
from eve_ds.data.batch_reader import ReadAhead
from eve_ds.data.loader import build_loader
from eve_ds.data.mapping import MappedFile
from eve_ds.data.sampler import Shuffle, TrainOrder
from eve_ds.data.samples import CaptionSamples
from eve_ds.data.shards import Split
from eve_ds.data.sources import JoinedSplit
from eve_ds.data.transforms import build_transform
from tests.support.shards import image_of, make_caption_set, make_nlvr_set, tiny_tokenizer

SIZE, WINDOW, MICRO = 160, 32, 2


class Watched(Split):
    """Writes down what it is asked for, call by call; processes that were forked off it write into the same file."""

    log: Path

    def read_ahead(self, samples: Iterable[int]) -> None:
        asked = list(samples)
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(" ".join(map(str, [os.getpid(), *asked])) + "\n")
        super().read_ahead(asked)

    def calls(self) -> dict[int, list[list[int]]]:
        """What each process asked for."""
        found: dict[int, list[list[int]]] = {}
        for line in self.log.read_text().splitlines():
            process, *asked = map(int, line.split())
            found.setdefault(process, []).append(asked)
        return found


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    split = Watched(make_caption_set(tmp_path, rows=SIZE, captions=1, image_size=8, shard_rows=40))
    split.log = tmp_path / "asked"
    return split


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("start", [0, 40])
def test_each_sample_once_in_file_order_before_it_is_read(watched: Watched, rank: int, start: int) -> None:
    world = 2
    order = TrainOrder(Shuffle(SIZE, 5, WINDOW), MICRO, world, rank)
    batches_per_window = WINDOW // order.global_batch_size
    ask = ReadAhead(watched, order, WINDOW)
    for number, indices in enumerate(islice(order.micro_batches(start), 6 * batches_per_window)):
        ask(indices)
        recent = watched.calls()[os.getpid()][max(0, number - 2 * batches_per_window) :]
        assert set(indices.samples.tolist()) <= {sample for call in recent for sample in call}
    (calls,) = watched.calls().values()
    # Its own samples, once in a chunk as long as a window (an epoch may end in it), in order.
    expected = [np.unique(order.samples_of(start + turn * WINDOW, batches_per_window)).tolist() for turn in range(7)]
    flat = [sample for call in calls for sample in call]
    planned = [sample for chunk in expected for sample in chunk]
    assert flat == planned[: len(flat)] and len(flat) >= sum(map(len, expected[:6]))
    # The first window at once, for there is none before it; all others in small parts.
    assert calls[0] == expected[0]
    assert max(map(len, calls[1:])) <= math.ceil(1.25 * MICRO)
    assert sum(bool(call) for call in calls[1 : 1 + batches_per_window]) > batches_per_window / 2


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_share_a_ranks_samples(watched: Watched, workers: int) -> None:
    data = CaptionSamples(watched, tiny_tokenizer(), build_transform(8, True), 12)
    loader = build_loader(data, MICRO, world_size=2, rank=1, seed=5, num_workers=workers, window=WINDOW)
    batches = iter(loader)
    batches_per_window = WINDOW // (2 * MICRO)
    read = [int(i) for batch in islice(batches, 2 * batches_per_window) for i in batch["image_index"]]
    batches.close()  # type: ignore[attr-defined]
    asked = Counter(sample for calls in watched.calls().values() for call in calls for sample in call)
    assert len(set(read)) == len(read) == WINDOW  # two windows' halves, of one epoch
    assert all(asked[sample] == 1 for sample in read)
    order = loader.order
    assert isinstance(order, TrainOrder) and not asked - Counter(order.samples_of(0, 5 * batches_per_window).tolist())
    assert len(watched.calls()) == max(workers, 1)
    # A part of the first window each, one after the other in the file, together all of it.
    parts = sorted(calls[0] for calls in watched.calls().values())
    assert [sample for part in parts for sample in part] == sorted(order.samples_of(0, batches_per_window).tolist())


def test_a_window_of_more_than_an_epoch_is_read_ahead_as_one(watched: Watched) -> None:
    order = TrainOrder(Shuffle(SIZE, 5, 2**40), MICRO)
    ReadAhead(watched, order, 2**40)(next(order.micro_batches()))
    assert watched.calls()[os.getpid()][0] == list(range(SIZE))


def test_no_read_ahead_without_a_window(watched: Watched) -> None:
    data = CaptionSamples(watched, tiny_tokenizer(), build_transform(8, True), 12)
    next(iter(build_loader(data, MICRO)))
    assert not watched.log.exists()


def test_read_ahead_merges_neighboring_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stretches: list[bytes] = []
    will_need = MappedFile.will_need

    def watch(file: MappedFile, start: int, end: int) -> None:
        stretches.append(file.path.read_bytes()[start:end])
        will_need(file, start, end)

    monkeypatch.setattr(MappedFile, "will_need", watch)
    captions = Split(make_caption_set(tmp_path / "a", rows=12, captions=2, image_size=8, shard_rows=8, batch_rows=8))
    monkeypatch.setattr(shards, "_READ_AHEAD_GAP", 0)
    captions.read_ahead([2, 3, 4, 10, 15, 16])  # rows 1, 1, 2, 5, 7 and 0 of the next shard
    assert stretches == [
        image_of(1, 8) + image_of(2, 8),
        image_of(5, 8),
        image_of(7, 8),
        image_of(8, 8),
    ]
    stretches.clear()
    monkeypatch.setattr(shards, "_READ_AHEAD_GAP", 64 << 10)
    captions.read_ahead([2, 3, 4, 10, 15, 16])
    assert stretches == [b"".join(image_of(i, 8) for i in range(1, 8)), image_of(8, 8)]
    stretches.clear()
    joined = JoinedSplit([captions, Split(make_caption_set(tmp_path / "b", rows=3, captions=1, image_size=8))])
    joined.read_ahead([23, 24, 26])
    assert stretches == [image_of(11, 8), b"".join(image_of(i, 8) for i in range(3))]
    stretches.clear()
    Split(make_nlvr_set(tmp_path / "c", rows=3, image_size=8)).read_ahead([0])
    assert all(any(image_of(i, 8) in stretch for stretch in stretches) for i in (0, 4))
    captions.read_ahead([])
