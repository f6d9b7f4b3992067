"""Images: from a file's bytes to an upright RGB square, augmented by draws that depend on the sample alone.

EVE's recipe (github.com/ssyze/EVE, dataset/__init__.py): RandomResizedCrop, mirror image, then nothing, color jitter
or RandAugment in training; a straight bicubic resize to a square in evaluation; mean = std = 0.5. Pillow and numpy
alone do the work: torchvision, whose formulae these are, cannot be installed beside this version of torch.
"""

from __future__ import annotations

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

from preprocessing.errors import DataError
from preprocessing.images.limits import MAX_PIXELS

Augmentation = Literal["none", "color", "rand"]
Box = tuple[int, int, int, int]  # left, top, right, bottom, pixels

PngImagePlugin.MAX_TEXT_CHUNK = 64 << 20  # as preprocessing/images/decoding.py has it: what was packed is trained on

_BICUBIC = Image.Resampling.BICUBIC
_BILINEAR = Image.Resampling.BILINEAR
_ORIENTATION = 0x0112
# EXIF orientation -> what makes the image upright (EXIF 2.32, tag 0x0112; 1 is upright already).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # stored with width and height exchanged
_RIGHT_TO_LEFT, _BOTTOM_TO_TOP = (2, 3, 6, 7), (3, 4, 7, 8)  # what is stored first comes out last
_EXIF_CARRIERS = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")

_JITTER = 0.4
_CROP_ASPECTS = (3 / 4, 4 / 3)
# RandAugment(2, 7) on a scale of 10, as X-VLM's code has it, on which EVE's builds (its own file was not published).
_RAND_OPS = 2
_RAND_LEVEL = 0.7
_RAND_PROBABILITY = 0.5
_RAND_FILL = (128, 128, 128)
_ENHANCE = _RAND_LEVEL * 1.8 + 0.1
_SHEAR = _RAND_LEVEL * 0.3
_TRANSLATE = _RAND_LEVEL * 10  # pixels, whatever the image's size
_ROTATE = _RAND_LEVEL * 30  # degrees

# "leftmost" and "bottomright" say a side; "bright" and "cleft" do not.
_SAYS_A_SIDE = re.compile(r"(?<![a-z])(?:top|bottom|upper|lower)?(?:left|right)", re.IGNORECASE)


def may_mirror(texts: Sequence[str]) -> bool:
    """Whether a mirrored image still fits the texts: none of them says left or right."""
    return not any(_SAYS_A_SIDE.search(text) for text in texts)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file: RGB, upright by its EXIF orientation, white behind transparency.

    Of an animation the first frame is taken; of sixteen bits a channel, the upper eight.

    Raises:
        DataError: the bytes are no whole image that Pillow knows, or one of more than `max_pixels`.
    """
    return _LazyImage(data, max_pixels).decode()


class _LazyImage:
    """An image file whose header has been read, and no pixel yet. Raises DataError like decode_image."""

    def __init__(self, data: bytes, max_pixels: int) -> None:
        try:
            self._image: Image.Image = Image.open(io.BytesIO(data))
            if self._image.width * self._image.height > max_pixels:
                raise DataError(f"{self._image.width} x {self._image.height} pixels, data.max_pixels={max_pixels}")
            # A JPEG's EXIF data stand in its header; other formats keep them behind the pixels, too.
            self._orientation = _orientation(self._image) if self._image.format == "JPEG" else None
            self._whole = self._image.size
            self.shrunk = 1  # times; by `decode`
        except Exception as error:  # on corrupt bytes, decoders raise whatever they stumble over
            raise _not_decoded(error) from error

    @property
    def jpeg_size(self) -> tuple[int, int] | None:
        """Width and height when upright, pixels, of a JPEG; None for other formats."""
        if self._orientation is None:
            return None
        return self._whole[::-1] if self._orientation in _LYING else self._whole

    def decode(self, least: tuple[int, int] | None = None) -> Image.Image:
        """The image as decode_image gives it; of a JPEG, with `least` (width, height), perhaps a smaller one.

        libjpeg can compute a JPEG at a half, a quarter or an eighth of its sides from the low frequencies of each block
        of pixels, in less time. Asked for `least`, the smallest of these sizes is made that is not below it.
        """
        try:
            if least is not None and self._orientation is not None:
                drafted = self._image.draft(None, least[::-1] if self._orientation in _LYING else least)
                self.shrunk = round(self._whole[0] / drafted[1][2]) if drafted else 1
            self._image.load()
            turn = _UPRIGHT.get(_orientation(self._image) if self._orientation is None else self._orientation)
            image = _to_rgb(self._image)
        except Exception as error:  # as above
            raise _not_decoded(error) from error
        return image if turn is None else image.transpose(turn)

    def shrunk_box(self, box: Box) -> tuple[float, float, float, float]:
        """Where a box of the whole upright JPEG lies in what `decode` made of it.

        A pixel is `shrunk` x `shrunk` of the file's, to the last fraction: where these do not fit in, the last stored
        column or row holds fewer of them and some filling, and turned upright it may be the first.
        """
        assert self.jpeg_size is not None
        slack = [-side % self.shrunk / self.shrunk for side in self.jpeg_size]
        left = slack[0] if self._orientation in _RIGHT_TO_LEFT else 0.0
        top = slack[1] if self._orientation in _BOTTOM_TO_TOP else 0.0
        return (
            left + box[0] / self.shrunk,
            top + box[1] / self.shrunk,
            left + box[2] / self.shrunk,
            top + box[3] / self.shrunk,
        )


def _not_decoded(error: Exception) -> DataError:
    if isinstance(error, UnidentifiedImageError):
        return DataError("the image cannot be decoded (its format is unknown)")
    return DataError(f"the image cannot be decoded ({' '.join(str(error).split())})")


def _orientation(image: Image.Image) -> int:
    if not (_EXIF_CARRIERS & image.info.keys() or image.format == "TIFF"):
        return 1  # parsing costs as much as decoding a small image
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # noqa: BLE001  # the parser raises whatever; a broken EXIF block does not spoil the image
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow's own conversion would clip to 255
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGB", image.size, (255, 255, 255))
        ground.paste(image, mask=image.getchannel("A"))
        return ground
    return image.convert("RGB")


def crop_box(draw: random.Random, width: int, height: int, scale: tuple[float, float]) -> Box:
    """RandomResizedCrop's box (left, top, right, bottom), pixels, as torchvision's `get_params` draws it.

    Args:
        draw: source of randomness.
        width, height: of the image, pixels.
        scale: range of the share of the area that is kept. The aspect ratio is log-uniform from 3/4 to 4/3; when ten
            draws do not fit into the image, the greatest middle part whose aspect is in that range is taken.
    """
    low, high = math.log(_CROP_ASPECTS[0]), math.log(_CROP_ASPECTS[1])
    for _ in range(10):
        area = width * height * _uniform(draw, *scale)
        aspect = math.exp(_uniform(draw, low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(draw.random() * (height - h + 1))
            left = int(draw.random() * (width - w + 1))
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < _CROP_ASPECTS[0]:
        h = round(width / _CROP_ASPECTS[0])
    elif width / height > _CROP_ASPECTS[1]:
        w = round(height * _CROP_ASPECTS[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def color_jitter(image: Image.Image, draw: random.Random) -> Image.Image:
    """Brightness, contrast and saturation by factors from 0.6 to 1.4, in random order (torchvision's ColorJitter)."""
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    while enhancers:
        enhancer = enhancers.pop(int(draw.random() * len(enhancers)))
        image = enhancer(image).enhance(_uniform(draw, 1 - _JITTER, 1 + _JITTER))
    return image


def _affine(image: Image.Image, *inverse: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, inverse, _BILINEAR, fillcolor=_RAND_FILL)


# EVE's ten operations; `sign`, +1 or -1, turns the geometric ones round. An affine map is given by its inverse.
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


def rand_augment(image: Image.Image, draw: random.Random) -> Image.Image:
    """RandAugment(2, 7): two of the ten operations, drawn with replacement, each applied with probability 0.5."""
    operations = list(RAND_OPERATIONS.values())
    for _ in range(_RAND_OPS):
        operation = operations[int(draw.random() * len(operations))]
        sign = 1 if draw.random() < 0.5 else -1
        if draw.random() < _RAND_PROBABILITY:
            image = operation(image, sign)
    return image


@dataclass(frozen=True)
class Transform:
    """See `build_transform`, which checks the arguments."""

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
        """Whether an image comes out different for another sample id."""
        return self.train and (self.crop_scale is not None or self.flip or self.augmentation != "none")

    def __call__(self, data: bytes, sample_id: int, mirror: bool = True, image_number: int = 0) -> np.ndarray:
        """One image, ready for `normalize`.

        Args:
            data: the image file's bytes.
            sample_id: what the random draws depend on, with the seed and `image`, and on nothing else.
            mirror: False where the text says left or right; the other draws stay the same.
            image: its number among the sample's images.
        Returns:
            [image_size, image_size, 3] uint8, RGB.
        Raises:
            DataError: the image cannot be decoded.
        """
        if not self.train:
            return np.asarray(self._square(decode_image(data, self.max_pixels)))
        draw = random.Random((self.seed << 72) | (image_number << 64) | sample_id)
        image = self._cropped(_LazyImage(data, self.max_pixels), draw)
        if self.flip and draw.random() < 0.5 and mirror:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.augmentation == "color":
            image = color_jitter(image, draw)
        elif self.augmentation == "rand":
            image = rand_augment(image, draw)
        return np.asarray(image)

    def _cropped(self, file: _LazyImage, draw: random.Random) -> Image.Image:
        """The square that is trained on, neither mirrored nor colored yet."""
        size = file.jpeg_size if self.draft else None
        if size is None:
            image = file.decode()
            # Cropped first: resize(box=...) would let the filter see pixels outside the box.
            return self._square(image if self.crop_scale is None else image.crop(self._box(draw, image.size)))
        box = self._box(draw, size)
        # The whole image's size at which the cut is as large as the square.
        width = -(-size[0] * self.image_size // (box[2] - box[0]))
        height = -(-size[1] * self.image_size // (box[3] - box[1]))
        image = file.decode((width, height))
        return self._square(image.crop(box)) if file.shrunk == 1 else self._cut(image, file.shrunk_box(box))

    def _box(self, draw: random.Random, size: tuple[int, int]) -> Box:
        return (0, 0, *size) if self.crop_scale is None else crop_box(draw, *size, self.crop_scale)

    def _cut(self, image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
        """The square out of a box that falls between pixels; rounded, it would shift what is seen by half a pixel."""
        left, top, right, bottom = math.floor(box[0]), math.floor(box[1]), math.ceil(box[2]), math.ceil(box[3])
        around = image.crop((left, top, right, bottom))
        inside = (box[0] - left, box[1] - top, box[2] - left, box[3] - top)
        return around.resize((self.image_size, self.image_size), _BICUBIC, box=inside)

    def _square(self, image: Image.Image) -> Image.Image:
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
    """What turns an image file into a training or evaluation image.

    Args:
        image_size: side of the square, pixels.
        train: False for evaluation, which resizes straight to the square and ignores all that follows.
        augmentation: none, color (jitter 0.4) or rand (RandAugment(2, 7) with EVE's ten operations).
        crop_scale: RandomResizedCrop's range of areas; None keeps whole images.
        flip: mirror half the images, but not those whose text says left or right.
        seed: of the draws, at least 0.
        draft: let libjpeg decode a large JPEG at a half, a quarter or an eighth of its sides where what is cut out of
            it stays at least as large as the square; the bicubic resize then does the rest. On COCO's photos this
            changes pixels by one to two levels of 255 on average, in the sharpest image by four, and never the draws
            or what evaluation sees.
        max_pixels: an image of more is not decoded, as in preparation.
    Raises:
        DataError: an argument is outside its range.
    """
    if image_size < 1:
        raise DataError(f"image_size={image_size}: must be at least 1")
    if augmentation not in get_args(Augmentation):
        raise DataError(f"augmentation={augmentation!r}: must be one of {', '.join(get_args(Augmentation))}")
    if seed < 0:
        raise DataError(f"seed={seed}: must be at least 0")
    scale = None
    if crop_scale is not None:
        if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise DataError(f"crop_scale={list(crop_scale)}: must be two numbers, 0 < low <= high <= 1")
        scale = (float(crop_scale[0]), float(crop_scale[1]))
    return Transform(image_size, train, augmentation, scale, flip, seed, draft, max_pixels)


def normalize(images: np.ndarray) -> Tensor:
    """[B, H, W, 3] uint8 to [B, 3, H, W] float32 from -1 to 1: (value / 255 - 0.5) / 0.5, EVE's mean and deviation."""
    # By numpy, in one thread: torch's threads would spin in the way of the loader's processes.
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))  # moved as bytes: a quarter of the traffic
    values = planes.astype(np.float32)
    values /= 127.5  # doubling is exact, so these are the formula's very bits
    values -= 1
    return torch.from_numpy(values)


def _uniform(draw: random.Random, low: float, high: float) -> float:
    # Python promises that random() stays the same from version to version, but not its other methods.
    return low + (high - low) * draw.random()
