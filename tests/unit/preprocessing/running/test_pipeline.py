import argparse
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preprocessing.errors import UserError
from preprocessing.images.image_refs import FileImage
from preprocessing.images.policy import ImagePolicy
from preprocessing.running import pipeline
from preprocessing.running.parts import PartJob, default_part_rows, write_part
from preprocessing.running.pipeline import build_split
from preprocessing.running.work_folder import remove_leftover
from preprocessing.shards.schema import read_manifest
from preprocessing.sources.source import Row, Source
from tests.unit.preprocessing.helpers import image_of, rows_of

ROWS = 50


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for index in range(ROWS):
        (folder / f"{index}.jpg").write_bytes(image_of(index, side=16))
    return folder


def source(images: Path, rows: int = ROWS) -> Source:
    """One caption row an image, from files 0.jpg, 1.jpg, …"""
    made = [
        Row(f"{index}.jpg", (FileImage(str(images / f"{index}.jpg")),), {"caption": ["a"], "image_id": str(index)})
        for index in range(rows)
    ]
    return Source("caption", made, [], {"rows": rows})


def options(out: Path, **changes: Any) -> argparse.Namespace:
    chosen = {"workers": 1, "shard_rows": 8, "max_dropped": 0.0, "overwrite": False, "policy": ImagePolicy()}
    return argparse.Namespace(out=str(out), split="train", **chosen | changes)


def content(folder: Path) -> dict[str, bytes]:
    """All files but the one that tells of the run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "provenance.json"}


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run in one process writes."""
    out = tmp_path_factory.mktemp("expected")
    build_split(source(images), options(out))
    assert [path.name for path in out.iterdir()] == ["train"]
    return content(out / "train")


class Stopped(BaseException):
    """As a Ctrl-C."""


class StoppingRows:
    """Rows that end in an interruption after some."""

    def __init__(self, rows: list[Row], after: int) -> None:
        self._rows, self._after = rows, after

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        yield from self._rows[: self._after]
        raise Stopped


def stop_after(images: Path, out: Path, rows: int, **changes: Any) -> None:
    whole = source(images)
    with pytest.raises(Stopped):
        build_split(replace(whole, rows=StoppingRows(list(whole.rows), rows)), options(out, **changes))


def test_parts_become_shards_in_order(expected: dict[str, bytes], images: Path) -> None:
    manifest = json.loads(expected["manifest.json"])
    assert [shard["file"] for shard in manifest["shards"]] == [f"shard-{index:05d}.arrow" for index in range(7)]
    assert [shard["rows"] for shard in manifest["shards"]] == [8, 8, 8, 8, 8, 8, 2]
    assert manifest["rows"] == ROWS and manifest["dropped"] == {}


def test_many_workers_write_the_same_bytes(images: Path, tmp_path: Path, expected: dict[str, bytes]) -> None:
    build_split(source(images), options(tmp_path, workers=2))
    assert content(tmp_path / "train") == expected


def test_an_interrupted_run_continues(
    images: Path, tmp_path: Path, expected: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    stop_after(images, tmp_path, 20)
    work = tmp_path / ".train.work/split"
    written = {path.name: path.stat().st_ino for path in work.iterdir()}
    assert sorted(written) == ["shard-00000.arrow", "shard-00001.arrow"]
    (work / ".shard-00002.arrow.4711").write_bytes(b"half")  # as a killed worker leaves it
    (work.parent / "records/part-000001.json").write_text("{")
    build_split(source(images), options(tmp_path))
    assert content(tmp_path / "train") == expected
    assert "continues where the last run stopped: 2 of 7 parts are done" in capsys.readouterr().err
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "train").iterdir()}
    assert inodes["shard-00000.arrow"] == written["shard-00000.arrow"]  # moved, not written again
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_changed_parts_are_written_again(images: Path, tmp_path: Path) -> None:
    stop_after(images, tmp_path, 40)
    work = tmp_path / ".train.work/split"
    written = {path.name: path.stat().st_ino for path in work.iterdir()}
    changed = source(images)
    changed.rows = [*changed.rows][:24]
    changed.rows[9] = replace(changed.rows[9], columns={"caption": ["new"], "image_id": "9"})
    build_split(changed, options(tmp_path))
    captions = [row["caption"] for row in rows_of(tmp_path / "train")]
    assert captions == [["a"]] * 9 + [["new"]] + [["a"]] * 14
    inodes = {path.name: path.stat().st_ino for path in (tmp_path / "train").glob("shard-*")}
    assert len(inodes) == 3
    assert {name for name in inodes if inodes[name] == written[name]} == {"shard-00000.arrow", "shard-00002.arrow"}


def test_other_options_start_over(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop_after(images, tmp_path, 40)
    build_split(source(images), options(tmp_path, policy=ImagePolicy(check="header")))
    assert "starts over, since the run that was stopped: image options changed" in capsys.readouterr().err
    assert read_manifest(tmp_path / "train")["rows"] == ROWS


def test_dropped_rows_count_over_the_whole_run(images: Path, tmp_path: Path) -> None:
    """One lost image a part is under no part's bound, and fails early when the whole run has too many."""
    mixed = source(images)
    mixed.rows = [
        replace(row, images=(FileImage(str(images / "none.jpg")),)) if index % 8 == 3 else row
        for index, row in enumerate(mixed.rows)
    ]
    with pytest.raises(UserError, match=r"more than --max-dropped 0\.05 of 50 rows must be dropped: 3\.jpg \(image is"):
        build_split(mixed, options(tmp_path, max_dropped=0.05))
    assert not list(tmp_path.iterdir())  # three parts were read, and all three had losses
    manifest = build_split(mixed, options(tmp_path, max_dropped=0.12))
    assert manifest["dropped"] == {"image is missing": 6}
    assert [item["item"] for item in manifest["dropped_items"]] == [f"{index}.jpg" for index in range(3, 50, 8)]


def test_parts_without_losses_outlast_a_failure(images: Path, tmp_path: Path) -> None:
    broken = source(images)
    broken.rows = [*broken.rows]
    broken.rows[30] = replace(broken.rows[30], images=(FileImage(str(tmp_path / "30.jpg")),))
    with pytest.raises(UserError, match="must be dropped"):
        build_split(broken, options(tmp_path))
    records = {path.name for path in (tmp_path / ".train.work/records").iterdir()}
    assert records >= {f"part-00000{index}.json" for index in range(3)} and "part-000003.json" not in records
    (tmp_path / "30.jpg").write_bytes(image_of(30, side=16))
    assert build_split(broken, options(tmp_path))["rows"] == ROWS


def test_a_part_without_a_row_leaves_a_gap(images: Path, tmp_path: Path) -> None:
    gone = source(images)
    gone.rows = [replace(row, images=(FileImage("none"),)) if 8 <= n < 16 else row for n, row in enumerate(gone.rows)]
    manifest = build_split(gone, options(tmp_path, max_dropped=1.0))
    assert [int(shard["file"][6:11]) for shard in manifest["shards"]] == [0, 2, 3, 4, 5, 6]


def test_many_dropped_rows_stand_in_their_own_file(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "LISTED", 3)
    lost = source(images)
    lost.rows = [replace(row, images=(FileImage("none"),)) if n % 2 else row for n, row in enumerate(lost.rows)]
    manifest = build_split(lost, options(tmp_path, max_dropped=0.5))
    lines = [json.loads(line) for line in (tmp_path / "train/dropped.jsonl").read_text().splitlines()]
    assert [line["item"] for line in lines] == [f"{index}.jpg" for index in range(1, 50, 2)]
    assert manifest["dropped_items"] == lines[:3] and manifest["dropped"] == {"image is missing": 25}


def test_two_runs_at_once_are_refused(images: Path, tmp_path: Path) -> None:
    stop_after(images, tmp_path, 20)
    with open(tmp_path / ".train.work/lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing it"):
            build_split(source(images), options(tmp_path))
    build_split(source(images), options(tmp_path))


@pytest.mark.parametrize("renames", [0, 1])
def test_a_kill_while_the_old_split_is_replaced(
    images: Path, tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    build_split(source(images, rows=8), options(tmp_path))
    left = renames

    def rename(*paths: Path) -> None:
        nonlocal left
        if not left:
            raise Stopped
        left -= 1
        real(*paths)

    real: Callable[..., None] = os.rename
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("preprocessing.running.work_folder.os.rename", rename)
        build_split(source(images), options(tmp_path, overwrite=True))
    assert (tmp_path / "train").exists() == (renames == 0)
    build_split(source(images), options(tmp_path, overwrite=True))
    assert content(tmp_path / "train") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_what_a_kill_at_the_very_end_leaves_is_removed(images: Path, tmp_path: Path) -> None:
    build_split(source(images), options(tmp_path))
    (tmp_path / ".train.work/records").mkdir(parents=True)
    remove_leftover(tmp_path / "train")
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_a_part_of_many_bytes_becomes_several_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(image_of(1, "PNG"))
    row = Row("a", (FileImage(str(tmp_path / "a.png")),), {"caption": ["a"], "image_id": "0"})
    job = PartJob("caption", "train", tmp_path, tmp_path, ImagePolicy(), 0, shard_bytes=1000)
    result = write_part(job, 7, [replace(row, columns={**row.columns, "image_id": str(n)}) for n in range(600)], "")
    shards = json.loads((tmp_path / "part-000007.json").read_text())["shards"]
    assert (result.rows, result.faults) == (600, 0)
    names = [shard["file"] for shard in shards]
    assert names == ["shard-00007.arrow", "shard-00007_01.arrow", "shard-00007_02.arrow"] == sorted(names)
    assert [shard["rows"] for shard in shards] == [256, 256, 88]


@pytest.mark.parametrize(
    ("rows", "part"), [(1, 256), (256, 256), (16384, 256), (16385, 512), (113_287, 1792), (12_000_000, 4096)]
)
def test_parts_are_enough_for_many_workers_and_not_too_large(rows: int, part: int) -> None:
    assert default_part_rows(rows) == part
