from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.images.image_refs import FileImage
from preprocessing.sources.easy_vqa import captions_of, told
from preprocessing.sources.vqa_grouping import RawQuestion


def test_a_missing_package_is_named(
    refuse: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install easy-vqa" in refuse("easy-vqa", "--split", "train", "--out", tmp_path)


@pytest.mark.parametrize(
    ("question", "answer", "true"),
    [
        ("what color is the circle?", "teal", {"teal", "circle"}),
        ("what is the blue shape?", "rectangle", {"blue", "rectangle"}),
        ("is there a red shape in the image?", "yes", {"red"}),
        ("is there a red shape in the image?", "no", set()),
        ("is there not a triangle?", "no", {"triangle"}),
        ("is no triangle present?", "yes", set()),
    ],
)
def test_what_an_answer_tells(question: str, answer: str, true: set[str]) -> None:
    colors_and_shapes = {"teal", "blue", "red", "circle", "rectangle", "triangle"}
    assert told(question, answer) & colors_and_shapes == true


def test_a_caption_has_what_is_told_of_its_image_and_no_more() -> None:
    listed = ["circle", "teal", "red", "yes", "no", "triangle", "rectangle"]
    told_of = {
        "both": [("what color is the circle?", "teal"), ("is there a red shape?", "no")],
        "color": [("what color is the shape?", "red"), ("is a circle present?", "no")],
        "shape": [("is there not a triangle?", "no")],
        "nothing": [("is there a red shape?", "no"), ("is no teal shape present?", "yes")],
    }
    asked = [
        RawQuestion(FileImage(f"{image}.png"), image, text, 0, (answer,), answer, "")
        for image, questions in told_of.items()
        for text, answer in questions
    ]
    source = captions_of(asked, [Path("questions.json")], listed)
    found = {row.columns["image_id"]: (row.images, row.columns["caption"]) for row in source.rows}
    assert found == {
        "both": ((FileImage("both.png"),), ["a teal circle"]),
        "color": ((FileImage("color.png"),), ["a red shape"]),
        "shape": ((FileImage("shape.png"),), ["a triangle"]),
    }
    assert source.left_out == {"image of which nothing is told": 1}
    assert source.counts == {"questions": 7, "images": 4}
