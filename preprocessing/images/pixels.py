"""Opens images without decoding them, and turns decoded ones into what a person sees: upright, in RGB.

The rules of the second are those of training (eve_ds/data/transforms.py).
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from preprocessing.images.decoding import MAX_PIXELS, BadImage
from preprocessing.images.jpeg_header import jpeg_size


def upright_rgb(image: Image.Image) -> Image.Image:
    """RGB, turned by the EXIF orientation, white behind transparency; the upper eight of sixteen bits of gray."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow's own conversion would clip to 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")


def size_of_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(width, height) by the header, as `open_image` gives it but faster. Raises BadImage exactly where that does."""
    size = jpeg_size(data) or open_image(data, max_pixels).size
    if size[0] * size[1] > max_pixels:
        raise BadImage("has too many pixels")
    return size


def open_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read and no pixel decoded. Raises BadImage when that fails or it is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large images and odd EXIF data: the bound below decides
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError:
            raise BadImage("has too many pixels") from None
        except Exception as error:  # decoders raise whatever they like
            raise BadImage("is of no known format") from error
    if image.width * image.height > max_pixels:
        raise BadImage("has too many pixels")
    return image
