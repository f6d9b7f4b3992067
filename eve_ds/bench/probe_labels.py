"""What linear probes are asked of the shapes world: the labels of each image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from preprocessing.shapes.scenes import QUADRANTS, Scene


class Labels(NamedTuple):
    """n labeled places, each with the answers to T questions.

    Attributes:
        image: [n] numbers of the images.
        cell: [n] cells of the objects; 0 where the whole image is meant.
        answers: [n][T].
    """

    image: list[int]
    cell: list[int]
    answers: list[tuple[str | bool, ...]]


def object_labels(scenes: Sequence[Scene], attribute: str) -> Labels:
    """Each object of each image: its ``attribute``, one of shape, color and size."""
    found = [(number, item.cell, (getattr(item, attribute),)) for number, scene in enumerate(scenes) for item in scene]
    return Labels(*map(list, zip(*found, strict=True))) if found else Labels([], [], [])


def top_left_labels(scenes: Sequence[Scene]) -> Labels:
    """The images with exactly one object in the top left quarter: its color."""
    labels = Labels([], [], [])
    for number, scene in enumerate(scenes):
        inside = [item for item in scene if item.quadrant == QUADRANTS[0]]
        if len(inside) == 1:
            labels.image.append(number)
            labels.cell.append(0)
            labels.answers.append((inside[0].color,))
    return labels


def presence_labels(scenes: Sequence[Scene], kinds: Sequence[tuple[str, str]]) -> Labels:
    """Every image: whether it holds an object of each (color, shape) of ``kinds``."""
    inside = [{item.kind for item in scene} for scene in scenes]
    answers: list[tuple[str | bool, ...]] = [tuple(kind in found for kind in kinds) for found in inside]
    return Labels(list(range(len(scenes))), [0] * len(scenes), answers)


def kinds_to_ask(*parts: Sequence[Scene]) -> list[tuple[str, str]]:
    """The (color, shape) that some images of every part hold and some do not."""
    counts = [Counter(kind for scene in scenes for kind in {item.kind for item in scene}) for scenes in parts]
    sizes = [len(scenes) for scenes in parts]
    return sorted(kind for kind in counts[0] if all(0 < c[kind] < n for c, n in zip(counts, sizes, strict=True)))


def class_numbers(*parts: Labels) -> list[Tensor]:
    """The answers of each part as [n, T] int64: their place among all different ones, sorted."""
    names = sorted({answer for labels in parts for answers in labels.answers for answer in answers})
    place = {name: number for number, name in enumerate(names)}
    return [torch.tensor([[place[answer] for answer in answers] for answers in labels.answers]) for labels in parts]
