"""Scenes, the content of images: two to five objects on a 4x4 grid, at most one in a cell."""

import json
import os
import random
from pathlib import Path
from typing import Any, NamedTuple

from preprocessing.errors import UserError
from preprocessing.local_files import check_regular, json_excerpt

SHAPES = ("ring", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "purple", "black")
SIZES = ("small", "large")
GRID = 4  # cells a side
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
FEWEST, MOST = 2, 5  # objects an image
ORDERS = ("reading", "random")  # of the objects in a caption
_COUNT_WEIGHTS = (7, 6, 4, 3)  # of 2, 3, 4 and 5 objects

# One scene in three has a favourite shape, so that three of a kind are common enough to be asked for.
_FAVOURITE_SCENES = 1 / 3
_FAVOURITE_OBJECTS = 0.6
_FIX = "write the world again with `python -m preprocessing shapes`"


_QUADRANT = tuple(QUADRANTS[2 * (cell // GRID >= GRID // 2) + (cell % GRID >= GRID // 2)] for cell in range(GRID**2))


class Thing(NamedTuple):
    """One object: its cell (0..15, row by row from the top left) and what it is."""

    cell: int
    shape: str
    color: str
    size: str

    @property
    def quadrant(self) -> str:
        """The quarter of the image that it is in, one of QUADRANTS."""
        return _QUADRANT[self.cell]

    @property
    def kind(self) -> tuple[str, str]:
        """(color, shape), as in statements and questions."""
        return self.color, self.shape


Scene = tuple[Thing, ...]  # ordered by cell, so that equal scenes compare equal


class SceneSampler:
    """Draws scenes without repetition: no scene is in two splits."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._drawn: set[Scene] = set()

    def draw(
        self, present: frozenset[tuple[str, str]] = frozenset(), absent: frozenset[tuple[str, str]] = frozenset()
    ) -> Scene:
        """A new scene that holds every (color, shape) of `present` and none of `absent` (disjoint, at most 2 each).

        The distribution of the number of objects does not depend on `present` and `absent`, so it reveals no answer.
        """
        while True:
            scene = self._scene(present, absent)
            if scene not in self._drawn:
                self._drawn.add(scene)
                return scene

    def _scene(self, present: frozenset[tuple[str, str]], absent: frozenset[tuple[str, str]]) -> Scene:
        rng = self._rng
        (count,) = rng.choices(range(FEWEST, MOST + 1), _COUNT_WEIGHTS)
        cells = rng.sample(range(GRID * GRID), count)
        favourite = rng.choice(SHAPES) if rng.random() < _FAVOURITE_SCENES else None
        kinds = sorted(present)
        while len(kinds) < count:
            shape = favourite if favourite and rng.random() < _FAVOURITE_OBJECTS else rng.choice(SHAPES)
            kind = (rng.choice(COLORS), shape)
            if kind not in absent:
                kinds.append(kind)
        things = (
            Thing(cell, shape, color, rng.choice(SIZES)) for cell, (color, shape) in zip(cells, kinds, strict=True)
        )
        return tuple(sorted(things))


class SceneFile(NamedTuple):
    """RAW/annotations/scenes_{split}2014.json.

    Attributes:
        order: in which captions name the objects, one of ORDERS.
        scenes: image id -> scene, in the order of the file.
    """

    order: str
    scenes: dict[int, Scene]


def read_scenes(path: str | os.PathLike[str]) -> SceneFile:
    """Read a scene file.

    Raises UserError naming file and entry: the file is missing or not JSON, the order of objects is unknown,
    a duplicate image id, there are too few or too many objects, a cell is off the grid or taken, or a shape, color
    or size is unknown.
    """
    content = _content(Path(path))
    order = content.get("order")
    if order not in ORDERS:
        raise UserError(f"{path}: order is {json_excerpt(order)}, none of {', '.join(ORDERS)}; {_FIX}")
    scenes: dict[int, Scene] = {}
    for index, entry in enumerate(content["scenes"]):
        where = f"{path}: scenes[{index}]"
        image_id, objects = (entry.get(name) if isinstance(entry, dict) else None for name in ("image_id", "objects"))
        if type(image_id) is not int or not isinstance(objects, list):
            raise UserError(f"{where}: needs image_id, a whole number, and objects, a list; {_FIX}")
        if image_id in scenes:
            raise UserError(f"{where}: image_id {image_id} occurs twice; {_FIX}")
        if not FEWEST <= len(objects) <= MOST:
            raise UserError(f"{where}: has {len(objects)} objects, needs {FEWEST} to {MOST}; {_FIX}")
        things = [_thing(record, f"{where}.objects[{number}]") for number, record in enumerate(objects)]
        if len({thing.cell for thing in things}) < len(things):
            raise UserError(f"{where}: two objects are in one cell; {_FIX}")
        scenes[image_id] = tuple(sorted(things))
    return SceneFile(order, scenes)


def _content(path: Path) -> dict[str, Any]:
    """The content of the file, an object with a list `scenes`."""
    check_regular(path)
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {_FIX}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: invalid JSON ({error}); {_FIX}") from None
    if not isinstance(content, dict) or not isinstance(content.get("scenes"), list):
        raise UserError(f"{path}: has no list 'scenes'; is this the right file? It is named scenes_{{split}}2014.json")
    return content


def _thing(record: Any, where: str) -> Thing:
    known = {"cell": range(GRID**2), "shape": SHAPES, "color": COLORS, "size": SIZES}
    for name, values in known.items():
        value = record.get(name) if isinstance(record, dict) else None
        if isinstance(value, bool | float) or value not in values:  # True and 1.0 equal 1
            allowed = f"0 to {GRID**2 - 1}" if name == "cell" else ", ".join(map(str, values))
            raise UserError(f"{where}: {name} is {json_excerpt(value)}, none of {allowed}; {_FIX}")
    return Thing(**{name: record[name] for name in known})
