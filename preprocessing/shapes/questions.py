"""VQA questions about scenes, balanced so that their text says little about the answer, with ten answers each."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from preprocessing.shapes.scenes import COLORS, FEWEST, MOST, QUADRANTS, SHAPES, Scene


class Question(NamedTuple):
    """One question about the scene at index `scene` and its right answer."""

    scene: int
    kind: str  # a key of KINDS
    text: str
    answer: str


class Kind(NamedTuple):
    """A kind of question: its frequency, and its types in VQA v2."""

    per_image: float  # questions of this kind per image, on average
    question_type: str  # VQA v2's: the words that the question starts with
    answer_type: str  # VQA v2's: yes/no, number, other


KINDS = {
    "exists": Kind(2.1, "is there a", "yes/no"),
    "occupied": Kind(0.8, "is there anything in the", "yes/no"),
    "color": Kind(1.2, "what color is the", "other"),
    "shape": Kind(0.3, "what shape is the", "other"),
    "count": Kind(0.8, "how many objects are there", "number"),
    "count_shape": Kind(0.3, "how many", "number"),
}
_MOST_COUNTED = 3  # four or five of a shape are too rare to be asked for in balance

# What a careless person says instead: shown to be near in color, look or number.
_MISTAKES = {
    "red": "purple",
    "green": "blue",
    "blue": "purple",
    "yellow": "green",
    "purple": "blue",
    "black": "blue",
    "ring": "square",
    "square": "triangle",
    "triangle": "square",
    "yes": "no",
    "no": "yes",
}
_WORDS = ("zero", "one", "two", "three", "four", "five")


def _candidates(scene: Scene) -> Iterator[tuple[str, str, str]]:
    """Every (kind, question, answer) that fits the scene: all its yes/no questions, and each that is unambiguous."""
    kinds = {thing.kind for thing in scene}
    shapes = [thing.shape for thing in scene]
    colors = [thing.color for thing in scene]
    quadrants = {thing.quadrant for thing in scene}
    for shape in SHAPES:
        for color in COLORS:
            yield "exists", f"Is there a {color} {shape}?", "yes" if (color, shape) in kinds else "no"
    for quadrant in QUADRANTS:
        yield "occupied", f"Is there anything in the {quadrant}?", "yes" if quadrant in quadrants else "no"
    for thing in scene:
        if shapes.count(thing.shape) == 1:
            yield "color", f"What color is the {thing.shape}?", thing.color
        if colors.count(thing.color) == 1:
            yield "shape", f"What shape is the {thing.color} object?", thing.shape
    yield "count", "How many objects are there?", str(len(scene))
    for shape in SHAPES:
        if shapes.count(shape) <= _MOST_COUNTED:
            yield "count_shape", f"How many {shape}s are there?", str(shapes.count(shape))


_TEXTS = {"exists": 18, "occupied": 4, "color": 3, "shape": 6, "count": 1, "count_shape": 3}  # wordings of a kind
_ANSWERS = {"exists": 2, "occupied": 2, "color": 6, "shape": 3, "count": MOST - FEWEST + 1, "count_shape": 4}


def questions(scenes: Sequence[Scene], rng: random.Random) -> list[Question]:
    """About 5.5 questions a scene, ordered by scene.

    Each yes/no text has exactly as many answers "yes" as "no"; the answers of other kinds are as balanced as the scenes
    allow. Scenes with few questions so far are chosen first.
    """
    pools: dict[tuple[str, str], dict[str, list[int]]] = {}
    for index, scene in enumerate(scenes):
        for kind, text, answer in _candidates(scene):
            pools.setdefault((kind, text), {}).setdefault(answer, []).append(index)
    asked = [0] * len(scenes)
    result: list[Question] = []
    for (kind, text), pool in sorted(pools.items()):
        wanted = max(1, round(KINDS[kind].per_image * len(scenes) / _TEXTS[kind] / _ANSWERS[kind]))
        if KINDS[kind].answer_type == "yes/no":
            wanted = min(wanted, *(len(pool.get(answer, ())) for answer in ("yes", "no")))
        for answer, indices in sorted(pool.items()):
            order = sorted(indices, key=lambda index: (asked[index], rng.random()))
            for index in order[:wanted]:
                asked[index] += 1
                result.append(Question(index, kind, text, answer))
    rng.shuffle(result)
    return sorted(result, key=lambda question: question.scene)


def ten_answers(question: Question, rng: random.Random) -> list[str]:
    """Ten answers: at least eight are right; in one question of eight, one or two are wrong or spelled differently."""
    answers = [question.answer] * 10
    fate = rng.random()
    if fate < 0.08:  # one or two are wrong
        for place in rng.sample(range(10), rng.randint(1, 2)):
            answers[place] = _mistake(question.answer, rng)
    elif fate < 0.12:  # right, but spelled differently: equal after the official normalization
        place = rng.randrange(10)
        answers[place] = _WORDS[int(question.answer)] if question.answer.isdigit() else f"{question.answer}."
    return answers


def _mistake(answer: str, rng: random.Random) -> str:
    if answer.isdigit():
        return str(max(0, int(answer) + rng.choice((-1, 1))))
    return _MISTAKES[answer]
