"""Tools for the examples that a run stores for its report (``samples/samples.json`` and PNG files)."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

THUMBNAIL = 160  # pixels


class Thumbnails:
    """Images, shrunk and stored in ``RUN/samples/``, each once.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "samples"
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, data: bytes) -> str:
        """Store the image file ``data`` under ``name``, unless it is there. Returns the file's name."""
        file = self.folder / f"{name}.png"
        if not file.exists():
            with Image.open(io.BytesIO(data)) as full_size:
                small = full_size.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(file)
        return file.name


def evenly_spaced(total: int, count: int) -> list[int]:
    """At most ``count`` indices below ``total``, evenly spaced."""
    return [i * total // count for i in range(count)] if total > count else list(range(total))
