"""Command lines that no command can serve. tests/e2e/test_command_line.py types some in processes of their own."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from preprocessing.errors import UserError
from preprocessing.sources.converter import _check_left_out

LONG = "n" * 300  # longer than a name may be


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["coco", "--annotations", "x", "--images", LONG, "--split", "train", "--out", "x"], "--images nnn"),
        (["coco", "--annotations", "x", "--images", ".", "--split", "train", "--out", LONG], "--out nnn"),
        (["verify", LONG], "manifest.json: File name too long"),
        (["tokenizer", "inspect", LONG, "text"], "File name too long; fix that"),
    ],
)
def test_names_that_are_too_long_are_one_line(refuse: Callable[..., str], words: list[str], said: str) -> None:
    message = refuse(*words)
    assert message.startswith(f"preprocessing {words[0]}: ") and said in message and "File name too long" in message


def test_no_more_than_all_is_advised_to_be_left_out() -> None:
    """Questions may be left out, and images counted."""
    source: Any = SimpleNamespace(left_out={"question without a word": 3}, counts={"images": 2}, where="raw.json")
    with pytest.raises(UserError, match=r"give --max-dropped 1: scores"):
        _check_left_out(source, 0.5)
    _check_left_out(source, 1.0)
