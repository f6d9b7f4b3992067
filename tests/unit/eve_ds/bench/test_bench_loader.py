"""`bench loader` at tiny sizes: its candidates do the same work, and one that ends does not end the run.

tests/e2e/test_bench_loader.py has a whole run.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from eve_ds.bench import __main__ as bench
from eve_ds.bench import loader, loader_baselines, loader_images, loader_ours
from eve_ds.bench.loader_process import JobError, JobProcess, Settings
from preprocessing.errors import UserError

HERE = Path(sys.executable)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    work = tmp_path_factory.mktemp("bench")
    sizes = {"image_size": 32, "packing_copies": 2, "shards": 3, "shard_rows": 300}
    settings = Settings(str(work), str(work / "images"), images=16, batch_size=2, processes=1, **sizes)
    loader_baselines.Images(settings)
    return settings


def test_images_are_jpegs_of_the_stated_size(settings: Settings) -> None:
    folder = Path(settings.image_folder)
    files = sorted(folder.glob("*.jpg"))
    assert len(files) == settings.images
    assert len({path.read_bytes() for path in files}) == settings.images
    for path in files:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", loader_images.SIZE)


def test_a_folder_that_was_not_finished_is_made_again(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        loader_images.create_once(tmp_path / "data", fail)
    assert list(tmp_path.iterdir()) == []
    loader_images.create_once(tmp_path / "data", lambda folder: (folder / "whole").touch())
    loader_images.create_once(tmp_path / "data", fail)  # is there: nothing is written
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["whole"]


def test_ours_gives_the_batches_that_the_bare_loop_makes(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = loader_baselines.Bare(settings)
    expected = [bare._batch([index])[0] for index in range(settings.images)]
    seen: list[torch.Tensor] = []

    def take(batches: Any, _: Settings) -> dict[str, float]:
        seen.extend(image.clone() for batch in batches for image in batch)
        return {}

    monkeypatch.setattr(loader_ours, "window_rate", take)
    loader_ours.Ours(settings).round()
    assert len(seen) == settings.images  # one pass: each image once, cropped and mirrored alike
    for image in expected:
        assert sum(torch.equal(image, other) for other in seen) == 1


def test_the_window_leaves_out_start_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("", "", images=40, batch_size=2, processes=2, prefetch=1)
    assert (settings.lead, settings.window) == (2, 16)
    now = 0.0
    monkeypatch.setattr(loader_baselines.time, "perf_counter", lambda: now)

    def batches() -> Iterator[torch.Tensor]:
        nonlocal now
        for number in range(1, 21):
            now += 0.5 if 2 < number <= 18 else 100.0
            yield torch.zeros(2, 1)

    assert loader_baselines.window_rate(batches(), settings) == {"images_per_second": 32 / 8.0}
    with pytest.raises(RuntimeError, match="ended before number 18"):
        loader_baselines.window_rate([torch.zeros(2, 1)] * 17, settings)


def test_opening_reads_a_row_of_every_shard(settings: Settings) -> None:
    opening = loader_ours.Opening(settings)
    figures = opening.round()
    assert figures["open_every_shard_seconds"] >= figures["open_seconds"] > 0
    (opening._split / "shard-00002.arrow").unlink()
    with pytest.raises(UserError, match="shard-00002"):
        opening.round()


JOBS = """
import os, time
class Noisy:
    def __init__(self, settings): print('not an answer', settings.images); self.rounds = 0
    def round(self): print('neither is this'); return {'images_per_second': 1.5}
class Ranks(Noisy):
    def round(self): return {'ranks': 'RANK' in os.environ, 'offline': 'HF_HUB_OFFLINE' in os.environ}
class DiesLater(Noisy):
    def round(self):
        self.rounds += 1
        if self.rounds == 3: os._exit(7)
        return {'images_per_second': 2.5}
class Hangs(Noisy):
    def round(self): time.sleep(600)
"""


@pytest.fixture
def start(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], JobProcess]:
    """Starts one of `JOBS`."""
    (tmp_path / "jobs.py").write_text(JOBS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("RANK", "3")

    def started(name: str) -> JobProcess:
        process = JobProcess(name, f"jobs:{name}", settings, HERE, 60)
        process.start()
        return process

    return started


def test_rank_variables_are_removed(start: Callable[[str], JobProcess]) -> None:
    process = start("Ranks")
    assert process.round() == {"ranks": False, "offline": True}  # streaming would wait for the other ranks
    process.close()


def test_a_job_that_hangs_is_ended(start: Callable[[str], JobProcess]) -> None:
    process = start("Hangs")
    process._timeout = 0.2
    with pytest.raises(JobError, match=r"no answer within 0\.2 s"):
        process.round()
    process.close()
    assert process._process.returncode == -signal.SIGKILL


def test_a_baseline_that_dies_in_a_round_does_not_end_the_run(start: Callable[[str], JobProcess]) -> None:
    options = bench.parse(["loader", "--repeats", "3", "--warmup", "1"])[1]
    missing: dict[str, str] = {}
    jobs = {"ours": start("Noisy"), "streaming": start("DiesLater")}
    assert loader._in_turn(jobs, options, missing) == {"ours": {"images_per_second": [1.5] * 3}}
    assert list(missing) == ["streaming"] and "exit code 7" in missing["streaming"]
    assert all(job._process.poll() is not None for job in jobs.values())
    with pytest.raises(UserError, match="ours: ended with exit code 7"):
        loader._in_turn({"ours": start("DiesLater")}, options, {})


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    where = ["--work", str(tmp_path), "--bench_python", str(tmp_path / "none")]
    with pytest.raises(UserError, match=r"--images 20: too few for 2 processes.*give 48 or more"):
        bench.main(["loader", "--images", "20", "--batch_size", "4", "--processes", "2", "--threads", "1", *where])
