"""Damage: bytes as disks and networks change them, values as people and other programs write them, code in pickles."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from typing import Any

CANARY = "CANARY"  # a file that code in a payload, were it run, would make
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, 1e-320, 0.5, -0.0, float("nan"),
    float("inf"), float("-inf"), "", " ", "null", "NaN", "-1", "1e999", "\x00", "a\x00b", "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07", "\r\noverwritten", "\u202eabc", "\ud83d", "é" * 300, "x" * 70_000, "../../etc/passwd",
    "/etc/passwd", "//", ".", "$(touch CANARY)", "`touch CANARY`", "; touch CANARY", "%s%n", "{0}", "<script>",
    [], [[]], {}, [None], {"": None}, ["a", 1, None], [1e999], {"a": {"b": {}}}, "True", "false", "2020-01-01",
    "!!python/object/apply:os.system ['touch CANARY']",
)  # fmt: skip
DEEP = (500, 5_000, 100_000)  # levels


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits flipped, bytes replaced, a piece cut out, moved, doubled, filled, or the end lost."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _BYTES[rng.randrange(len(_BYTES))](found, rng)
    return bytes(found)


def _flip(data: bytearray, rng: random.Random) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _replace(data: bytearray, rng: random.Random) -> None:
    for _ in range(min(len(data), rng.choice((1, 4, 16)))):
        data[rng.randrange(len(data))] = rng.choice((0, 0x1B, 0x0A, 0x22, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut_end(data: bytearray, rng: random.Random) -> None:
    del data[rng.randrange(len(data) + 1) :]


def _piece(data: bytearray, rng: random.Random) -> slice:
    start = rng.randrange(len(data) + 1)
    return slice(start, start + rng.choice((1, 8, 64, 512, 4096)))


def _cut_out(data: bytearray, rng: random.Random) -> None:
    del data[_piece(data, rng)]


def _double(data: bytearray, rng: random.Random) -> None:
    piece = _piece(data, rng)
    data[piece.start : piece.start] = data[piece]


def _swap(data: bytearray, rng: random.Random) -> None:
    size = rng.choice((1, 8, 512))
    if len(data) >= 2 * size:
        one, other = sorted(rng.sample(range(len(data) // size), 2)) if len(data) // size > 1 else (0, 0)
        a, b = slice(one * size, (one + 1) * size), slice(other * size, (other + 1) * size)
        data[a], data[b] = data[b], data[a]


def _fill(data: bytearray, rng: random.Random) -> None:
    piece = _piece(data, rng)
    size = len(data[piece])
    data[piece] = bytes([rng.choice((0, 0xFF))]) * size


def _integer(data: bytearray, rng: random.Random) -> None:
    form = rng.choice(("<i", "<q", ">i", ">q"))
    size = struct.calcsize(form)
    if len(data) >= size:
        place = rng.randrange(len(data) - size + 1)
        value = rng.choice((-1, 0, 1, 2**31 - 1, -(2**31), 2**24))
        data[place : place + size] = struct.pack(form, value)


def _append(data: bytearray, rng: random.Random) -> None:
    data += rng.choice((b"\x00", b"\n", b"\n\n{", b"junk" * 100, bytes(data[: 1 << 16])))


_BYTES: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip, _flip, _flip, _replace, _cut_end, _cut_out, _double, _swap, _fill, _integer, _append,
)  # fmt: skip


def damaged_value(value: Any, rng: random.Random) -> Any:
    """The value with one part lost, doubled, renamed, exchanged with another, or become something odd."""
    places = list(_places(value, ()))
    where = rng.choice(places)
    if not where:
        return _odd(value, rng)
    copy = json.loads(json.dumps(value))
    parent = copy
    for key in where[:-1]:
        parent = parent[key]
    key = where[-1]
    action = rng.randrange(6)
    if action == 0:
        del parent[key]
    elif action == 1 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    elif action == 2 and isinstance(parent, dict):
        parent[rng.choice((str(key).upper(), f"{key} ", "", "\x1b[2J", f"{key}\x00"))] = parent.pop(key)
    elif action == 3:
        parent[key] = _at(value, rng.choice(places))
    else:
        parent[key] = _odd(parent[key], rng)
    return copy


def _places(value: Any, where: tuple[Any, ...]) -> Any:
    yield where
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield from _places(part, (*where, key))


def _at(value: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        value = value[key]
    return json.loads(json.dumps(value))


def _odd(value: Any, rng: random.Random) -> Any:
    near: list[Any] = [[value], {"value": value}, str(value)]
    if isinstance(value, str):
        near += [value * 2, value + "\x00", "\x1b[2J" + value, value.upper(), value + "\n", list(value)]
    if isinstance(value, int | float):
        near += [value + 1, -value, value * 10**9]
        near += [float(value), value + 0.5] if abs(value) < 1e300 else []
    return rng.choice(near) if rng.random() < 0.3 else rng.choice(ODD_VALUES)


def json_text(value: Any) -> bytes:
    """JSON as Python writes it, NaN included; halves of UTF-16 pairs as escapes."""
    return json.dumps(value).encode()


def damaged_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON file, damaged as a value (four times in five) or as bytes; now and then nested thousands deep."""
    choice = rng.random()
    if choice < 0.2:
        return damaged_bytes(data, rng)
    if choice < 0.25:
        depth = rng.choice(DEEP)
        opening, closing = rng.choice(((b"[", b"]"), (b'{"a":', b"}")))
        nested = opening * depth + b"1" + closing * depth
        text = data.replace(b"null", nested, 1) if b"null" in data else data.rstrip()[:-1] + b"," + nested + b"]"
        return rng.choice((nested, text))
    value = damaged_value(json.loads(data), rng)
    for _ in range(rng.choice((0, 0, 1, 3))):
        value = damaged_value(value, rng)
    text = json_text(value)
    return text + b"," if rng.random() < 0.02 else text


def damaged_lines(data: bytes, rng: random.Random) -> bytes:
    """JSON lines or a table of lines: one line damaged, doubled, lost or moved."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    action = rng.randrange(6)
    if action == 0:
        return damaged_bytes(data, rng)
    if action == 1:
        lines.insert(rng.randrange(len(lines)), lines[place])
    elif action == 2:
        del lines[place]
    elif lines[place].lstrip()[:1] == b"{":
        lines[place] = damaged_json(lines[place], rng)
    else:
        cells = lines[place].split(b"\t")
        cell = rng.randrange(len(cells))
        odd = str(rng.choice(ODD_VALUES)).encode("utf-8", "surrogatepass")
        cells[cell : cell + rng.randrange(2)] = [odd] * rng.choice((1, 1, 2))
        lines[place] = b"\t".join(cells)
    return b"\n".join(lines)


class Command:
    """What a pickle holds that runs a command when it is loaded."""

    def __reduce__(self) -> Any:
        import os

        return os.system, (f"touch {CANARY}",)


class Written:
    """The same without a shell: it opens the file."""

    def __reduce__(self) -> Any:
        return open, (CANARY, "w")


def hostile_pickle(rng: random.Random) -> bytes:
    """A pickle that makes the file CANARY where it is loaded without restraint."""
    payload = pickle.dumps(rng.choice((Command, Written))(), protocol=rng.choice((0, 2, 4)))
    return payload if rng.random() < 0.7 else pickle.dumps({"model": 1}, protocol=2)[:-1] + payload


def damaged_torch(data: bytes, rng: random.Random) -> bytes:
    """A file of torch.save: damaged bytes, or a hostile pickle in its place or within it."""
    choice = rng.random()
    if choice < 0.55:
        return damaged_bytes(data, rng)
    if choice < 0.7:
        return hostile_pickle(rng)
    return _rezipped(data, lambda name, part: _pickle_part(name, part, rng))


def _pickle_part(name: str, part: bytes, rng: random.Random) -> bytes:
    if not name.endswith("data.pkl"):
        return part
    return hostile_pickle(rng) if rng.random() < 0.5 else damaged_bytes(part, rng)


def damaged_npz(data: bytes, rng: random.Random) -> bytes:
    """An .npz: damaged bytes, or an array's header or content damaged with a right checksum."""
    if rng.random() < 0.3:
        return damaged_bytes(data, rng)
    victim = rng.choice(zipfile.ZipFile(io.BytesIO(data)).namelist())

    def change(name: str, part: bytes) -> bytes:
        if name != victim:
            return part
        header = part[:128]
        kind = rng.randrange(5)
        if kind == 0:
            return damaged_bytes(header, rng) + part[128:]
        if kind == 1:
            return damaged_bytes(part, rng)
        if kind == 2:
            return header.replace(b"'<f4'", b"'|O8'").replace(b"'<i8'", b"'|O8'") + hostile_pickle(rng)
        old = rng.choice((b"<f4", b"<i8", b"(", b")", b",", b"False", b"shape", b"descr"))
        odd = (b"<c8", b"<M8", b"|S9", b"(99999999999999, ", b"True ", b"-", b"[[[[[", b"1e9", b"__import__('os')")
        return header.replace(old, rng.choice(odd), 1)[:128].ljust(128) + part[128:]

    return _rezipped(data, change)


def _rezipped(data: bytes, change: Callable[[str, bytes], bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def damaged_yaml(data: bytes, rng: random.Random) -> bytes:
    """A recipe: a line damaged, doubled, lost, its value odd; or a tag, an anchor, deep nesting."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    name = lines[place].split(b":")[0]
    odd = (
        b"", b" ~", b" .nan", b" .inf", b" -1", b" 1e400", b" 2001-01-01", b" 0x10", b" 1_000", b" 12:30:45", b" yes",
        b" !!python/object/apply:os.system ['touch CANARY']", b" !!binary aGVsbG8=", b" !!set {a, b}", b" &a [*a]",
        b" *nowhere", b" [1, 2", b" {a: 1}", b" [[[]]]", b' "\\0"', b' "\\e[31m"', b" |\n  text", b" 10e9999", b" null",
        b" " + b"9" * 5000, b" " + b"[" * 3000 + b"]" * 3000, b" " + b"{a: " * 3000 + b"}" * 3000, b" << : *a", b" 1.5",
    )  # fmt: skip
    action = rng.randrange(8)
    if action == 0:
        return damaged_bytes(data, rng)
    if action == 1:
        lines.insert(rng.randrange(len(lines)), lines[place])
    elif action == 2:
        del lines[place]
    elif action == 3:
        lines[place] = name + rng.choice((b"x:", b"\x1b[2J:", b":\t", b" ")) + b" 1"
    else:
        lines[place] = name + b":" + rng.choice(odd)
    return b"\n".join(lines)


def damaged_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file: damaged bytes, or its JSON header damaged with the right length before it."""
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.5:
        return damaged_bytes(data, rng)
    header = damaged_json(data[8 : 8 + size], rng)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def damaged(name: str, data: bytes, rng: random.Random) -> bytes:
    """The file called ``name`` damaged as its kind is."""
    suffix = name.rsplit(".", 1)[-1]
    return _KINDS.get(suffix, damaged_bytes)(data, rng)


_KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": damaged_json, "jsonl": damaged_lines, "tsv": damaged_lines, "token": damaged_lines, "txt": damaged_lines,
    "csv": damaged_lines, "yaml": damaged_yaml, "pt": damaged_torch, "npz": damaged_npz,
    "safetensors": damaged_safetensors,
}  # fmt: skip
