"""What goes wrong with weights, said in one line."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 20  # names in a message; a checkpoint of another model differs in hundreds


class WeightsError(ValueError):
    """Weights that do not fit; the message is one line naming the file or tensor."""


def listed(names: Iterable[str]) -> str:
    """Names for a message, comma-separated, with a count of those beyond the first twenty."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else ""
    return ", ".join(ordered[:_SHOWN]) + rest
