"""A converter of one's own, named by its import path: the worked example of docs/extending.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from preprocessing.shards.schema import read_manifest
from tests.unit.preprocessing.helpers import command, convert, image_of, rows_of

OWN = "docs.examples.my_source"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A catalog of three photos, one of which has no title, and a line that is at fault."""
    for number in (1, 2, 3):
        (tmp_path / f"{number}.jpg").write_bytes(image_of(number))
    records = [{"number": n, "photo": f"{n}.jpg", "titles": [f"photo {n}", "a photo"]} for n in (1, 2)]
    records += [{"number": 3, "photo": "3.jpg", "titles": []}, {"number": "four", "photo": "4.jpg", "titles": ["x"]}]
    (tmp_path / "catalog.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def options(raw: Path, out: Path) -> list[object]:
    return ["--catalog", raw / "catalog.jsonl", "--images", raw, "--split", "train", "--max-dropped", 0.5, "--out", out]


def test_the_example_converts(raw: Path, tmp_path: Path) -> None:
    convert(OWN, *options(raw, tmp_path / "data"))
    rows = rows_of(tmp_path / "data" / "train")
    assert [(row["image_id"], row["caption"]) for row in rows] == [
        ("1", ["photo 1", "a photo"]),
        ("2", ["photo 2", "a photo"]),
    ]
    assert rows[0]["image"] == image_of(1)
    manifest = read_manifest(tmp_path / "data" / "train")
    assert manifest["dropped"] == {"field 'number' is not int": 1, "image without caption": 1}
    convert("verify", tmp_path / "data")


def test_the_example_as_it_is_typed(raw: Path, tmp_path: Path) -> None:
    told = command(OWN, *options(raw, tmp_path / "data"), "--workers", 2)
    assert told.returncode == 0, told.stderr
    assert "2 rows, 4 samples" in told.stdout


def test_its_help_has_its_own_option() -> None:
    told = command(OWN, "--help")
    assert told.returncode == 0 and "--catalog FILE" in told.stdout and "--workers N" in told.stdout


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_package.my_source", "my_package.my_source: cannot be imported (No module named 'my_package')"),
        ("docs/examples/my_source.py", "docs/examples/my_source.py: cannot be imported"),
        (".my_source", ".my_source: cannot be imported"),
        ("preprocessing.text", "preprocessing.text: has no function add_arguments and no run; docs/extending.md"),
        ("--foo.bar", "argument COMMAND: invalid choice: 'train'"),  # an option is no path
    ],
)
def test_a_wrong_path_is_one_line(refuse: Callable[..., str], name: str, said: str) -> None:
    assert said in refuse(name, "--split", "train")
