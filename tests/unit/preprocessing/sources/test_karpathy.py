"""COCO and Flickr30k by Karpathy's split files, Flickr30k by its own, and the images of a test list kept out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import convert, image_of, rows_of, write_json

COCO = {9: ("train2014", "train"), 42: ("val2014", "restval"), 73: ("val2014", "val"), 74: ("val2014", "test")}
FLICKR = {"1000092795": "train", "10002456": "train", "1007129816": "val", "1009434119": "test"}


def sentences(name: object) -> list[dict[str, Any]]:
    """Two captions as Karpathy's files have them."""
    return [{"tokens": ["a", "b"], "raw": f"A, {name}, {place}.", "imgid": 0, "sentid": place} for place in range(2)]


def coco_json(folder: Path) -> Path:
    images = [
        {
            "filepath": subset,
            "sentids": [0, 1],
            "filename": f"COCO_{subset}_{number:012d}.jpg",
            "imgid": index,
            "split": split,
            "sentences": sentences(number),
            "cocoid": number,
        }
        for index, (number, (subset, split)) in enumerate(COCO.items())
    ]
    return write_json(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


@pytest.fixture
def coco(tmp_path: Path) -> list[object]:
    """The command for a miniature of COCO 2014 with Karpathy's splits, but for --split."""
    for number, (subset, _) in COCO.items():
        (tmp_path / subset).mkdir(exist_ok=True)
        (tmp_path / subset / f"COCO_{subset}_{number:012d}.jpg").write_bytes(image_of(number))
    return ["coco", "--annotations", coco_json(tmp_path), "--images", tmp_path, "--out", tmp_path / "out"]


@pytest.mark.parametrize(
    ("words", "numbers"),
    [
        (["--split", "train"], [9, 42]),
        (["--split", "train", "--no-restval"], [9]),
        (["--split", "val"], [73]),
        (["--split", "test"], [74]),
    ],
)
def test_coco_splits(coco: list[object], tmp_path: Path, words: list[str], numbers: list[int]) -> None:
    convert(*coco, *words)
    rows = rows_of(tmp_path / "out" / words[1])
    assert [row["image_id"] for row in rows] == [str(number) for number in numbers]
    assert [row["image"] for row in rows] == [image_of(number) for number in numbers]
    assert [row["caption"] for row in rows] == [[f"A, {number}, {place}." for place in range(2)] for number in numbers]


def test_coco_2017_images_serve_as_well(tmp_path: Path) -> None:
    (tmp_path / "train2017").mkdir()
    for number in COCO:
        (tmp_path / f"train2017/{number:012d}.jpg").write_bytes(image_of(number))
    annotations = coco_json(tmp_path)
    convert("coco", "--annotations", annotations, "--images", tmp_path, "--split", "train", "--out", tmp_path / "out")
    assert [row["image"] for row in rows_of(tmp_path / "out/train")] == [image_of(9), image_of(42)]


def test_pre_training_on_train_and_val_less_the_test_list(tmp_path: Path, coco: list[object]) -> None:
    """EVE's data_utils/dataset_coco.py: both official files, without the images of X-VLM's coco_test.json."""
    files = []
    for subset in ("train2014", "val2014"):
        numbers = [number for number, (where, _) in COCO.items() if where == subset]
        content = {
            "info": {"year": 2014},
            "licenses": [],
            "images": [
                {"id": n, "file_name": f"COCO_{subset}_{n:012d}.jpg", "height": 40, "width": 40} for n in numbers
            ],
            "annotations": [{"id": 10 * n, "image_id": n, "caption": f"c {n}"} for n in numbers],
        }
        files.append(write_json(tmp_path / f"captions_{subset}.json", content))
    test = [{"image": "val2014/COCO_val2014_000000000074.jpg", "caption": ["a", "b"]}]
    lists = [write_json(tmp_path / "coco_test.json", test), coco[2]]
    for index, excluded in enumerate(lists):  # of Karpathy's file, the test split
        out = tmp_path / f"out{index}"
        convert("coco", "--annotations", *files, "--images", tmp_path, "--split", "train", "--out", out,
                "--exclude", excluded)  # fmt: skip
        assert [row["image_id"] for row in rows_of(out / "train")] == ["9", "42", "73"]
        assert read_manifest(out / "train")["dropped"] == {"image is listed in --exclude": 1}


def test_lists_of_which_nothing_is_here_are_refused_unless_allowed(
    coco: list[object], tmp_path: Path, refuse: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong list would leave test images in the training data without a word."""
    (tmp_path / "ids.txt").write_text("42\n43\n42\n")
    (tmp_path / "other.txt").write_text("4385058960_b0f291553e.jpg\n")
    words = [*coco, "--split", "train", "--exclude", tmp_path / "ids.txt", tmp_path / "other.txt"]
    message = refuse(*words)
    assert "other.txt: none of its 1 images is here: it has names like 4385058960_b0f291553e.jpg" in message
    assert "the data set like COCO_train2014_000000000009.jpg;" in message and "--allow-unmatched" in message
    assert not (tmp_path / "out/train").exists()
    convert(*words, "--allow-unmatched")
    out = capsys.readouterr().out
    assert "ids.txt: 1 of 2 images found\n" in out and "other.txt: 0 of 1 images found\n" in out
    assert "--exclude: 1 left out: image is listed in --exclude\n" in out
    assert [row["image_id"] for row in rows_of(tmp_path / "out/train")] == ["9"]
    assert read_manifest(tmp_path / "out/train")["source"] == {
        "images": 2, "captions": 4, "images named by --exclude": 3, "images named by --exclude and found": 1
    }  # fmt: skip
    test = write_json(tmp_path / "coco_test.json", [{"image": "val2014/COCO_val2014_000000000074.jpg"}])
    convert(*coco, "--split", "train", "--exclude", test, "--overwrite")  # its images are another split's
    out = capsys.readouterr().out
    assert "coco_test.json: 1 of 1 images found\n" in out and "--exclude: nothing left out\n" in out
    none = write_json(tmp_path / "pairs.json", {"duplicates": []})
    convert(*coco, "--split", "train", "--exclude", none, "--overwrite")
    assert "pairs.json: 0 of 0 images found\n" in capsys.readouterr().out
    assert "out/train: is no list of names; prepared data sets and hashes go to --exclude-images-of" in refuse(
        *coco, "--split", "val", "--exclude", tmp_path / "out/train"
    )


def test_cleaned_captions(coco: list[object], tmp_path: Path) -> None:
    convert(*coco, "--split", "val", "--text-cleaning", "xvlm")
    assert rows_of(tmp_path / "out/val")[0]["caption"] == ["a 73 0", "a 73 1"]


def test_bad_karpathy_files_are_named(coco: list[object], tmp_path: Path, refuse: Callable[..., str]) -> None:
    content = {"images": [{"filename": "a.jpg", "split": "dev", "sentences": []}], "dataset": "coco"}
    coco[2] = write_json(tmp_path / "k.json", content)
    assert "k.json: images[0]: split 'dev' is none of" in refuse(*coco, "--split", "train")
    content["images"][0] = {"filename": "a.jpg", "split": "train", "sentences": [{"tokens": []}]}
    coco[2] = write_json(tmp_path / "k.json", content)
    assert "images[0]: has no field 'raw'" in refuse(*coco, "--split", "train")
    assert "must be the only one" in refuse(*coco[:3], tmp_path / "x.json", *coco[3:], "--split", "train")


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    """The images of a miniature of Flickr30k, with Karpathy's file and the captions' own."""
    (tmp_path / "flickr30k-images").mkdir()
    for index, name in enumerate(FLICKR):
        (tmp_path / f"flickr30k-images/{name}.jpg").write_bytes(image_of(index))
    images = [
        {"sentids": [0, 1], "imgid": 0, "sentences": sentences(name), "split": split, "filename": f"{name}.jpg"}
        for name, split in FLICKR.items()
    ]
    write_json(tmp_path / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})
    lines = [f"{name}.jpg#{place}\tA, {name}, {place}.\n" for name in FLICKR for place in range(2)]
    (tmp_path / "results_20130124.token").write_text("".join(lines))
    return tmp_path


def test_flickr_by_both_files(flickr: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (flickr / "train.txt").write_text("1000092795\n10002456\n1\n")
    end = ["--images", flickr, "--split", "train", "--out"]
    convert("flickr30k", "--annotations", flickr / "dataset_flickr30k.json", *end, flickr / "a")
    convert("flickr30k", "--annotations", flickr / "results_20130124.token", "--only", flickr / "train.txt", *end,
            flickr / "b")  # fmt: skip
    assert "train.txt: 2 of 3 images found\n" in capsys.readouterr().out
    rows = rows_of(flickr / "a/train")
    assert rows == rows_of(flickr / "b/train")
    assert [(row["image_id"], row["image"]) for row in rows] == [
        ("1000092795", image_of(0)),
        ("10002456", image_of(1)),
    ]
    assert rows[0]["caption"] == ["A, 1000092795, 0.", "A, 1000092795, 1."]
    assert read_manifest(flickr / "b/train")["dropped"] == {"image is not listed in --only": 2}
    convert("flickr30k", "--annotations", flickr / "results_20130124.token", "--exclude",
            flickr / "dataset_flickr30k.json", *end, flickr / "c")  # fmt: skip
    assert len(rows_of(flickr / "c/train")) == 3


def test_bad_flickr_files_are_named(flickr: Path, refuse: Callable[..., str]) -> None:
    end = ["--images", flickr, "--split", "train", "--out", flickr / "out"]
    (flickr / "bad.token").write_text("1.jpg#0\tfine\n1.jpg a caption\n")
    assert "bad.token: line 2: is not 'image.jpg#0<tab>caption'" in refuse(
        "flickr30k", "--annotations", flickr / "bad.token", *end
    )
    (flickr / "twice.token").write_text("n.jpg#0\tfine\nm.jpg#0\tfine\nn.png#0\tanother\n")
    assert "twice.token: image id n stands for n.jpg and for n.png" in refuse(
        "flickr30k", "--annotations", flickr / "twice.token", *end
    )
    other = write_json(flickr / "other.json", [])
    assert "other.json: is not Karpathy's JSON" in refuse("flickr30k", "--annotations", other, *end)
    karpathy = flickr / "dataset_flickr30k.json"
    assert "--only" in refuse("flickr30k", "--annotations", karpathy, "--only", other, *end)
