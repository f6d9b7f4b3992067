"""A linear classifier in closed form: ridge regression to one-hot targets, its ridge chosen on held-out images.

Legend: n examples, D features, C classes, T questions asked of every example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Shares of the mean variance of a feature. From the weakest that keeps float64 well conditioned to one that leaves
# little but the shares of the classes.
RIDGES = tuple(10.0**power for power in range(-6, 2))
HELD_OUT = 10  # one image in so many of the fitted ones chooses the ridge
_ROUNDING = 1e-10  # deviation of a feature, as a share of its greatest value, that means nothing in float64


class Examples(NamedTuple):
    """What a probe is fitted to, or tested on.

    Attributes:
        features: [n, D] float.
        labels: [n, T] int64, the class of each answer, from 0.
        image: [n] int64, the image that the example is of; those of one image are held out together.
    """

    features: Tensor
    labels: Tensor
    image: Tensor


class Result(NamedTuple):
    """Accuracy on the tested examples, mean over the T questions, as a fraction; and the ridge that was chosen."""

    accuracy: float
    ridge: float


class Linear(NamedTuple):
    """Scores ``x @ weight + bias``: weight [D, C], bias [C], float64."""

    weight: Tensor
    bias: Tensor

    def classes(self, features: Tensor) -> Tensor:
        """[n] int64: the class of the highest score for features [n, D]."""
        return (features.double() @ self.weight + self.bias).argmax(dim=1)


def fit_ridges(
    features: Tensor, labels: Tensor, num_classes: int, ridges: Sequence[float] = RIDGES, balanced: bool = False
) -> list[Linear]:
    """Minimize ``sum_i w_i |y_i - x_i W - b|^2 + ridge v |W|^2`` for each ridge, y one-hot.

    v is the mean variance of a feature: so a ridge means the same for features of any scale. One eigendecomposition of
    their covariance serves all ridges.

    Args:
        features: [n, D] float, n at least 1.
        labels: [n] int64 from 0 to ``num_classes`` - 1.
        balanced: weights w with the same sum for every class that occurs, else 1 / n for every example.
    """
    x, y = features.double(), F.one_hot(labels, num_classes).double()
    weights = (y / y.sum(dim=0).clamp(min=1)).sum(dim=1) if balanced else torch.ones_like(x[:, 0])
    weights = weights / weights.sum()
    mean_x, mean_y = weights @ x, weights @ y
    root = weights.sqrt()[:, None]
    x, y = (x - mean_x) * root, (y - mean_y) * root
    values, vectors = torch.linalg.eigh(x.t() @ x)
    values = values.clamp(min=0)
    # Where features are constant, what rounding left of them must not count.
    floor = (_ROUNDING * features.abs().max().double()).square().clamp(min=torch.finfo(torch.float64).tiny)
    variance = values.mean().maximum(floor)
    projected = vectors.t() @ (x.t() @ y)
    found = []
    for ridge in ridges:
        weight = vectors @ (projected / (values + ridge * variance)[:, None])
        found.append(Linear(weight, mean_y - mean_x @ weight))
    return found


def accuracy(truth: Tensor, predicted: Tensor, balanced: bool = False) -> float:
    """Share of right answers; ``balanced``: the mean over the classes in ``truth`` of the share of each.

    Args:
        truth: [n] int64, n at least 1.
        predicted: [n] int64.
    """
    right = (truth == predicted).double()
    if not balanced:
        return float(right.mean())
    return float(torch.stack([right[truth == label].mean() for label in truth.unique()]).mean())


def held_out(image: Tensor) -> Tensor:
    """[n] bool: the examples of every tenth image, counted in the order of their numbers, the first one included."""
    _, place = image.unique(return_inverse=True)
    return place % HELD_OUT == 0


def linear_probe(fitted: Examples, tested: Examples, balanced: bool = False) -> Result:
    """Fit a classifier for each question and count its right answers on ``tested``.

    The ridge, one for all questions, is the best on the held-out tenth of the fitted images, the strongest of equals;
    the classifiers are then fitted to all of ``fitted``. ``tested`` decides on nothing.

    Args:
        fitted: of two images at least.
        tested: one example at least.
        balanced: classes weigh the same in the fit and in the accuracy.
    """
    held = held_out(fitted.image)
    num_classes = int(max(fitted.labels.max(), tested.labels.max())) + 1
    scores = torch.zeros(len(RIDGES), dtype=torch.float64)
    for labels in fitted.labels.t():
        models = fit_ridges(fitted.features[~held], labels[~held], num_classes, balanced=balanced)
        guesses = (model.classes(fitted.features[held]) for model in models)
        scores += torch.tensor([accuracy(labels[held], guess, balanced) for guess in guesses], dtype=torch.float64)
    best = max(range(len(RIDGES)), key=lambda index: (float(scores[index]), RIDGES[index]))
    reached = []
    for labels, truth in zip(fitted.labels.t(), tested.labels.t(), strict=True):
        (model,) = fit_ridges(fitted.features, labels, num_classes, RIDGES[best : best + 1], balanced)
        reached.append(accuracy(truth, model.classes(tested.features), balanced))
    return Result(sum(reached) / len(reached), RIDGES[best])
