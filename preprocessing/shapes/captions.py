"""Five captions for a scene. Each names every object with colour, shape and quarter, in wording of its own."""

import random
from collections.abc import Callable, Sequence

from preprocessing.shapes.scenes import Scene, Thing

MOST_WORDS = 29  # words and punctuation marks in a caption
_NUMBER = {2: "two", 3: "three", 4: "four", 5: "five"}


def _name(thing: Thing, sized: bool) -> str:
    return f"{thing.size} {thing.color} {thing.shape}" if sized else f"{thing.color} {thing.shape}"


def _name_first(things: Sequence[Thing], sized: bool) -> str:
    return ", ".join(f"{_name(thing, sized)} {thing.quadrant}" for thing in things)


def _place_first(things: Sequence[Thing], sized: bool) -> str:
    return ", ".join(f"{thing.quadrant} {_name(thing, sized)}" for thing in things)


def _counted(things: Sequence[Thing], sized: bool) -> str:
    return f"{_NUMBER[len(things)]} objects: {_name_first(things, sized)}"


def _sentence(things: Sequence[Thing], sized: bool) -> str:
    return " and ".join(f"a {_name(thing, sized)} at the {thing.quadrant}" for thing in things)


def _there_is(things: Sequence[Thing], sized: bool) -> str:
    return "there is " + ", ".join(f"a {_name(thing, sized)} in the {thing.quadrant}" for thing in things)


def _by_quarter(things: Sequence[Thing], sized: bool) -> str:
    """Groups what shares a quarter; quarters come in the order of their first object."""
    quarters = list(dict.fromkeys(thing.quadrant for thing in things))
    groups = (" and ".join(f"a {_name(t, sized)}" for t in things if t.quadrant == quarter) for quarter in quarters)
    return ", ".join(f"{quarter}: {group}" for quarter, group in zip(quarters, groups, strict=True))


_STYLES: tuple[Callable[[Sequence[Thing], bool], str], ...] = (
    _name_first,
    _place_first,
    _counted,
    _sentence,
    _there_is,
    _by_quarter,
)


def count_words(caption: str) -> int:
    """Words and punctuation marks, as a word-level tokenizer sees them."""
    return len(caption.replace(",", " ,").replace(":", " :").split())


def captions(scene: Scene, rng: random.Random) -> list[str]:
    """Five captions of at most MOST_WORDS words, each with the objects in another order.

    Sizes are told where there is room: full scenes take the terse wordings.
    """
    result: list[str] = []
    styles = rng.sample(_STYLES, len(_STYLES))
    for index in range(5):
        things = rng.sample(scene, len(scene))
        ways = [(style, sized) for sized in rng.sample((True, False), 2) for style in styles[index:] + styles[:index]]
        fitting = (text for style, sized in ways if count_words(text := style(things, sized)) <= MOST_WORDS)
        result.append(next(text for text in fitting if text not in result))
    return result
