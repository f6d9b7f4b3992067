"""A linear classifier in closed form: ridge regression to one-hot targets, its ridge chosen on held-out images.

Legend: n examples, D features, C classes, T questions asked of every example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Fractions of the mean variance of a feature: from the weakest that keeps float64 well conditioned, to one that
# predicts little more than the class frequencies.
RIDGES = tuple(10.0**power for power in range(-6, 2))
HELD_OUT = 10  # every tenth fitted image is held out to choose the ridge
_ROUNDING = 1e-10  # relative deviation of a feature that is rounding error in float64


class Examples(NamedTuple):
    """Examples to fit a probe to, or to test it on.

    Attributes:
        features: [n, D] float.
        labels: [n, T] int64, the class of each answer, from 0.
        image: [n] int64, image of each example; the examples of an image are held out together.
    """

    features: Tensor
    labels: Tensor
    image: Tensor


class Result(NamedTuple):
    """Accuracy on the tested examples (fraction, mean over the T questions), and the chosen ridge."""

    accuracy: float
    ridge: float


class Linear(NamedTuple):
    """Linear classifier ``x @ weight + bias``: weight [D, C], bias [C], float64."""

    weight: Tensor
    bias: Tensor

    def classes(self, features: Tensor) -> Tensor:
        """[n] int64: class with the highest score for features [n, D]."""
        return (features.double() @ self.weight + self.bias).argmax(dim=1)


def fit_ridges(
    features: Tensor, labels: Tensor, num_classes: int, ridges: Sequence[float] = RIDGES, balanced: bool = False
) -> list[Linear]:
    """Minimize ``sum_i w_i |y_i - x_i W - b|^2 + ridge v |W|^2`` for each ridge, y one-hot.

    v is the mean variance of a feature, so that the ridge does not depend on their scale. One eigendecomposition of the
    covariance is used for all ridges.

    Args:
        features: [n, D] float, n at least 1.
        labels: [n] int64 from 0 to ``num_classes`` - 1.
        balanced: weights w have the same sum for every class that occurs; otherwise each is 1 / n.
    """
    x, y = features.double(), F.one_hot(labels, num_classes).double()
    weights = (y / y.sum(dim=0).clamp(min=1)).sum(dim=1) if balanced else torch.ones_like(x[:, 0])
    weights = weights / weights.sum()
    mean_x, mean_y = weights @ x, weights @ y
    root = weights.sqrt()[:, None]
    x, y = (x - mean_x) * root, (y - mean_y) * root
    values, vectors = torch.linalg.eigh(x.t() @ x)
    values = values.clamp(min=0)
    # Rounding errors of constant features must not count as variance.
    floor = (_ROUNDING * features.abs().max().double()).square().clamp(min=torch.finfo(torch.float64).tiny)
    variance = values.mean().maximum(floor)
    projected = vectors.t() @ (x.t() @ y)
    found = []
    for ridge in ridges:
        weight = vectors @ (projected / (values + ridge * variance)[:, None])
        found.append(Linear(weight, mean_y - mean_x @ weight))
    return found


def accuracy(truth: Tensor, predicted: Tensor, balanced: bool = False) -> float:
    """Accuracy; ``balanced``: the mean over the classes in ``truth`` of the accuracy of each.

    Args:
        truth: [n] int64, n at least 1.
        predicted: [n] int64.
    """
    right = (truth == predicted).double()
    if not balanced:
        return float(right.mean())
    return float(torch.stack([right[truth == label].mean() for label in truth.unique()]).mean())


def held_out(image: Tensor) -> Tensor:
    """[n] bool: the examples of every tenth image, in the order of their numbers, starting with the first."""
    _, place = image.unique(return_inverse=True)
    return place % HELD_OUT == 0


def linear_probe(fitted: Examples, tested: Examples, balanced: bool = False) -> Result:
    """Fit a classifier for each question and measure its accuracy on ``tested``.

    The ridge, one for all questions, is the best on the held-out tenth of the fitted images (of equals, the strongest).
    The classifiers are then fitted to all of ``fitted``. ``tested`` does not influence any choice.

    Args:
        fitted: examples of at least two images.
        tested: at least one example.
        balanced: all classes have equal weight in the fit and in the accuracy.
    """
    held = held_out(fitted.image)
    num_classes = int(max(fitted.labels.max(), tested.labels.max())) + 1
    scores = torch.zeros(len(RIDGES), dtype=torch.float64)
    for labels in fitted.labels.t():
        models = fit_ridges(fitted.features[~held], labels[~held], num_classes, balanced=balanced)
        guesses = (model.classes(fitted.features[held]) for model in models)
        scores += torch.tensor([accuracy(labels[held], guess, balanced) for guess in guesses], dtype=torch.float64)
    best = max(range(len(RIDGES)), key=lambda index: (float(scores[index]), RIDGES[index]))
    accuracies = []
    for labels, truth in zip(fitted.labels.t(), tested.labels.t(), strict=True):
        (model,) = fit_ridges(fitted.features, labels, num_classes, RIDGES[best : best + 1], balanced)
        accuracies.append(accuracy(truth, model.classes(tested.features), balanced))
    return Result(sum(accuracies) / len(accuracies), RIDGES[best])
