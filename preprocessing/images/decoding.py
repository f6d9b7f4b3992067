"""Reads, opens and decodes image files. `upright_rgb` follows the rules of training (eve_ds/data/transforms.py)."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from preprocessing.errors import UserError
from preprocessing.images.image_refs import FileImage, ImageRef
from preprocessing.shards.schema import MAX_PIXELS, MAX_PNG_TEXT

PngImagePlugin.MAX_TEXT_CHUNK = MAX_PNG_TEXT


class BadImage(Exception):
    """An image that cannot be trained on. `str(error)` is the reason; the manifest counts images by it."""


def read_image(image: ImageRef, room: memoryview | None = None) -> bytes | memoryview:
    """The bytes that `image` refers to, unchecked. A file that fits in `room` is read into it, and a slice is returned.

    Raises BadImage when they are missing or cannot be read, and UserError when a remote file system fails, which is
    no fault of the image.
    """
    try:
        if room is not None and isinstance(image, FileImage) and (data := image.read_into(room)) is not None:
            return data
        return image.read()
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("is missing") from None
    except OSError as error:
        if error.errno is None:  # pyarrow's: a connection broke while reading
            raise UserError(f"{image.name}: {' '.join(str(error).split())}; run the same command again") from None
        raise BadImage(f"cannot be read ({error.strerror})") from None
    except UserError:
        raise
    except ValueError as error:
        raise BadImage(str(error)) from None


def open_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read and no pixel decoded. Raises BadImage when that fails or it is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images and odd EXIF data
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            raise BadImage("has too many pixels") from None
        except Exception as error:  # decoders raise errors of all kinds on broken files
            raise BadImage("is of no known format") from error
    if image.width * image.height > max_pixels:
        raise BadImage("has too many pixels")
    return image


def decode_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded image, in the mode of its file. Raises BadImage unless all of it decodes and it is not too large."""
    image = open_image(data, max_pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if image.format == "PNG":  # load() skips the checksums of PNG's pixel data
                image.verify()
                image = Image.open(io.BytesIO(data))
            image.load()
        except Exception as error:
            raise BadImage("does not decode") from error
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned by the EXIF orientation, white behind transparency; the upper eight of sixteen bits of gray."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion would clip to 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")
