"""Shards: random access is exact, and what is missing, truncated or changed is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from eve_ds.data.shards import Split
from preprocessing.errors import UserError
from preprocessing.shards.schema import CAPTION_SCHEMA
from preprocessing.shards.writer import ShardWriter
from preprocessing.shards.writer import write_manifest as write_converted
from tests.support.shards import (
    image_of,
    make_caption_set,
    make_nlvr_set,
    make_vqa_set,
    shard_record,
    write_manifest,
    write_split,
)


def _ragged(root: Path, lengths: list[int]) -> Path:
    rows = [
        {"image": image_of(i, 8), "caption": [f"{i}/{c}" for c in range(n)], "image_id": str(i), "split": "train"}
        for i, n in enumerate(lengths)
    ]
    return write_split(root / "train", "caption", rows, shard_rows=4, batch_rows=2)


def test_rows_and_samples_by_random_access(tmp_path: Path) -> None:
    lengths = [2, 0, 3, 1, 0, 0, 1, 4, 1, 0]
    split = Split(_ragged(tmp_path, lengths))
    assert (split.kind, split.rows, split.samples) == ("caption", 10, 12)
    expected = [(i, c) for i, n in enumerate(lengths) for c in range(n)]
    for index in np.random.default_rng(0).permutation(12).tolist():
        row_index, row, item = split.sample(index)
        assert (row_index, item) == expected[index]
        assert row.item("caption", item) == f"{row_index}/{item}"
        assert row.value("image_id") == str(row_index)
        assert row.blob("image") == image_of(row_index, 8)
    for index in range(10):
        assert split.row(index).value("caption") == [f"{index}/{c}" for c in range(lengths[index])]
    assert split.sample_rows().tolist() == [i for i, _ in expected]


@pytest.mark.parametrize("make", [make_vqa_set, make_nlvr_set])
def test_other_kinds(tmp_path: Path, make: object) -> None:
    split = Split(make(tmp_path, rows=5))  # type: ignore[operator]
    assert (split.rows, split.samples) == (5, 10)
    assert split.sample(7)[0] == 3


def test_reads_what_the_converters_write(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    writer = ShardWriter(folder, "caption", "train", shard_bytes=1)  # a shard a batch
    for i in range(600):
        writer.add({"image": b"%d" % i, "caption": [f"{i}/{c}" for c in range(i % 3)], "image_id": str(i)})
    write_converted(folder, "caption", "train", writer.close(), dropped={}, dropped_items=[], source={})
    split = Split(folder)
    assert len(list(folder.glob("*.arrow"))) == 3 and (split.rows, split.samples) == (600, 600)
    for index in range(0, 600, 7):
        row_index, row, item = split.sample(index)
        assert row.item("caption", item) == f"{row_index}/{item}" and row.blob("image") == b"%d" % row_index


def test_beyond_the_end(tmp_path: Path) -> None:
    split = Split(make_caption_set(tmp_path, rows=3, captions=1))
    for index in (-1, 3):
        with pytest.raises(IndexError):
            split.row(index)
        with pytest.raises(IndexError):
            split.sample(index)


def test_plain_string_captions_as_eve_writes_them(tmp_path: Path) -> None:
    folder = tmp_path / "train"
    folder.mkdir()
    table = pa.table({"image": [image_of(i, 8) for i in range(5)], "caption": list("abcde"), "image_id": list("vwxyz")})
    path = folder / "coco_0.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    split = Split(write_manifest(folder, "caption", "train", [shard_record(path, 5, 5)]))
    assert [split.sample(i)[1].item("caption", split.sample(i)[2]) for i in range(5)] == list("abcde")
    assert split.sample_rows().tolist() == [0, 1, 2, 3, 4]


def test_a_split_can_be_pickled(tmp_path: Path) -> None:
    split = Split(make_caption_set(tmp_path, rows=4))
    split.row(0)
    copy = pickle.loads(pickle.dumps(split))  # noqa: S301  as multiprocessing sends it
    assert copy.row(3).value("image_id") == "image-3"


def test_few_shards_stay_mapped(tmp_path: Path) -> None:
    split = Split(make_caption_set(tmp_path, rows=10, shard_rows=2), open_shards=2)
    rows = [split.row(i) for i in (0, 9, 2, 5, 7, 0)]
    assert [row.value("image_id") for row in rows] == [f"image-{i}" for i in (0, 9, 2, 5, 7, 0)]
    assert _mapped(tmp_path) == 6  # rows that live keep their shard mapped; the first one came back for another
    del rows
    assert _mapped(tmp_path) == 2


def _mapped(folder: Path) -> int:
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def _one_line(error: pytest.ExceptionInfo[UserError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        Split(tmp_path)
    _one_line(error, "manifest.json")


def test_missing_shard(tmp_path: Path) -> None:
    folder = make_caption_set(tmp_path, rows=10, shard_rows=4)
    (folder / "shard-00001.arrow").unlink()
    with pytest.raises(UserError) as error:
        Split(folder)
    _one_line(error, "shard-00001.arrow", "copy or prepare it again")


def test_truncated_shard(tmp_path: Path) -> None:
    folder = make_caption_set(tmp_path, rows=10, shard_rows=4)
    path = folder / "shard-00002.arrow"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError) as error:
        Split(folder)
    _one_line(error, "shard-00002.arrow", f"{len(whole) - 100} bytes", f"expected {len(whole)}", "truncated")


def test_shard_truncated_or_gone_after_opening_the_split(tmp_path: Path) -> None:
    split = Split(make_caption_set(tmp_path, rows=10, shard_rows=4))
    path = tmp_path / "train" / "shard-00001.arrow"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"shard-00001\.arrow.*truncated"):
        split.row(5)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-00001\.arrow"):
        split.row(5)
    assert split.row(0).value("image_id") == "image-0"


def test_same_size_but_no_arrow(tmp_path: Path) -> None:
    folder = make_caption_set(tmp_path, rows=3)
    path = folder / "shard-00000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError) as error:
        Split(folder).row(0)
    _one_line(error, "shard-00000.arrow", "Arrow")


def _single(folder: Path, table: pa.Table, rows: int, samples: int) -> Split:
    folder.mkdir()
    path = folder / "shard-00000.arrow"
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)
    return Split(write_manifest(folder, "caption", "train", [shard_record(path, rows, samples)]))


def test_wrong_counts_in_the_manifest(tmp_path: Path) -> None:
    row = {"image": b"x", "caption": ["a", "b"], "image_id": "0", "split": "train"}
    split = _single(tmp_path / "train", pa.Table.from_pylist([row], schema=CAPTION_SCHEMA), rows=1, samples=3)
    with pytest.raises(UserError, match="1 rows and 2 samples, the manifest says 1 and 3"):
        split.row(0)


def test_missing_doubled_or_ill_typed_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a caption shard has one column 'image', this one 0"):
        _single(tmp_path / "a", pa.table({"caption": ["x"]}), 1, 1).row(0)
    twice = pa.table([[b"x"], [b"y"], ["x"]], names=["image", "image", "caption"])
    with pytest.raises(UserError, match="a caption shard has one column 'image', this one 2"):
        _single(tmp_path / "d", twice, 1, 1).row(0)
    with pytest.raises(UserError, match="'image' is string, not binary"):
        _single(tmp_path / "b", pa.table({"image": ["x"], "caption": ["x"]}), 1, 1).row(0)
    with pytest.raises(UserError, match="'caption' is int64"):
        _single(tmp_path / "c", pa.table({"image": [b"x"], "caption": [1]}), 1, 1).row(0)


def test_empty_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no samples"):
        Split(write_split(tmp_path / "val", "caption", []))


def test_null_image(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([None], pa.binary()), "caption": ["x"]})
    with pytest.raises(UserError, match="row 0: column 'image' is null"):
        _single(tmp_path / "a", table, 1, 1).row(0).blob("image")
