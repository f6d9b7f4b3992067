"""Parses a line of TSV or JSON into captions and the place of the image: the forms of web data sets.

TSV without a header: CC3M's `caption<tab>url`, CC12M's `url<tab>caption`, or what `--columns` says. With one: the names
below (open_clip's script writes `title<tab>filepath`). JSON lines: objects with the same names, such as EVE's
{"binary": base64, "desc": caption, "url"}. If a record has several names of one role, the first of them
in ROLES counts.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from preprocessing.local_files import json_excerpt, parse_json

ROLES: dict[str, tuple[str, ...]] = {
    "caption": ("caption", "desc", "text", "title", "txt"),
    "file": ("file", "filepath", "filename", "file_name", "image_path", "path", "image_rpath", "image"),
    "base64": ("base64", "binary", "image_base64", "b64", "bytes"),
    "url": ("url", "image_url", "photo_url"),
    "split": ("split",),
}
IGNORED = "-"
_INLINE = "inline"
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_RANK = {name: rank for names in ROLES.values() for rank, name in enumerate(names)}
_URL = re.compile(rb"https?://", re.IGNORECASE)
_LONG = 1024  # file names are shorter: a longer `image` is base64
_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*')  # of JSON, without its quotes


class BadLine(ValueError):
    """A line that is not of its file's form. `str(error)` says what is wrong; faults are counted by `reason`."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Record:
    """The content of a line. `cell` is (first byte in the line, bytes) of a base64 image."""

    captions: tuple[str, ...]
    file: str | None = None
    url: str | None = None
    cell: tuple[int, int] | None = None
    split: object = None  # the value of its split field, if any


@dataclass(frozen=True)
class Form:
    """How a file's lines are read: as TSV with a role for each column, or, without `columns`, as JSON objects."""

    columns: tuple[str, ...] | None
    header: bool = False
    quoted: bool = False  # fields with a quote are written as pandas does: "a ""b"""


def find_form(first: bytes, second: bytes, columns: Sequence[str] | None) -> Form:
    """The form of a file by its first line, or by the names in `columns`. Raises BadLine when it has no known form.

    If the first line is a damaged record and certainly no header, the second line decides.
    """
    if columns:
        return Form(_column_roles([name.lower() for name in columns]))
    try:
        return _form_of(first)
    except BadLine:
        if _is_json(second):
            return Form(None)
        if not any(map(_URL.match, first.split(b"\t"))) or (form := _form_of(second)).header:
            raise
        return form


def _is_json(line: bytes) -> bool:
    return line.lstrip().startswith(b"{")


def _form_of(first: bytes) -> Form:
    if _is_json(first):
        return Form(None)
    fields = first.split(b"\t")
    names = [field.decode("utf-8", "replace").strip('"').lower() for field in fields]
    if "caption" in (roles := {_role(name) for name in names}) and len(roles - {IGNORED}) > 1:
        return Form(_column_roles(names), header=True, quoted=True)
    urls = [index for index, field in enumerate(fields) if _URL.match(field)]
    if len(fields) == 2 and len(urls) == 1:
        return Form(("url", "caption") if urls == [0] else ("caption", "url"))
    raise BadLine(
        f"has {len(fields)} tab-separated columns without known names; name them with --columns, such as "
        "`--columns file caption`",
        "line has no known columns",
    )


def _role(name: str) -> str:
    return _ROLE_OF.get(name.lower(), IGNORED)


def _choose(fields: Iterable[tuple[str, str]]) -> dict[str, str]:
    """role -> name, of (role, name) pairs. If several names have a role, the first of them in ROLES is chosen."""
    chosen: dict[str, str] = {}
    for role, name in fields:
        if role != IGNORED and (role not in chosen or _order(name) < _order(chosen[role])):
            chosen[role] = name
    return chosen


def _order(name: str) -> tuple[int, str]:
    return _RANK[name.lower()], name


def _column_roles(names: Sequence[str]) -> tuple[str, ...]:
    """The role of each column by its name in lower case. Raises BadLine when two columns have the chosen name."""
    chosen = _choose((_role(name), name) for name in names)
    twice = next((name for name in chosen.values() if names.count(name) > 1), None)
    if twice is not None:
        raise BadLine(f"two columns are called {twice}; call one of them {IGNORED}", "columns of one name")
    return tuple(role if chosen.get(role := _role(name)) == name else IGNORED for name in names)


def parse_line(line: bytes, form: Form) -> Record:
    """The record of one line, without its end. Raises BadLine."""
    return _parse_json(line) if form.columns is None else _parse_tsv(line, form.columns, form.quoted)


def _parse_tsv(line: bytes, columns: Sequence[str], quoted: bool) -> Record:
    fields = line.split(b"\t")
    if len(fields) != len(columns):
        what = f"has {len(fields)} tab-separated columns, not {len(columns)}; fix the file"
        raise BadLine(what, "line has too many columns or too few")
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
                raise BadLine("is not UTF-8 text; fix the file", "line is not UTF-8 text") from None
        start += length + 1
    return Record((found.get("caption", ""),), found.get("file"), found.get("url"), cell, found.get("split"))


def _parse_json(line: bytes) -> Record:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise BadLine(f"invalid JSON ({error}); fix the file", "line is invalid JSON") from None
    if not isinstance(value, dict):
        raise BadLine("is no JSON object; fix the file", "line is no JSON object")
    chosen = _fields(value)
    data = chosen.get("base64") or chosen.get(_INLINE)
    cell = None if data is None else _string_position(line, data, value[data])
    file, url = _content(value, chosen, "file"), _content(value, chosen, "url")
    return Record(_captions(value, chosen), file, url, cell, _content(value, chosen, "split"))


def _fields(entry: dict[str, Any]) -> dict[str, str]:
    """role -> name of its field. A field that should name a file but holds base64 has the role _INLINE.

    Values that are no text are considered for captions and splits only, where they are refused later; nulls are not.
    """
    found = []
    for name, content in entry.items():
        role = _role(name)
        if isinstance(content, str):
            found.append((_INLINE if role == "file" and len(content) > _LONG else role, name))
        elif role in ("caption", "split") and content is not None:
            found.append((role, name))
    return _choose(found)


def _content(entry: dict[str, Any], chosen: dict[str, str], role: str) -> Any:
    return entry[chosen[role]] if role in chosen else None


def _captions(entry: dict[str, Any], chosen: dict[str, str]) -> tuple[str, ...]:
    """The captions of an entry; one empty caption if all its caption fields are null. Raises BadLine."""
    name = chosen.get("caption")
    if name is not None:
        return caption_texts(entry[name], f"its {name}")
    if not any(_role(name) == "caption" for name in entry):
        raise BadLine(f"has no field of {', '.join(ROLES['caption'])}; name the field so", "record has no caption")
    return ("",)


def caption_texts(value: Any, what: str) -> tuple[str, ...]:
    """The captions in a JSON value: a text or a list of texts. A null is an empty caption, which is counted later.

    Raises BadLine for other values.
    """
    if isinstance(value, str):  # the usual case
        return (value,)
    texts = value if isinstance(value, list) else [value]
    wrong = [text for text in texts if text is not None and not isinstance(text, str)]
    if wrong:
        raise BadLine(f"{what} is {json_excerpt(wrong[0])}, not text; fix the file", "caption is no text")
    return tuple(text or "" for text in texts)


def record_of(entry: Any) -> Record:
    """The record of an entry of a JSON list: {"image": file, "caption"} or, as ViLT has it, [file, caption].

    Raises BadLine.
    """
    if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str):
        return Record(caption_texts(entry[1], "its caption"), entry[0])
    if not isinstance(entry, dict):
        what = "is neither an object nor [file, caption]; fix the file"
        raise BadLine(what, "entry is neither an object nor [file, caption]")
    chosen = _fields(entry)
    file = _content(entry, chosen, "file") or _content(entry, chosen, _INLINE)
    url = _content(entry, chosen, "url")
    return Record(_captions(entry, chosen), file, url, split=_content(entry, chosen, "split"))


def _string_position(line: bytes, name: str, text: str) -> tuple[int, int]:
    """(first byte, bytes) of the string value of field `name` in a line of JSON, without its quotes.

    Its value is the base64 `text`, unlike that of a field with the same name in a nested object. Raises BadLine
    when no field matches.
    """
    plain = text.encode()
    usual = (plain, plain.replace(b"/", b"\\/"))
    for match in re.finditer(re.escape(json.dumps(name).encode()) + rb'\s*:\s*"', line):
        start = match.end()
        for form in usual:
            if line.startswith(form, start) and line.startswith(b'"', start + len(form)):
                return start, len(form)
        string = _STRING.match(line, start)
        if string is not None and b"\\" in string[0] and parse_json(b'"%b"' % string[0]) == text:
            return start, len(string[0])
    what = f"field {name!r} is written in an odd way; write its name without escapes"
    raise BadLine(what, "name of a field is written in an odd way")
