"""Raw inputs to what a model takes: images of several kinds to pixels, texts to token ids; inputs joined to rows."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from eve_ds.data.transforms import Transform, decode_image, upright_rgb
from preprocessing.errors import UserError, shortened
from preprocessing.local_files import check_regular
from preprocessing.text.tokenizer import Tokenizer

ImageInput: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray"
log = logging.getLogger(__name__)


def to_square(image: ImageInput, transform: Transform) -> np.ndarray:
    """The evaluation transform of one image.

    Args:
        image: path of an image file, its bytes, a Pillow image, or an array, [H, W], [H, W, 3] or [H, W, 4] uint8.
        transform: of evaluation.
    Returns:
        [image_size, image_size, 3] uint8.
    Raises:
        UserError: no such file, not an image, or larger than ``transform.max_pixels``; names the file.
    """
    name = str(image) if isinstance(image, str | Path) else "the image"
    try:
        rgb = _decoded(image, transform.max_pixels)
    except UserError as error:
        more = " or raise max_pixels" if "max_pixels" in str(error) else ""
        raise UserError(
            f"{name}: {str(error).replace('data.max_pixels', 'max_pixels')}; give another image{more}"
        ) from (error)
    return np.asarray(transform.square(rgb))


def _decoded(image: ImageInput, max_pixels: int) -> Image.Image:
    if isinstance(image, bytes):
        return decode_image(image, max_pixels)
    if isinstance(image, str | Path):
        return decode_image(read_file(image), max_pixels)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise UserError(
                f"is an array {list(image.shape)} of {image.dtype}, not [H, W], [H, W, 3] or [H, W, 4] of uint8"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise UserError(f"is of type {type(image).__name__}, not a path, bytes, a Pillow image or an array")
    if image.width * image.height > max_pixels:
        raise UserError(f"{image.width} x {image.height} pixels, max_pixels={max_pixels}")
    try:
        image.load()
        return upright_rgb(image)
    except Exception as error:  # decoders raise any exception on corrupt bytes
        raise UserError(f"the image cannot be decoded ({' '.join(str(error).split())})") from error


def read_file(path: str | Path) -> bytes:
    """The bytes of an image file. Raises UserError, without the file's name, if it cannot be read."""
    check_regular(path)
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise UserError(getattr(error, "strerror", None) or str(error)) from None


def to_ids(text: str, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """Token ids of one text, [CLS] and [SEP] included, at most ``max_length``; warns where words are cut.

    Raises:
        UserError: the text is empty, or no text.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"text {text!r}: is empty or no text; give a question, a caption or a statement")
    ids = tokenizer.encode(text, max_length)
    if len(ids) == max_length and len(tokenizer.encode(text, max_length + 1)) > max_length:
        log.warning("%r is longer than the model's %d tokens; its end is ignored", shortened(text), max_length)
    return ids


def rows_of(**inputs: Any) -> tuple[list[tuple[Any, ...]], bool]:
    """Join inputs to rows: lists must have one length, and what is no list goes with every row.

    Returns:
        the rows, and whether there was no list, so that the caller gives one result in place of a list.
    Raises:
        UserError: two lists of different lengths.
    """
    lists = {name: value for name, value in inputs.items() if isinstance(value, list | tuple)}
    lengths = {len(value) for value in lists.values()}
    if len(lengths) > 1:
        raise UserError(
            f"{' and '.join(f'{len(value)} {name}' for name, value in lists.items())}: lists must have the same length"
        )
    count = lengths.pop() if lengths else 1
    columns = [value if name in lists else [value] * count for name, value in inputs.items()]
    return list(zip(*columns, strict=True)), not lists


def distinct(images: Sequence[ImageInput]) -> tuple[list[ImageInput], list[int]]:
    """The images without repetitions of the same object, and the place of each of ``images`` among them."""
    keys = [image if isinstance(image, str | Path) else id(image) for image in images]
    unique = dict(zip(keys, images, strict=True))
    place = {key: number for number, key in enumerate(unique)}
    return list(unique.values()), [place[key] for key in keys]
