"""Tables as Hugging Face has them: splits in a column or in the files' names, and captions under many names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of


def command(tmp_path: Path, rows: list[dict[str, Any]] | pa.Table, split: str = "train") -> list[object]:
    (tmp_path / "raw").mkdir(exist_ok=True)
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "raw/0.parquet", row_group_size=2)
    return ["img2dataset", "--images", tmp_path / "raw", "--split", split, "--out", tmp_path / "out", "--overwrite"]


def captions(tmp_path: Path, split: str = "train") -> list[list[str]]:
    return [row["caption"] for row in rows_of(tmp_path / "out" / split)]


def row(number: int, **more: Any) -> dict[str, Any]:
    return {"image": {"bytes": image_of(number), "path": None}, "caption": f"c{number}", **more}


SPLITS = ["train", "restval", "val", "validation", "test", "TEST", "dev"]


@pytest.mark.parametrize(("split", "numbers"), [("train", [0, 1]), ("val", [2, 3, 6]), ("test", [4, 5])])
def test_a_column_split_selects_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: str, numbers: list[int]
) -> None:
    """nlphuji/flickr30k has all 31,014 images in one split by name, and their splits in a column."""
    rows = [row(number, split=name) for number, name in enumerate(SPLITS)]
    convert(*command(tmp_path, rows, split))
    assert [row["image"] for row in rows_of(tmp_path / "out" / split)] == [image_of(number) for number in numbers]
    manifest = read_manifest(tmp_path / "out" / split)
    assert manifest["dropped"] == {} and manifest["source"] == {"images": len(numbers)}
    said = capsys.readouterr().out
    assert f"raw: {len(numbers)} records are of {split} by their split, skipped: " in said


def test_a_column_split_without_the_wanted_one_is_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    rows = [row(number, split=name) for number, name in enumerate(("train", "train", "val"))]
    message = refuse(*command(tmp_path, rows, "test"))
    assert "raw: holds no record of split test by their split, but 2 of train, 1 of val; give another" in message
    message = refuse(*command(tmp_path, [row(0, split=5)]))
    assert "0.parquet: column split is of type int64, not text" in message


def test_a_file_without_the_column_split_that_another_one_has(tmp_path: Path, refuse: Callable[..., str]) -> None:
    words = command(tmp_path, [row(0, split="train"), row(1, split="test")])
    pq.write_table(pa.Table.from_pylist([row(2)]), tmp_path / "raw/1.parquet")
    assert "0.parquet has a column of splits, " in (message := refuse(*words))
    assert "1.parquet has none; give them one by one, or move one away" in message


def test_a_column_of_images_that_holds_none(tmp_path: Path, refuse: Callable[..., str]) -> None:
    message = refuse(*command(tmp_path, [{"image": [image_of(0)], "caption": "a"}]))
    assert "0.parquet: column image is of type list<" in message and "neither bytes, base64 nor a struct" in message
    for kind in (pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())):
        image = pa.array([image_of(0)], pa.binary()).cast(kind)
        convert(*command(tmp_path, pa.table({"image": image, "caption": ["a"]})))
        assert captions(tmp_path) == [["a"]]


def test_names_of_files_tell_splits_apart(tmp_path: Path) -> None:
    """What `huggingface-cli download` leaves: all splits in data/, and a hidden folder of its own."""
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")):
        words = command(tmp_path, [row(number)], "val")
        (tmp_path / "raw/data").mkdir(exist_ok=True)
        (tmp_path / "raw/0.parquet").rename(tmp_path / f"raw/data/{name}.parquet")
    (tmp_path / "raw/.cache").mkdir()
    (tmp_path / "raw/.cache/x.parquet").write_bytes(b"PAR1")
    convert(*words)
    convert(*["train" if word == "val" else word for word in words])
    assert captions(tmp_path, "val") == [["c2"]] and captions(tmp_path) == [["c0"], ["c1"]]


@pytest.mark.parametrize("split", ["train", "val"])
def test_files_that_may_be_of_any_split_beside_one_that_says_its_own(
    tmp_path: Path, refuse: Callable[..., str], split: str
) -> None:
    words = command(tmp_path, [row(0)], split)
    (tmp_path / "raw/val").mkdir()
    pq.write_table(pa.Table.from_pylist([row(1)]), tmp_path / "raw/val/0.parquet")
    assert "raw: holds val by the names of its files, but 0.parquet could be of any" in refuse(*words)


SENTENCE = pa.struct([("raw", pa.string()), ("sentid", pa.int64())])


@pytest.mark.parametrize(
    "columns",
    [
        {"captions": [["a", "b"], ["c"]]},
        {"caption": [["a", "b"], ["c"]]},
        {"sentences": [["a", "b"], ["c"]]},
        {"sentences_raw": [["a", "b"], ["c"]]},
        {"sentences": pa.array([[{"raw": "a"}, {"raw": "b"}], [{"raw": "c"}, None]], pa.list_(SENTENCE))},
        {"caption_1": ["b", None], "caption_0": ["a", "c"]},
        {"caption_10": ["b", ""], "caption_9": ["a", "c"]},
        {"caption1": ["b", None], "caption0": ["a", "c"], "text_0": ["x", "y"]},
        {"text": ["a\u2028b", "c"], "captions": [["x"], ["y"]]},
    ],
)
def test_captions_by_the_names_that_columns_have(tmp_path: Path, columns: dict[str, Any]) -> None:
    table = pa.table({"jpg": [image_of(0), image_of(1)], **columns})
    convert(*command(tmp_path, table))
    assert captions(tmp_path) == ([["a\u2028b"], ["c"]] if "text" in columns else [["a", "b"], ["c"]])


def test_a_caption_column_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    convert(*command(tmp_path, [row(0)]), "--caption-column", "caption", "caption")
    assert captions(tmp_path) == [["c0"]]


def test_captions_by_the_name_that_is_given(tmp_path: Path, refuse: Callable[..., str]) -> None:
    rows = [row(number, blip=f"b{number}", llava=[f"l{number}", "same"]) for number in range(3)]
    words = command(tmp_path, rows)
    convert(*words, "--caption-column", "llava", "blip")
    assert captions(tmp_path) == [[f"l{number}", "same", f"b{number}"] for number in range(3)]
    message = refuse(*words, "--caption-column", "blop")
    assert "0.parquet: has no column blop, which --caption-column names; it has image, caption, blip, llava" in message
    message = refuse(*words, "--caption-column", "image")
    assert "0.parquet: column image is of type struct" in message and "name another with --caption-column" in message
    convert("cc12m", *words[1:], "--caption-column", "blip")
    assert captions(tmp_path) == [[f"b{number}"] for number in range(3)]
    message = refuse(*command(tmp_path, [{"jpg": image_of(), "blip": "b"}]))
    assert "but jpg, blip; name it with --caption-column" in message
    message = refuse("cc12m", *words[1:], "--annotations", "x", "--caption-column", "blip")
    assert "--caption-column: is for img2dataset's folder" in message


@pytest.mark.parametrize(
    "more",
    [
        {"image": {"bytes": image_of(0), "path": "COCO_val2014_000000000042.jpg"}},
        {"filename": "COCO_val2014_000000000042.jpg"},
        {"file_name": "val2014/COCO_val2014_000000000042.jpg"},
        {"url": "http://images.cocodataset.org/val2017/000000000042.jpg?x=1"},
        {"cocoid": 42},
    ],
)
def test_rows_are_excluded_by_all_their_names(tmp_path: Path, more: dict[str, Any]) -> None:
    (tmp_path / "test.txt").write_text("000000000042.jpg\n")
    words = command(tmp_path, [row(0, **more), row(1)])
    convert(*words, "--exclude", tmp_path / "test.txt")
    assert captions(tmp_path) == [["c1"]]
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"image is listed in --exclude": 1}
    convert(*words)
    assert [row["image_id"] for row in rows_of(tmp_path / "out/train")] == ["0-0", "0-1"]


def test_one_caption_that_is_no_utf8_is_counted(tmp_path: Path, refuse: Callable[..., str]) -> None:
    offsets = pa.py_buffer(pa.array([0, 1, 3, 4], pa.int32()).buffers()[1])
    texts = pa.StringArray.from_buffers(3, offsets, pa.py_buffer(b"a\xff\xfec"))
    words = command(tmp_path, pa.table({"jpg": [image_of(n) for n in range(3)], "caption": texts}))
    assert "0.parquet: row 1: column caption is not UTF-8 text; fix the file (1 of 3 records" in refuse(*words)
    convert(*words, "--max-dropped", 0.4)
    assert captions(tmp_path) == [["a"], ["c"]]
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["dropped"] == {"text is not UTF-8": 1}
    assert manifest["dropped_items"] == [{"item": "0.parquet: row 1", "reason": "text is not UTF-8"}]


def test_a_table_beside_folders_of_images(tmp_path: Path, refuse: Callable[..., str]) -> None:
    """A README's image makes no layout; tars and captioned folders beside each other are for the user to tell."""
    words = command(tmp_path, [row(0)])
    (tmp_path / "raw/assets").mkdir()
    (tmp_path / "raw/assets/teaser.png").write_bytes(image_of(1, "PNG"))
    convert(*words)
    assert captions(tmp_path) == [["c0"]]
    (tmp_path / "raw/assets/teaser.txt").write_text("of a folder")
    (tmp_path / "raw/0.tar").write_bytes(bytes(10240))
    assert "raw: holds tars, and folders of images with texts; say with --format" in refuse(*words)
    convert(*words, "--format", "files")
    assert captions(tmp_path) == [["of a folder"]]


def test_a_column_whose_name_is_no_utf8_is_reported(tmp_path: Path, refuse: Callable[..., str]) -> None:
    words = command(tmp_path, [row(0, ABCD="x")])
    file = tmp_path / "raw/0.parquet"
    file.write_bytes(file.read_bytes().replace(b"ABCD", b"\xffBCD"))
    assert "0.parquet: is no whole parquet file ('utf-8' codec" in refuse(*words)
