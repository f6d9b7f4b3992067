"""Bit rot: shards compared with their hashes before a run and beside it; what is recorded, and what is read again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from eve_ds.data import hashing_process
from eve_ds.data.shards import Shard, Split
from eve_ds.engine import verification
from eve_ds.engine.verification import VERIFIED, VerifyShards, before_and_while, verify_now
from preprocessing.errors import UserError
from tests.support.foreign_shards import vilt_coco
from tests.support.shards import make_caption_set


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    return Split(make_caption_set(tmp_path / "set", 9, shard_rows=3)).hashed_shards


def flip(path: Path) -> None:
    """One bit in the middle, where an image is; the time of change stays, as it does when a disk rots."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def a_trainer(folder: Path, **changes: Any) -> Any:
    values = {"output_dir": folder, "stop": SimpleNamespace(requested=False), "stopped_early": False}
    values |= {"world_size": 1, "is_main": True, "step": 3}
    return SimpleNamespace(**values | changes)


def test_a_flipped_bit_is_found_before_the_run(shards: list[Shard]) -> None:
    verify_now(shards)
    assert before_and_while("off", shards) == [] == before_and_while("full", shards)
    flip(shards[1].path)
    with pytest.raises(UserError, match=rf"{shards[1].path}: its SHA-256 is not the manifest's.*copy or prepare"):
        before_and_while("full", shards)
    with pytest.raises(UserError, match="SHA-256"):
        before_and_while("background", shards, trains=False)  # what is scored is verified first
    assert before_and_while("off", shards) == []
    flip(shards[1].path)
    verify_now(shards)


def test_a_shard_that_cannot_be_read_is_named(shards: list[Shard]) -> None:
    shards[2].path.unlink()
    with pytest.raises(UserError, match=rf"{shards[2].path}: cannot be read \(No such file"):
        verify_now(shards)


def test_shards_without_a_manifest_have_nothing_to_be_compared_with(tmp_path: Path) -> None:
    files = vilt_coco(tmp_path)
    assert Split(tmp_path, [files[0]]).hashed_shards == []


def test_the_process_beside_a_run_asks_it_to_stop_and_names_the_shard(shards: list[Shard], tmp_path: Path) -> None:
    flip(shards[2].path)
    callback, trainer = VerifyShards(shards), a_trainer(tmp_path / "run")
    callback.fit_start(trainer)
    try:
        while not trainer.stop.requested:
            callback.step_end(trainer, {})
            time.sleep(0.01)
        trainer.stopped_early = True
        with pytest.raises(UserError, match=rf"{shards[2].path}: its SHA-256 .* the run is saved at step 3; copy or"):
            callback.fit_end(trainer)
    finally:
        callback.close(trainer)


def test_a_run_that_ends_first_waits_for_what_little_is_left(
    shards: list[Shard], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a rate at which the process would take hours; and no file is read again by the next start."""
    for expected in (3, 0):
        callback, trainer = VerifyShards(shards, rate=1.0), a_trainer(tmp_path / "run")
        callback.fit_start(trainer)
        try:
            callback.fit_end(trainer)
        finally:
            callback.close(trainer)
        assert caplog.messages == []
        lines = [line for path in (tmp_path / "run" / VERIFIED).iterdir() for line in path.read_text().splitlines()]
        assert len(lines) == 3, expected
    found = shards[0].path.stat()
    flip(shards[0].path)
    os.utime(shards[0].path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as a copy that keeps times: read again
    callback, trainer = VerifyShards(shards), a_trainer(tmp_path / "run")
    callback.fit_start(trainer)
    try:
        with pytest.raises(UserError, match="SHA-256"):
            callback.fit_end(trainer)
    finally:
        callback.close(trainer)


def test_hosts_that_share_the_shards_begin_at_different_ones(tmp_path: Path) -> None:
    """Each passes over what another one has read, so that they share the work; and a host begins as it did before."""
    shards = Split(make_caption_set(tmp_path / "set", 9, shard_rows=1)).hashed_shards
    orders = []
    for number, name in enumerate(("a", "b", "a")):
        trainer = a_trainer(tmp_path / f"run{number}")
        with mock.patch.object(verification, "host", return_value=name):
            callback = VerifyShards(shards)
            callback.fit_start(trainer)
            try:
                callback.fit_end(trainer)
            finally:
                callback.close(trainer)
        lines = (trainer.output_dir / VERIFIED / f"{name}.jsonl").read_text().splitlines()
        orders.append([json.loads(line)["file"] for line in lines])
    first, other, again = orders
    assert first == again != other and sorted(first) == sorted(other) == [str(shard.path) for shard in shards]


def test_a_run_that_is_stopped_does_not_wait_and_says_what_is_left(
    shards: list[Shard], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    callback, trainer = VerifyShards(shards, rate=1.0), a_trainer(tmp_path / "run", stopped_early=True)
    callback.fit_start(trainer)
    process = callback._process
    assert process is not None
    callback.fit_end(trainer)
    callback.close(trainer)
    assert "of 3 shards were compared with their hashes so far" in caplog.text
    assert process.poll() is not None


def test_the_process_reads_no_faster_than_told_gives_way_and_ends_with_its_parent(
    shards: list[Shard], tmp_path: Path
) -> None:
    """The parent is killed: the process, asked for a byte a second, must not outlive it."""
    job = {"shards": [[str(s.path), s.bytes, s.sha256] for s in shards], "record": str(tmp_path / "r"), "host": "h"}
    code = f"""
import json, os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-P", {hashing_process.__file__!r}], stdin=subprocess.PIPE)
child.stdin.write(json.dumps({job!r} | {{"rate": 1.0, "parent": os.getpid()}}).encode() + b"\\n")
child.stdin.flush()
print(child.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        while os.getpriority(os.PRIO_PROCESS, child) != 19:
            time.sleep(0.01)
        parent.kill()
    while is_alive(child):
        time.sleep(0.01)
    assert not list((tmp_path / "r").glob("*")) or len(hashing_process.recorded(tmp_path / "r")) <= 1


def is_alive(process: int) -> bool:
    try:
        return json.dumps(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]) != '"Z"'
    except OSError:
        return False


def test_damaged_lines_of_the_record_are_none(tmp_path: Path) -> None:
    good = {"file": "a", "key": ["ab", 1, 2, 3]}
    text = f'{json.dumps(good)}\n{{"file": "b"}}\n[]\n{"[" * 5000}\n{{"key": ["x", 1e999, 2, 3]}}\n{{"key": ["c", 1'
    (tmp_path / "host.jsonl").write_text(text)
    assert hashing_process.recorded(tmp_path) == {("ab", 1, 2, 3)}
    assert hashing_process.recorded(tmp_path / "none") == set()
