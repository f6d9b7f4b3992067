"""The largest micro-batch that fits a device."""

from __future__ import annotations

from collections.abc import Callable


def largest(peak: Callable[[int], int], limit: int, most: int, start: int = 1) -> int:
    """Rows with ``peak(rows) <= limit``, at most 1/64 below the largest number of 1 .. most; 0 if not one fits.

    ``peak`` grows with the rows, nearly in a line, and is slow to work out: the next try is where the line through two
    known points meets the limit.

    Args:
        peak: rows -> bytes.
        limit: bytes.
        most: rows.
        start: the first try.
    """
    known: dict[int, int] = {}
    fits, over, rows = 0, most + 1, min(start, most)
    while over - fits > 1 + fits // 64:
        known[rows] = peak(rows)
        if known[rows] <= limit:
            fits = rows
        else:
            over = rows
        rows = min(max(_meeting(known, limit, fits, over), fits + 1 + fits // 64), over - 1)
    return fits


def _meeting(known: dict[int, int], limit: int, fits: int, over: int) -> int:
    """Rows at which a line meets ``limit``: through both ends of the bracket, or through the two nearest points."""
    if len(known) == 1 or not fits:
        return 2 * fits or over // 2
    low, high = (fits, over) if over in known else sorted(known)[-2:]
    slope = max((known[high] - known[low]) / (high - low), 1.0)
    return int(low + (limit - known[low]) / slope)
