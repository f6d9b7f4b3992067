"""Finds captions and image names in the columns of a table, and in the .json file beside an image."""

import argparse
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any
from urllib.parse import unquote, urlsplit

from preprocessing.images.image_folder import coco_key
from preprocessing.local_files import parse_json
from preprocessing.text.cleaning import lines_of

CAPTION_COLUMNS = ("txt", "caption", "text", "TEXT", "captions", "sentences", "sentences_raw", "sentence")
NAME_COLUMNS = (
    *("filename", "file_name", "filepath", "image_path", "path", "url", "image_url", "coco_url", "image_id"),
    *("cocoid", "coco_id"),
)
_COCO_COLUMNS = ("cocoid", "coco_id")
_NUMBERED = re.compile(r"(caption|captions|sentence|text)_?(\d+)")
_RAW = "raw"  # the text of Karpathy's sentences {raw, tokens, sentid, imgid}


def add_caption_column_argument(parser: argparse.ArgumentParser) -> None:
    """Declare `--caption-column`."""
    parser.add_argument(
        "--caption-column",
        nargs="+",
        default=[],
        metavar="NAME",
        help="parquet columns, or fields of the .json files, that hold the captions, texts or lists of texts: all that "
        f"are named (default: the first there is of {', '.join(CAPTION_COLUMNS)}, or caption_0, caption_1, …)",
    )


def caption_columns(there: Iterable[str], wanted: Sequence[str]) -> list[str]:
    """Which of the columns `there` hold captions: the `wanted` ones, or without those, the ones with a known name."""
    names = list(there)
    if wanted:
        return [name for name in dict.fromkeys(wanted) if name in names]
    known = next((name for name in CAPTION_COLUMNS if name in names), None)
    if known is not None:
        return [known]
    numbered = [match for match in map(_NUMBERED.fullmatch, names) if match]
    return [match[0] for match in sorted(numbered, key=lambda match: int(match[2])) if match[1] == numbered[0][1]]


def captions_in(record: Mapping[str, Any], columns: Iterable[str]) -> list[str]:
    """All captions in the columns of a record."""
    return [text for name in columns for text in texts_in(record.get(name))]


def texts_in(value: Any) -> list[str]:
    """The captions in a value, which is a text or a list of texts. A null in a list is an empty caption."""
    if not isinstance(value, list):
        text = _text(value)
        return [] if text is None else [text]
    texts = ["" if one is None else _text(one) for one in value]
    return [] if None in texts else [text for text in texts if text is not None]


def _text(value: Any) -> str | None:
    """A caption: a text, or the text in an object as in Karpathy's files. None for anything else."""
    if isinstance(value, dict):
        value = value.get(_RAW)
    return value if isinstance(value, str) else None


@lru_cache(maxsize=1)
def parse_side_json(content: bytes) -> Any:
    """The value of the .json file beside an image, parsed once for its captions, names and split. Raises ValueError."""
    return parse_json(content)


def decode_text(content: bytes) -> list[str]:
    """The captions of a .txt file. Raises ValueError when it is not UTF-8."""
    try:
        return lines_of(content.decode())
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8 text") from None


def decode_json(content: bytes, wanted: Sequence[str]) -> list[str]:
    """The captions of a .json file, if it has any. Raises ValueError when it is not JSON."""
    record = parse_side_json(content)
    if not isinstance(record, dict):
        return []
    if wanted:
        return captions_in(record, wanted)
    columns = [name for name in CAPTION_COLUMNS if texts_in(record.get(name))]
    return captions_in(record, columns[:1] or caption_columns(record, ()))


def names_in_json(content: bytes) -> tuple[str, ...]:
    """The names that an exclusion list may use for the image that a .json file belongs to."""
    try:
        record = parse_side_json(content)
    except ValueError:
        return ()
    return tuple(image_names(record)) if isinstance(record, dict) else ()


def image_names(record: Mapping[str, Any]) -> Iterator[str]:
    """The names that an exclusion list may use for the image of a record: its file, the end of its address, its ids."""
    for column in NAME_COLUMNS:
        value = record.get(column)
        if isinstance(value, int) and not isinstance(value, bool):
            yield coco_key(value) if column in _COCO_COLUMNS else str(value)
        elif isinstance(value, str) and value:
            yield unquote(urlsplit(value).path) if "://" in value else value
