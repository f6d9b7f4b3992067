"""Images: every file mode comes out RGB and upright; augmentation follows torchvision's and X-VLM's formulae."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from eve_ds.data import transforms
from eve_ds.data.transforms import (
    RAND_OPERATIONS,
    build_transform,
    color_jitter,
    crop_box,
    decode_image,
    may_mirror,
    normalize,
    rand_augment,
)
from preprocessing.errors import UserError
from tests.support.shards import image_of


class Fixed(random.Random):
    """Draws that a test has chosen."""

    def __init__(self, draws: Sequence[float]) -> None:
        super().__init__(0)
        self._draws = list(draws)

    def random(self) -> float:
        return self._draws.pop(0)


def _noise(height: int = 12, width: int = 16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(20, 200, (height, width, 3)).astype(np.uint8)


def _file(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


# ---- decoding


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation(orientation: int, fmt: str) -> None:
    image = Image.fromarray(_noise())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = _file(image, fmt, exif=exif)
    upright = np.asarray(decode_image(data))
    assert np.array_equal(upright, np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")))
    if orientation == 6 and fmt == "PNG":  # stored lying on its left side: turned clockwise by a quarter
        assert np.array_equal(upright, np.rot90(_noise(), k=-1))


def test_damaged_exif_is_ignored() -> None:
    data = _file(Image.fromarray(_noise()), "JPEG", exif=b"Exif\x00\x00garbage that is no TIFF")
    assert decode_image(data).size == (16, 12)


def test_gray_palette_cmyk_bilevel() -> None:
    gray = Image.fromarray(_noise()[..., 0])
    assert np.array_equal(np.asarray(decode_image(_file(gray))), np.repeat(np.asarray(gray)[..., None], 3, axis=2))
    palette = Image.fromarray(_noise()).quantize(64)
    assert np.array_equal(np.asarray(decode_image(_file(palette))), np.asarray(palette.convert("RGB")))
    assert np.asarray(decode_image(_file(Image.new("1", (4, 4), 1)))).min() == 255
    cmyk = np.asarray(decode_image(_file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")))
    assert cmyk[..., 0].min() > 240 and cmyk[..., 1:].max() < 15  # no cyan, all magenta and yellow: red


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256], [32768, 40000, 65535]], dtype=np.uint16)
    out = np.asarray(decode_image(_file(Image.fromarray(values))))
    assert np.array_equal(out[..., 0], values >> 8) and np.array_equal(out[..., 0], out[..., 2])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_white_behind_transparency(mode: str) -> None:
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[0] = (10, 10, 10, 255)
    image = Image.fromarray(rgba)
    if mode == "P":
        image = Image.fromarray(np.array([[1, 1], [0, 0]], dtype=np.uint8), "L").convert("P")
        image.putpalette([0, 0, 0, 10, 10, 10])
        data = _file(image, transparency=0)
    else:
        data = _file(image.convert(mode))
    out = np.asarray(decode_image(data))
    assert (out[0] == 10).all() and (out[1] == 255).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    out = np.asarray(decode_image(_file(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    assert out.shape == (4, 4, 3) and (out == [255, 0, 0]).all()


@pytest.mark.parametrize("fmt", ["PNG", "JPEG"])
def test_corrupt_images(fmt: str) -> None:
    whole = image_of(0, 64, fmt)
    for data in (b"", b"no image", whole[: len(whole) // 2], whole[:30]):
        with pytest.raises(UserError, match="cannot be decoded") as error:
            decode_image(data)
        assert "\n" not in str(error.value)


# ---- cropping


def test_crop_box_follows_torchvision() -> None:
    # area 8000 x 0.75 = 6000, aspect exp(0) = 1: a square of round(sqrt(6000)) = 77; 4 places down, 24 across
    assert crop_box(Fixed([0.5, 0.5, 0.99, 0.5]), 100, 80, (0.5, 1.0)) == (12, 3, 89, 80)
    # the first draw (whole area at aspect 4/3: 103 wide) does not fit, the second is taken
    aspect = math.exp(math.log(3 / 4) + 0.25 * (math.log(4 / 3) - math.log(3 / 4)))
    w, h = round(math.sqrt(4000 * aspect)), round(math.sqrt(4000 / aspect))
    assert crop_box(Fixed([0.9999, 0.9999, 0.0, 0.25, 0.0, 0.0]), 100, 80, (0.5, 1.0)) == (0, 0, w, h)


def test_crop_box_falls_back_to_the_middle() -> None:
    draws = [0.5, 0.5] * 10
    assert crop_box(Fixed(draws), 300, 10, (0.9, 1.0)) == (143, 0, 156, 10)
    assert crop_box(Fixed(draws), 10, 300, (0.9, 1.0)) == (0, 143, 10, 156)


def test_crop_before_resize() -> None:
    data = _file(Image.fromarray(_noise(80, 100)))
    transform = build_transform(32, True, crop_scale=(0.5, 1.0), flip=False, seed=5)
    draw = random.Random((5 << 72) | 77)
    box = crop_box(draw, 100, 80, (0.5, 1.0))
    expected = Image.fromarray(_noise(80, 100)).crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(transform(data, 77), np.asarray(expected))


def test_crop_areas_and_aspects() -> None:
    draw = random.Random(1)
    boxes = np.array([crop_box(draw, 640, 480, (0.5, 1.0)) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    share = width * height / (640 * 480)
    assert boxes.min() >= 0 and boxes[:, 2].max() <= 640 and boxes[:, 3].max() <= 480
    assert share.min() > 0.49 and share.max() > 0.95
    assert (width / height).min() > 0.74 and (width / height).max() < 1.35


# ---- color


def test_color_jitter_follows_torchvision() -> None:
    image = _noise()
    # the last of three (saturation) first, by 1 + 0.4; then brightness, by 1 - 0.4; then contrast, by 1 + 0.2
    out = color_jitter(Image.fromarray(image), Fixed([0.99, 1.0, 0.0, 0.0, 0.0, 0.75]))

    def gray(x: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(x).convert("L")).astype(np.float64)

    def blend(base: np.ndarray | float, x: np.ndarray, factor: float) -> np.ndarray:
        return np.clip(base + factor * (x - base), 0, 255).astype(np.uint8)

    expected = blend(gray(image)[..., None], image, 1.4)
    expected = blend(0.0, expected, 0.6)
    expected = blend(float(int(gray(expected).mean() + 0.5)), expected, 1.2)
    assert np.abs(np.asarray(out).astype(int) - expected.astype(int)).max() <= 1


# ---- RandAugment, with X-VLM's formulae (dataset/randaugment.py) written anew


def _apply(name: str, image: np.ndarray, sign: int = 1) -> np.ndarray:
    return np.asarray(RAND_OPERATIONS[name](Image.fromarray(image), sign))


def test_it_has_eves_ten_operations() -> None:
    assert list(RAND_OPERATIONS) == [
        "Identity",
        "AutoContrast",
        "Equalize",
        "Brightness",
        "Sharpness",
        "ShearX",
        "ShearY",
        "TranslateX",
        "TranslateY",
        "Rotate",
    ]


def test_autocontrast() -> None:
    image = _noise()
    low, high = image.min(axis=(0, 1)).astype(float), image.max(axis=(0, 1)).astype(float)
    expected = np.clip((image - low) * 255 / (high - low), 0, 255)
    assert np.abs(_apply("AutoContrast", image) - expected).max() <= 1


def test_equalize() -> None:
    image = _noise(40, 40)
    for channel in range(3):
        values = image[..., channel]
        counts = np.bincount(values.ravel(), minlength=256)
        step = counts[counts != 0][:-1].sum() // 255
        table = np.clip((np.concatenate([[step // 2], counts[:-1]]).cumsum()) // step, 0, 255)
        assert np.array_equal(_apply("Equalize", image)[..., channel], table[values])


def test_brightness_and_sharpness() -> None:
    image = _noise()
    assert np.abs(_apply("Brightness", image) - np.clip(image * 1.36, 0, 255)).max() <= 1
    kernel = np.ones((3, 3))
    kernel[1, 1] = 5
    windows = np.lib.stride_tricks.sliding_window_view(image.astype(float), (3, 3), axis=(0, 1))
    smooth = (windows * kernel / 13).sum(axis=(-1, -2))
    expected = np.clip(smooth + 1.36 * (image[1:-1, 1:-1] - smooth), 0, 255)
    assert np.abs(_apply("Sharpness", image)[1:-1, 1:-1] - expected).max() <= 1.5


def test_translations_by_seven_pixels() -> None:
    image = _noise(20, 20)
    right, left = _apply("TranslateX", image), _apply("TranslateX", image, -1)
    assert np.array_equal(right[:, 7:], image[:, :-7]) and (right[:, :7] == 128).all()
    assert np.array_equal(left[:, :-7], image[:, 7:]) and (left[:, -7:] == 128).all()
    down = _apply("TranslateY", image)
    assert np.array_equal(down[7:], image[:-7]) and (down[:7] == 128).all()


def _bilinear(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The image at these points (a pixel's middle lies half a pixel inside it), gray where they fall outside."""
    height, width = image.shape[:2]
    left, top = np.floor(x - 0.5), np.floor(y - 0.5)
    right, down = x - 0.5 - left, y - 0.5 - top
    out = np.zeros(image.shape)
    for i, j, share in ((0, 0, (1 - right) * (1 - down)), (1, 0, right * (1 - down)), (0, 1, (1 - right) * down)):
        out += _at(image, left + i, top + j) * share[..., None]
    out += _at(image, left + 1, top + 1) * (right * down)[..., None]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    return np.where(inside[..., None], out, 128)


def _at(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return image[np.clip(y, 0, image.shape[0] - 1).astype(int), np.clip(x, 0, image.shape[1] - 1).astype(int)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_every_pixel_comes_from_where_the_map_says(name: str, sign: int) -> None:
    image = _noise(31, 40)
    y, x = np.mgrid[0:31, 0:40] + 0.5
    angle = math.radians(21) * sign  # counter-clockwise about the middle; y grows downwards
    across, down = x - 20, y - 15.5
    source = {
        "ShearX": (x - sign * 0.21 * y, y),
        "ShearY": (x, y - sign * 0.21 * x),
        "TranslateX": (x - sign * 7, y),
        "TranslateY": (x, y - sign * 7),
        "Rotate": (
            20 + math.cos(angle) * across - math.sin(angle) * down,
            15.5 + math.sin(angle) * across + math.cos(angle) * down,
        ),
    }[name]
    assert np.abs(_apply(name, image, sign) - _bilinear(image, *source)).max() <= 1


def test_rotation_by_21_degrees() -> None:
    image = np.zeros((41, 41, 3), dtype=np.uint8)
    image[20, 36] = 255  # 16 pixels right of the middle
    out = _apply("Rotate", image)[..., 0].astype(int)
    angle = math.radians(21)
    y, x = np.unravel_index(np.where(out == 128, 0, out).argmax(), out.shape)
    assert abs(x - (20 + 16 * math.cos(angle))) <= 1 and abs(y - (20 - 16 * math.sin(angle))) <= 1  # counter-clockwise
    assert (out[0, 0], out[-1, -1]) == (128, 128)


def test_rand_augment_draws_two_with_probability_one_half() -> None:
    image = Image.fromarray(_noise(20, 20))
    # TranslateX (index 7) to the right, applied; then Brightness, not applied
    out = rand_augment(image, Fixed([0.75, 0.1, 0.49, 0.35, 0.1, 0.51]))
    assert np.array_equal(np.asarray(out), _apply("TranslateX", _noise(20, 20)))


# ---- the whole


def test_evaluation_is_a_straight_resize() -> None:
    data = _file(Image.fromarray(_noise(80, 100)))
    expected = Image.fromarray(_noise(80, 100)).resize((32, 32), Image.Resampling.BICUBIC)
    transform = build_transform(32, False, "rand")
    assert np.array_equal(transform(data, 1), np.asarray(expected))
    assert np.array_equal(transform(data, 1), transform(data, 2))


def _bicubic(lines: np.ndarray, size: int) -> np.ndarray:
    """[n, ...] to [size, ...] with Keys' kernel (a = -1/2), as wide as the lines shrink: torchvision's antialias."""
    scale = len(lines) / size
    distance = np.abs((np.arange(len(lines)) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / max(scale, 1))
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return np.tensordot(weights / weights.sum(axis=1, keepdims=True), lines, 1)


@pytest.mark.parametrize("size", [32, 120])
def test_the_resize_is_bicubic_and_antialiased(size: int) -> None:
    image = _noise(80, 100)
    across = _bicubic(image.transpose(1, 0, 2).astype(float), size).round().clip(0, 255)  # Pillow rounds in between
    expected = _bicubic(across.transpose(1, 0, 2), size).clip(0, 255)
    assert np.abs(build_transform(size, False)(_file(Image.fromarray(image)), 0) - expected).max() <= 1.5


def test_no_resize_where_the_size_is_right() -> None:
    data = image_of(3, 32)
    for train in (False, True):
        out = build_transform(32, train, "none", crop_scale=None, flip=False)(data, 9)
        assert np.array_equal(out, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("augmentation", ["none", "color", "rand"])
def test_draws_depend_only_on_the_sample(augmentation: transforms.Augmentation) -> None:
    data = image_of(1, 48)
    transform = build_transform(32, True, augmentation, seed=4)
    random.seed(0)
    np.random.seed(0)
    first = [transform(data, i) for i in range(6)]
    random.seed(1)
    again = [build_transform(32, True, augmentation, seed=4)(data, i) for i in reversed(range(6))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(first[0], other) for other in first[1:])
    other_seed = [build_transform(32, True, augmentation, seed=5)(data, i) for i in range(6)]
    assert not all(np.array_equal(a, b) for a, b in zip(first, other_seed, strict=True))
    assert not all(np.array_equal(transform(data, i, image_number=1), first[i]) for i in range(6))


def test_half_of_the_images_are_mirrored() -> None:
    data = image_of(2, 32)
    plain = np.asarray(Image.open(io.BytesIO(data)))
    transform = build_transform(32, True, crop_scale=None)
    mirrored = 0
    for i in range(200):
        assert np.array_equal(transform(data, i, mirror=False), plain)
        out = transform(data, i)
        mirrored += np.array_equal(out, plain[:, ::-1])
        assert np.array_equal(out, plain) or np.array_equal(out, plain[:, ::-1])
    assert 70 < mirrored < 130


def test_mirroring_does_not_change_the_other_draws() -> None:
    data = image_of(2, 48)
    transform = build_transform(32, True, "color")
    for i in range(20):
        free, kept = transform(data, i), transform(data, i, mirror=False)
        assert np.abs(np.sort(free, axis=None).astype(int) - np.sort(kept, axis=None).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a dog on the left"], False),
        (["Right of it"], False),
        (["the leftmost one"], False),
        (["bottomright corner"], False),
        (["left-hand side"], False),
        (["a bright red bus, upright, in a cleft"], True),
        (["what is there", "right"], False),
        (["what is there", "a bus"], True),
        ([], True),
    ],
)
def test_which_texts_may_be_mirrored(texts: list[str], expected: bool) -> None:
    assert may_mirror(texts) is expected


def test_normalize_is_mean_and_deviation_one_half() -> None:
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    out = normalize(images)
    expected = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"augmentation": "mixup"}, "augmentation='mixup'"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(options: dict[str, object], name: str) -> None:
    with pytest.raises(UserError, match=name.replace("(", r"\(")):
        build_transform(**{"image_size": 32, "train": True, **options})  # type: ignore[arg-type]
