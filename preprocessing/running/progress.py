"""Progress, rate and remaining time of a long run: a bar on a terminal, else a line every ten seconds."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

from preprocessing.errors import printable

_SECONDS = 10.0


class Progress:
    """Counts finished units out of `total`, on stderr."""

    def __init__(self, what: str, total: int, unit: str = "row") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._skipped = 0
        self._start = self._last = time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit=unit, file=sys.stderr) if sys.stderr.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, message: str) -> None:
        """Print a line, above the bar where there is one."""
        tqdm.write(printable(f"{self._what}: {message}"), file=sys.stderr)

    def skip(self, count: int) -> None:
        """Add `count` units of an earlier run, which do not count for the rate."""
        self._done += count
        self._skipped += count
        if self._bar is not None:
            self._bar.initial += count
            self._bar.update(count)

    def add(self, count: int) -> None:
        """Add `count` finished units."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
            return
        now = time.monotonic()
        if now - self._last >= _SECONDS:
            self._last = now
            self.say(self.state(now - self._start))

    def state(self, seconds: float) -> str:
        """The line of progress, `seconds` after the start."""
        rate = (self._done - self._skipped) / max(seconds, 1e-9)
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate else "time left unknown"
        return f"{self._done} of {self._total} {self._unit}s, {rate:.1f} a second, {left}"
