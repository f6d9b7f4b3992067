"""Images embedded in a page, as the model sees them: upright, with transparency on white."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from eve_ds.data.transforms import upright_rgb
from eve_ds.report.html import Html, tag

MAX_SIDE = 320  # pixels; larger images are reduced, so that the page stays at a few MB
PIXELATED = 100  # pixels; smaller images are enlarged without interpolation
EMBEDDED_AS_IS = {"PNG": "image/png", "JPEG": "image/jpeg", "GIF": "image/gif", "WEBP": "image/webp"}


class Images:
    """Loads the images named in a stage's samples. Names outside of ``folder`` are refused."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._cache: dict[str, Html] = {}

    def show(self, name: object, description: str) -> Html:
        """``<img>`` with the embedded image, or a placeholder that names the missing file."""
        key = f"{name}\n{description}"
        if key not in self._cache:
            self._cache[key] = self._show(name, description)
        return self._cache[key]

    def _show(self, name: object, description: str) -> Html:
        try:
            source, small = self._encode(str(name))
        except Exception as error:  # noqa: BLE001  # decoders raise any exception on corrupt bytes
            return tag("span", f"no image {name}", class_="absent", title=type(error).__name__)
        return tag("img", src=source, alt=description, class_="pixelated" if small else None, loading="lazy")

    def _encode(self, name: str) -> tuple[str, bool]:
        """Data URL of an image, and whether it is small.

        Raises:
            Exception: the file is missing, outside of the folder, or not an image.
        """
        path = (self._folder / name).resolve()
        if not path.is_relative_to(self._folder):
            raise ValueError(f"{name} lies outside {self._folder}")
        return embedded(path.read_bytes())


def embedded(content: bytes, side: int = MAX_SIDE) -> tuple[str, bool]:
    """Data URL of an image file as the model sees it, of at most ``side`` pixels, and whether it is small.

    Raises:
        Exception: it is no image, or a corrupt one.
    """
    with Image.open(io.BytesIO(content)) as opened:
        opened.load()
        image, kind = upright_rgb(opened), opened.format or ""
    size = max(image.size)
    if size > side or kind not in EMBEDDED_AS_IS:
        source = thumbnail(image, side)
    elif image is opened:  # nothing had to be changed
        source = _url(EMBEDDED_AS_IS[kind], content)
    else:
        source = _url("image/png", _encoded(image, "PNG"))
    return source, size < PIXELATED


def thumbnail(image: Image.Image, side: int) -> str:
    """Data URL of an RGB image, which is reduced to at most ``side`` pixels in place."""
    image.thumbnail((side, side))
    return _url("image/jpeg", _encoded(image, "JPEG", quality=85))


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _url(mime: str, content: bytes) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"
