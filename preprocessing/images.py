"""Checks image files before they enter a shard. Their bytes pass untouched; only whether they decode is asked."""

import io
import warnings
from pathlib import Path

from PIL import Image

MAX_PIXELS = 50_000_000  # larger than any photo of the usual sets; decoding one takes 150 MB
PILLOW_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS: beyond it Pillow itself refuses to open a file


class BadImage(Exception):
    """An image that no training run could use. `str(error)` is the reason, in words that can be counted."""


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> bytes:
    """The bytes of the image file `path`. Raises BadImage when it is missing, broken or too large."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("is missing") from None
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror})") from None
    decode_image(data, max_pixels)
    return data


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded image, in the mode of its file. Raises BadImage unless all of it decodes and it is not too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd EXIF data; the bound below decides
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            raise BadImage("has too many pixels") from None
        except Exception as error:  # decoders raise whatever they like on broken files
            raise BadImage("is of no known format") from error
        if image.width * image.height > max_pixels:
            raise BadImage("has too many pixels")
        try:
            if image.format == "PNG":  # load() skips the checksums of PNG's pixel data
                image.verify()
                image = Image.open(io.BytesIO(data))
            image.load()
        except Exception as error:
            raise BadImage("does not decode") from error
    return image
