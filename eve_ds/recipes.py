"""YAML recipes: which of them a command line names, reading them, and every key checked.

Python's YAML reader takes the last of two equal keys and says nothing; here that is an error, as the standard has it.
So is a key with nothing behind it, which YAML takes for null, and what is neither text, number, list nor mapping.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import stat
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from eve_ds.errors import UserError
from preprocessing.local_files import check_regular
from preprocessing.redaction import shortened

Section = TypeVar("Section")
HOME = Path(__file__).resolve().parents[1]  # of eve_ds and ds_configs: the checkout, or site-packages
RECIPES = ("eve_ds/configs", ".yaml")  # folder of those that come with EVE-DS, and suffix
_UNFIT = (KeyError, IndexError, AttributeError)  # PyYAML, of "!!bool x", "!!int ''" and "!!timestamp x"
DEEPEST, MOST_NODES = 20, 10_000  # a recipe has four levels and a hundred nodes
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _TwiceError(yaml.MarkedYAMLError):
    """A key stands twice in a mapping."""


class _Loader(yaml.SafeLoader):
    """Plain data; a key that stands twice in a mapping is an error, and 1e-6 is a number, as jsonargparse reads it."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                problem = f"{key.value!r} stands in line {first[key.value]} already; put all of it in one place"
                raise _TwiceError(problem=problem, problem_mark=key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def shipped(path: str, folder: str, suffix: str) -> Path:
    """The file of that name; where there is none, the one that comes with EVE-DS, by its path there or its name."""
    name = path if path.endswith(suffix) else path + suffix
    places = [Path(path), HOME / path, HOME / folder / name]
    return next((place for place in places if place.is_file()), Path(path))


def meant(path: str | Path, folder: str, suffix: str) -> str:
    """The end of a message about a file that is not there: one of nearly that name, or all that come with EVE-DS."""
    shipped_ones = {file.stem: file.stem for file in sorted((HOME / folder).glob(f"*{suffix}"))}
    beside = {file.stem: str(file) for file in sorted(Path(path).parent.glob(f"*{suffix}"))}
    known = {**shipped_ones, **beside}
    near = difflib.get_close_matches(Path(path).name.removesuffix(suffix), list(known), n=1, cutoff=0.5)
    return f"; did you mean {known[near[0]]}?" if near else f"; EVE-DS comes with {', '.join(shipped_ones)}"


def recipe(path: str) -> Path:
    """The recipe that ``--config`` names."""
    return shipped(path, *RECIPES)


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """The files that ``--config`` names (``shipped`` ones by name), in order, and the rest of the command line.

    Raises:
        UserError: ``--config`` without a file.
    """
    files, rest = [], []
    options = iter(argv)
    for option in options:
        name, equals, value = option.partition("=")
        if name != "--config":
            rest.append(option)
            continue
        file = value if equals else next(options, "")
        if not file or file.startswith("--"):
            raise UserError("--config: no file follows; name a YAML recipe, as in eve_ds/configs/tiny_shapes.yaml")
        files.append(str(recipe(file)))
    return files, rest


def read_yaml(path: str | Path, option: str = "") -> Any:
    """The tree in a YAML file.

    Args:
        path: the file.
        option: that named it, for messages.
    Raises:
        UserError: unreadable, not YAML, or a key stands twice; the message names file and line.
    """
    source = f"{option} {path}".strip()
    check_regular(path, streams=True)
    try:
        loader = _Loader(_content(path))
        node = loader.get_single_node()
        for number, _ in enumerate(_plain_nodes(node)):
            if number > MOST_NODES:
                raise _NodeError(f"its aliases (*name) stand for more than {MOST_NODES} values; write fewer")
        return loader.construct_document(node) if node is not None else None
    except RecursionError as error:
        raise UserError(f"{source}: is nested deeper than {DEEPEST} levels") from error
    except OSError as error:
        others = meant(path, *RECIPES) if option and isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{source}: {error.strerror or error}{others}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 text") from error
    except ValueError as error:  # ours; Python's, of a number of thousands of digits or a day beyond its month
        raise UserError(f"{source}: {error}") from error
    except _UNFIT as error:
        raise UserError(f"{source}: not valid YAML: a value does not fit the tag (!!...) before it") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{place}: {getattr(error, 'problem', error)}") from error


_of_streams: dict[tuple[int, int], str] = {}  # by device and inode: what the shell has opened can be read once


def _content(path: str | Path) -> str:
    """The text of a file; that of a stream is kept for whoever asks next."""
    found = os.stat(path)
    key = found.st_dev, found.st_ino
    if key in _of_streams:
        return _of_streams[key]
    text = Path(path).read_text(encoding="utf-8")
    if stat.S_ISFIFO(found.st_mode):
        _of_streams[key] = text
    return text


def parse_value(typed: str, where: str = "") -> Any:
    """What an option's value stands for; the text itself where that is no YAML.

    Raises:
        UserError: a key stands twice, and it is said ``where``.
    """
    try:
        found = yaml.load(typed, _Loader)  # plain data, as SafeLoader has it
    except (yaml.YAMLError, ValueError, RecursionError, *_UNFIT) as error:
        if where and isinstance(error, _TwiceError):
            raise UserError(f"{where}: {error.problem}") from error
        return typed
    return "" if not typed else found


class _NodeError(ValueError):
    """What YAML takes and a recipe does not; says key, line and mend."""


def _plain_nodes(node: Any, key: str = "", depth: int = 0) -> Iterator[Any]:
    """All nodes below ``node``, those behind aliases each time. Raises _NodeError at one that is not plain data."""
    if node is None:
        return
    where = f"{key or 'the file'} in line {node.start_mark.line + 1}"
    if depth > DEEPEST:
        raise _NodeError(f"{key.split('.')[0]!r} is nested deeper than {DEEPEST} levels (or holds itself)")
    if node.tag == "tag:yaml.org,2002:timestamp":
        raise _NodeError(f"{where}: {node.value} is a date to YAML; put it in quotes")
    if node.tag not in _PLAIN:
        raise _NodeError(f"{where}: values of kind {node.tag.removeprefix('tag:yaml.org,2002:')!r} are not taken")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith((":int", ":float")) and ":" in node.value:
        raise _NodeError(f"{where}: {node.value} is a time to YAML; put it in quotes, or write a number")
    if isinstance(node, yaml.ScalarNode) and node.tag.endswith(":null") and not node.value and key:
        raise _NodeError(f"{where} has no value; write one (null, if that is meant), or leave the key out")
    yield node
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _plain_nodes(item, f"{key}[{index}]", depth + 1)
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            label = name.value if isinstance(name, yaml.ScalarNode) else "?"
            merged = name.tag.endswith(":merge")  # what is merged stands here
            yield from _plain_nodes(value, key if merged else f"{key}.{label}" if key else label, depth + 1)


def read_run_config(path: Path, *sections: str) -> dict[str, Any]:
    """The tree of the config.yaml that a run stores. Raises UserError as ``read_yaml``, or if it lacks a section."""
    tree = read_yaml(path)
    for name in sections:
        if not isinstance(tree, dict) or not isinstance(tree.get(name), dict):
            raise UserError(f"{path}: no {name!r} section; expected the config.yaml that a run stores")
    return tree


def known_keys(root: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass tree, sections included."""
    keys = []
    hints = typing.get_type_hints(root)
    for item in dataclasses.fields(root):
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            keys += known_keys(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
    return keys


def hint_of(root: type, key: str) -> Any:
    """The type of a dotted key of a dataclass tree."""
    hint: Any = root
    for name in key.split("."):
        hint = typing.get_type_hints(hint)[name]
    return hint


def check_keys(raw: Any, root: type, source: str) -> None:
    """Raise UserError naming the first unknown key in a YAML tree, and the nearest known one."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: a config is a YAML mapping of sections, this is {shown(raw)}")
    known = known_keys(root)
    sections = {key for key in known if any(other.startswith(key + ".") for other in known)}

    def visit(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if path not in known:
                raise UserError(f"{source}: unknown key {path!r}{nearest(path, known)}")
            if "." in str(key):
                section, name = str(key).rsplit(".", 1)
                raise UserError(f"{source}: {path!r} is a key with a dot; write {section}: {{{name}: {value}}}")
            if path in sections:
                if not isinstance(value, dict):
                    raise UserError(f"{source}: {path!r} is a section, give a mapping in place of {shown(value)}")
                visit(value, path + ".")
            elif holds_mappings(hint := hint_of(root, path)):  # the parser would import what a `class_path` names
                for place, what in misfits(unquoted(value, hint, f"{source}: {path}"), hint, path):
                    raise UserError(f"{at(source, place)}: {what}")

    visit(raw, "")


def check_values(settings: Any, prefix: str = "") -> None:
    """Raise UserError for null where a setting needs a value, and for control characters, in a tree of dataclasses."""
    hints = typing.get_type_hints(type(settings))
    for item in dataclasses.fields(settings):
        key, value = f"{prefix}{item.name}", getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{key}.")
        elif isinstance(value, str) and (bad := next((char for char in value if ord(char) < 32), None)):
            raise UserError(f"{key} holds the control character {bad!r}; leave it out")
        elif value is None and not fits(None, hints[item.name]):
            default = "" if isinstance(item.default, _MISSING) else f" ({item.default!r})"
            raise UserError(
                f"{key} is null, but needs a value; write one, or leave the key out for its default{default}"
            )


def section_of(kind: type[Section], values: Any, source: str) -> Section:
    """The dataclass with the values of a stored section.

    Raises:
        UserError: a value of the wrong type, an unknown key; the message names ``source`` and the key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping, this is {shown(values)}")
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{source}: unknown key {key!r}{nearest(str(key), list(hints))}")
        for place, what in misfits(value, hints[key], key):
            raise UserError(f"{source}: {place}: {what}")
    return kind(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type: bool, int, float, str, None, lists, mappings, literals and unions of them."""
    return next(misfits(value, hint, ""), None) is None


def misfits(value: Any, hint: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, what is wrong there) wherever a plain value is not of a type; ``key`` is the value's own.

    A mapping stands for a dataclass.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        if any(fits(value, choice) for choice in inner):
            return
        if isinstance(value, list) and (lists := [each for each in inner if typing.get_origin(each) is list]):
            yield from misfits(value, lists[0], key)
            return
    elif origin is list and isinstance(value, list):
        for place, item in enumerate(value):
            yield from misfits(item, inner[0], f"{key}[{place}]")
        return
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        yield from _misfits_within(value, typing.cast(type, hint), key)
        return
    elif _is(value, hint):
        return
    yield key, f"expected {told(hint)}, got {shown(value)}"


def unquoted(value: Any, hint: Any, where: str) -> Any:
    """A plain value as the parser takes it: what stands in quotes where its type has no text is what is in them.

    Raises:
        UserError: a key stands twice in such a text; the message says ``where``.
    """
    if isinstance(value, str) and not fits(value, hint):
        value = parse_value(value, where)
    for kind in typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,):
        if isinstance(value, list) and typing.get_origin(kind) is list:
            return [unquoted(item, typing.get_args(kind)[0], where) for item in value]
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            hints = typing.get_type_hints(kind)
            return {key: unquoted(item, hints[key], where) if key in hints else item for key, item in value.items()}
    return value


def _misfits_within(values: dict[Any, Any], kind: type, key: str) -> Iterator[tuple[str, str]]:
    hints = typing.get_type_hints(kind)
    for name, item in values.items():
        if name in hints:
            yield from misfits(item, hints[name], f"{key}.{name}" if key else name)
        else:
            yield key, f"unknown key {name!r}{nearest(str(name), list(hints))}"
    for item in dataclasses.fields(kind):
        needed = isinstance(item.default, _MISSING) and isinstance(item.default_factory, _MISSING)
        if needed and item.name not in values:
            yield key, f"has no key {item.name!r}"


def _is(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, typing.get_origin(hint) or hint)


def holds_mappings(hint: Any) -> bool:
    """Whether a setting of this type has mappings in it, as ``data.sources`` does."""
    return dataclasses.is_dataclass(hint) or any(holds_mappings(each) for each in typing.get_args(hint))


_UNIONS = (typing.Union, types.UnionType)
_MISSING = type(dataclasses.MISSING)
_TOLD = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
_LISTED = {int: "integers", float: "numbers", str: "texts"}


def told(hint: Any) -> str:
    """A type in words."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(told(choice) for choice in inner)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is list:
        return f"a list of {_LISTED.get(inner[0]) or f'mappings ({_fields(inner[0])})'}"
    return _TOLD.get(hint) or f"a mapping ({_fields(hint)})"


def _fields(kind: type) -> str:
    return ", ".join(item.name for item in dataclasses.fields(kind))


def shown(value: Any) -> str:
    """A plain value as a recipe has it, without secrets, cut where it is long."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return shortened(repr(value) if isinstance(value, str | int | float | list | dict) else str(value))


def at(source: str, key: str) -> str:
    """Where a value stands: a file and a key in it; an option, and a key in its value if it is another one."""
    return source if source.rstrip("+") == f"--{key}" else f"{source}: {key}"


def nearest(key: str, known: list[str], dashes: str = "") -> str:
    """The end of a message about an unknown key: the known one that is most like it, if any is."""
    tails = {item.rsplit(".", 1)[-1]: item for item in known}
    tail = key.rsplit(".", 1)[-1]
    like = difflib.get_close_matches(tail, list(tails), n=len(tails), cutoff=0.5)  # a long section alone is no likeness
    near = [item for item in difflib.get_close_matches(key, known, n=5, cutoff=0.5) if item.rsplit(".", 1)[-1] in like]
    if not near:
        near = [tails[t] for t in difflib.get_close_matches(tail, list(tails), n=1, cutoff=0.6)]
    return f"; did you mean {dashes}{near[0]}?" if near else ""
