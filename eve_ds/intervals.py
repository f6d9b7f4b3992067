"""Intervals of a run, in optimizer steps (``1000``) or in epochs (``1 epoch``, ``0.5 epochs``)."""

from __future__ import annotations

import re
from fractions import Fraction

from preprocessing.errors import UserError

_EPOCHS = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})\s*epochs?\s*")


def check_interval(key: str, value: int | str) -> None:
    """Raise UserError unless ``value`` is a number of steps, 0 included, or a text as ``1 epoch``."""
    if isinstance(value, str) and not _epochs(value):
        raise UserError(f"{key}={value} must be a whole number of steps, or epochs, as in '1 epoch' or '0.5 epochs'")
    if isinstance(value, int) and value < 0:
        raise UserError(f"{key}={value} must be at least 0; see --help")


class Interval:
    """When something is due that the configuration wants every so many steps or epochs.

    Args:
        value: of the configuration, checked; 0 for never.
        samples_per_epoch: of the training split of all sources, as ``optimizer.epochs`` counts them.
        global_batch_size: samples of a step.
    """

    def __init__(self, value: int | str, samples_per_epoch: int, global_batch_size: int) -> None:
        # A fraction, not rounded: else ten epochs of 7.5 steps would be 80 steps long.
        epochs = _epochs(value) if isinstance(value, str) else None
        self.steps = Fraction(value) if epochs is None else epochs * samples_per_epoch / global_batch_size

    def due(self, step: int) -> bool:
        """Whether an interval is complete after ``step`` steps, and was not one step before."""
        return self.steps > 0 and step // self.steps > (step - 1) // self.steps


def _epochs(text: str) -> Fraction | None:
    """The number of epochs; None for another text, and for 0."""
    match = _EPOCHS.fullmatch(text)
    return Fraction(match[1]) or None if match else None
