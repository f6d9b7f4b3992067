"""Reads image files and decodes them: what both `ImagePolicy` and the tools that look at shards need."""

import io
import warnings

from PIL import Image, PngImagePlugin

from preprocessing.images.locations import FileImage, ImageRef
from preprocessing.shards.schema import MAX_PIXELS, PILLOW_PIXELS, DataError

__all__ = ["MAX_PIXELS", "PILLOW_PIXELS", "BadImage", "decode_image", "read_image"]

# What a text or a color profile in a PNG may unpack to: Pillow's own bound of 1 MiB refuses sound images of many
# programs. All texts of a file together are held to the same 64 MiB by Pillow. Training has this bound, too.
PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20


class BadImage(Exception):
    """An image that no training run could use. `str(error)` is the reason, in words that can be counted."""


def read_image(image: ImageRef, room: memoryview | None = None) -> bytes | memoryview:
    """The bytes that `image` refers to, unchecked: those of a file that fits in `room` there, as a part of it.

    Raises BadImage when they are missing or cannot be read, and DataError when a remote file system fails: that is no
    fault of the image.
    """
    try:
        if room is not None and isinstance(image, FileImage) and (data := image.read_into(room)) is not None:
            return data
        return image.read()
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("is missing") from None
    except OSError as error:
        if error.errno is None:  # pyarrow's: a connection broke while reading
            raise DataError(f"{image.name}: {' '.join(str(error).split())}; run the same command again") from None
        raise BadImage(f"cannot be read ({error.strerror})") from None
    except DataError:
        raise
    except ValueError as error:
        raise BadImage(str(error)) from None


def decode_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
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
