"""NLVR2-style statements about pairs of images: each is about four pairs and true of two of them."""

import random
from typing import NamedTuple

from preprocessing.shapes.scenes import COLORS, SHAPES, Scene, SceneSampler

PAIRS = 4  # pairs in a set, and labels of a statement: two true, two false
STATEMENTS = 2  # statements in a set, about the same pairs

_WORDING = {
    "left": ("the left picture contains a {}", "there is a {} in the left picture"),
    "right": ("the right picture contains a {}", "there is a {} in the right picture"),
    "both": ("both pictures contain a {}", "there is a {} in both pictures"),
}
# Whether a statement's object is in the (left, right) image of each of the four pairs. For "left" and "right" all four
# cases occur, so the other image says nothing about the label. A false "both" is false for each side once.
_CASES: dict[str, tuple[tuple[bool, bool], ...]] = {
    "left": ((True, True), (True, False), (False, True), (False, False)),
    "right": ((True, True), (True, False), (False, True), (False, False)),
    "both": ((True, True), (True, True), (True, False), (False, True)),
}
_HOLDS = {
    "left": lambda left, right: left,
    "right": lambda left, right: right,
    "both": lambda left, right: left and right,
}


class PairSet(NamedTuple):
    """Four pairs of scenes and the statements about them."""

    pairs: tuple[tuple[Scene, Scene], ...]
    sentences: tuple[str, ...]
    labels: tuple[tuple[bool, ...], ...]  # [statement][pair]


def pair_set(index: int, sampler: SceneSampler, rng: random.Random) -> PairSet:
    """Set number `index` of a split. The kinds of statement alternate, so that all are equally frequent."""
    kinds = [tuple(_WORDING)[(index + statement * (1 + index // 3 % 3)) % 3] for statement in range(STATEMENTS)]
    objects = rng.sample([(color, shape) for color in COLORS for shape in SHAPES], STATEMENTS)
    cases = [rng.sample(_CASES[kind], PAIRS) for kind in kinds]
    pairs = []
    for pair in range(PAIRS):
        sides = []
        for side in (0, 1):
            inside = frozenset(obj for obj, case in zip(objects, cases, strict=True) if case[pair][side])
            sides.append(sampler.draw(present=inside, absent=frozenset(objects) - inside))
        pairs.append((sides[0], sides[1]))
    sentences = (
        rng.choice(_WORDING[kind]).format(f"{color} {shape}")
        for kind, (color, shape) in zip(kinds, objects, strict=True)
    )
    labels = (tuple(_HOLDS[kind](*where) for where in case) for kind, case in zip(kinds, cases, strict=True))
    return PairSet(tuple(pairs), tuple(sentences), tuple(labels))
