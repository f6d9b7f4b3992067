"""JPEG draft decoding: smaller decoding of large files in training, and nothing else that anyone could notice."""

from __future__ import annotations

import functools
import io
import random

import numpy as np
import pytest
from PIL import Image

from eve_ds.data.transforms import build_transform, crop_box, decode_image
from preprocessing.errors import UserError

BICUBIC = Image.Resampling.BICUBIC
LEVELS = 3  # of 255; half a pixel to the side would be five to ten


@functools.cache
def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Amplitudes fall with frequency as in photos (Field 1987: about 1/f), in a gray that the colors share mostly."""
    draw = np.random.default_rng(seed)
    down, across = np.fft.fftfreq(height)[:, None] * height, np.fft.rfftfreq(width)[None] * width
    fall = np.maximum(np.hypot(down, across), 1) ** 1.2
    layers = np.fft.irfft2(np.fft.rfft2(draw.standard_normal((4, height, width))) / fall, (height, width))
    layers /= layers.std(axis=(1, 2), keepdims=True)
    pixels = 128 + 45 * (layers[0, ..., None] + 0.3 * layers[1:].transpose(1, 2, 0))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, orientation: int = 1, **options: object) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, exif=exif, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def difference(data: bytes, size: int, ids: range = range(4), **options: object) -> float:
    """Levels of 255 by which drafted and whole decoding differ, on average; 0 only where nothing was drafted."""
    settings = {"crop_scale": (0.5, 1.0), "flip": False, **options}
    on, off = (build_transform(size, True, draft=draft, **settings) for draft in (True, False))  # type: ignore[arg-type]
    return float(np.mean([np.abs(on(data, i).astype(int) - off(data, i)).mean() for i in ids]))


# Widths and heights that eight divides, and such that leave one or seven pixels over.
@pytest.mark.parametrize("side", [(480, 640), (479, 641), (513, 519)])
@pytest.mark.parametrize("size", [32, 96])
@pytest.mark.parametrize("crop_scale", [(0.5, 1.0), None])
def test_pixels_change_by_few_levels_on_average(side: tuple[int, int], size: int, crop_scale: object) -> None:
    assert 0 < difference(jpeg(photo(*side)), size, crop_scale=crop_scale) < LEVELS


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_image_has_the_same_crop(orientation: int) -> None:
    data = jpeg(photo(489, 649), orientation)  # what does not fit into blocks of eight may come out first
    assert 0 < difference(data, 32) < LEVELS and 0 < difference(data, 32, crop_scale=None) < LEVELS


@pytest.mark.parametrize("options", [{"progressive": True}, {"subsampling": 0}, {"subsampling": 2}])
def test_kinds_of_jpeg(options: dict[str, object]) -> None:
    assert 0 < difference(jpeg(photo(480, 640), **options), 64) < LEVELS


def test_gray_and_cmyk() -> None:
    for mode in ("L", "CMYK"):
        assert 0 < difference(jpeg(photo(480, 640).convert(mode)), 64) < LEVELS


def test_without_draft_pixels_are_exact() -> None:
    data = jpeg(photo(479, 641), orientation=6)
    whole = decode_image(data)
    box = crop_box(random.Random((3 << 72) | 5), *whole.size, (0.5, 1.0))
    expected = whole.crop(box).resize((32, 32), BICUBIC)
    assert np.array_equal(build_transform(32, True, flip=False, draft=False, seed=3)(data, 5), np.asarray(expected))


def test_evaluation_sees_the_whole_image() -> None:
    data = jpeg(photo(480, 640))
    expected = decode_image(data).resize((32, 32), BICUBIC)
    assert np.array_equal(build_transform(32, False, draft=True)(data, 0), np.asarray(expected))


@pytest.mark.parametrize("crop_scale", [(0.5, 1.0), None])
def test_no_draft_below_the_size_of_the_square(crop_scale: object) -> None:
    data = jpeg(photo(120, 160))
    assert difference(data, 96, range(8), crop_scale=crop_scale) == 0  # more than half of the whole image
    assert difference(data, 32, range(8), crop_scale=crop_scale) > 0


def test_other_formats_are_decoded_at_full_size() -> None:
    buffer = io.BytesIO()
    photo(480, 640).save(buffer, "PNG")
    assert difference(buffer.getvalue(), 32) == 0


@pytest.mark.parametrize("augmentation", ["color", "rand"])
def test_the_draws_are_the_same(augmentation: str) -> None:
    """Another box, side or color for one sample in eight would change more than this."""
    data = jpeg(photo(480, 640))
    options = {"flip": True, "augmentation": augmentation}
    assert all(0 < difference(data, 32, range(i, i + 1), **options) < LEVELS for i in range(8))


def test_a_jpeg_cut_off_is_corrupt() -> None:
    data = jpeg(photo(480, 640))
    with pytest.raises(UserError, match="cannot be decoded"):
        build_transform(32, True)(data[: len(data) // 2], 0)
