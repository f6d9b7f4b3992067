"""Raw inputs to what a model takes: images of several kinds to pixels, texts to token ids; inputs joined to rows."""

from __future__ import annotations

import io
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from eve_ds.data.transforms import Transform, upright_rgb
from preprocessing.errors import UserError, shortened
from preprocessing.local_files import replace_surrogates
from preprocessing.text.tokenizer import Tokenizer

ImageInput: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray"
log = logging.getLogger(__name__)


class TooLargeError(UserError):
    """An image of more than ``max_pixels``."""


class UndecodableError(UserError):
    """Bytes that are no image: reading them again does not help."""


def to_square(image: ImageInput, transform: Transform) -> np.ndarray:
    """The evaluation transform of one image.

    Args:
        image: path of an image file, its bytes, a Pillow image, or an array, [H, W], [H, W, 3] or [H, W, 4] uint8.
        transform: of evaluation.
    Returns:
        [image_size, image_size, 3] uint8.
    Raises:
        UserError: as ``read_image``; names the file and says what to do.
    """
    try:
        return np.asarray(transform.square(read_image(image, transform.max_pixels)))
    except UserError as error:
        name = image if isinstance(image, str | Path) else "the image"
        more = " or raise max_pixels" if isinstance(error, TooLargeError) else ""
        raise UserError(f"{name}: {error}; give another image{more}") from error


def read_image(image: ImageInput, max_pixels: int) -> Image.Image:
    """An image as RGB, upright, with transparency on white: what ``decode_image`` gives of a file.

    Raises:
        TooLargeError: more than ``max_pixels``.
        UndecodableError: no image, or a damaged one.
        UserError: the file cannot be read, or ``image`` is of another kind. All three give the reason alone.
    """
    if isinstance(image, str | Path):
        image = _read_file(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))):
            raise UserError(
                f"is an array {list(image.shape)} of {image.dtype}, not [H, W], [H, W, 3] or [H, W, 4] of uint8"
            )
        image = Image.fromarray(image)
    if not isinstance(image, bytes | Image.Image):
        raise UserError(f"is of type {type(image).__name__}, not a path, bytes, a Pillow image or an array")
    try:
        opened = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        if opened.width * opened.height <= max_pixels:
            opened.load()
            return upright_rgb(opened)
    except MemoryError:
        raise UserError("no memory is left to decode it") from None
    except UnidentifiedImageError:
        raise UndecodableError("the image cannot be decoded (its format is unknown)") from None
    except Exception as error:  # decoders raise any exception on corrupt bytes
        raise UndecodableError(f"the image cannot be decoded ({' '.join(str(error).split())})") from error
    raise TooLargeError(f"{opened.width} x {opened.height} pixels, max_pixels={max_pixels}")


def _read_file(path: str | Path) -> bytes:
    try:
        pipe = stat.S_IFMT(os.stat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR)
        content = b"" if pipe else Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the name
        raise UserError(getattr(error, "strerror", None) or str(error)) from None
    if pipe:
        raise UserError("is a pipe, a socket or a device")
    return content


def to_ids(text: str, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """Token ids of one text, [CLS] and [SEP] included, at most ``max_length``; warns where words are cut.

    Raises:
        UserError: the text is empty, or no text.
    """
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"text {text!r}: is empty or no text; give a question, a caption or a statement")
    text = replace_surrogates(text)  # of bytes on the command line that are no UTF-8
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
