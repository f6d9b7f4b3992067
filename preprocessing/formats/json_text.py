"""JSON as it is met: captions cut in the middle of an emoji leave half of a UTF-16 pair behind."""

import json
import re
from typing import Any

from preprocessing.shards.schema import shortened

_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPED_BYTES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # json takes the latter, which is no UTF-8
_HALF = re.compile("[\ud800-\udfff]")


def parse_json(text: str | bytes) -> Any:
    """The value of `text`; halves of UTF-16 pairs in it, which no UTF-8 file can hold, become U+FFFD.

    Raises ValueError (json.JSONDecodeError, UnicodeDecodeError), also for what is nested too deep.
    """
    try:
        value = json.loads(text)
        found = _ESCAPED.search(text) if isinstance(text, str) else _ESCAPED_BYTES.search(text)
        return _mended(value) if found else value
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", "", 0) from None


def shown(value: Any) -> str:
    """The first forty characters of `value` as JSON, for messages, without secrets."""
    try:
        return shortened(json.dumps(value), 40)
    except RecursionError:  # what could just be read may be too deep to be written
        return "nested too deep"


def whole_characters(text: str) -> str:
    """`text` with U+FFFD for each half of a UTF-16 pair, and for each byte of a file name that is no UTF-8."""
    return _HALF.sub("\ufffd", text)


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, list):
        return [_mended(item) for item in value]
    if isinstance(value, dict):
        return {_mended(name): _mended(item) for name, item in value.items()}
    return value
