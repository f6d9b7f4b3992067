"""Micro-batches: the same for any world and any number of workers, resumable, finite and padded in evaluation."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from eve_ds.data.loader import Loader, build_loader
from eve_ds.data.samples import CaptionSamples, Sample
from eve_ds.data.shards import Split
from eve_ds.data.sources import JoinedSplit
from eve_ds.data.transforms import build_transform
from eve_ds.tasks.nlvr import NlvrSamples
from eve_ds.tasks.vqa import VqaSamples
from preprocessing.errors import UserError
from tests.support.shards import (
    ANSWERS,
    image_of,
    make_caption_set,
    make_nlvr_set,
    make_vqa_set,
    tiny_tokenizer,
    write_split,
)

TOKENIZER = tiny_tokenizer()
TRAIN = build_transform(16, train=True, augmentation="color")
EVAL = build_transform(16, train=False)


def _captions(root: Path, rows: int = 7) -> CaptionSamples:
    return CaptionSamples(make_caption_set(root, rows=rows, image_size=16), TOKENIZER, TRAIN, 12)


def _take(loader: Loader, count: int) -> list[dict[str, torch.Tensor]]:
    return list(itertools.islice(loader, count))


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_training_batches(tmp_path: Path) -> None:
    data = _captions(tmp_path)
    loader = build_loader(data, micro_batch_size=4, seed=1)
    batches = _take(loader, 7)  # 28 samples: two epochs of 14
    assert loader.position == 28 and loader.wait_seconds > 0
    ids = torch.cat([batch["sample_id"] for batch in batches])
    assert sorted(ids.tolist()) == list(range(28)) and max(ids[:14]) < 14
    batch = batches[0]
    assert batch["images"].shape == (4, 3, 16, 16) and batch["images"].dtype == torch.float32
    assert batch["text_ids"].shape == batch["text_mask"].shape and batch["image_index"].dtype == torch.int64
    assert "valid" not in batch
    with pytest.raises(TypeError):
        len(loader)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (2, 1)])
def test_any_world_and_workers_give_the_same_samples(tmp_path: Path, world: int, workers: int) -> None:
    data = _captions(tmp_path)
    reference = _take(build_loader(data, micro_batch_size=8, seed=3), 4)
    ranks = [
        _take(build_loader(data, micro_batch_size=8 // world, world_size=world, rank=r, seed=3, num_workers=workers), 4)
        for r in range(world)
    ]
    for step, whole in enumerate(reference):
        for name in ("images", "sample_id", "image_index"):
            assert torch.equal(torch.cat([rank[step][name] for rank in ranks]), whole[name])


def test_workers_give_the_same_batches_and_do_not_change_the_global_generator(tmp_path: Path) -> None:
    data = _captions(tmp_path)
    reference = _take(build_loader(data, micro_batch_size=3, seed=3), 6)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches = _take(build_loader(data, micro_batch_size=3, seed=3, num_workers=2), 6)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(_equal(a, b) for a, b in zip(reference, batches, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_mid_epoch_is_exact(tmp_path: Path, workers: int) -> None:
    data = _captions(tmp_path)
    whole = _take(build_loader(data, micro_batch_size=4, seed=2), 9)
    first = build_loader(data, micro_batch_size=4, seed=2, num_workers=workers)
    _take(first, 5)
    assert first.position == 20  # what was read ahead does not count
    again = build_loader(data, micro_batch_size=4, seed=2, start_sample=first.position, num_workers=workers)
    assert all(_equal(a, b) for a, b in zip(_take(again, 4), whole[5:], strict=True))
    assert all(_equal(a, b) for a, b in zip(_take(first, 4), whole[5:], strict=True))  # iterated again, it goes on
    assert first.position == again.position == 36


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("world", [1, 3])
def test_evaluation(tmp_path: Path, world: int, workers: int) -> None:
    data = VqaSamples(make_vqa_set(tmp_path, rows=5, image_size=16), TOKENIZER, EVAL, 12, answer_list=ANSWERS)
    ids, invalid = [], 0
    for rank in range(world):
        processes = workers if rank == 0 else 0
        loader = build_loader(data, micro_batch_size=2, world_size=world, rank=rank, train=False, num_workers=processes)
        for _ in range(2):  # a second pass starts anew
            batches = list(loader)
        assert len(batches) == len(loader) == -(-10 // (2 * world))
        for batch in batches:
            assert batch["valid"].dtype == torch.bool and batch["answer_targets"].shape[1] == len(ANSWERS)
            ids += batch["sample_id"][batch["valid"]].tolist()
            invalid += int((~batch["valid"]).sum())
    assert sorted(ids) == list(range(10))
    assert invalid == (0 if world == 1 else 2)


def test_evaluation_limit(tmp_path: Path) -> None:
    data = NlvrSamples(make_nlvr_set(tmp_path, rows=5, image_size=16), TOKENIZER, EVAL, 12)
    batches = list(build_loader(data, micro_batch_size=4, train=False, limit=6))
    assert [batch["question_index"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5]]
    assert batches[0]["images_0"].shape == batches[0]["images_1"].shape == (4, 3, 16, 16)
    assert len(list(build_loader(data, micro_batch_size=4, train=False, limit=99))) == 3


def test_more_readers_than_rows(tmp_path: Path) -> None:
    data = _captions(tmp_path)
    with pytest.raises(UserError) as error:
        build_loader(data, micro_batch_size=1, world_size=2, num_workers=4)
    text = str(error.value)
    assert "7 rows" in text and "2 ranks x 4 workers = 8" in text and "data.num_workers" in text and "\n" not in text
    build_loader(data, micro_batch_size=1, world_size=7)


@pytest.mark.parametrize("workers", [0, 1])
def test_corrupt_row_is_one_line(tmp_path: Path, workers: int) -> None:
    rows = [
        {"image": image_of(i)[: 60 if i == 3 else None], "caption": ["a"], "image_id": str(i), "split": "train"}
        for i in range(6)
    ]
    data = CaptionSamples(write_split(tmp_path / "train", "caption", rows), TOKENIZER, EVAL, 12)
    with pytest.raises(UserError, match=r"shard-00000\.arrow: row 3: .*decoded") as error:
        _take(build_loader(data, micro_batch_size=2, num_workers=workers), 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"rank": 2, "world_size": 2}, {"micro_batch_size": 0}, {"num_workers": -1}])
def test_impossible_arguments(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_loader(_captions(tmp_path), **{"micro_batch_size": 2, **options})  # type: ignore[arg-type]


class _Gated(CaptionSamples):
    """Reads a sample when the test lets it, as a slow disk would."""

    def __init__(self, root: Path) -> None:
        super().__init__(make_caption_set(root, rows=20, image_size=16), TOKENIZER, EVAL, 12)
        self.gate = threading.Semaphore(0)
        self.reads = 0

    def describe(self, key: tuple[int, int]) -> Sample:
        self.gate.acquire()
        self.reads += 1
        return super().describe(key)


def _wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


def test_reads_ahead_while_the_consumer_works(tmp_path: Path) -> None:
    data = _Gated(tmp_path)
    data.gate.release(100)
    batches = iter(build_loader(data, micro_batch_size=2, prefetch=3))
    next(batches)
    _wait_for(lambda: data.reads == 2 * (1 + 3))
    time.sleep(0.05)
    assert data.reads == 8  # and no further
    next(batches)
    _wait_for(lambda: data.reads == 10)


def test_wait_seconds(tmp_path: Path) -> None:
    data = _Gated(tmp_path)
    loader = build_loader(data, micro_batch_size=1, prefetch=1)
    timer = threading.Timer(0.1, data.gate.release, [100])
    timer.start()
    batches = iter(loader)
    next(batches)
    timer.join()
    assert loader.wait_seconds >= 0.09


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_end_with_the_iterator(tmp_path: Path, workers: int) -> None:
    threads, children = set(threading.enumerate()), set(multiprocessing.active_children())
    batches = iter(build_loader(_captions(tmp_path), micro_batch_size=2, num_workers=workers))
    next(batches)
    new = set(threading.enumerate()) - threads
    assert new or set(multiprocessing.active_children()) - children
    batches.close()  # type: ignore[attr-defined]
    _wait_for(lambda: not any(thread.is_alive() for thread in new))
    assert set(multiprocessing.active_children()) <= children


def _read_and_die(data: Path, workers: Connection) -> None:
    """By SIGKILL, as for lack of memory, while the workers have more to send than a pipe holds."""
    batches = iter(build_loader(_captions(data), micro_batch_size=1500, num_workers=2))
    next(batches)
    time.sleep(0.5)
    workers.send([process.pid for process in multiprocessing.active_children()])
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_a_killed_process(tmp_path: Path) -> None:
    """Else they would keep its memory, and on a GPU the device's."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_read_and_die, args=(tmp_path, there))
    process.start()
    workers = here.recv()
    process.join()
    assert len(workers) == 2
    _wait_for(lambda: not any(_runs(worker) for worker in workers))


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _two_sources(root: Path) -> CaptionSamples:
    splits = [Split(make_caption_set(root / name, rows=rows, image_size=16)) for name, rows in (("a", 7), ("b", 30))]
    return CaptionSamples(JoinedSplit(splits), TOKENIZER, TRAIN, 12)


@pytest.mark.parametrize("weights", [None, (3.0, 1.0)])
@pytest.mark.parametrize("window", [0, 16])
def test_sources_are_mixed_and_counted(tmp_path: Path, weights: tuple[float, ...] | None, window: int) -> None:
    data = _two_sources(tmp_path)
    options: dict[str, Any] = {"seed": 5, "window": window, "weights": weights}
    whole = build_loader(data, micro_batch_size=10, **options)
    batches = _take(whole, 20)
    of_first = sum(int((batch["image_index"] < 7).sum()) for batch in batches)
    assert whole.drawn.tolist() == [of_first, 200 - of_first]
    share = of_first / 200
    assert (0.68 < share < 0.82) if weights else (0.14 < share < 0.24)  # 3 of 4; 14 of 74 samples
    for rank in range(2):
        options |= {"start_sample": 100, "num_workers": rank}
        half = _take(build_loader(data, micro_batch_size=5, world_size=2, rank=rank, **options), 10)
        for one, other in zip(half, batches[10:], strict=True):
            assert torch.equal(one["images"], other["images"][5 * rank : 5 * rank + 5])


@pytest.mark.parametrize("options", [{"window": 15}, {"weights": (1.0,)}, {"weights": (1.0, 0.0)}])
def test_impossible_mixtures(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        build_loader(_two_sources(tmp_path), 2, **options)


def test_corrupt_rows_are_replaced_until_they_are_too_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = {3, 4, 17, 30, 33}
    rows = [
        {"image": image_of(i)[: 60 if i in bad else None], "caption": ["a"], "image_id": str(i), "split": "train"}
        for i in range(40)
    ]
    data = CaptionSamples(write_split(tmp_path / "train", "caption", rows), TOKENIZER, TRAIN, 12)
    loader = build_loader(data, micro_batch_size=4, max_corrupt=0.5)
    batches = _take(loader, 20)
    assert loader.replaced == 10  # each twice, in two epochs
    seen = torch.cat([batch["image_index"] for batch in batches]).tolist()
    assert sorted(seen) == sorted(2 * [{3: 5, 4: 5, 17: 18, 30: 31, 33: 34}.get(i, i) for i in range(40)])
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 5  # once each
    assert sum("shard-00000.arrow: row 3" in line and "sample 5 replaces sample 3" in line for line in told) == 1
    with pytest.raises(UserError, match=r"4 corrupt rows among \d+ samples, more than data\.max_corrupt=0\.05"):
        _take(build_loader(data, micro_batch_size=4, max_corrupt=0.05), 20)
    with pytest.raises(UserError, match=r"row \d+: .*decoded"):
        _take(build_loader(data, micro_batch_size=4, max_corrupt=0.0), 20)
