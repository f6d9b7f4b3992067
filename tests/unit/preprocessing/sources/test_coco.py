import json
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import IMAGES, convert, image_of, rows_of, write_json


def coco(captions: dict[int, list[str]]) -> dict[str, object]:
    """Captions JSON over images 1.jpg, 2.jpg, … for the given captions by image id."""
    return {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in captions],
        "annotations": [{"image_id": number, "caption": text} for number, texts in captions.items() for text in texts],
    }


def arguments(folder: Path, annotations: Path | None = None, **options: object) -> list[object]:
    words = [f"--{name.replace('_', '-')}" if i == 0 else v for name, v in options.items() for i in (0, 1)]
    start = ["coco", "--annotations", annotations or folder / "captions.json", "--images", folder, "--split", "train"]
    return [*start, "--out", folder / "out", *words]


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    """A folder of 100 JPEG images, and their captions."""
    for number in range(1, 101):
        (tmp_path / f"{number}.jpg").write_bytes(image_of(number))
    write_json(tmp_path / "captions.json", coco({number: [f"{number} a", f"{number} b"] for number in range(1, 101)}))
    return tmp_path


@pytest.mark.parametrize("images", ["images", "images/val2014"])
def test_shapes_world(raw: Path, tmp_path: Path, images: str) -> None:
    annotations = raw / "annotations/captions_val2014.json"
    convert("coco", "--annotations", annotations, "--images", raw / images, "--split", "val", "--out", tmp_path)
    content = json.loads(annotations.read_text())
    rows = rows_of(tmp_path / "val")
    assert len(rows) == IMAGES["val"]
    for row, image in zip(rows, content["images"], strict=True):
        assert row["image_id"] == str(image["id"]) and row["split"] == "val"
        assert row["image"] == (raw / "images/val2014" / image["file_name"]).read_bytes()
        assert row["caption"] == [a["caption"] for a in content["annotations"] if a["image_id"] == image["id"]]


def test_same_input_same_bytes(hundred: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(*arguments(hundred)[:-1], tmp_path / name)
    for file in ("shard-00000.arrow", "manifest.json"):
        assert (tmp_path / "one/train" / file).read_bytes() == (tmp_path / "two/train" / file).read_bytes()


def test_a_truncated_jpeg_is_dropped_counted_and_listed(hundred: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (hundred / "7.jpg").write_bytes(image_of(7)[:1000])
    convert(*arguments(hundred))
    manifest = read_manifest(hundred / "out/train")
    assert (manifest["rows"], manifest["samples"]) == (99, 198)
    assert manifest["dropped"] == {"image does not decode": 1}
    assert manifest["dropped_items"] == [{"item": "7.jpg", "reason": "image does not decode"}]
    assert manifest["source"] == {"images": 100, "captions": 200}
    assert "7" not in {row["image_id"] for row in rows_of(hundred / "out/train")}
    assert "99 rows, 198 samples" in (out := capsys.readouterr().out) and "1 dropped: image does not decode" in out


def test_too_many_dropped_fails_and_leaves_nothing(hundred: Path, refuse: Callable[..., str]) -> None:
    (hundred / "7.jpg").write_bytes(image_of(7)[:1000])
    (hundred / "8.jpg").unlink()
    message = refuse(*arguments(hundred))
    assert "more than --max-dropped 0.01 of 100 rows" in message
    assert "7.jpg (image does not decode), 8.jpg (image is missing)" in message
    assert list((hundred / "out").iterdir()) == []
    convert(*arguments(hundred, max_dropped=0.02))
    assert read_manifest(hundred / "out/train")["dropped"] == {"image does not decode": 1, "image is missing": 1}


def test_large_images_are_dropped(hundred: Path, refuse: Callable[..., str]) -> None:
    assert "has too many pixels" in refuse(*arguments(hundred, max_pixels=1000))


def test_folder_without_the_images(hundred: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "elsewhere").mkdir()
    words = [tmp_path / "elsewhere" if word == hundred else word for word in arguments(hundred)]
    message = refuse(*words)
    assert "elsewhere: holds no image of 100 rows looked at, such as 1.jpg" in message and "--images" in message
    words = [tmp_path / "nowhere" if word == hundred else word for word in arguments(hundred)]
    assert "nowhere: no such folder" in refuse(*words)


def test_missing_empty_and_broken_annotations(hundred: Path, refuse: Callable[..., str]) -> None:
    assert "none.json: no such file" in refuse(*arguments(hundred, hundred / "none.json"))
    empty = write_json(hundred / "empty.json", coco({}))
    assert "empty.json: empty data set" in refuse(*arguments(hundred, empty))
    blank = write_json(hundred / "blank.json", coco({1: [" "], 2: []}))
    assert "2 left out: image without caption" in refuse(*arguments(hundred, blank))
    (hundred / "broken.json").write_text('{"images": [\n{"id": 1 "file_name": "1.jpg"}]}')
    assert "broken.json: invalid JSON at line 2 column 10" in refuse(*arguments(hundred, hundred / "broken.json"))


def test_bad_records_are_named(hundred: Path, refuse: Callable[..., str]) -> None:
    content = coco({1: ["a"], 2: ["b"]})
    content["annotations"][1]["image_id"] = 9
    bad = write_json(hundred / "bad.json", content)
    assert "bad.json: annotations[1]: image_id 9 is none" in refuse(*arguments(hundred, bad))
    bad = write_json(hundred / "bad.json", {"images": [{"id": 1}], "annotations": []})
    assert "bad.json: images[0]: has no field 'file_name'" in refuse(*arguments(hundred, bad))
    bad = write_json(hundred / "bad.json", {"images": [{"id": 1, "file_name": "1.jpg"}] * 2, "annotations": []})
    assert "images[1]: id 1 occurs twice" in refuse(*arguments(hundred, bad))
    bad = write_json(hundred / "bad.json", [1])
    assert "bad.json: is no JSON object" in refuse(*arguments(hundred, bad))


def test_output_of_another_run(hundred: Path, refuse: Callable[..., str]) -> None:
    convert(*arguments(hundred))
    before = (hundred / "out/train/provenance.json").read_bytes()
    assert "out/train: holds a finished split already (100 rows" in refuse(*arguments(hundred))
    assert (hundred / "out/train/provenance.json").read_bytes() == before
    convert(*arguments(hundred), "--overwrite")
    (hundred / "out/train/notes.txt").write_text("mine")
    assert "holds notes.txt" in refuse(*arguments(hundred), "--overwrite")
    assert [path.name for path in (hundred / "out").iterdir()] == ["train"]


@pytest.mark.parametrize("option", ["--out", "--images"])
def test_empty_folder_names(hundred: Path, refuse: Callable[..., str], option: str) -> None:
    assert f"{option}: is empty; name a folder" in refuse(*arguments(hundred), option, "")


@pytest.mark.parametrize(("option", "value"), [("max_dropped", 1.5), ("max_pixels", 0)])
def test_bad_options_are_named(hundred: Path, refuse: Callable[..., str], option: str, value: float) -> None:
    name = "--" + option.replace("_", "-")
    assert f"{name} {value}" in refuse(*arguments(hundred, **{option: value}))
