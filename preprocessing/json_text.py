"""JSON as text: reading it, writing it, quoting it in messages. A leaf that anyone may import.

Captions that were cut in the middle of an emoji leave half of a UTF-16 surrogate pair behind, which no UTF-8 file can
hold. `parse_json` replaces such halves.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from preprocessing.redaction import shortened

_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPED_BYTES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # json accepts the latter, which is no UTF-8
_HALF = re.compile("[\ud800-\udfff]")


def load_json(content: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """``json.loads`` (``pairs``: its object_pairs_hook) that raises ValueError also for JSON nested too deep."""
    try:
        return json.loads(content, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deep") from None


def parse_json(text: str | bytes) -> Any:
    """The value of `text`, with U+FFFD for each half of a surrogate pair.

    Raises ValueError (json.JSONDecodeError, UnicodeDecodeError), also for JSON nested too deep.
    """
    try:
        value = json.loads(text)
        found = _ESCAPED.search(text) if isinstance(text, str) else _ESCAPED_BYTES.search(text)
        return _replace_halves(value) if found else value
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", "", 0) from None


def dump_json(value: Any) -> bytes:
    """`value` as JSON bytes that depend on nothing but `value`: sorted keys, one trailing newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def json_excerpt(value: Any) -> str:
    """The first forty characters of `value` as JSON, for messages, without secrets."""
    try:
        return shortened(json.dumps(value), 40)
    except RecursionError:  # a value that could just be read may be too deep to be written
        return "nested too deep"


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, and for each byte of a file name that is no UTF-8."""
    return _HALF.sub("\ufffd", text)


def _replace_halves(value: Any) -> Any:
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [_replace_halves(item) for item in value]
    if isinstance(value, dict):
        return {_replace_halves(name): _replace_halves(item) for name, item in value.items()}
    return value
