"""One caption and where its image is, from a line of TSV or JSON: the forms in which web sets come.

TSV without a header: CC3M's `caption<tab>url`, CC12M's `url<tab>caption`, or what `--columns` says. With one: the names
below (open_clip's script writes `title<tab>filepath`). JSON lines: objects with the same names, such as EVE's
{"binary": base64, "desc": caption, "url"}.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from preprocessing.json_text import parse_json

ROLES: dict[str, tuple[str, ...]] = {
    "caption": ("caption", "desc", "text", "title", "txt"),
    "file": ("file", "filepath", "filename", "file_name", "image_path", "path", "image"),
    "base64": ("base64", "binary", "image_base64", "b64", "bytes"),
    "url": ("url", "image_url", "photo_url"),
}
IGNORED = "-"
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_URL = re.compile(rb"https?://", re.IGNORECASE)
_LONG = 1024  # no file name is longer: an `image` beyond that is base64


class BadLine(ValueError):
    """A line that is not of its file's form; `str(error)` says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Record:
    """What a line says. `cell` is (first byte in the line, bytes) of base64."""

    caption: str
    file: str | None = None
    url: str | None = None
    cell: tuple[int, int] | None = None


@dataclass(frozen=True)
class Form:
    """How a file's lines are read: as TSV with a role for each column, or, without `columns`, as JSON objects."""

    columns: tuple[str, ...] | None
    header: bool = False
    quoted: bool = False  # as pandas writes: "a ""b""" where a field holds a quote


def find_form(first: bytes, columns: Sequence[str] | None) -> Form:
    """The form of a file by its first line, or by the names in `columns`. Raises BadLine when it is none."""
    if columns:
        return Form(tuple(_role(name) for name in columns))
    if first.lstrip().startswith(b"{"):
        return Form(None)
    fields = first.split(b"\t")
    names = [field.decode("utf-8", "replace").strip('"').lower() for field in fields]
    if "caption" in (roles := [_role(name) for name in names]) and len(set(roles) - {IGNORED}) > 1:
        return Form(tuple(roles), header=True, quoted=True)
    urls = [index for index, field in enumerate(fields) if _URL.match(field)]
    if len(fields) == 2 and len(urls) == 1:
        return Form(("url", "caption") if urls == [0] else ("caption", "url"))
    raise BadLine(
        f"has {len(fields)} tab-separated columns without known names; name them with --columns, such as "
        "`--columns file caption`"
    )


def _role(name: str) -> str:
    return _ROLE_OF.get(name.lower(), IGNORED)


def parse_line(line: bytes, form: Form) -> Record:
    """The record of one line, without its end. Raises BadLine."""
    return _parse_json(line) if form.columns is None else _parse_tsv(line, form.columns, form.quoted)


def _parse_tsv(line: bytes, columns: Sequence[str], quoted: bool) -> Record:
    fields = line.split(b"\t")
    if len(fields) != len(columns):
        raise BadLine(f"has {len(fields)} tab-separated columns, not {len(columns)}")
    found: dict[str, str] = {}
    cell = None
    start = 0
    for role, value in zip(columns, fields, strict=True):
        length = len(value)
        if role == "base64":
            cell = (start, length)
        elif role != IGNORED:
            if quoted and len(value) > 1 and value[:1] == value[-1:] == b'"':
                value = value[1:-1].replace(b'""', b'"')
            try:
                found[role] = value.decode()
            except UnicodeDecodeError:
                raise BadLine("is not UTF-8 text") from None
        start += length + 1
    return Record(found.get("caption", ""), found.get("file"), found.get("url"), cell)


def _parse_json(line: bytes) -> Record:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise BadLine(f"invalid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadLine("is no JSON object")
    found: dict[str, str] = {}
    cell = None
    for name, content in value.items():
        role = _role(name)
        if not isinstance(content, str) or role == IGNORED or role in found:
            continue
        if role == "base64" or (role == "file" and len(content) > _LONG):
            cell = _string_place(line, name)
        else:
            found[role] = content
    caption = found["caption"] if "caption" in found else _no_caption(value)
    return Record(caption, found.get("file"), found.get("url"), cell)


def _no_caption(entry: dict[str, Any]) -> str:
    """The caption of an entry that has no text for it: an empty one where it is null. Raises BadLine."""
    names = [name for name in entry if _role(name) == "caption"]
    if not names:
        raise BadLine(f"has no field of {', '.join(ROLES['caption'])}")
    return "".join(caption_text(entry[name], f"its {name}") for name in names)


def caption_text(value: Any, what: str) -> str:
    """A caption as JSON has it; null is an empty one, which is counted as such. Raises BadLine for all but text."""
    if value is not None and not isinstance(value, str):
        raise BadLine(f"{what} is {json.dumps(value)[:40]}, not text; mend the file")
    return value or ""


def record_of(entry: Any) -> Record:
    """The record of an entry of a JSON list: {"image": file, "caption"} or, as ViLT has it, [file, caption].

    Raises BadLine.
    """
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
        return Record(caption_text(entry[1], "its caption"), entry[0])
    if not isinstance(entry, dict):
        raise BadLine("is neither an object nor [file, caption]")
    found = {_role(name): value for name, value in entry.items() if isinstance(value, str)}
    caption = found["caption"] if "caption" in found else _no_caption(entry)
    return Record(caption, found.get("file"), found.get("url"))


def _string_place(line: bytes, name: str) -> tuple[int, int]:
    """(first byte, bytes) of the string that stands for `name` in a line of JSON, without its quotes."""
    key = re.escape(json.dumps(name).encode())
    match = re.search(key + rb'\s*:\s*"([^"\\]*(?:\\.[^"\\]*)*)"', line)
    if match is None:  # the name itself is written with escapes
        raise BadLine(f"field {name!r} is written in an odd way")
    return match.start(1), match.end(1) - match.start(1)
