"""Image transforms: from a file's bytes to an upright RGB square, with augmentation seeded by the sample.

EVE's recipe (github.com/ssyze/EVE, dataset/__init__.py): RandomResizedCrop, horizontal flip, then nothing, color
jitter or RandAugment in training; a plain bicubic resize to a square in evaluation; mean = std = 0.5. The formulas are
torchvision's, which cannot be installed with this version of torch; this module needs Pillow and numpy only.
"""

from __future__ import annotations

import functools
import io
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from preprocessing.errors import UserError
from preprocessing.shards.schema import MAX_PIXELS

Augmentation = Literal["none", "color", "rand"]
Box = tuple[int, int, int, int]  # left, top, right, bottom, pixels

PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # as in preprocessing/images/decoding.py: every packed image can be read

_BICUBIC = Image.Resampling.BICUBIC
_BILINEAR = Image.Resampling.BILINEAR
_ORIENTATION = 0x0112
# EXIF orientation -> transposition that makes the image upright (EXIF 2.32, tag 0x0112; 1 is upright).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TRANSPOSED = (5, 6, 7, 8)  # stored with width and height exchanged
_RIGHT_TO_LEFT, _BOTTOM_TO_TOP = (2, 3, 6, 7), (3, 4, 7, 8)  # mirrored when made upright
_EXIF_CARRIERS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")

_JITTER = 0.4
_CROP_ASPECTS = (3 / 4, 4 / 3)
# RandAugment(2, 7) on a scale of 10, as in X-VLM's code, on which EVE's is based (EVE's own file was not published).
_RAND_OPS = 2
_RAND_LEVEL = 0.7
_RAND_PROBABILITY = 0.5
_RAND_FILL = (128, 128, 128)
_ENHANCE = _RAND_LEVEL * 1.8 + 0.1
_SHEAR = _RAND_LEVEL * 0.3
_TRANSLATE = _RAND_LEVEL * 10  # pixels, at every image size
_ROTATE = _RAND_LEVEL * 30  # degrees

# Matches "leftmost" and "bottomright", but not "bright" and "cleft".
_LEFT_OR_RIGHT = re.compile(r"(?<![a-z])(?:top|bottom|upper|lower)?(?:left|right)", re.IGNORECASE)


def may_mirror(texts: Sequence[str]) -> bool:
    """Whether the image may be mirrored: no text contains left or right."""
    return not any(_LEFT_OR_RIGHT.search(text) for text in texts)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to RGB: upright by its EXIF orientation, with transparency on white.

    Takes the first frame of an animation, and the upper eight of sixteen bits per channel.

    Raises:
        UserError: the image is incomplete, of a format unknown to Pillow, or larger than ``max_pixels``.
    """
    return _LazyImage(data, max_pixels).decode()


def upright_rgb(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """What ``decode_image`` gives of an image that is open already.

    Args:
        image: of any mode.
        orientation: EXIF's; None reads it from the image.
    Raises:
        Exception: any, of Pillow's decoders, if the pixels are not loaded yet.
    """
    transposition = _UPRIGHT.get(_orientation(image) if orientation is None else orientation)
    rgb = _to_rgb(image)
    return rgb if transposition is None else rgb.transpose(transposition)


class _LazyImage:
    """An image file of which only the header has been read. Raises UserError as ``decode_image`` does."""

    def __init__(self, data: bytes, max_pixels: int) -> None:
        try:
            self._image: Image.Image = Image.open(io.BytesIO(data))
            if self._image.width * self._image.height > max_pixels:
                raise UserError(f"{self._image.width} x {self._image.height} pixels, data.max_pixels={max_pixels}")
            # Only JPEG always has its EXIF data in the header; other formats may store them after the pixels.
            self._orientation = _orientation(self._image) if self._image.format == "JPEG" else None
            self._full_size = self._image.size
            self.scale = 1  # factor by which ``decode`` reduces the sides
        except Exception as error:  # decoders raise any exception on corrupt bytes
            raise _not_decoded(error) from error

    @property
    def jpeg_size(self) -> tuple[int, int] | None:
        """Width and height of a JPEG, upright, pixels; None for other formats."""
        if self._orientation is None:
            return None
        return self._full_size[::-1] if self._orientation in _TRANSPOSED else self._full_size

    def decode(self, min_size: tuple[int, int] | None = None) -> Image.Image:
        """Decode as ``decode_image`` does; with ``min_size`` (width, height), a JPEG may come out smaller.

        libjpeg can decode a JPEG at 1/2, 1/4 or 1/8 of its sides from the low frequencies of each block, in less time.
        The smallest of these sizes that is at least ``min_size`` is chosen.
        """
        try:
            if min_size is not None and self._orientation is not None:
                drafted = self._image.draft(None, min_size[::-1] if self._orientation in _TRANSPOSED else min_size)
                self.scale = round(self._full_size[0] / drafted[1][2]) if drafted else 1
            self._image.load()
            return upright_rgb(self._image, self._orientation)
        except Exception as error:  # as above
            raise _not_decoded(error) from error

    def scaled_box(self, box: Box) -> tuple[float, float, float, float]:
        """Coordinates of a box of the full-size upright JPEG in the image that ``decode`` returned.

        A decoded pixel covers exactly ``scale`` x ``scale`` pixels of the file. If the size is not divisible by
        ``scale``, the last stored column or row covers fewer of them and is padded; made upright, it may be the first.
        """
        assert self.jpeg_size is not None
        padding = [-side % self.scale / self.scale for side in self.jpeg_size]
        left = padding[0] if self._orientation in _RIGHT_TO_LEFT else 0.0
        top = padding[1] if self._orientation in _BOTTOM_TO_TOP else 0.0
        return (
            left + box[0] / self.scale,
            top + box[1] / self.scale,
            left + box[2] / self.scale,
            top + box[3] / self.scale,
        )


def _not_decoded(error: Exception) -> UserError:
    if isinstance(error, UnidentifiedImageError):
        return UserError("the image cannot be decoded (its format is unknown)")
    return UserError(f"the image cannot be decoded ({' '.join(str(error).split())})")


def _orientation(image: Image.Image) -> int:
    if not (_EXIF_CARRIERS & image.info.keys() or image.format == "TIFF"):
        return 1  # parsing EXIF data takes as long as decoding a small image
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  # a damaged EXIF block, on which the parser raises any exception, is ignored
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow's own conversion would clip to 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGB", image.size, (255, 255, 255))
        background.paste(image, mask=image.getchannel("A"))
        return background
    return image.convert("RGB")


def crop_box(rng: random.Random, width: int, height: int, scale: tuple[float, float]) -> Box:
    """RandomResizedCrop's box (left, top, right, bottom), pixels, as in torchvision's ``get_params``.

    Args:
        rng: random number generator.
        width, height: of the image, pixels.
        scale: range of the fraction of the area that is kept. The aspect ratio is log-uniform from 3/4 to 4/3; if ten
            draws do not fit into the image, the largest center crop with an aspect ratio in that range is returned.
    """
    low, high = math.log(_CROP_ASPECTS[0]), math.log(_CROP_ASPECTS[1])
    for _ in range(10):
        area = width * height * _uniform(rng, *scale)
        aspect = math.exp(_uniform(rng, low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.random() * (height - h + 1))
            left = int(rng.random() * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < _CROP_ASPECTS[0]:
        h = round(width / _CROP_ASPECTS[0])
    elif width / height > _CROP_ASPECTS[1]:
        w = round(height * _CROP_ASPECTS[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(image: Image.Image, rng: random.Random) -> Image.Image:
    """ColorJitter of torchvision: brightness, contrast, saturation by factors from 0.6 to 1.4, in random order."""
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    while enhancers:
        enhancer = enhancers.pop(int(rng.random() * len(enhancers)))
        image = enhancer(image).enhance(_uniform(rng, 1 - _JITTER, 1 + _JITTER))
    return image


def _affine(image: Image.Image, *inverse: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, inverse, _BILINEAR, fillcolor=_RAND_FILL)


# EVE's ten operations; ``sign``, +1 or -1, is the direction of the geometric ones. Affine maps are inverse matrices.
RAND_OPERATIONS: dict[str, Callable[[Image.Image, int], Image.Image]] = {
    "Identity": lambda image, sign: image,
    "AutoContrast": lambda image, sign: ImageOps.autocontrast(image),
    "Equalize": lambda image, sign: ImageOps.equalize(image),
    "Brightness": lambda image, sign: ImageEnhance.Brightness(image).enhance(_ENHANCE),
    "Sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(_ENHANCE),
    "ShearX": lambda image, sign: _affine(image, 1, -sign * _SHEAR, 0, 0, 1, 0),
    "ShearY": lambda image, sign: _affine(image, 1, 0, 0, -sign * _SHEAR, 1, 0),
    "TranslateX": lambda image, sign: _affine(image, 1, 0, -sign * _TRANSLATE, 0, 1, 0),
    "TranslateY": lambda image, sign: _affine(image, 1, 0, 0, 0, 1, -sign * _TRANSLATE),
    "Rotate": lambda image, sign: image.rotate(sign * _ROTATE, _BILINEAR, fillcolor=_RAND_FILL),
}


def rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """RandAugment(2, 7): two of the ten operations, drawn with replacement, each applied with probability 0.5."""
    operations = list(RAND_OPERATIONS.values())
    for _ in range(_RAND_OPS):
        operation = operations[int(rng.random() * len(operations))]
        sign = 1 if rng.random() < 0.5 else -1
        if rng.random() < _RAND_PROBABILITY:
            image = operation(image, sign)
    return image


@dataclass(frozen=True)
class Transform:
    """See ``build_transform``, which checks the arguments."""

    image_size: int
    train: bool
    augmentation: Augmentation
    crop_scale: tuple[float, float] | None
    flip: bool
    seed: int
    draft: bool
    max_pixels: int = MAX_PIXELS

    @property
    def is_random(self) -> bool:
        """Whether the output depends on the sample id."""
        return self.train and (self.crop_scale is not None or self.flip or self.augmentation != "none")

    def __call__(self, data: bytes, sample_id: int, mirror: bool = True, image_number: int = 0) -> np.ndarray:
        """Transform one image.

        Args:
            data: bytes of the image file.
            sample_id: together with ``seed`` and ``image_number`` the only seed of the random draws.
            mirror: False forbids mirroring; the other draws do not change.
            image_number: index among the images of the sample.
        Returns:
            [image_size, image_size, 3] uint8, RGB.
        Raises:
            UserError: the image cannot be decoded.
        """
        if not self.train:
            return np.asarray(self.square(decode_image(data, self.max_pixels)))
        rng = random.Random((self.seed << 72) | (image_number << 64) | sample_id)
        image = self._cropped(_LazyImage(data, self.max_pixels), rng)
        if self.flip and rng.random() < 0.5 and mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augmentation == "color":
            image = color_jitter(image, rng)
        elif self.augmentation == "rand":
            image = rand_augment(image, rng)
        return np.asarray(image)

    def _cropped(self, file: _LazyImage, rng: random.Random) -> Image.Image:
        """Decode, crop and resize to the square."""
        size = file.jpeg_size if self.draft else None
        if size is None:
            image = file.decode()
            # Not resize(box=...): its filter would see pixels outside of the box.
            return self.square(image if self.crop_scale is None else image.crop(self._box(rng, image.size)))
        box = self._box(rng, size)
        # Size of the full image at which the crop is as large as the square.
        width = -(-size[0] * self.image_size // (box[2] - box[0]))
        height = -(-size[1] * self.image_size // (box[3] - box[1]))
        image = file.decode((width, height))
        return self.square(image.crop(box)) if file.scale == 1 else self._resize_box(image, file.scaled_box(box))

    def _box(self, rng: random.Random, size: tuple[int, int]) -> Box:
        return (0, 0, *size) if self.crop_scale is None else crop_box(rng, *size, self.crop_scale)

    def _resize_box(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        """Crop and resize a box with fractional coordinates, which rounding would shift by up to half a pixel."""
        left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
        around = image.crop((left, top, right, bottom))
        inside = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        return around.resize((self.image_size, self.image_size), _BICUBIC, box=inside)

    def square(self, image: Image.Image) -> Image.Image:
        """Resize an RGB image to the square."""
        size = (self.image_size, self.image_size)
        return image if image.size == size else image.resize(size, _BICUBIC)


def build_transform(
    image_size: int,
    train: bool,
    augmentation: Augmentation = "none",
    crop_scale: Sequence[float] | None = (0.5, 1.0),
    flip: bool = True,
    seed: int = 0,
    draft: bool = True,
    max_pixels: int = MAX_PIXELS,
) -> Transform:
    """Build the transform from an image file to a training or evaluation image.

    Args:
        image_size: side of the square, pixels.
        train: False for evaluation, which only resizes to the square and ignores the following arguments.
        augmentation: none, color (jitter 0.4) or rand (RandAugment(2, 7) with EVE's ten operations).
        crop_scale: RandomResizedCrop's range of area fractions; None does not crop.
        flip: mirror half of the images, except those whose text says left or right.
        seed: of the random draws, at least 0.
        draft: let libjpeg decode a large JPEG at 1/2, 1/4 or 1/8 of its sides if the crop stays at least as large as
            the square, to which it is then resized. On COCO's photos this changes pixels by one to two levels of 255 on
            average, by four in the sharpest image. It never changes the draws or the evaluation.
        max_pixels: larger images are not decoded, as in the preparation.
    Raises:
        UserError: an argument is outside its range.
    """
    if image_size < 1:
        raise UserError(f"image_size={image_size}: must be at least 1")
    if augmentation not in get_args(Augmentation):
        raise UserError(f"augmentation={augmentation!r}: must be one of {', '.join(get_args(Augmentation))}")
    if seed < 0:
        raise UserError(f"seed={seed}: must be at least 0")
    scale = None
    if crop_scale is not None:
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise UserError(f"crop_scale={list(crop_scale)}: must be two numbers, 0 < low <= high <= 1")
        scale = (float(crop_scale[0]), float(crop_scale[1]))
    return Transform(image_size, train, augmentation, scale, flip, seed, draft, max_pixels)


def normalize(images: np.ndarray) -> Tensor:
    """Normalize [B, H, W, 3] uint8 to [B, 3, H, W] float32 in [-1, 1], EVE's mean and std: (x / 255 - 0.5) / 0.5."""
    # In numpy, with one thread: torch's threads would compete with the loader processes.
    planes = np.ascontiguousarray(
        images.transpose(0, 3, 1, 2)
    )  # before the conversion: a quarter of the memory traffic
    values = planes.astype(np.float32)
    values /= 127.5  # doubling is exact, so the result is bitwise that of the formula
    values -= 1
    return torch.from_numpy(values)


def normalize_on_device(images: Tensor) -> Tensor:
    """``normalize`` of a tensor, where it is: [B, H, W, 3] uint8 to [B, 3, H, W] float32, the same bits."""
    planes = images.permute(0, 3, 1, 2)
    minus_one, deviation = _mean_and_deviation(images.device)
    out = torch.empty(planes.shape, device=images.device)
    # One kernel reads the bytes, computes, and writes channels first. The divisor is a tensor, since on a GPU torch
    # multiplies by the reciprocal of a number, which rounds differently.
    return torch.addcdiv(minus_one, planes, deviation, out=out)


@functools.cache
def _mean_and_deviation(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.full((), -1.0, device=device), torch.full((), 127.5, device=device)


def _uniform(rng: random.Random, low: float, high: float) -> float:
    # Of random.Random's methods, only random() is guaranteed to be reproducible across Python versions.
    return low + (high - low) * rng.random()
