"""Five captions for a scene. Each names every object with its color and shape, in its own wording.

Lists name them in reading order: row by row, from left to right. The other wordings group them by quarter, shape or
color. In random order an image does not tell which object a masked word belongs to, so fewer of them can be predicted
(docs/pretraining_study.md has the comparison).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

from preprocessing.shapes.scenes import COLORS, ORDERS, QUADRANTS, SHAPES, Scene, Thing

MOST_WORDS = 29  # words and punctuation marks in a caption
_NUMBER = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}


def _name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _name_first(things: Sequence[Thing]) -> str:
    return ", ".join(f"{_name(thing)} {thing.quadrant}" for thing in things)


def _place_first(things: Sequence[Thing]) -> str:
    return ", ".join(f"{thing.quadrant} {_name(thing)}" for thing in things)


def _counted(things: Sequence[Thing]) -> str:
    return f"{_NUMBER[len(things)]} objects: {_name_first(things)}"


def _sentence(things: Sequence[Thing]) -> str:
    return " and ".join(f"a {_name(thing)} at the {thing.quadrant}" for thing in things)


def _there_is(things: Sequence[Thing]) -> str:
    return "there is " + ", ".join(f"a {_name(thing)} in the {thing.quadrant}" for thing in things)


def _by_quarter(things: Sequence[Thing]) -> str:
    """All four quarters, including empty ones."""
    groups = []
    for quarter in QUADRANTS:
        inside = " and ".join(_name(thing) for thing in things if thing.quadrant == quarter)
        groups.append(f"{quarter}: {inside or 'nothing'}")
    return ", ".join(groups)


def _by_shape(things: Sequence[Thing]) -> str:
    """All three shapes, including absent ones, without quarters."""
    groups = []
    for shape in SHAPES:
        colors = [thing.color for thing in things if thing.shape == shape]
        name = shape if len(colors) == 1 else f"{shape}s"
        groups.append(f"{_NUMBER[len(colors)]} {name}: {' and '.join(colors)}" if colors else f"no {name}")
    return ", ".join(groups)


def _by_color(things: Sequence[Thing]) -> str:
    """The colors in the scene, without quarters."""
    groups = []
    for color in COLORS:
        shapes = [thing.shape for thing in things if thing.color == color]
        groups += [f"{color}: {' and '.join(shapes)}"] if shapes else []
    return ", ".join(groups)


_STYLES: tuple[Callable[[Sequence[Thing]], str], ...] = (
    _name_first,
    _place_first,
    _counted,
    _sentence,
    _there_is,
    _by_quarter,
    _by_shape,
    _by_color,
)


def count_words(caption: str) -> int:
    """The number of words and punctuation marks, as a word-level tokenizer counts them."""
    return len(caption.replace(",", " ,").replace(":", " :").split())


def captions(scene: Scene, rng: random.Random, order: str = ORDERS[0]) -> list[str]:
    """Five captions of at most MOST_WORDS words, in different wordings.

    Args:
        scene: what is in the image.
        rng: draws the wordings.
        order: of the objects, one of ORDERS: "reading", or "random" for another order in each caption.
    """
    result: list[str] = []
    for style in rng.sample(_STYLES, len(_STYLES)):
        text = style(rng.sample(scene, len(scene)) if order == "random" else scene)
        if count_words(text) <= MOST_WORDS:
            result.append(text)
    return result[:5]


def wordings(scene: Scene, order: str = ORDERS[0]) -> Iterator[str]:
    """Every text that ``captions`` may give for the scene, once or more often."""
    for things in permutations(scene) if order == "random" else (scene,):
        texts = (style(things) for style in _STYLES)
        yield from (text for text in texts if count_words(text) <= MOST_WORDS)
