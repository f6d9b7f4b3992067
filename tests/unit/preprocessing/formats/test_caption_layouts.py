"""Captions in the layouts in which people have them: several lines to an image, X-VLM's lines, Kaggle's tables."""

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json


@pytest.mark.parametrize("layout", ["files", "webdataset"])
def test_a_line_of_a_text_file_is_a_caption(tmp_path: Path, layout: str) -> None:
    texts = [b"one\n", "\ufeffa cat\r\n\r\nun chat, caf\u00e9\n...\n".encode(), b"\n", b"nul\0\n" + b"x" * 100_000]
    (tmp_path / "raw/00000").mkdir(parents=True)
    for number, text in enumerate(texts):
        (tmp_path / f"raw/00000/{number}.jpg").write_bytes(image_of(number))
        (tmp_path / f"raw/00000/{number}.txt").write_bytes(text)
    if layout == "webdataset":
        with tarfile.open(tmp_path / "raw/00000.tar", "w") as tar:
            for path in sorted((tmp_path / "raw/00000").iterdir()):
                tar.add(path, path.name)
    convert("img2dataset", "--images", tmp_path / "raw", "--format", layout, "--split", "train", "--out",
            tmp_path / "out")  # fmt: skip
    found = [(row["image"], row["caption"]) for row in rows_of(tmp_path / "out/train")]
    assert found == [(image_of(0), ["one"]), (image_of(1), ["a cat", "un chat, caf\u00e9"])]
    assert read_manifest(tmp_path / "out/train")["dropped"] == {
        "caption has only punctuation": 1,
        "caption holds a NUL byte": 1,
        "caption has more than 10000 characters": 1,
        "image without caption": 2,
    }


@pytest.mark.parametrize(
    ("command", "as_list"),
    [("cc3m", False), ("cc3m", True), ("json --task retrieval", False), ("json --task retrieval", True)],
)
def test_lines_of_x_vlms_pre_training(tmp_path: Path, command: str, as_list: bool) -> None:
    captions = [["a dog", "two dogs", "..."], "one cat", [], [" "]]
    records = [{"image_rpath": f"pics/{n}.jpg", "caption": texts, "elems": []} for n, texts in enumerate(captions)]
    (tmp_path / "pics").mkdir()
    for number in range(4):
        (tmp_path / f"pics/{number}.jpg").write_bytes(image_of(number))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "set.json").write_text(json.dumps(records) if as_list else lines)
    convert(*command.split(), "--annotations", tmp_path / "set.json", "--images", tmp_path, "--split", "train", "--out",
            tmp_path / "out", "--text-cleaning", "none")  # fmt: skip
    rows = rows_of(tmp_path / "out/train")
    assert [(row["image"], row["caption"]) for row in rows] == [
        (image_of(0), ["a dog", "two dogs"]),
        (image_of(1), ["one cat"]),
    ]
    manifest = read_manifest(tmp_path / "out/train")
    assert manifest["source"]["captions"] == 5
    assert manifest["dropped"]["caption has only punctuation"] == manifest["dropped"]["caption is empty"] == 1


FLICKR = {
    "results.csv": (
        "image_name| comment_number| comment\n"
        '1000092795.jpg| 0| Two young guys , "one" | shaggy\n'
        "1000092795.jpg| 1| Two men .\n"
        "2199200615.jpg| 3| A dog .\n"
        "2199200615.jpg| 4   A dog runs across the grass .\n"
    ),
    "captions.txt": (
        "image,caption\n"
        '1000092795.jpg,"Two young guys , ""one"" | shaggy"\n'
        "1000092795.jpg,Two men .\n"
        "2199200615.jpg,A dog .\r\n"
        "2199200615.jpg,A dog runs across the grass .\n"
    ),
    "numbered.txt": (
        "image_name,comment_number,comment\n"
        '1000092795.jpg,0,"Two young guys , ""one"" | shaggy"\n'
        "1000092795.jpg,1,Two men .\n"
        "2199200615.jpg,0,A dog .\n"
        "2199200615.jpg,1,A dog runs across the grass .\n"
    ),
    "unquoted.csv": (
        "image,caption\n"
        '1000092795.jpg,Two young guys , "one" | shaggy\n'
        "1000092795.jpg,Two men .\n"
        "2199200615.jpg,A dog .\n"
        "2199200615.jpg,A dog runs across the grass .\n"
    ),
}


@pytest.mark.parametrize("name", FLICKR)
@pytest.mark.parametrize("folder", ["flickr30k_images/flickr30k_images", "Images", "image"])
def test_flickr_in_kaggles_formats(tmp_path: Path, name: str, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True)
    for number, image in enumerate(("1000092795", "2199200615")):
        (tmp_path / folder / f"{image}.jpg").write_bytes(image_of(number))
    (tmp_path / name).write_text(FLICKR[name])
    convert("flickr30k", "--annotations", tmp_path / name, "--images", tmp_path, "--split", "train", "--out",
            tmp_path / "out")  # fmt: skip
    rows = rows_of(tmp_path / "out/train")
    assert [(row["image_id"], row["image"], row["caption"]) for row in rows] == [
        ("1000092795", image_of(0), ['Two young guys , "one" | shaggy', "Two men ."]),
        ("2199200615", image_of(1), ["A dog .", "A dog runs across the grass ."]),
    ]


def test_bad_lines_of_tables_are_named_and_counted(tmp_path: Path, refuse: Callable[..., str]) -> None:
    command = ["flickr30k", "--images", tmp_path, "--split", "train", "--out", tmp_path / "out", "--annotations"]
    (tmp_path / "a.jpg").write_bytes(image_of(1))
    for text in ("image,caption\na.jpg,A dog\nno caption\n", "image_name| comment_number| comment\n\na.jpg| 0\n"):
        (tmp_path / "bad.csv").write_text(text)
        message = refuse(*command, tmp_path / "bad.csv")
        assert "bad.csv: line 3: is not of the form of its header, 'image" in message
    long = "x" * 200_000  # more than the csv module takes in a quoted cell
    bad = ["no caption", 'a.jpg,"A dog', f'a.jpg,"{long}']
    good = ['a.jpg,"Hi", says a man', 'a.jpg,"A ""big"" dog"', f'a.jpg,"{long}"']
    (tmp_path / "bad.csv").write_text("\n".join(["image,caption", *bad, *good]), newline="")
    convert(*command, tmp_path / "bad.csv", "--max-dropped", 0.9)
    assert rows_of(tmp_path / "out/train")[0]["caption"] == ['"Hi", says a man', 'A "big" dog']
    assert read_manifest(tmp_path / "out/train")["dropped"] == {
        "line is of another form": 3,
        "caption has more than 10000 characters": 1,
    }


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_quoted_caption_may_run_over_lines(tmp_path: Path, separator: str) -> None:
    lines = [
        "image@caption",
        'a.jpg@"A dog,',
        '  and a ""cat"", run,  ',
        "",
        'home."',
        'a.jpg@"One line"',
        'a.jpg@"A mark that is left over',
        "a.jpg@Another one",
        'a.jpg@"stands here',
        'a.jpg@"says ""no""',
        'and more"\r',
        'a.jpg@"' + "\n".join(map(str, range(9))) + '"',
        'a.jpg@"' + "\n".join(map(str, range(11))) + '"',
        "a.jpg@The last one",
    ]
    (tmp_path / "captions.txt").write_text("\n".join(lines).replace("@", separator) + "\n", newline="")
    (tmp_path / "a.jpg").write_bytes(image_of(1))
    convert("flickr30k", "--images", tmp_path, "--split", "train", "--out", tmp_path / "out", "--max-dropped", 0.99,
            "--annotations", tmp_path / "captions.txt")  # fmt: skip
    assert rows_of(tmp_path / "out/train")[0]["caption"] == [
        'A dog, and a "cat", run, home.',
        "One line",
        "Another one",
        'says "no" and more',
        "0 1 2 3 4 5 6 7 8",
        "The last one",
    ]
    assert read_manifest(tmp_path / "out/train")["dropped"] == {"line is of another form": 2 + 11}


@pytest.mark.parametrize(
    "between", [b"b.jpg,a,b", b"caf\xe9", b'b.jpg,"', b"b.png,x\n" * 20, b"x" * 10_000], ids=["a", "b", "c", "d", "e"]
)
def test_an_unmatched_quotation_mark_loses_one_line_only(tmp_path: Path, between: bytes) -> None:
    """Though a line further down has a second one, which would close it."""
    text = b'image,caption\na.jpg,One\na.jpg,"Two\n' + between + b'\nsaid "\na.jpg,Three\na.jpg,Four "\na.jpg,Five\n'
    (tmp_path / "captions.txt").write_bytes(text)
    for name in ("a.jpg", "b.jpg", "b.png"):
        (tmp_path / name).write_bytes(image_of(1))
    convert("flickr30k", "--images", tmp_path, "--split", "train", "--out", tmp_path / "out", "--max-dropped", 0.9,
            "--annotations", tmp_path / "captions.txt")  # fmt: skip
    captions = {row["image_id"]: row["caption"] for row in rows_of(tmp_path / "out/train")}["a"]
    assert captions[0] == "One" and captions[-3:] == ["Three", 'Four "', "Five"]
    assert not any("Two" in caption for caption in captions)
    assert list(read_manifest(tmp_path / "out/train")["dropped"]) == [
        *(["line is not UTF-8 text"] if between == b"caf\xe9" else []),
        "line is of another form",
    ]


def test_visual_genome_of_version_1_0_in_a_folder_image(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    for number in (1, 2):
        (tmp_path / f"image/{number}.jpg").write_bytes(image_of(number))
    regions = [{"id": n, "regions": [{"id": 5, "phrase": f"thing {n}"}]} for n in (1, 2)]
    qas = [{"id": n, "qas": [{"qa_id": n, "question": "What is it?", "answer": "thing"}]} for n in (1, 2)]
    data = write_json(tmp_path / "image_data.json", [{"id": 1, "coco_id": 9}, {"id": 2, "coco_id": None}])
    coco = write_json(tmp_path / "coco_test.json", [{"image": "val2014/COCO_val2014_000000000009.jpg"}])
    end = ["--image-data", data, "--exclude", coco, "--images", tmp_path, "--split", "train", "--out"]
    convert("visual-genome", "--regions", write_json(tmp_path / "r.json", regions), *end, tmp_path / "captions")
    found = [(row["image_id"], row["image"]) for row in rows_of(tmp_path / "captions/train")]
    assert found == [("2", image_of(2))]
    convert("visual-genome-qa", "--questions", write_json(tmp_path / "q.json", qas), "--min-answers", 1, *end,
            tmp_path / "vqa")  # fmt: skip
    found = [(row["image_id"], row["image"]) for row in rows_of(tmp_path / "vqa/train")]
    assert found == [("2", image_of(2))]


@pytest.mark.parametrize("folder", ["images/val2014", "image", "images/image"])
def test_coco_images_one_folder_further_down(tmp_path: Path, folder: str, refuse: Callable[..., str]) -> None:
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / folder / "COCO_val2014_000000000009.jpg").write_bytes(image_of(9))
    content = {
        "images": [{"id": 9, "file_name": "COCO_val2014_000000000009.jpg"}],
        "annotations": [{"image_id": 9, "caption": "a"}],
    }
    command = ["coco", "--annotations", write_json(tmp_path / "c.json", content), "--images", tmp_path, "--split",
               "val", "--out", tmp_path / "out"]  # fmt: skip
    if folder == "images/image":
        assert "holds no image of 1 rows looked at" in refuse(*command)
    else:
        convert(*command)
        assert rows_of(tmp_path / "out/val")[0]["image"] == image_of(9)


@pytest.mark.parametrize("folder", ["images/train/3", "images/train", "image", "train/3", "3", "."])
def test_nlvr2_images_where_people_have_them(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    for side in (0, 1):
        (tmp_path / folder / f"train-1-0-img{side}.png").write_bytes(image_of(side))
    record = {"identifier": "train-1-0-0", "directory": 3, "sentence": "a", "label": "True"}
    convert("nlvr2", "--annotations", write_json(tmp_path / "train.json", record), "--images", tmp_path, "--split",
            "train", "--out", tmp_path / "out")  # fmt: skip
    assert [(row["image_0"], row["image_1"]) for row in rows_of(tmp_path / "out/train")] == [(image_of(0), image_of(1))]
