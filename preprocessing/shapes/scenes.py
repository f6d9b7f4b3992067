"""What is in a picture: two to five objects on a 4x4 grid of cells, one object a cell."""

import random
from typing import NamedTuple

SHAPES = ("ring", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow", "purple", "black")
SIZES = ("small", "large")
GRID = 4  # cells a side
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
FEWEST, MOST = 2, 5  # objects a picture
_COUNT_WEIGHTS = (7, 6, 4, 3)  # of 2, 3, 4 and 5 objects

# One scene in three has a favourite shape, so that three of a kind are common enough to be asked for.
_FAVOURITE_SCENES = 1 / 3
_FAVOURITE_OBJECTS = 0.6


_QUADRANT = tuple(QUADRANTS[2 * (cell // GRID >= GRID // 2) + (cell % GRID >= GRID // 2)] for cell in range(GRID**2))


class Thing(NamedTuple):
    """One object: its cell (0..15, row by row from the top left) and what it is."""

    cell: int
    shape: str
    color: str
    size: str

    @property
    def quadrant(self) -> str:
        """Which quarter of the picture holds it, one of QUADRANTS."""
        return _QUADRANT[self.cell]

    @property
    def kind(self) -> tuple[str, str]:
        """(color, shape): what statements and questions call it by."""
        return self.color, self.shape


Scene = tuple[Thing, ...]  # ordered by cell, so that equal scenes compare equal


class SceneSampler:
    """Draws scenes, never the same one twice: what one split got no other split gets."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._drawn: set[Scene] = set()

    def draw(
        self, present: frozenset[tuple[str, str]] = frozenset(), absent: frozenset[tuple[str, str]] = frozenset()
    ) -> Scene:
        """A new scene that holds every (color, shape) of `present` and none of `absent` (disjoint, at most 2 each).

        The number of objects has the same distribution whatever is asked, so that it tells nothing of the answer.
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
