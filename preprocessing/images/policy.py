"""Checks each image before it is stored: it is refused, re-encoded smaller, or passed unchanged.

The result depends on the image's bytes and the options alone, so that workers can share the rows.
"""

import argparse
import io
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from preprocessing.errors import UserError
from preprocessing.images.decoding import BadImage, decode_image, open_image, upright_rgb
from preprocessing.images.fingerprints import NEAR_DISTANCE, HashList, content_key, perceptual_hashes
from preprocessing.running.storage import storage_path
from preprocessing.shards.reader import hashes_of
from preprocessing.shards.schema import MAX_PIXELS, PILLOW_PIXELS

CHECKS = ("full", "header")
IN_OTHER_SET = "is in a set of --exclude-images-of"
NEAR_OTHER_SET = "nearly duplicates one of --near-duplicates-of"
_QUALITY = 90
_LEAST_SIDE = 32


class ExcludedImage(BadImage):
    """An image that is left out on request, because another set has it. It does not count as a fault of the data."""


@dataclass(frozen=True)
class ImagePolicy:
    """How images are checked and stored; see `image_policy`. Can be pickled."""

    max_pixels: int = MAX_PIXELS
    check: str = "full"
    max_side: int | None = None
    quality: int = _QUALITY
    excluded: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))  # [n] sorted content keys
    near: HashList = field(default_factory=lambda: HashList.of([]))
    near_distance: int = NEAR_DISTANCE

    def apply(self, data: bytes | memoryview) -> bytes | memoryview:
        """The bytes to store: `data` itself, or a smaller JPEG where `max_side` asks for one.

        Raises BadImage when the image is broken or too large, ExcludedImage when it is to be left out.
        """
        self._refuse_listed(data)
        image = decode_image(data, self.max_pixels) if self.check == "full" else open_image(data, self.max_pixels)
        if self.max_side is not None and max(image.size) > self.max_side:
            data = _downscaled(image, self.max_side, self.quality)
            self._refuse_listed(data)  # the other set may have been made smaller by the same options
        if len(self.near):
            self._refuse_near(image)
        return data

    def _refuse_listed(self, data: bytes | memoryview) -> None:
        if len(self.excluded):
            key = np.uint64(content_key(data))
            index = int(np.searchsorted(self.excluded, key))
            if index < len(self.excluded) and self.excluded[index] == key:
                raise ExcludedImage(IN_OTHER_SET)

    def _refuse_near(self, image: Image.Image) -> None:
        try:
            hashes = perceptual_hashes(image)
        except Exception as error:  # decoders raise errors of all kinds on broken files
            raise BadImage("does not decode") from error
        if next(self.near.near(*hashes, self.near_distance), None) is not None:
            raise ExcludedImage(NEAR_OTHER_SET)


def _downscaled(image: Image.Image, max_side: int, quality: int) -> bytes:
    """The image as JPEG, its longer side `max_side` pixels."""
    try:
        small = upright_rgb(image)
        small.thumbnail((max_side, max_side), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
    except Exception as error:  # as above: with check=header the pixels are decoded here
        raise BadImage("does not decode") from error
    return buffer.getvalue()


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `image_policy`."""
    add = parser.add_argument_group("images").add_argument
    add("--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"drop larger images (default {MAX_PIXELS})")
    add("--check", choices=CHECKS, default="full", help="decode every image, or read its header only (default full)")
    add("--max-side", type=int, metavar="N", help="re-encode larger images as JPEG with this longer side")
    add(
        "--quality", type=int, default=_QUALITY, metavar="Q", help=f"of re-encoded images, 1 to 95 (default {_QUALITY})"
    )
    what = "prepared data set, split folder, or list made by `duplicates hash`"
    add("--exclude-images-of", nargs="+", default=[], metavar="DIR", help=f"leave out images that are in a {what}")
    add("--near-duplicates-of", nargs="+", default=[], metavar="DIR", help="the same for near duplicates too")
    add(
        "--near-distance",
        type=int,
        default=NEAR_DISTANCE,
        metavar="BITS",
        help=f"how many of 64 bits two near duplicates may differ in, by each of two hashes (default {NEAR_DISTANCE})",
    )


def image_policy(args: argparse.Namespace) -> ImagePolicy:
    """The policy of the options. Reads the sets whose images are to be left out. Raises UserError."""
    if not 1 <= args.max_pixels <= PILLOW_PIXELS:
        raise UserError(f"--max-pixels {args.max_pixels}: must be between 1 and Pillow's own bound, {PILLOW_PIXELS}")
    if args.max_side is not None and args.max_side < _LEAST_SIDE:
        raise UserError(f"--max-side {args.max_side}: must be at least {_LEAST_SIDE} pixels")
    if not 1 <= args.quality <= 95:
        raise UserError(f"--quality {args.quality}: must be between 1 and 95")
    if not 0 <= args.near_distance <= 32:
        raise UserError(f"--near-distance {args.near_distance}: must be between 0 and 32 bits")
    workers = getattr(args, "workers", 1)
    near = HashList.joined(hashes_of(storage_path(name), workers=workers) for name in args.near_duplicates_of)
    exact = [hashes_of(storage_path(name), False, workers).keys for name in args.exclude_images_of]
    for name, keys in zip(args.exclude_images_of, exact, strict=True):
        if not len(keys):
            raise UserError(f"--exclude-images-of {name}: holds no image; name the set that is to be kept out")
    nameless = replace(near, names=np.zeros(len(near), dtype="S1"))  # pickled for the workers, which need no names
    return ImagePolicy(
        args.max_pixels,
        args.check,
        args.max_side,
        args.quality,
        np.unique(np.concatenate([near.keys, *exact])),
        nameless,
        args.near_distance,
    )
