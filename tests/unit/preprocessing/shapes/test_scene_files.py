"""Scene files: what is refused of them, and in which order their objects are read."""

from pathlib import Path
from typing import Any

import pytest

from preprocessing.errors import UserError
from preprocessing.shapes.scenes import Thing, read_scenes
from tests.unit.preprocessing.helpers import write_json

RED = {"cell": 3, "shape": "ring", "color": "red", "size": "small"}
BLUE = RED | {"cell": 5, "color": "blue"}
PAIR = {"image_id": 7, "objects": [RED, BLUE]}


def scene_file(*objects: object, order: object = "reading") -> dict[str, Any]:
    return {"order": order, "scenes": [PAIR, {"image_id": 8, "objects": list(objects)}]}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([], "has no list 'scenes'"),
        ({"scenes": [PAIR]}, "order is null, none of reading, random"),
        (scene_file(RED, BLUE, order=["reading"]), 'order is ["reading"], none of reading, random'),
        ({"order": "random", "scenes": [3]}, "scenes[0]: needs image_id"),
        ({"order": "random", "scenes": [PAIR | {"image_id": True}]}, "scenes[0]: needs image_id"),
        ({"order": "random", "scenes": [PAIR] * 2}, "scenes[1]: image_id 7 occurs twice"),
        (scene_file(), "scenes[1]: has 0 objects, needs 2 to 5"),
        (scene_file(*({**RED, "cell": cell} for cell in range(6))), "scenes[1]: has 6 objects, needs 2 to 5"),
        (scene_file(RED, RED), "scenes[1]: two objects are in one cell"),
        (scene_file(RED, "ring"), "scenes[1].objects[1]: cell is null, none of 0 to 15"),
        (scene_file(RED | {"cell": 16}, BLUE), "scenes[1].objects[0]: cell is 16, none of 0 to 15"),
        (scene_file(RED | {"cell": 1.0}, BLUE), "scenes[1].objects[0]: cell is 1.0, none of 0 to 15"),
        (scene_file(RED | {"shape": "star"}, BLUE), 'shape is "star", none of ring, square, triangle'),
        (scene_file(RED | {"color": ["red"]}, BLUE), 'color is ["red"], none of red, green'),
        (scene_file({**RED, "size": None}, BLUE), "size is null, none of small, large"),
    ],
)
def test_bad_scene_files_are_refused(content: object, told: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "scenes_val2014.json", content)
    with pytest.raises(UserError) as caught:
        read_scenes(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and told in message and "\n" not in message


def test_scene_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.json: cannot be read \(No such file.*write the world again"):
        read_scenes(tmp_path / "none.json")
    for content in (b'{"scenes": [', b"\xff", b"[" * 100_000):
        (tmp_path / "cut.json").write_bytes(content)
        with pytest.raises(UserError, match=r"cut\.json: invalid JSON .*write the world again"):
            read_scenes(tmp_path / "cut.json")


def test_scenes_are_ordered_by_cell_whatever_the_file_has(tmp_path: Path) -> None:
    path = write_json(tmp_path / "scenes.json", scene_file(RED, RED | {"cell": 1, "size": "large"}))
    assert read_scenes(path).scenes[8] == (Thing(1, "ring", "red", "large"), Thing(3, "ring", "red", "small"))
