"""Captions of the shapes world: read back as a person reads them, they say what is in the scene and nothing else."""

import random
import re
from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocessing.shapes.captions import MOST_WORDS, ORDERS, captions, count_words, wordings
from preprocessing.shapes.scenes import COLORS, GRID, MOST, QUADRANTS, SHAPES, Scene, Thing
from tests.unit.preprocessing.shapes.test_shapes import sample, scenes

NUMBERS = ("no", "one", "two", "three", "four", "five")
EXAMPLE = (Thing(0, "ring", "red", "small"), Thing(3, "ring", "blue", "large"), Thing(13, "square", "red", "small"))

Told = tuple[str, str, str | None]  # color, shape, and quarter where it is told


def named(names: tuple[str, ...], text: str) -> str | None:
    """Which one of ``names`` the text has, in singular or plural."""
    found = set(re.findall(rf"\b({'|'.join(names)})s?\b", text))
    assert len(found) < 2, text
    return found.pop() if found else None


def told(text: str) -> list[Told]:
    """The objects of a caption in its order. What stands before a colon is said of all that follows up to a comma."""
    found = []
    for part in text.split(", "):
        head, _, inside = part.rpartition(": ")
        for one in inside.split(" and "):
            color, shape = (named(names, f"{head} {one}") for names in (COLORS, SHAPES))
            if color and shape:
                found.append((color, shape, named(QUADRANTS, f"{head} {one}")))
    return found


@given(scenes, st.integers(0, 9), st.sampled_from(ORDERS))
def test_captions_say_what_is_there_in_five_wordings(scene: Scene, seed: int, order: str) -> None:
    texts = captions(scene, random.Random(seed), order)
    assert len(set(texts)) == len(texts) == 5
    assert set(texts) <= set(wordings(scene, order))
    in_quarters = Counter((*thing.kind, thing.quadrant) for thing in scene)
    kinds = Counter(thing.kind for thing in scene)
    for text in texts:
        assert count_words(text) <= MOST_WORDS
        objects = Counter(told(text))
        with_quarters = all(quarter for _, _, quarter in objects)
        assert objects == (in_quarters if with_quarters else Counter({(*kind, None): n for kind, n in kinds.items()}))
        for number, noun in re.findall(rf"\b({'|'.join(NUMBERS)}) (\w+?)s?\b", text):
            assert NUMBERS.index(number) == sum(noun in ("object", thing.shape) for thing in scene), text


@given(scenes, st.integers(0, 9))
def test_in_reading_order_the_scene_decides_which_object_comes_when(scene: Scene, seed: int) -> None:
    assert [thing.cell for thing in scene] == sorted(thing.cell for thing in scene)
    by_quarter, by_shape, by_color = (  # sorting is stable: within a group the order is the scene's, too
        sorted(scene, key=lambda thing: QUADRANTS.index(thing.quadrant)),
        sorted(scene, key=lambda thing: SHAPES.index(thing.shape)),
        sorted(scene, key=lambda thing: COLORS.index(thing.color)),
    )
    orders = [[thing.kind for thing in things] for things in (scene, by_quarter, by_shape, by_color)]
    for text in captions(scene, random.Random(seed)):
        assert [(color, shape) for color, shape, _ in told(text)] in orders


def test_captions_by_hand() -> None:
    assert list(wordings(EXAMPLE)) == [
        "red ring top left, blue ring top right, red square bottom left",
        "top left red ring, top right blue ring, bottom left red square",
        "three objects: red ring top left, blue ring top right, red square bottom left",
        "a red ring at the top left and a blue ring at the top right and a red square at the bottom left",
        "there is a red ring in the top left, a blue ring in the top right, a red square in the bottom left",
        "top left: red ring, top right: blue ring, bottom left: red square, bottom right: nothing",
        "two rings: red and blue, one square: red, no triangles",
        "red: ring and square, blue: ring",
    ]
    assert count_words("two rings: red and blue, no triangles") == 9


def test_random_order_has_every_order() -> None:
    drawn = {tuple(told(text)) for seed in range(60) for text in captions(EXAMPLE, random.Random(seed), "random")}
    assert len([objects for objects in drawn if objects[0][2]]) == 6
    assert set(wordings(EXAMPLE)) < set(wordings(EXAMPLE, "random"))
    assert len(set(wordings(EXAMPLE, "random"))) == 5 * 6 + 1 + 2 + 2  # quarters, shapes (two rings), colors (two red)


def test_the_generator_decides_which_wordings_are_taken() -> None:
    assert captions(EXAMPLE, random.Random(1)) == captions(EXAMPLE, random.Random(1))
    assert {text for seed in range(30) for text in captions(EXAMPLE, random.Random(seed))} == set(wordings(EXAMPLE))


@pytest.mark.parametrize("order", ORDERS)
def test_five_objects_have_five_captions_wherever_they_stand(order: str) -> None:
    """Some wordings are too long for five objects: five of the eight must be left in any case."""
    rng = random.Random(0)
    for cells in combinations(range(GRID**2), MOST):
        scene = tuple(Thing(cell, rng.choice(SHAPES), rng.choice(COLORS), "small") for cell in cells)
        assert len(set(captions(scene, rng, order))) == 5


@settings(max_examples=20)
@given(scenes)
def test_wordings_differ_from_each_other(scene: Scene) -> None:
    assert len(set(wordings(scene))) == len(list(wordings(scene))) >= 5


def test_captions_tell_images_apart() -> None:
    drawn = sample(500)
    rng = random.Random(0)
    texts = [text for scene in drawn for text in captions(scene, rng)]
    with_quarters = [text for text in texts if told(text)[0][2]]
    assert len(with_quarters) < 0.8 * len(texts)
    assert len(set(with_quarters)) / len(with_quarters) > 0.99
    assert len(set(texts)) / len(texts) > 0.9
