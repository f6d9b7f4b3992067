"""`python -m preprocessing` as people run it: many processes, MPI, kills at any moment, full disks, object stores."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocessing.__main__ import main
from preprocessing.running import storage as places
from preprocessing.shards.schema import read_manifest
from tests.cluster.processes import require
from tests.support.raw_coco import write_raw_coco
from tests.support.s3 import BUCKET, S3, s3_server

ROOT = Path(__file__).parents[2]
ROWS = 150
PARTS = 75
SECONDS = 240  # far beyond what any step takes: only a hang meets it


class World:
    """Raw data, and what an undisturbed run in one process makes of them."""

    def __init__(self, folder: Path) -> None:
        raw = write_raw_coco(folder / "raw", ROWS, side=640)
        self.options = ["coco", *raw, "--shard-rows", str(ROWS // PARTS)]
        assert main([*self.options, "--out", str(folder / "expected")]) == 0
        self.expected = content(folder / "expected")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def content(out: Path) -> dict[str, bytes]:
    """All files of the train split but the one that tells of the run; there must be nothing beside the split."""
    assert [path.name for path in out.iterdir()] == ["train"]
    return {path.name: path.read_bytes() for path in (out / "train").iterdir() if path.name != "provenance.json"}


def start(arguments: list[str], *before: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, "-m", "preprocessing", *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(arguments: list[str], *before: str) -> tuple[int, str]:
    with start(arguments, *before) as process:
        _, said = process.communicate(timeout=SECONDS)
        return process.returncode, said


def parts_done(out: Path) -> int:
    try:
        return len(os.listdir(out / ".train.work/records"))
    except FileNotFoundError:
        return 0


def wait_for_parts(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until so many parts are recorded, or the run has ended."""
    deadline = time.monotonic() + SECONDS
    while process.poll() is None and parts_done(out) < count:
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_ends_with_the_same_bytes(world: World, tmp_path: Path, workers: int) -> None:
    """kill -9 again and again, at random times; each new run starts at once, beside the dead one's workers."""
    moment = random.Random(workers)
    arguments = [*world.options, "--out", str(tmp_path / "out"), "--workers", str(workers)]
    kills = 0
    while kills < 5:
        with start(arguments) as process:
            wait_for_parts(process, tmp_path / "out", min(parts_done(tmp_path / "out") + moment.randrange(8), PARTS))
            time.sleep(moment.uniform(0, 0.1))
            process.kill()
        kills += process.returncode == -signal.SIGKILL
        if (tmp_path / "out/train").exists():
            break
    assert kills >= 2
    if not (tmp_path / "out/train").exists():
        assert parts_done(tmp_path / "out") > 0
        code, said = run(arguments)
        assert code == 0 and "continues where the last run stopped" in said
    assert content(tmp_path / "out") == world.expected


def test_a_killed_worker_ends_the_run_in_one_line(world: World, tmp_path: Path) -> None:
    arguments = [*world.options, "--out", str(tmp_path / "out"), "--workers", "2"]
    with start(arguments) as process:
        wait_for_parts(process, tmp_path / "out", 2)
        os.kill(workers_of(process.pid)[0], signal.SIGKILL)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 2
    assert said.count("\n") == 1 and "a worker process was killed" in said
    assert run(arguments)[0] == 0
    assert content(tmp_path / "out") == world.expected


def workers_of(pid: int) -> list[int]:
    """The worker processes of a run (the resource tracker of multiprocessing is a child too)."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_ctrl_c_stops_all_and_the_next_run_goes_on(world: World, tmp_path: Path) -> None:
    arguments = [*world.options, "--out", str(tmp_path / "out"), "--workers", "2", "--overwrite"]
    for _ in range(3):
        with start(arguments) as process:
            wait_for_parts(process, tmp_path / "out", 5)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=SECONDS)
        if not (tmp_path / "out/train").exists():  # else it ended in the half second before the signal came to it
            break
    assert (process.returncode, said) == (130, "")
    assert run(arguments)[0] == 0
    assert content(tmp_path / "out") == world.expected


def test_under_mpirun_the_bytes_are_the_same(world: World, tmp_path: Path) -> None:
    require("mpirun")
    mpirun = ["mpirun", "-n", "3", "--allow-run-as-root", "--oversubscribe"]
    code, said = run([*world.options, "--out", str(tmp_path / "out")], *mpirun)
    assert code == 0, said
    assert content(tmp_path / "out") == world.expected
    provenance = json.loads((tmp_path / "out/train/provenance.json").read_text())
    assert provenance["processes"] == 3
    code, said = run([*world.options, "--out", str(tmp_path / "out")], *mpirun)
    assert code == 2 and said.count("holds a finished split already") == 1


def test_two_runs_at_once_are_refused(world: World, tmp_path: Path) -> None:
    arguments = [*world.options, "--out", str(tmp_path / "out")]
    with start(arguments) as first:
        wait_for_parts(first, tmp_path / "out", 1)
        first.send_signal(signal.SIGSTOP)  # so that it is still at it
        code, said = run(arguments)
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=SECONDS)
    assert code == 2 and "another process is writing it" in said and said.count("\n") == 1
    assert first.returncode == 0 and content(tmp_path / "out") == world.expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 300 kB where this may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    yield folder
    if mounted.returncode == 0:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_mended_by_room(world: World, small_disk: Path, tmp_path: Path) -> None:
    arguments = [*world.options, "--out", str(small_disk / "out")]
    mounted = os.path.ismount(small_disk)
    with start(arguments) as process:
        if not mounted:  # no right to mount: no file may grow beyond 5 kB
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (5000, 5000))
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 2 and said.count("\n") == 1
    assert "cannot be written" in said and ("No space left" in said or not mounted)
    assert not (small_disk / "out/train").exists()
    assert not list(small_disk.rglob(".shard-*"))
    for record in small_disk.rglob("part-*.json"):
        for shard in json.loads(record.read_text())["shards"]:
            assert (record.parents[1] / "split" / shard["file"]).stat().st_size == shard["bytes"]
    if mounted:
        subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    assert run(arguments)[0] == 0
    assert content(small_disk / "out") == world.expected


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def test_from_s3_to_s3(s3: S3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Raw data, shards and `verify`, all behind URIs; the bytes are those of a local run."""
    raw = write_raw_coco(tmp_path / "raw", 40)
    assert main(["coco", *raw, "--shard-rows", "10", "--out", str(tmp_path / "local")]) == 0
    s3.put(tmp_path / "raw", "raw")
    remote = [option.replace(str(tmp_path), f"s3://{BUCKET}") for option in raw]
    arguments = ["coco", *remote, "--shard-rows", "10", "--out", f"s3://{BUCKET}/out"]
    assert main(arguments) == 0
    for name, data in content(tmp_path / "local").items():
        assert s3.read(f"out/train/{name}") == data
    assert s3.names("out/train") == sorted(path.name for path in (tmp_path / "local/train").iterdir())
    assert s3.names("out") == [f"train/{name}" for name in s3.names("out/train")]  # the work folder has gone
    capsys.readouterr()
    assert main(["verify", f"s3://{BUCKET}/out"]) == 0
    assert main(["inspect", f"s3://{BUCKET}/out", "--rows", "1"]) == 0
    assert "40 rows, 40 samples, 4 shards" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "holds a finished split already" in capsys.readouterr().err
    assert main(["verify", f"s3://{BUCKET}/out", "--repair"]) == 2
    with s3.files.open_output_stream(f"{BUCKET}/out/train/shard-00002.arrow") as stream:
        stream.write(b"not Arrow")
    assert main(["verify", f"s3://{BUCKET}/out"]) == 1
    assert f"s3://{BUCKET}/out/train/shard-00002.arrow: is no Arrow file" in capsys.readouterr().err


def test_a_killed_run_to_s3_goes_on(s3: S3, world: World, tmp_path: Path) -> None:
    """The manifest comes last: until then nobody takes what is there for a split."""
    arguments = [*world.options, "--out", f"s3://{BUCKET}/killed", "--workers", "2"]
    with start(arguments) as process:
        deadline = time.monotonic() + SECONDS
        while len(s3.names("killed/.train.work/records")) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    assert "manifest.json" not in s3.names("killed/train")
    with s3.files.open_output_stream(f"{BUCKET}/killed/train/shard-00099.arrow") as stream:
        stream.write(b"of an older run")
    code, said = run(arguments)
    assert code == 0 and "continues where the last run stopped" in said
    assert {name: s3.read(f"killed/train/{name}") for name in world.expected} == world.expected
    assert set(s3.names("killed")) == {f"train/{name}" for name in [*world.expected, "provenance.json"]}


def test_overwriting_on_s3_takes_the_old_manifest_away_first(s3: S3, tmp_path: Path) -> None:
    raw = write_raw_coco(tmp_path / "raw", 20)
    out = f"s3://{BUCKET}/again"
    with s3.files.open_output_stream(f"{BUCKET}/again/train/shard-00000.arrow") as stream:
        stream.write(b"of some other run")
    assert main(["coco", *raw, "--shard-rows", "5", "--out", out]) == 2
    assert s3.read("again/train/shard-00000.arrow") == b"of some other run"
    assert main(["coco", *raw, "--shard-rows", "5", "--out", out, "--overwrite"]) == 0
    shutil.rmtree(tmp_path / "raw/images")
    (tmp_path / "raw/images").mkdir()
    (tmp_path / "raw/images/1.jpg").write_bytes(b"no image")
    assert main(["coco", *raw, "--shard-rows", "5", "--out", out, "--overwrite"]) == 2
    assert "manifest.json" not in s3.names("again/train")
    shutil.rmtree(tmp_path / "raw")
    write_raw_coco(tmp_path / "raw", 12)
    assert main(["coco", *raw, "--shard-rows", "5", "--out", out, "--overwrite"]) == 0
    assert read_manifest(places.RemotePath(f"{out}/train"))["rows"] == 12
    assert len(s3.names("again/train")) == 3 + 3  # shards; ids, manifest, provenance
