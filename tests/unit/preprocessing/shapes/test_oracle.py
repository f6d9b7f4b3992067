"""The oracle of masked words, by cases that are counted by hand."""

from itertools import permutations

import pytest

from preprocessing.shapes.captions import wordings
from preprocessing.shapes.oracle import best_guesses
from preprocessing.shapes.scenes import Thing

TEXTS = [[1, 7, 3], [1, 5, 3], [1, 5, 4], [2, 9, 9], [1, 8]]


@pytest.mark.parametrize(
    ("shown", "masked", "guesses"),
    [
        ([2, 0, 0], [1, 2], [9, 9]),  # one text begins with 2
        ([1, 0, 4], [1], [5]),
        ([1, 0, 0], [1, 2], [5, 3]),  # three texts: 5 stands in two of them, and so does 3
        ([1, 0, 0], [2, 1], [3, 5]),  # as the places are named
        ([0, 0, 0], [0, 1, 2], [1, 5, 3]),  # each place alone: no text needs to hold all guesses
        ([1, 0, 3], [1], [5]),  # 7 or 5, as likely: the smaller
        ([1, 0], [1], [8]),  # texts of the same length alone
        ([1, 5, 3], [], []),
        ([1, 5, 9], [1], None),
        ([1, 5, 9, 9], [0, 1, 2, 3], None),
    ],
)
def test_guesses_by_hand(shown: list[int], masked: list[int], guesses: list[int] | None) -> None:
    for texts in permutations(TEXTS):
        assert best_guesses(texts, shown, masked) == guesses


def test_what_stands_at_a_masked_place_is_not_looked_at() -> None:
    assert all(best_guesses(TEXTS, [1, hidden, 4], [1]) == [5] for hidden in range(10))


def test_a_text_that_occurs_twice_counts_twice() -> None:
    assert best_guesses([[1, 5], [1, 7]], [1, 0], [1]) == [5]
    assert best_guesses([[1, 5], [1, 7], [1, 7]], [1, 0], [1]) == [7]


def test_texts_may_be_read_once() -> None:
    assert best_guesses(iter(TEXTS), [2, 0, 0], [1, 2]) == [9, 9]


def test_order_of_the_objects_decides_what_can_be_known() -> None:
    """In reading order the first object is known; in random order either may be meant, unless its place is visible."""
    scene = (Thing(0, "ring", "red", "small"), Thing(3, "square", "blue", "small"))
    words = {word: number for number, word in enumerate("a and at blue left red ring right square the top".split())}
    tokens = {
        order: [[words[word] for word in text.split()] for text in wordings(scene, order) if text.startswith("a ")]
        for order in ("reading", "random")
    }
    shown = [words[word] for word in "a red ring at the top left and a blue square at the top right".split()]
    assert best_guesses(tokens["reading"], shown, [1, 6, 9, 14]) == [words[w] for w in ("red", "left", "blue", "right")]
    hidden = [place for place in range(15) if place not in (0, 3, 4, 5, 7, 8, 11, 12, 13)]  # colors, shapes, sides
    guesses = best_guesses(tokens["random"], shown, hidden)
    assert guesses is not None and guesses[0] == guesses[3] == words["blue"]  # as likely as red, and before it
    assert best_guesses(tokens["random"], shown, [1, 2, 9, 10]) == [words[w] for w in ("red", "ring", "blue", "square")]
