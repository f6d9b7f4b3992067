from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.sources.easy_vqa import told


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
