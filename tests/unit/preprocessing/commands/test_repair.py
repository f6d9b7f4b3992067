import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from preprocessing.__main__ import main
from preprocessing.running.work_folder import open_work
from preprocessing.shards.schema import read_manifest
from preprocessing.shards.writer import ShardWriter, write_manifest
from tests.unit.preprocessing.helpers import command, image_of, rows_of

ROWS = 300  # a shard of two record batches, and one of 40 rows


def row(index: int, **changes: Any) -> dict[str, Any]:
    return {"image": image_of(index, "PNG", side=8), "caption": ["a"], "image_id": str(index)} | changes


def write(folder: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A split of two shards: `rows`, and 40 rows with ids from 1000."""
    folder.mkdir(parents=True)
    shards = []
    for name, part in (("shard-00000.arrow", rows), ("shard-00001.arrow", [row(1000 + index) for index in range(40)])):
        with ShardWriter(folder, "caption", "train", name=lambda number, name=name: name) as writer:  # type: ignore[misc]
            for one in part:
                writer.add(one)
            shards += writer.close()
    return write_manifest(folder, "caption", "train", shards, dropped={"early": 2}, dropped_items=[], source={})


@pytest.fixture
def split(tmp_path: Path) -> Path:
    write(tmp_path / "train", [row(index) for index in range(ROWS)])
    return tmp_path / "train"


@pytest.fixture
def repair(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], str]:
    """Runs `verify --repair`, which must leave no fault; gives what it printed."""

    def run(folder: Path) -> str:
        assert main(["verify", str(folder)]) == 1
        capsys.readouterr()
        assert main(["verify", str(folder), "--repair"]) == 0, capsys.readouterr().err
        said = capsys.readouterr().out
        assert main(["verify", str(folder)]) == 0
        return said

    return run


def test_a_sound_split_is_left_alone(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in split.iterdir()}
    assert main(["verify", str(split), "--repair"]) == 0
    assert capsys.readouterr().out == f"{split}: no fault in train\n"
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in split.iterdir()} == before


def test_broken_rows_are_taken_out(tmp_path: Path, repair: Callable[[Path], str]) -> None:
    rows = [row(index) for index in range(ROWS)]
    rows[5] = row(5, image=b"no")
    rows[7] = row(7, caption=[])
    rows[290] = row(290, image_id="3")  # as row 3, in another record batch
    rows[291] = row(291, image_id="1004")  # as row 4 of the next shard, which goes
    write(tmp_path / "train", rows)
    other = (tmp_path / "train/shard-00001.arrow").read_bytes()
    said = repair(tmp_path / "train")
    assert "shard-00000.arrow is written anew: 297 rows are kept; 3 broken rows are taken out (row 5: image is" in said
    assert "shard-00001.arrow is written anew: 39 rows are kept" in said
    manifest = read_manifest(tmp_path / "train")
    assert manifest["dropped"] == {
        "early": 2,
        "repair: image is of no known format": 1,
        "repair: caption is empty, or a text in it is": 1,
        "repair: its id stands in an earlier row": 2,
    }
    assert {"item": "shard-00000.arrow row 5", "reason": "repair: image is of no known format"} in manifest[
        "dropped_items"
    ]
    assert len(manifest["repairs"]) == 2
    assert [one["image_id"] for one in rows_of(tmp_path / "train")][:8] == ["0", "1", "2", "3", "4", "6", "8", "9"]
    assert (tmp_path / "train/shard-00001.arrow").read_bytes() != other


def test_a_changed_shard_is_not_accepted_without_the_option(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = split / "shard-00001.arrow"
    record = read_manifest(split)["shards"][1]
    content = path.read_bytes()
    place = content.index(b"train")  # of a row's column `split`, which is checked; the letter before it is a caption's
    caption = content.rindex(b"a", 0, place)
    path.write_bytes(content[:caption] + b"b" + content[caption + 1 :])
    assert main(["verify", str(split), "--repair"]) == 1
    said = capsys.readouterr()
    assert "shard-00001.arrow is kept as it is, and so is its record" in said.out and "--accept-changed" in said.out
    assert "shard-00001.arrow: its SHA-256 is not the manifest's" in said.err
    assert read_manifest(split)["shards"][1] == record
    before = {one.name: (one.stat().st_ino, one.read_bytes()) for one in split.iterdir()}
    assert main(["verify", str(split), "--repair"]) == 1  # nothing else is to be done: nothing is written
    assert {one.name: (one.stat().st_ino, one.read_bytes()) for one in split.iterdir()} == before
    assert "shard-00001.arrow is kept as it is" in capsys.readouterr().out
    assert main(["verify", str(split), "--repair", "--accept-changed"]) == 0
    assert main(["verify", str(split)]) == 0
    assert read_manifest(split)["shards"][1]["sha256"] != record["sha256"]


def test_a_split_without_a_shard_is_invalid(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in split.glob("*.arrow"):
        path.unlink()
    write_manifest(split, "caption", "train", [], dropped={}, dropped_items=[], source={})
    for more in ([], ["--repair"]):
        assert main(["verify", str(split), *more]) == 1
        assert f"{split}: holds no row; convert it again" in capsys.readouterr().err


def test_accepting_goes_with_repairing(split: Path, refuse: Callable[..., str]) -> None:
    assert "--accept-changed: goes with --repair" in refuse("verify", split, "--accept-changed")


def test_a_cut_shard_keeps_its_whole_batches(split: Path, repair: Callable[[Path], str]) -> None:
    shard = split / "shard-00000.arrow"
    untouched = (split / "shard-00001.arrow").stat().st_ino
    os.truncate(shard, shard.stat().st_size - 2000)
    said = repair(split)
    assert "shard-00000.arrow is written anew: 256 rows are kept" in said and "is no Arrow file" in said
    assert read_manifest(split)["dropped"] == {"early": 2, "repair: a part of its shard is lost": 44}
    assert [one["image_id"] for one in rows_of(split)] == [str(n) for n in [*range(256), *range(1000, 1040)]]
    assert (split / "shard-00001.arrow").stat().st_ino == untouched


@pytest.mark.parametrize("damage", ["unlink", "empty"])
def test_a_lost_shard_is_given_up(split: Path, repair: Callable[[Path], str], damage: str) -> None:
    shard = split / "shard-00000.arrow"
    shard.unlink() if damage == "unlink" else os.truncate(shard, 0)
    assert "shard-00000.arrow is given up" in repair(split)
    manifest = read_manifest(split)
    assert [one["file"] for one in manifest["shards"]] == ["shard-00001.arrow"] and manifest["rows"] == 40
    assert manifest["dropped"]["repair: its shard is lost"] == ROWS


@pytest.mark.parametrize("content", [None, "{", '{"schema_version": 99}'])
def test_a_lost_manifest_is_rebuilt(split: Path, repair: Callable[[Path], str], content: str | None) -> None:
    before = read_manifest(split)
    if content is None:
        (split / "manifest.json").unlink()
    else:
        (split / "manifest.json").write_text(content)
    folder = split.parent if content is None else split
    said = repair(folder)
    assert "manifest.json was missing" in said or "manifest.json could not be read" in said
    after = read_manifest(split)
    assert (after["shards"], after["rows"], after["kind"]) == (before["shards"], before["rows"], before["kind"])


def test_wrong_counts_are_corrected(split: Path, repair: Callable[[Path], str]) -> None:
    manifest = read_manifest(split)
    manifest["rows"] += 1
    manifest["shards"][1]["samples"] += 1
    (split / "manifest.json").write_text(json.dumps(manifest))
    said = repair(split)
    assert "has 40 samples, the manifest says 41" in said and "rows were not the sum" in said
    assert read_manifest(split)["rows"] == ROWS + 40


def test_a_damaged_offset_is_no_crash(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An offset beyond its buffer would be followed there by a reader that trusts it."""
    shard = split / "shard-00000.arrow"
    data = bytearray(shard.read_bytes())
    first = image_of(0, "PNG", side=8)
    offsets = data.index(bytes(4) + len(first).to_bytes(4, "little"))
    data[offsets + 7] = 0x7F
    shard.write_bytes(data)
    assert main(["verify", str(split)]) == 1
    assert "shard-00000.arrow: record batch 0 cannot be read" in capsys.readouterr().err
    assert main(["verify", str(split), "--repair"]) == 0
    assert read_manifest(split)["dropped"]["repair: a part of its shard is lost"] == 256


def test_what_cannot_be_repaired_is_reported(split: Path, refuse: Callable[..., str]) -> None:
    (split / "stray.arrow").write_bytes(b"")
    assert "stray.arrow: is not in the manifest; move it away" in refuse("verify", split, "--repair")
    (split / "stray.arrow").unlink()
    for path in split.glob("*.arrow"):
        os.truncate(path, 0)
    assert "no row of it is sound" in refuse("verify", split, "--repair")
    assert len(list(split.iterdir())) == 3  # as it was


def test_a_kill_between_the_renames_is_recovered_from(split: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.rename(split, split.parent / ".train.old")
    assert main(["verify", str(split.parent), "--repair"]) == 0
    assert "no fault in train" in capsys.readouterr().out


def test_verify_with_workers_says_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(index) for index in range(ROWS)]
    rows[9] = row(9, image=b"no", image_id="1003")
    write(tmp_path / "train", rows)
    said = []
    for workers in ("1", "2"):
        assert main(["verify", str(tmp_path), "--workers", workers]) == 1
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    assert "shard-00000.arrow row 9: image is of no known format" in said[0]
    assert f"shard-00001.arrow row 3: image_id 1003 stands in {tmp_path}/train/shard-00000.arrow row 9 too" in said[0]


def test_two_repairs_at_once_lose_nothing(tmp_path: Path) -> None:
    rows = [row(index) for index in range(ROWS)]
    rows[5] = row(5, image=b"no")
    write(tmp_path / "train", rows)
    with ThreadPoolExecutor(3) as threads:
        runs = [threads.submit(command, "verify", tmp_path, "--repair") for _ in range(3)]
        ended = [run.result() for run in runs]
    assert 0 in {run.returncode for run in ended} <= {0, 2}
    assert all("another process is writing it; wait" in run.stderr for run in ended if run.returncode)
    assert [one["image_id"] for one in rows_of(tmp_path / "train")] == [
        str(index) for index in [*range(5), *range(6, ROWS), *range(1000, 1040)]
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_split_that_is_being_written_is_not_repaired(split: Path, refuse: Callable[..., str], damaged: bool) -> None:
    if damaged:
        os.truncate(split / "shard-00001.arrow", 2000)
    with open_work(split, {}, overwrite=True):
        assert f"{split}: another process is writing it; wait" in refuse("verify", split, "--repair")
    assert len(list(split.iterdir())) == 3


def test_a_link_to_a_split_stays_one(split: Path, repair: Callable[[Path], str]) -> None:
    far = split.parent / "far/v2"
    shutil.move(split, far)
    split.symlink_to(far)
    for rows in (ROWS + 40, ROWS):
        os.truncate(far / "shard-00000.arrow", (far / "shard-00000.arrow").stat().st_size - 2000)
        repair(split.parent)
        assert split.is_symlink() and read_manifest(far)["rows"] < rows
    assert [path.name for path in far.parent.iterdir()] == ["v2"]
    assert sorted(path.name for path in split.parent.iterdir()) == ["far", "train"]


@pytest.mark.parametrize("manifest", [True, False])
def test_a_shard_that_may_not_be_read_is_not_given_up(split: Path, refuse: Callable[..., str], manifest: bool) -> None:
    """A folder, here; its rows may be sound ones."""
    shard = split / "shard-00001.arrow"
    shutil.move(shard, split.parent / "kept")
    shard.mkdir()
    (shard / "notes").write_text("mine")
    if not manifest:
        (split / "manifest.json").unlink()
    said = refuse("verify", split.parent, "--repair")
    assert f"{shard}: cannot be read (Is a directory); make it a file that can be, or move it away" in said
    assert (shard / "notes").exists()
