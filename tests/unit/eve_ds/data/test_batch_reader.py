"""Reading a micro-batch: which sample replaces a corrupt one, and which errors are never replaced."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import pickle
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eve_ds.data.batch_reader import MAX_NEIGHBORS, BatchReader, LoadedBatch, SharedImages
from eve_ds.data.loader import Loader, build_loader
from eve_ds.data.sampler import MicroBatchIndices
from eve_ds.data.samples import CaptionSamples, Samples
from eve_ds.data.transforms import build_transform
from eve_ds.data.worker import JOB_SIGNALS, explain_worker_death
from eve_ds.tasks.vqa import VqaSamples
from preprocessing.errors import UserError
from tests.support.limits import few_descriptors
from tests.support.shards import image_of, make_vqa_set, tiny_tokenizer, write_split

TOKENIZER = tiny_tokenizer()
TRAIN = build_transform(16, train=True, augmentation="color")


def captions(root: Path, corrupt: set[int], rows: int = 12, number: int = 2) -> CaptionSamples:
    """`rows` images with `number` captions each, of which these cannot be decoded."""
    table = [
        {
            "image": image_of(i, 16, "JPEG")[: 200 if i in corrupt else None],
            "caption": [f"image {i} caption {c}" for c in range(number)],
            "image_id": str(i),
            "split": "train",
        }
        for i in range(rows)
    ]
    return CaptionSamples(write_split(root / "train", "caption", table, shard_rows=5), TOKENIZER, TRAIN, 12)


def read(data: Samples, samples: list[int], epoch: int = 0, replace: bool = True, **options: Any) -> LoadedBatch:
    indices = MicroBatchIndices(np.array(samples), np.full(len(samples), epoch), None, 0)
    return BatchReader(data, 1, replace, **options)[0, indices]


def test_the_next_valid_sample_replaces_a_corrupt_one(tmp_path: Path) -> None:
    data = captions(tmp_path, corrupt={3, 4, 11})
    found = read(data, [0, 6, 9, 23, 7], epoch=2)  # 6, 7: row 3; 9: row 4; 23: the last one, so the first follows
    expected = read(data, [0, 10, 10, 0, 10], epoch=2)
    assert found.failure is None and found.arrays.keys() == expected.arrays.keys()
    assert all(np.array_equal(found.arrays[name], expected.arrays[name]) for name in found.arrays)
    assert found.arrays["sample_id"].tolist() == [48, 58, 58, 48, 58]
    assert not expected.replaced and len(found.replaced) == 4
    assert [Path(each.where.split(":")[0]).name for each in found.replaced] == (
        ["shard-00000.arrow", "shard-00000.arrow", "shard-00002.arrow", "shard-00000.arrow"]
    )
    assert [each.where[-5:] for each in found.replaced] == ["row 3", "row 4", "row 1", "row 3"]
    message = found.replaced[0].message
    assert message.startswith(found.replaced[0].where) and message.endswith("sample 10 replaces sample 6")
    assert "cannot be decoded" in message and "\n" not in message


def test_a_corrupt_row_is_a_failure_without_replacement(tmp_path: Path) -> None:
    found = read(captions(tmp_path, corrupt={3}), [6], replace=False)
    assert found.failure is not None and not found.arrays and not found.replaced
    assert "shard-00000.arrow: row 3: the image cannot be decoded" in found.failure


def test_the_number_of_tried_neighbors_is_limited(tmp_path: Path) -> None:
    data = captions(tmp_path, corrupt=set(range(1, MAX_NEIGHBORS + 2)), rows=MAX_NEIGHBORS + 3, number=1)
    found = read(data, [2])
    assert found.failure is None and found.arrays["sample_id"].tolist() == [MAX_NEIGHBORS + 2]
    found = read(data, [1])
    assert found.failure is not None and found.failure.endswith(f"the next {MAX_NEIGHBORS} samples are corrupt, too")
    assert "shard-00000.arrow: row 1:" in found.failure and "\n" not in found.failure


def test_a_dataset_of_corrupt_rows_only_is_a_failure(tmp_path: Path) -> None:
    found = read(captions(tmp_path, corrupt={0, 1, 2}, rows=3), [4])
    assert found.failure is not None and "row 2" in found.failure and "are corrupt, too" in found.failure


def whole_batches(data: Samples, count: int, world: int, workers: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Micro-batches of 8 put together from their ranks, and how many samples were replaced."""
    loaders = [
        build_loader(data, 8 // world, world_size=world, rank=r, seed=3, num_workers=workers, max_corrupt=0.5)
        for r in range(world)
    ]
    parts = [list(itertools.islice(loader, count)) for loader in loaders]
    names = ("images", "sample_id", "image_index")
    whole = [{name: torch.cat([rank[i][name] for rank in parts]) for name in names} for i in range(count)]
    return whole, sum(loader.replaced for loader in loaders)


@pytest.mark.parametrize(("world", "workers"), [(2, 0), (4, 0), (1, 2), (2, 1)])
def test_replacement_is_the_same_on_any_ranks_and_workers(tmp_path: Path, world: int, workers: int) -> None:
    data = captions(tmp_path, corrupt={2, 7, 8})
    expected, replaced = whole_batches(data, 6, 1, 0)  # two epochs of 24
    assert replaced == 2 * 3 * 2
    found, number = whole_batches(data, 6, world, workers)
    assert number == replaced
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in expected[0])


def test_errors_beyond_one_row_are_never_replaced(tmp_path: Path) -> None:
    data = captions(tmp_path / "a", corrupt=set())
    (tmp_path / "a" / "train" / "shard-00001.arrow").unlink()
    found = read(data, [0, 12])
    assert found.failure is not None and "shard-00001.arrow: No such file" in found.failure and not found.replaced
    questions = VqaSamples(
        make_vqa_set(tmp_path / "b", rows=4, image_size=16), TOKENIZER, TRAIN, 16, answer_list=["yes", "no"]
    )
    found = read(questions, [1])  # another answer list: a mistake, and no accident of this row
    assert found.failure is not None and "answer_list.json" in found.failure


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_vanishes_ends_the_iteration(tmp_path: Path, workers: int) -> None:
    data = captions(tmp_path, corrupt=set())
    batches = iter(build_loader(data, 4, num_workers=workers, max_corrupt=0.5))
    next(batches)
    (tmp_path / "train" / "shard-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"^[^\n]*shard-00002\.arrow: No such file[^\n]*$"):
        for _ in range(12):
            next(batches)


# ---- worker processes


def test_images_travel_through_shared_memory(tmp_path: Path) -> None:
    data = captions(tmp_path, corrupt=set())
    shared = SharedImages(3, data.images, 4, 16)
    plain = [read(data, [i, i + 5]) for i in range(5)]
    for number, expected in enumerate(plain):
        indices = expected.indices
        found = pickle.loads(pickle.dumps(BatchReader(data, 1, True, shared)[number, indices]))  # noqa: S301  as a queue does
        assert found.slot == number % 3 and "images" not in found.arrays and "text_ids" in found.arrays
        assert np.array_equal(shared.view(found.slot, 2)["images"], expected.arrays["images"])


def test_shared_memory_that_cannot_be_allocated() -> None:
    with pytest.raises(UserError, match=r"^data\.num_workers: no shared memory for .* lower data\.num_workers"):
        SharedImages(1 << 30, ("images",), 1 << 20, 224)


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[tuple[Iterator[Any], int]]:
    """A loader's iterator, and the process that reads for it."""
    before = _children()
    batches = iter(build_loader(captions(tmp_path, corrupt=set()), 2, num_workers=1))
    next(batches)
    (process,) = _children() - before
    yield batches, process
    batches.close()  # type: ignore[attr-defined]
    assert _children() <= before


def _children() -> set[int]:
    return {process.pid or 0 for process in multiprocessing.active_children()}


def test_a_killed_worker_is_one_line(one_worker: tuple[Iterator[Any], int]) -> None:
    batches, process = one_worker
    with pytest.raises((UserError, RuntimeError)) as error:
        os.kill(process, signal.SIGKILL)
        for _ in range(100):  # torch raises the error anywhere in the main thread
            next(batches)
    line = str(error.value) if isinstance(error.value, UserError) else explain_worker_death(error.value)
    assert line is not None and f"data loader process {process} ended by SIGKILL" in line and "\n" not in line


@pytest.mark.timeout(60)
def test_a_killed_worker_is_found_if_other_code_has_caught_torchs_error(one_worker: tuple[Iterator[Any], int]) -> None:
    """Else the next batch is waited for until the time-out, five minutes."""
    batches, process = one_worker
    with pytest.raises(RuntimeError, match="is killed by signal"):
        os.kill(process, signal.SIGKILL)
        time.sleep(30)
    with pytest.raises(UserError, match=f"^data loader process {process} ended by SIGKILL: most often for lack of mem"):
        next(batches)


def test_workers_ignore_a_signal_to_the_whole_job(one_worker: tuple[Iterator[Any], int]) -> None:
    """Schedulers and terminals signal every process; the training process saves, and needs batches until then."""
    batches, process = one_worker
    numbers = [int(number) for number in JOB_SIGNALS]
    from_elsewhere = f"import os; [os.kill({process}, number) for number in {numbers}]"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", from_elsewhere], check=True)
        for _ in range(10):
            next(batches)


def test_a_parents_signal_ends_its_worker(one_worker: tuple[Iterator[Any], int]) -> None:
    _, process = one_worker
    os.kill(process, signal.SIGTERM)
    ended = os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
    assert ended is not None and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("DataLoader worker (pid 71) is killed by signal: Killed. ", "71 ended by SIGKILL: most often for lack of mem"),
        ("DataLoader worker (pid 71) is killed by signal: Bus error. It is possible that", "71 ended by a bus error"),
        ("DataLoader worker (pid 71) is killed by signal: Aborted. ", "71 ended by a signal (Aborted)"),
        ("DataLoader worker (pid(s) 71, 72) exited unexpectedly", "71, 72 ended unexpectedly"),
        ("CUDA error: out of memory", None),
    ],
)
def test_torchs_messages_about_a_dead_worker(message: str, words: str | None) -> None:
    line = explain_worker_death(RuntimeError(message))
    assert (line is None) == (words is None) and (words or "") in (line or "")
    assert explain_worker_death(ValueError(message)) is None


def test_too_few_descriptors_for_workers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = captions(tmp_path, corrupt=set())
    loader: Loader = build_loader(data, 2, num_workers=2)
    for spare in (0, 5, 9):  # for nothing; for the queue of results; for one of two processes
        with few_descriptors(spare), pytest.raises(UserError, match=r"^data\.num_workers=2: .*Too many .*`ulimit -n`"):
            next(iter(loader))
    gc.collect()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept() -> None:
    """Pages that are given back are zeroed anew, at a fault each, when they are taken again."""
    script = (
        "import resource, sys; from eve_ds.data.worker import keep_freed_memory\n"
        "if sys.argv[1] == 'keep': keep_freed_memory()\n"
        "def faults():\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "def use():\n"
        "    pieces = [b'x' * (3 << 20) for _ in range(4)]\n"  # as glibc grows its thresholds, one is never given back
        "for _ in range(5): use()\n"
        "before = faults()\n"
        "for _ in range(20): use()\n"
        "print(faults() - before)"
    )
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", script, word], capture_output=True, text=True, check=True).stdout)
        for word in ("keep", "give back")
    )
    assert kept < given_back / 10
