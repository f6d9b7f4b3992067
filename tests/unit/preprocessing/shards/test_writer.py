import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from preprocessing.errors import UserError
from preprocessing.running.storage import file_sha256
from preprocessing.shards import writer as writer_module
from preprocessing.shards.reader import read_rows
from preprocessing.shards.schema import CAPTION_SCHEMA
from preprocessing.shards.writer import ShardWriter, check_output, prepared_splits, write_manifest, write_provenance
from tests.unit.preprocessing.helpers import image_of, rows_of


def write(folder: Path, rows: int, **options: Any) -> dict[str, Any]:
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "caption", "train", **options)
    for index in range(rows):
        writer.add({"image": image_of(index, side=8), "caption": ["one", "two"], "image_id": str(index)})
    return write_manifest(folder, "caption", "train", writer.close(), dropped={}, dropped_items=[], source={})


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a", 300)
    write(tmp_path / "b", 300)
    for name in ("shard-00000.arrow", "manifest.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rows_come_back_in_batches_of_256(tmp_path: Path) -> None:
    manifest = write(tmp_path / "a", 600)
    assert (manifest["rows"], manifest["samples"]) == (600, 1200)
    reader = pa.ipc.open_file(tmp_path / "a/shard-00000.arrow")
    assert reader.schema.equals(CAPTION_SCHEMA)
    assert [reader.get_batch(index).num_rows for index in range(3)] == [256, 256, 88]
    rows = rows_of(tmp_path / "a")
    assert [row["image_id"] for row in rows] == [str(index) for index in range(600)]
    assert rows[7] == {"image": image_of(7, side=8), "caption": ["one", "two"], "image_id": "7", "split": "train"}


def test_large_data_is_split_in_shards(tmp_path: Path) -> None:
    shards = write(tmp_path / "a", 600, shard_bytes=1000)["shards"]
    assert [shard["file"] for shard in shards] == [f"shard-{index:05d}.arrow" for index in range(3)]
    assert [shard["rows"] for shard in shards] == [256, 256, 88]
    for shard in shards:
        path = tmp_path / "a" / shard["file"]
        assert (shard["bytes"], shard["sha256"]) == (path.stat().st_size, file_sha256(path))
    assert len(rows_of(tmp_path / "a")) == 600


def test_output_of_another_run_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train", 1)
    with pytest.raises(
        UserError, match=r"train: holds a finished split already \(1 rows, kind caption\); give --overwrite"
    ):
        check_output(tmp_path, "caption", "train", overwrite=False)
    check_output(tmp_path, "caption", "train", overwrite=True)
    check_output(tmp_path, "caption", "val", overwrite=False)
    with pytest.raises(UserError, match="holds a caption data set"):
        check_output(tmp_path, "vqa", "val", overwrite=True)


@pytest.mark.parametrize("content", ["", '{"kind": "capt', '{"schema_version": 99}'])
def test_an_unreadable_manifest_is_no_dead_end(tmp_path: Path, content: str) -> None:
    """With --overwrite the split is replaced, whatever its manifest; else, and beside it, what helps is said."""
    write(tmp_path / "train", 1)
    (tmp_path / "train/manifest.json").write_text(content)
    check_output(tmp_path, "caption", "train", overwrite=True)
    for split, overwrite in (("train", False), ("val", False), ("val", True)):
        with pytest.raises(UserError, match=r"train/manifest\.json: .* again \(--split train --overwrite\)") as raised:
            check_output(tmp_path, "caption", split, overwrite)
        assert str(raised.value).endswith(f"fix it: python -m preprocessing verify {tmp_path}/train --repair")
    assert prepared_splits(tmp_path) == ["train"]


def test_provenance_says_where_it_came_from(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text("[]")
    write_provenance(tmp_path, [tmp_path / "in.json"])
    provenance = json.loads((tmp_path / "provenance.json").read_text())
    assert set(provenance) == {"command", "directory", "host", "inputs", "processes", "time", "versions"}
    assert provenance["inputs"][0]["bytes"] == 2


def test_an_image_larger_than_the_buffer(tmp_path: Path) -> None:
    """The memory of a batch grows, and what it held is kept; the one after next has it again, for small images."""
    tmp_path = tmp_path / "a"
    tmp_path.mkdir()
    images = [bytes([index]) * (9_000_000 if index in (3, 4) else 10) for index in range(20)]
    with ShardWriter(tmp_path, "caption", "train") as writer:
        for repeat in range(40):
            for index, image in enumerate(images if repeat == 0 else [b"small"] * 20):
                writer.add({"image": image, "caption": ["one"], "image_id": f"{repeat} {index}"})
        write_manifest(tmp_path, "caption", "train", writer.close(), dropped={}, dropped_items=[], source={})
    stored = [row["image"] for row in rows_of(tmp_path)]
    assert stored[:20] == images and set(stored[20:]) == {b"small"} and len(stored) == 800


def test_images_are_put_into_the_writers_memory_or_copied_there(tmp_path: Path) -> None:
    """Pairs, so that two columns have memory; what was put there and not added is gone."""
    images = [image_of(index, side=8) for index in range(1200)]
    with ShardWriter(tmp_path, "nlvr", "train") as writer:
        for index in range(0, len(images), 2):
            pair: dict[str, Any] = {}
            for side, image in enumerate(images[index : index + 2]):
                column = f"image_{side}"
                writer.image_buffer(column)[:9] = b"was taken"
                room = writer.image_buffer(column)[: len(image)]
                room[:] = image
                pair[column] = room if (index // 2 + side) % 3 else image
            writer.add({**pair, "questions": ["a"], "answers": ["True"], "identifier": [str(index)]})
        (shard,) = writer.close()
    rows = list(read_rows(tmp_path / shard["file"], "nlvr"))
    assert [row[f"image_{side}"] for row in rows for side in range(2)] == images


def test_batches_end_at_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all images of a row together: 1,000 with the second row."""
    monkeypatch.setattr(writer_module, "_BATCH_BYTES", 1000)
    with ShardWriter(tmp_path, "nlvr", "train") as writer:
        image = bytes(250)
        for index in range(7):
            columns = {"questions": ["a"], "answers": ["True"], "identifier": [str(index)]}
            writer.add({"image_0": image, "image_1": image, **columns})
        shards = writer.close()
    reader = pa.ipc.open_file(tmp_path / "shard-00000.arrow")
    assert [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)] == [2, 2, 2, 1]
    assert file_sha256(tmp_path / "shard-00000.arrow") == shards[0]["sha256"]


def test_an_error_leaves_no_half_shard(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "caption", "train") as writer:
        for index in range(300):
            writer.add({"image": b"x", "caption": ["one"], "image_id": str(index)})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
