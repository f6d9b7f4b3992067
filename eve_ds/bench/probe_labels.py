"""Labels of the shapes world for linear probes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from preprocessing.shapes.scenes import QUADRANTS, Scene


class Labels(NamedTuple):
    """n labeled images or cells, each with the answers to T questions.

    Attributes:
        image: [n] image indices.
        cell: [n] cells of the objects; 0 for labels of a whole image.
        answers: [n][T].
    """

    image: list[int]
    cell: list[int]
    answers: list[tuple[str | bool, ...]]


def object_labels(scenes: Sequence[Scene], attribute: str) -> Labels:
    """``attribute`` (shape, color or size) of each object of each image."""
    found = [(number, item.cell, (getattr(item, attribute),)) for number, scene in enumerate(scenes) for item in scene]
    return Labels(*map(list, zip(*found, strict=True))) if found else Labels([], [], [])


def top_left_labels(scenes: Sequence[Scene]) -> Labels:
    """Color of the object in the top left quarter, for images with exactly one object there."""
    labels = Labels([], [], [])
    for number, scene in enumerate(scenes):
        inside = [item for item in scene if item.quadrant == QUADRANTS[0]]
        if len(inside) == 1:
            labels.image.append(number)
            labels.cell.append(0)
            labels.answers.append((inside[0].color,))
    return labels


def presence_labels(scenes: Sequence[Scene], kinds: Sequence[tuple[str, str]]) -> Labels:
    """For every image: whether it contains an object of each (color, shape) in ``kinds``."""
    inside = [{item.kind for item in scene} for scene in scenes]
    answers: list[tuple[str | bool, ...]] = [tuple(kind in found for kind in kinds) for found in inside]
    return Labels(list(range(len(scenes))), [0] * len(scenes), answers)


def kinds_to_ask(*parts: Sequence[Scene]) -> list[tuple[str, str]]:
    """The (color, shape) pairs that some images of every part contain and others do not."""
    counts = [Counter(kind for scene in scenes for kind in {item.kind for item in scene}) for scenes in parts]
    sizes = [len(scenes) for scenes in parts]
    return sorted(kind for kind in counts[0] if all(0 < c[kind] < n for c, n in zip(counts, sizes, strict=True)))


def class_numbers(*parts: Labels) -> list[Tensor]:
    """Answers of each part as class indices [n, T] int64, numbered over the sorted answers of all parts."""
    names = sorted({answer for labels in parts for answers in labels.answers for answer in answers})
    place = {name: number for number, name in enumerate(names)}
    return [torch.tensor([[place[answer] for answer in answers] for answers in labels.answers]) for labels in parts]
