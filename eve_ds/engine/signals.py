"""SIGTERM and SIGUSR1 ask for a checkpoint and a clean exit; the trainer looks between steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """Context manager under which SIGTERM and SIGUSR1 set ``requested`` and do nothing else.

    Launchers often send a signal twice (to the process and to its group), so a second one changes nothing; a scheduler
    that will not wait sends SIGKILL.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        if self.requested:
            return  # a launcher sends TERM to the ranks that are left as soon as one has ended
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
