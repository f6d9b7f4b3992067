"""The error of a user's bad input, and names for its message. A leaf that anyone may import."""

from __future__ import annotations

from collections.abc import Iterable

_MAX_NAMES = 20  # in a message; a checkpoint of another model differs in hundreds


class UserError(ValueError):
    """Bad usage or bad input: commands print it as one line, ``error: …``, and end with exit code 2.

    The message is one line that names the file, row or option at fault and says what to do.
    """


def listed(names: Iterable[str]) -> str:
    """Names for a message, sorted and comma-separated, with a count of those beyond the first twenty."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - _MAX_NAMES} more" if len(ordered) > _MAX_NAMES else ""
    return ", ".join(ordered[:_MAX_NAMES]) + rest
