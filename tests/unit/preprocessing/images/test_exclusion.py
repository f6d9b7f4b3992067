import json
from pathlib import Path
from typing import Any

import pytest

from preprocessing.errors import UserError
from preprocessing.images.exclusion import ImageList, read_image_names
from tests.unit.preprocessing.helpers import write_json


def test_an_image_is_known_by_its_base_name_and_a_coco_image_by_its_number() -> None:
    numbers = ImageList(["391895"])
    assert numbers.match("val2014/COCO_val2014_000000391895.jpg") and numbers.match("000000391895.jpg")
    assert numbers.match("VG_100K/391895.jpg")
    assert not numbers.match("1391895.jpg") and not numbers.match("COCO_val2014_000000391896.jpg")
    assert not ImageList(["391895.jpg"]).match("000000391895.jpg")  # a file of that name is Visual Genome's
    assert ImageList(["COCO_val2014_000000391895.jpg"]).match("train2017/000000391895.jpg")
    assert ImageList([r"C:\data\val\a.jpg"]).match("images/a.png")
    assert not ImageList([]).match("a.jpg")


def test_names_of_each_list_are_counted_as_images_and_once() -> None:
    first = ImageList(["a.jpg", "x/a.jpg", "42", "COCO_val2014_000000000042.jpg", "b.jpg"], "first")
    lists = ImageList.joined([first, ImageList(["b.jpg", "c.jpg"], "second")])
    assert list(lists.counts()) == [("first", 3, 0), ("second", 2, 0)]
    for names in (("a.png", "7"), ("y/a.jpg",), ("b.jpg", "9"), ("d.jpg",)):
        assert lists.match(*names) == (names != ("d.jpg",))
    assert list(lists.counts()) == [("first", 3, 2), ("second", 2, 1)]


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ([{"image": "val2014/a.jpg", "caption": ["x"]}], ["val2014/a.jpg"]),
        ([{"images": ["l.png", "r.png"], "sentence": "x"}], ["l.png", "r.png"]),
        ({"images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}, ["a.jpg"]),
        (
            {
                "images": [{"filename": name, "split": name, "sentences": []} for name in ("train", "test")],
                "dataset": "x",
            },
            ["test"],
        ),
        ({"images": [{"filename": name, "split": name.title()} for name in ("val", "test")]}, ["test"]),
        ([{"image": "a.jpg", "split": "val"}, {"image": "b.jpg"}], ["a.jpg", "b.jpg"]),
        ({"duplicates": [{"image_id": "7", "of": "DIR", "of_image": "9", "distance": 2, "exact": False}]}, ["7"]),
        (["a.jpg", "b.jpg"], ["a.jpg", "b.jpg"]),
    ],
)
def test_forms_of_lists(tmp_path: Path, content: Any, names: list[str]) -> None:
    assert list(read_image_names(write_json(tmp_path / "list.json", content))) == names


def test_lists_of_a_record_a_line(tmp_path: Path) -> None:
    nlvr2 = [{"identifier": f"test1-{pair}-1-{sentence}", "label": "True"} for pair in (0, 1) for sentence in (0, 1)]
    xvlm = [{"image_rpath": "pics/a.jpg", "caption": ["b"]}, {"image_rpath": "pics/b.jpg", "caption": []}]
    pairs = [f"test1-{pair}-1-img{side}.png" for pair in (0, 0, 1, 1) for side in (0, 1)]
    for records, names in ((nlvr2, pairs), (xvlm, ["pics/a.jpg", "pics/b.jpg"])):
        (tmp_path / "list.json").write_text("\n".join(map(json.dumps, records)) + "\n\n")
        assert list(read_image_names(tmp_path / "list.json")) == names
        (tmp_path / "list.json").rename(tmp_path / "list.jsonl")
        assert list(read_image_names(tmp_path / "list.jsonl")) == names
    (tmp_path / "one.jsonl").write_text(json.dumps(xvlm[0]))
    assert list(read_image_names(tmp_path / "one.jsonl")) == ["pics/a.jpg"]
    (tmp_path / "list.json").write_text('{"images": [\n{"file_name": "a.jpg"}]}')
    assert list(read_image_names(tmp_path / "list.json")) == ["a.jpg"]
    (tmp_path / "list.json").write_text('{"image": "a"}\n{"image": \n')
    with pytest.raises(UserError, match=r"list\.json: line 2: invalid JSON"):
        list(read_image_names(tmp_path / "list.json"))


def test_text_lists_and_unknown_forms(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("1000092795\n\n 10002456.jpg \n")
    assert list(read_image_names(tmp_path / "list.txt")) == ["1000092795", "10002456.jpg"]
    for content in ({"x": 1}, 3):
        with pytest.raises(UserError, match=r"list\.json: is no list of images"):
            list(read_image_names(write_json(tmp_path / "list.json", content)))
    with pytest.raises(UserError, match="record 0: names no image"):
        list(read_image_names(write_json(tmp_path / "list.json", [{"caption": "x"}])))
