"""Sound inputs as {path: content}, from which targets start."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def dumped(value: Any) -> bytes:
    """As JSON."""
    return json.dumps(value).encode()


def lines(texts: Iterable[str]) -> bytes:
    """A line each."""
    return "".join(f"{text}\n" for text in texts).encode()


def tree_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
