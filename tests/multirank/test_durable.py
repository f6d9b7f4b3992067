"""What a save has on disk, and in which order; and that rank 0 marks nothing whole that it does not see."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.multirank.test_universal import Case, Run, start
from tests.support.distributed import run_distributed_test

CASE = Case(2, 2, 2)


def note_events(log: Path, rank: int) -> None:
    """Lines in ``log``, of all ranks in the order of time: [rank, "synced" or "named", path]."""
    fsync, replace = os.fsync, os.replace
    handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def write(event: str, path: str) -> None:
        os.write(handle, json.dumps([rank, event, path]).encode() + b"\n")

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        write("synced", os.readlink(f"/proc/self/fd/{descriptor}"))

    def note_replace(old: Any, new: Any) -> None:
        write("named", str(new))
        replace(old, new)

    os.fsync, os.replace = note_fsync, note_replace  # type: ignore[assignment]


def save(root: Path) -> None:
    start()
    from eve_ds.engine import checkpoint, distributed
    from eve_ds.engine.checkpoint_record import model_file
    from preprocessing.errors import UserError

    run = Run(root, CASE)
    run.train(range(1))
    note_events(root / "events", run.rank)
    saved = run.save(1)
    assert torch.serialization.get_crc32_options()  # what a user's callback saves has checksums
    assert not any(part.CRC for part in zipfile.ZipFile(model_file(saved, 2, run.rank)).infolist())
    with pytest.raises(UserError, match=r"step_00000001 is whole, though it was not seen when the run began"):
        run.save(1)
    assert (saved / "complete.json").is_file()

    sizes, looks = checkpoint.file_sizes, iter(range(10**6))

    def late(path: Path, names: Any) -> Any:
        return sizes(path, names) if next(looks) == 2 else {}

    checkpoint.file_sizes = late
    assert (run.save(2) / "complete.json").is_file() and (run.rank or next(looks) == 3)
    distributed.PATIENCE_SECONDS = 0.3
    with pytest.raises(UserError, match=r"step_00000003: rank 0 on host .* does not see all that other ranks wrote"):
        run.save(3)
    assert not (run.folder / "step_00000003" / "complete.json").exists()


def save_on_a_disk_that_fills_up(root: Path) -> None:
    """With room for all but complete.json."""
    start()
    from eve_ds.engine import resume
    from eve_ds.engine.checkpoint_record import Manifest
    from eve_ds.errors import RankError
    from preprocessing.errors import UserError

    run = Run(root, CASE)
    before, write = run.save(1), Manifest.write

    def write_without_room(manifest: Manifest, path: Path) -> None:
        with open(root / "filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        write(manifest, path)

    Manifest.write = write_without_room  # type: ignore[method-assign]
    kind = UserError if run.rank else RankError  # rank 0 tells; the others would, if no launcher ended them
    words = (
        r"^rank 0: .*/step_00000002 cannot be written, .* the disk is full \(.*No space left on device.*\); make room"
    )
    with pytest.raises(UserError, match=words) as told:
        run.save(2)
    assert type(told.value) is kind and not (run.folder / "step_00000002").exists()
    found = resume.sound(run.folder)
    assert found is not None and found[0] == before
    Manifest.write = write  # type: ignore[method-assign]
    if run.rank == 0:
        (root / "filler").unlink()
    assert (run.save(2) / "complete.json").is_file()


def test_a_disk_that_is_full_when_a_checkpoint_is_marked_whole(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        run_distributed_test(save_on_a_disk_that_fills_up, 2, args=(tmp_path,))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_all_is_on_disk_before_a_checkpoint_counts(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    run_distributed_test(save, 2, args=(tmp_path,))
    folder = tmp_path / CASE.name
    target = folder / "step_00000001"
    events = [tuple(json.loads(line)) for line in (tmp_path / "events").read_text().splitlines()]
    events = events[: events.index((0, "synced", str(folder / "step_00000002")))]
    marked = events.index((0, "named", str(target / "complete.json")))
    before, after = events[:marked], events[marked + 1 :]
    for name in json.loads((target / "complete.json").read_text())["files"]:
        of_rank_1 = name.startswith(("zero_pp_rank_1", "averages_rank_1"))
        writer = 1 if of_rank_1 or "expert_2" in name or "expert_3" in name else 0
        assert (writer, "synced", str(target / name)) in before, name
    for path in (tmp_path / "metrics.jsonl", target, folder, tmp_path):
        assert (0, "synced", str(path)) in before, path
    assert (0, "synced", str(target)) in after
