"""Images of a run, as data inside the page."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from eve_ds.report.html import Html, tag

LARGEST = 320  # pixels: what is larger is made smaller, so that the page stays a few MB
PIXELATED = 100  # pixels: what is smaller is shown as the squares it has, not as a blur
EMBEDDED_AS_IS = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


class Images:
    """Finds the images that a stage's samples name. Names that lead out of ``folder`` are not followed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._cache: dict[str, Html] = {}

    def show(self, name: object, description: str) -> Html:
        """``<img>`` with the image in it, or a placeholder that says what is missing."""
        key = f"{name}\n{description}"
        if key not in self._cache:
            self._cache[key] = self._show(name, description)
        return self._cache[key]

    def _show(self, name: object, description: str) -> Html:
        try:
            source, small = self._encode(str(name))
        except Exception as error:  # noqa: BLE001  # decoders raise whatever they stumble over
            return tag("span", f"no image {name}", class_="absent", title=type(error).__name__)
        return tag("img", src=source, alt=description, class_="pixelated" if small else None, loading="lazy")

    def _encode(self, name: str) -> tuple[str, bool]:
        """Data address of an image, and whether it is small.

        Raises:
            Exception: not there, outside the folder, or no image.
        """
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder):
            raise ValueError(f"{name} lies outside {self._folder}")
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            size = max(image.size)
            mime = EMBEDDED_AS_IS.get(image.format or "")
            if mime is None or size > LARGEST:
                content, mime = _shrink(image), "image/jpeg"
        return f"data:{mime};base64,{base64.b64encode(content).decode()}", size < PIXELATED


def _shrink(image: Image.Image) -> bytes:
    copy = image.convert("RGB")
    copy.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
