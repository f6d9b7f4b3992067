"""Logging as a command sets it up, for one test."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def logging_restored() -> Iterator[None]:
    """Undo at the end what ``eve_ds.errors.setup_logging`` changes, so that later tests find logging as it was."""
    logger = logging.getLogger("eve_ds")
    before = logger.level, logger.propagate, list(logger.handlers), warnings.formatwarning
    try:
        yield
    finally:
        logger.level, logger.propagate, logger.handlers, warnings.formatwarning = before
        logger.manager._clear_cache()  # type: ignore[attr-defined]  # of which levels are enabled
