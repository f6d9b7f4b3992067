"""img2dataset's three output formats, as its writer.py and logger.py make them."""

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.__main__ import main
from preprocessing.errors import UserError
from preprocessing.formats.shard_rows import Wanted
from preprocessing.shards.schema import read_manifest
from preprocessing.sources.img2dataset import read_folder
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json

GOT = {0: [0, 2], 1: [1, 3]}  # shard -> which of its four addresses gave an image
KEYS = [f"{shard:05d}{number:04d}" for shard, numbers in GOT.items() for number in numbers]


def metadata(shard: int, number: int) -> dict[str, Any]:
    got = number in GOT[shard]
    return {
        "caption": f"caption {shard}.{number}",
        "url": f"http://a/{shard}/{number}.jpg",
        "key": f"{shard:05d}{number:04d}",
        "status": "success" if got else "failed_to_download",
        "error_message": None if got else "HTTP Error 404: Not Found",
        "width": 40 if got else None,
        "height": 40 if got else None,
        "original_width": 40 if got else None,
        "original_height": 40 if got else None,
        "exif": "{}" if got else None,
        "sha256": "0" * 64 if got else None,
    }


def image(shard: int, number: int) -> bytes:
    return image_of(10 * shard + number)


def write_side_files(folder: Path, shard: int, rows: list[dict[str, Any]], name: str) -> None:
    schema = pa.Table.from_pylist([*rows, metadata(0, 0) | {"jpg": b"", "txt": ""}]).schema
    columns = [schema.field(column) for column in rows[0]]
    with pq.ParquetWriter(folder / f"{name}.parquet", pa.schema(columns)) as writer:  # flushed in small groups
        for start in (0, 3):
            writer.write_table(pa.Table.from_pylist(rows[start : start + 3], pa.schema(columns)))
    counts = {"count": 4, "successes": 2, "failed_to_download": 2, "failed_to_resize": 0, "duration": 1.5}
    write_json(folder / f"{name}_stats.json", counts | {"status_dict": {"success": 2, "HTTP Error 404": 2}})


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_output(folder: Path, layout: str) -> None:
    folder.mkdir()
    for shard in GOT:
        name = f"{shard:05d}"
        rows = [metadata(shard, number) for number in range(4)]
        if layout == "parquet":
            for number, row in enumerate(rows):
                got = number in GOT[shard]
                row.update(jpg=image(shard, number) if got else None, txt=row["caption"] if got else None)
        write_side_files(folder, shard, rows, name)
        if layout == "webdataset":
            with tarfile.open(folder / f"{name}.tar", "w") as tar:
                for number in GOT[shard]:
                    add(tar, f"{rows[number]['key']}.jpg", image(shard, number))
                    add(tar, f"{rows[number]['key']}.json", json.dumps(rows[number], indent=4).encode())
                    add(tar, f"{rows[number]['key']}.txt", rows[number]["caption"].encode())
        elif layout == "files":
            (folder / name).mkdir()
            for number in GOT[shard]:
                base = folder / name / rows[number]["key"]
                base.with_suffix(".jpg").write_bytes(image(shard, number))
                base.with_suffix(".txt").write_text(rows[number]["caption"])
                write_json(base.with_suffix(".json"), rows[number])


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "files"])
@pytest.mark.parametrize("command", ["img2dataset", "cc12m"])
def test_all_three_formats_give_the_same_rows(tmp_path: Path, layout: str, command: str) -> None:
    write_output(tmp_path / "raw", layout)
    convert(command, "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out/train")
    assert [row["image_id"] for row in rows] == KEYS
    numbers = [(shard, number) for shard in GOT for number in GOT[shard]]
    assert [row["image"] for row in rows] == [image(*pair) for pair in numbers]
    assert [row["caption"] for row in rows] == [[f"caption {shard}.{number}"] for shard, number in numbers]
    counts = {"images": 4, "addresses": 8, "addresses without an image": 4}
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["source"] == counts
    assert manifest["dropped"] == ({"image is null": 4} if layout == "parquet" else {})


@pytest.mark.parametrize("layout", ["webdataset", "parquet", "files"])
def test_images_alone(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str], refuse: Callable[..., str]
) -> None:
    """The captions that are there are not stored, and an image without one, or an unlike folder of images, will do."""
    write_output(tmp_path / "raw", layout)
    if layout == "files":
        (tmp_path / "raw/more/deep").mkdir(parents=True)
        (tmp_path / "raw/more/deep/x.PNG").write_bytes(image_of(50, "PNG"))
    elif layout == "parquet":
        pq.write_table(pa.table({"image": [image_of(50, "PNG")]}), tmp_path / "raw/x.parquet")
    else:
        with tarfile.open(tmp_path / "raw/x.tar", "w") as tar:
            add(tar, "x.png", image_of(50, "PNG"))
    options = ("--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    convert("img2dataset", "--images-only", *options)
    rows, manifest = rows_of(tmp_path / "out/train"), read_manifest(tmp_path / "out/train")
    numbers = [(shard, number) for shard in GOT for number in GOT[shard]]
    assert [row["image"] for row in rows] == [*(image(*pair) for pair in numbers), image_of(50, "PNG")]
    assert [row["caption"] for row in rows] == [[]] * 5
    assert (manifest["modality"], manifest["rows"], manifest["samples"]) == ("image", 5, 0)
    assert main(["verify", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]) == 0
    said = capsys.readouterr().out
    assert "out/train: caption, split train, images without captions\n  5 rows, 0 samples" in said
    assert (tmp_path / "page.html").read_text().count("<img") == 5
    words = refuse("img2dataset", "--images-only", "--caption-column", "txt", *options, "--overwrite")
    assert "--images-only: stores no captions; leave it or --caption-column out" in words


def test_other_webdatasets(tmp_path: Path) -> None:
    """Names with folders, captions in JSON alone, images without any, other endings, other members."""
    (tmp_path / "raw").mkdir()
    with tarfile.open(tmp_path / "raw/a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        add(tar, "part/one.png", image_of(1, "PNG"))
        add(tar, "part/one.json", json.dumps({"caption": "in json"}).encode())
        add(tar, "part/one.cls", b"3")
        add(tar, "two.jpg", image_of(2))
        add(tar, f"{'long' * 40}.jpeg", image_of(3))
        add(tar, f"{'long' * 40}.txt", b" a  long name ")
        add(tar, "four.webp", image_of(4, "WEBP"))
        add(tar, "four.txt", b" ")
        add(tar, "five.txt", b"no image")
    convert("img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out/train")
    assert [(row["image_id"], row["caption"]) for row in rows] == [
        ("part/one", ["in json"]),
        ("long" * 40, ["a  long name"]),
    ]
    assert [row["image"] for row in rows] == [image_of(1, "PNG"), image_of(3)]
    assert read_manifest(tmp_path / "out/train")["dropped"] == {
        "image without caption": 2,
        "text without image": 1,
    }


@pytest.mark.parametrize("layout", ["webdataset", "files"])
def test_names_that_are_no_utf8(tmp_path: Path, layout: str) -> None:
    key = os.fsdecode(b"caf\xe9")
    (tmp_path / "raw/a").mkdir(parents=True)
    if layout == "files":
        (tmp_path / f"raw/a/{key}.jpg").write_bytes(image_of(1))
        (tmp_path / f"raw/a/{key}.txt").write_text("one")
    else:
        with tarfile.open(tmp_path / "raw/a.tar", "w") as tar:
            add(tar, f"{key}.jpg", image_of(1))
            add(tar, f"{key}.txt", b"one")
    convert("img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    (row,) = rows_of(tmp_path / "out/train")
    assert (row["image_id"], row["caption"], row["image"]) == ("caf\ufffd", ["one"], image_of(1))


def test_keys_that_begin_anew_in_each_shard(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    for number, name in enumerate(("a", "b")):
        with tarfile.open(tmp_path / f"raw/{name}.tar", "w") as tar:
            add(tar, "0.jpg", image_of(number))
            add(tar, "0.txt", name.encode())
    convert("img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    rows = rows_of(tmp_path / "out/train")
    assert [(row["image_id"], row["caption"], row["image"]) for row in rows] == [
        ("a/0", ["a"], image_of(0)),
        ("b/0", ["b"], image_of(1)),
    ]


def test_hugging_face_tables_without_keys(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    rows = [{"image": {"bytes": image_of(n), "path": None}, "text": f"t{n}"} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "raw/train-00000.parquet", row_group_size=2)
    (tmp_path / "not.txt").write_text("train-00000-1\n")
    convert("img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out",
            "--exclude", tmp_path / "not.txt")  # fmt: skip
    found = [(row["image_id"], row["image"], row["caption"]) for row in rows_of(tmp_path / "out/train")]
    assert found == [("train-00000-0", image_of(0), ["t0"]), ("train-00000-2", image_of(2), ["t2"])]


def test_broken_and_foreign_files_are_named(tmp_path: Path, refuse: Callable[..., str]) -> None:
    raw = tmp_path / "raw"
    command = ["img2dataset", "--images", raw, "--split", "train", "--out", tmp_path / "out"]
    raw.mkdir()
    assert "raw: holds no .tar or .parquet files" in refuse(*command)
    (raw / "a.parquet").write_bytes(b"PAR1")
    assert "a.parquet: is no whole parquet file" in refuse(*command)
    pq.write_table(pa.Table.from_pylist([{"url": "x"}]), raw / "a.parquet")
    assert "a.parquet: has no column of images" in refuse(*command)
    with tarfile.open(raw / "a.tar", "w") as tar:
        add(tar, "1.jpg", image_of(1))
        add(tar, "1.txt", b"one")
    with tarfile.open(raw / "b.tar", "w") as tar:
        for member in ("1.jpg", "1.txt", "2.txt", "1.jpg", "1.txt"):
            add(tar, member, image_of(1))
    assert "b.tar: key 1 occurs twice" in refuse(*command)
    (raw / "b.tar").write_bytes((raw / "a.tar").read_bytes()[:700])
    assert "b.tar: is no whole tar" in refuse(*command)
    (raw / "b.tar").unlink()
    write_json(raw / "a_stats.json", [])
    assert "a_stats.json: has no number 'count'" in refuse(*command)


def test_tars_that_are_cut_or_garbled_between_members(tmp_path: Path, refuse: Callable[..., str]) -> None:
    raw = tmp_path / "raw"
    command = ["img2dataset", "--images", raw, "--split", "train", "--out", tmp_path / "out"]
    raw.mkdir()
    with tarfile.open(raw / "a.tar", "w") as tar:
        for number in range(4):
            add(tar, f"{number}.jpg", image_of(number))
            add(tar, f"{number}.txt", b"text")
    whole = (raw / "a.tar").read_bytes()
    with tarfile.open(raw / "a.tar") as tar:
        third = tar.getmember("2.jpg").offset
    for content in (
        whole[:third],  # cut between two members
        whole[: third + 512],  # behind a header
        whole[: third + 100],  # in one
        whole[:third] + b"\xaa" * 512 + whole[third + 512 :],
        whole[:third] + bytes(512) + whole[third + 512 :],  # a header that a disk has lost
    ):
        (raw / "a.tar").write_bytes(content)
        assert "a.tar: is no whole tar" in refuse(*command)
    (raw / "a.tar").write_bytes(whole)
    write_json(raw / "a_stats.json", {"count": 9, "successes": 5})
    assert "a_stats.json: says 5 successes, the shard holds 4 images" in refuse(*command)
    (raw / "a_stats.json").unlink()
    with tarfile.open(raw / "a.tar", "w") as tar:
        for number in range(2):
            add(tar, "1.jpg", image_of(number))
        add(tar, "1.txt", b"text")
    assert "a.tar: key 1 occurs twice" in refuse(*command)


def test_images_whose_names_have_a_second_dot_are_counted(tmp_path: Path, refuse: Callable[..., str]) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    command = ["img2dataset", "--images", raw, "--split", "train", "--out", tmp_path / "out"]
    with tarfile.open(raw / "a.tar", "w") as tar:
        for number, name in enumerate(("photo.v1", "photo.v2")):
            add(tar, f"{name}.JPG", image_of(number))
            add(tar, f"{name}.txt", b"text")
    assert "no row to write; 2 left out: image name has a second dot" in refuse(*command)
    with tarfile.open(raw / "b.tar", "w") as tar:
        add(tar, "a.jpg", image_of(2))
        add(tar, "a.txt", b"two")
    convert(*command)
    assert [row["image"] for row in rows_of(tmp_path / "out/train")] == [image_of(2)]
    manifest = read_manifest(tmp_path / "out/train")
    assert (manifest["source"], manifest["dropped"]) == ({"images": 1}, {"image name has a second dot": 2})


def test_endings_in_folders_are_taken_as_they_are_spelled(tmp_path: Path) -> None:
    (tmp_path / "raw/a").mkdir(parents=True)
    for number, ending in enumerate(("JPG", "jpeg", "Png")):
        (tmp_path / f"raw/a/{number}.{ending}").write_bytes(image_of(number))
        (tmp_path / f"raw/a/{number}.txt").write_text(f"text {number}")
    convert("img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    assert [row["image"] for row in rows_of(tmp_path / "out/train")] == [image_of(number) for number in range(3)]


@pytest.mark.parametrize("layout", ["parquet", "webdataset"])
def test_lists_of_captions(tmp_path: Path, layout: str) -> None:
    (tmp_path / "raw").mkdir()
    captions: list[list[str | None]] = [["a", " b "], ["c", "", None], [], [" "]]
    if layout == "parquet":
        rows = [{"image": {"bytes": image_of(n)}, "caption": texts} for n, texts in enumerate(captions)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "raw/0.parquet")
    else:
        with tarfile.open(tmp_path / "raw/0.tar", "w") as tar:
            for number, texts in enumerate(captions):
                add(tar, f"{number}.jpg", image_of(number))
                add(tar, f"{number}.json", json.dumps({"caption": texts}).encode())
    convert("img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    found = [(row["image"], row["caption"]) for row in rows_of(tmp_path / "out/train")]
    assert found == [(image_of(0), ["a", "b"]), (image_of(1), ["c"])]
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"caption is empty": 2, "image without caption": 2}


@pytest.mark.parametrize("caption", [5, b"a", [5], {"en": "a"}])
def test_captions_of_other_types_are_refused(tmp_path: Path, refuse: Callable[..., str], caption: Any) -> None:
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.Table.from_pylist([{"jpg": image_of(), "caption": caption}]), tmp_path / "raw/0.parquet")
    message = refuse("img2dataset", "--images", tmp_path / "raw", "--split", "train", "--out", tmp_path / "out")
    assert "0.parquet: column caption is of type" in message and "neither text nor lists of texts" in message


def test_captions_that_cannot_be_read(tmp_path: Path, refuse: Callable[..., str]) -> None:
    """A link that leads nowhere is no caption; a folder in the place of one is told."""
    raw = tmp_path / "raw"
    (raw / "a").mkdir(parents=True)
    command = ["img2dataset", "--images", raw, "--split", "train", "--out", tmp_path / "out"]
    for number in range(2):
        (raw / f"a/{number}.jpg").write_bytes(image_of(number))
    (raw / "a/0.txt").symlink_to(tmp_path / "none.txt")
    (raw / "a/1.txt").write_text("one")
    convert(*command)
    assert [row["caption"] for row in rows_of(tmp_path / "out/train")] == [["one"]]
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"image without caption": 1}
    (raw / "a/0.txt").unlink()
    (raw / "a/0.txt").mkdir()
    assert "a/0.txt: cannot be read (Is a directory)" in refuse(*command, "--overwrite")


def test_captions_that_go_while_the_run_is_at_work(tmp_path: Path) -> None:
    (tmp_path / "raw/a").mkdir(parents=True)
    (tmp_path / "raw/a/0.jpg").write_bytes(image_of())
    (tmp_path / "raw/a/0.txt").write_text("zero")
    rows = read_folder(str(tmp_path / "raw"), "auto", Wanted("train")).rows
    (tmp_path / "raw/a/0.txt").unlink()
    with pytest.raises(UserError, match="raw/a: image 0: has no caption any more"):
        list(rows)


def test_bad_statistics_are_named(tmp_path: Path, refuse: Callable[..., str]) -> None:
    raw = tmp_path / "raw"
    (raw / "a").mkdir(parents=True)
    (raw / "a/0.jpg").write_bytes(image_of())
    (raw / "a/0.txt").write_text("zero")
    command = ["img2dataset", "--images", raw, "--split", "train", "--out", tmp_path / "out"]
    for content in ({"count": 5, "successes": None}, {"count": 5}, {"count": 5, "successes": "1"}):
        write_json(raw / "a_stats.json", content)
        assert "a_stats.json: has no number 'successes'" in refuse(*command)
    (raw / "a_stats.json").rename(raw / os.fsdecode(b"\xff_stats.json"))
    assert "has no UTF-8 name" in refuse(*command)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["webdataset", "parquet"])
def test_a_copy_of_a_shard_under_another_name_is_reported_and_counted(
    tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are there twice. Shards in which no address gave an image may well be equal."""
    write_output(tmp_path / "raw", layout)
    for name in ("a", "b"):
        if layout == "webdataset":
            tarfile.open(tmp_path / f"raw/{name}.tar", "w").close()
        else:
            pq.write_table(pa.table({"key": pa.array([], "string"), "jpg": pa.array([], "binary"),
                                     "txt": pa.array([], "string")}), tmp_path / f"raw/{name}.parquet")  # fmt: skip
    command = ["img2dataset", "--images", tmp_path / "raw", "--format", layout, "--split", "train", "--out",
               tmp_path / "out"]  # fmt: skip
    convert(*command)
    assert len(rows_of(tmp_path / "out/train")) == 4 and "two names" not in capsys.readouterr().out
    ending = {"webdataset": "tar", "parquet": "parquet"}[layout]
    shutil.copy(tmp_path / f"raw/00001.{ending}", tmp_path / f"raw/more.{ending}")
    first, other = (f"{tmp_path}/raw/{name}.{ending}" for name in ("00001", "more"))
    convert(*command, "--overwrite")
    assert f"warning: {first} and {other}: are one file under two names; its images" in capsys.readouterr().out
    assert read_manifest(tmp_path / "out/train")["source"]["shards that are there twice"] == 1


def test_annotations_that_are_given_twice_are_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "0.jpg").write_bytes(image_of(0))
    one = write_json(tmp_path / "one.json", [{"image": "0.jpg", "caption": "a"}])
    other = write_json(tmp_path / "other.json", [{"image": "0.jpg", "caption": "b"}])  # of the same size
    command = ["json", "--task", "retrieval", "--images", tmp_path, "--split", "train", "--out", tmp_path / "out",
               "--annotations", one]  # fmt: skip
    convert(*command, other)
    assert rows_of(tmp_path / "out/train")[0]["caption"] == ["a", "b"]
    shutil.copy(tmp_path / "one.json", tmp_path / "copy.json")
    for again in (tmp_path / "copy.json", one):
        assert f"one.json and {again}: are one file under two names" in refuse(*command, again, "--overwrite")
