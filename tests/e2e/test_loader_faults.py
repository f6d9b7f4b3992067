"""Pre-training as users run it while its data fail: corrupt rows, killed readers, shards that change, a slow disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ranks
from tests.support.shards import image_of, tiny_tokenizer, write_split

ROWS, SHARD_ROWS = 24, 8
CORRUPT = (1, 6, 9, 17, 20)  # those rows of the corrupt data set


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_captions(root / "corrupt", CORRUPT)
    tiny_tokenizer(root / "tokenizer")
    return root


def write_captions(root: Path, corrupt: tuple[int, ...] = ()) -> None:
    rows = [
        {
            "image": image_of(i, fmt="JPEG")[: 300 if i in corrupt else None],
            "caption": [f"image {i}"],
            "image_id": f"image-{i}",
            "split": "train",
        }
        for i in range(ROWS)
    ]
    write_split(root / "train", "caption", rows, shard_rows=SHARD_ROWS)


def options(data: Path, captions: Path, output: Path, world_size: int, **more: object) -> list[str]:
    fixed = {
        "config": "tests/e2e/tiny.yaml",
        "data.path": captions,
        "data.tokenizer": data / "tokenizer",
        "data.val_split": "null",
        "engine.expert_parallel_size": world_size,
        "logging.wandb": "false",
        "logging.samples": 0,
        "checkpoint.every": 0,
        "checkpoint.export": "false",
        "output_dir": output,
    }
    return [f"--{name}={value}" for name, value in {**fixed, **more}.items()]


def records(output: Path) -> list[dict[str, float]]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Run:
    """A run without end over sound data of its own, which has taken some steps."""

    def __init__(self, data: Path, folder: Path, world_size: int, workers: int) -> None:
        self.captions, self.output = folder / "captions", folder / "run"
        write_captions(self.captions)
        endless = {"optimizer.total_steps": 1_000_000, "data.num_workers": workers}
        arguments = options(data, self.captions, self.output, world_size, **endless)
        self.ranks = ranks.start("eve_ds.pretrain", arguments, world_size)
        deadline = time.monotonic() + ranks.LIMIT
        while len(records(self.output)) < 2:
            alive = all(rank.poll() is None for rank in self.ranks)
            assert alive and time.monotonic() < deadline, ranks.finish(self.ranks)
            time.sleep(0.05)

    def shard(self, number: int) -> Path:
        return self.captions / "train" / f"shard-{number:05d}.arrow"

    def readers(self, rank: int) -> list[int]:
        """The loader processes of a rank."""
        parent = self.ranks[rank].pid
        return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]

    def finish(self) -> list[tuple[int, str]]:
        """Of each rank, its exit code and the one line by which it tells why it ended."""
        try:
            outputs = [rank.communicate(timeout=ranks.LIMIT)[0] for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()
        found = []
        for rank, output in zip(self.ranks, outputs, strict=True):
            assert "Traceback" not in output and "terminate called" not in output, output
            lines = [line for line in output.splitlines() if re.match(r"error:|rank \d+:", line)]
            assert len(lines) == 1, output
            found.append((rank.returncode, lines[0]))
        return found


def test_few_corrupt_rows_are_replaced_and_a_slow_disk_shows(data: Path, tmp_path: Path) -> None:
    settings = {"data.max_corrupt": 0.5, "optimizer.total_steps": 4}
    output = tmp_path / "run"
    text = ranks.run("eve_ds.pretrain", options(data, data / "corrupt", output, 1, **settings), 1)
    for row in CORRUPT:  # reported once each, although an epoch has three steps
        where = rf"shard-{row // SHARD_ROWS:05d}\.arrow: row {row % SHARD_ROWS}: the image cannot be decoded"
        assert len(re.findall(rf"{where}.*sample {row + 1} replaces sample {row}$", text, re.MULTILINE)) == 1, text
    replaced = [record["data/replaced"] for record in records(output)]
    assert replaced[2] == len(CORRUPT) <= replaced[3] and replaced == sorted(replaced)

    slow = tmp_path / "slow"
    words = [sys.executable, "-c", SLOW_DISK, *options(data, data / "corrupt", slow, 1, **settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ranks.REPOSITORY)}
    subprocess.run(words, cwd=ranks.REPOSITORY, env=environment, check=True, capture_output=True, timeout=ranks.LIMIT)
    waits = [[record["data/wait_fraction"] for record in records(run)[1:]] for run in (output, slow)]
    assert all(0 <= wait <= 1 for run in waits for wait in run)
    # On a busy machine reading goes on while the steps take long, or is late itself: one step that shows the disk and
    # one without it are enough.
    assert max(waits[1]) > min(waits[0]) + 0.2, waits


SLOW_DISK = """
import runpy, time
from eve_ds.data.mapping import MappedFile
read = MappedFile.read
def read_slowly(file, view):
    time.sleep(0.2)
    return read(file, view)
MappedFile.read = read_slowly
runpy.run_module("eve_ds.pretrain", run_name="__main__", alter_sys=True)
"""


def test_too_many_corrupt_rows_end_the_run(data: Path, tmp_path: Path) -> None:
    arguments = options(data, data / "corrupt", tmp_path / "run", 1, **{"data.max_corrupt": 0.01})
    (rank,) = ranks.start("eve_ds.pretrain", arguments, 1)
    ((code,), text) = ranks.finish([rank])
    (line,) = [line for line in text.splitlines() if line.startswith("error:")]
    assert code == 2 and "Traceback" not in text, text
    assert re.search(r"4 corrupt rows among \d+ samples, more than data\.max_corrupt=0\.01", line), line
    assert re.search(r"shard-0000\d\.arrow: row \d", line), line


def test_a_killed_reader_ends_the_run(data: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path, world_size=2, workers=1)
    (reader,) = run.readers(rank=1)
    os.kill(reader, signal.SIGKILL)
    (lost, alone), (code, line) = run.finish()
    assert code == 2 and line.startswith(f"error: rank 1: data loader process {reader} ended by SIGKILL"), line
    assert lost == 3 and alone.startswith("rank 0: another rank has ended; its message says why")


def test_a_truncated_shard_ends_the_run(data: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path, world_size=2, workers=1)
    os.truncate(run.shard(1), run.shard(1).stat().st_size // 2)
    ended = run.finish()
    told = [line for code, line in ended if code == 2]
    assert told and all("shard-00001.arrow: " in line and "truncated" in line for line in told), ended
    # The rank that met it first is gone before the other one reads of that shard, or finds itself alone.
    assert all("another rank has ended" in line for code, line in ended if code != 2), ended
    assert {code for code, _ in ended} <= {2, 3}


def test_a_shard_that_vanishes_ends_the_run(data: Path, tmp_path: Path) -> None:
    run = Run(data, tmp_path, world_size=1, workers=0)
    run.shard(2).unlink()
    ((code, line),) = run.finish()
    assert code == 2 and line.startswith("error: rank 0:") and "shard-00002.arrow: No such file" in line, line


def test_a_signal_for_the_whole_job_saves(data: Path, tmp_path: Path) -> None:
    """As a scheduler stops a job: SIGTERM to all of its processes, readers first."""
    run = Run(data, tmp_path, world_size=1, workers=2)
    for process in [*run.readers(rank=0), run.ranks[0].pid]:
        os.kill(process, signal.SIGTERM)
    codes, text = ranks.finish(run.ranks)
    assert codes == [75] and "error:" not in text and "Traceback" not in text, text
    (saved,) = (run.output / "checkpoints").iterdir()
    assert saved.name == f"step_{len(records(run.output)):08d}" and (saved / "complete.json").is_file()
