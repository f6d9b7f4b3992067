"""Images on the pages are what the model sees: upright, on white; small ones as they are."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eve_ds.data.transforms import decode_image
from eve_ds.predict.search_page import Found, search_page
from eve_ds.report.images import embedded
from eve_ds.tasks.spec import Thumbnails


def turned(width: int, kind: str = "JPEG") -> bytes:
    """Left half black, right half white; its EXIF orientation 6 makes the black half the upper one."""
    image = Image.new("RGB", (width, width // 2), "white")
    image.paste("black", (0, 0, width // 2, width // 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    return file_of(image, kind, exif=exif)


def transparent(side: int) -> bytes:
    """All transparent; its color is black."""
    return file_of(Image.new("RGBA", (side, side)), "PNG")


def file_of(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(source: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))


def on_page(content: bytes, folder: Path) -> Image.Image:
    return opened(embedded(content)[0])


def on_search_page(content: bytes, folder: Path) -> Image.Image:
    (folder / "query").write_bytes(content)
    (source,) = re.findall(r'src="([^"]*)"', search_page([Found({"image": str(folder / "query")}, [])], folder))
    return opened(source)


def in_samples(content: bytes, folder: Path) -> Image.Image:
    thumbnails = Thumbnails(folder)
    return Image.open(thumbnails.folder / thumbnails.add("image", content))


SHOWN = [on_page, on_search_page, in_samples]


@pytest.mark.parametrize("shown", SHOWN)
@pytest.mark.parametrize("content", [turned(64), turned(900), turned(64, "PNG"), transparent(64), transparent(900)])
def test_an_image_is_shown_as_the_model_sees_it(
    content: bytes, shown: Callable[[bytes, Path], Image.Image], tmp_path: Path
) -> None:
    expected, found = decode_image(content), shown(content, tmp_path)
    assert found.mode == "RGB" and not found.getexif() and max(found.size) <= 320
    assert found.width / found.height == pytest.approx(expected.width / expected.height, rel=0.02)
    pixels = [np.asarray(image.resize((2, 8), Image.Resampling.NEAREST)).astype(int) for image in (found, expected)]
    assert np.abs(pixels[0] - pixels[1]).max() < 8


def test_a_small_image_that_is_upright_stays_the_file_it_is() -> None:
    plain = file_of(Image.effect_noise((40, 30), 90).convert("RGB"), "PNG")
    assert base64.b64decode(embedded(plain)[0].partition(",")[2]) == plain and embedded(plain)[1]
    gray = embedded(file_of(Image.effect_noise((40, 30), 90), "PNG"))[0]
    assert gray.startswith("data:image/png;")  # without the losses of JPEG
