"""YAML recipes: find and read the files of a command line, and check every key.

PyYAML silently uses the last of two equal keys; here they are an error, as in the YAML standard. Keys without a value
(null in YAML) and values other than strings, numbers, booleans, lists and mappings are errors, too.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import stat
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from preprocessing.errors import UserError, shortened
from preprocessing.local_files import check_regular

Section = TypeVar("Section")
HOME = Path(__file__).resolve().parents[1]  # holds eve_ds and ds_configs: the checkout, or site-packages
RECIPES = ("eve_ds/configs", ".yaml")  # folder and suffix of the recipes of EVE-DS
_TAG_ERRORS = (KeyError, IndexError, AttributeError)  # raised by PyYAML on "!!bool x", "!!int ''" and "!!timestamp x"
MAX_DEPTH, MAX_NODES = 20, 10_000  # a recipe has four levels and a hundred nodes
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


class _DuplicateKeyError(yaml.MarkedYAMLError):
    """A key occurs twice in a mapping."""


class _Loader(yaml.SafeLoader):
    """SafeLoader in which duplicate keys are errors, and 1e-6 is a number, as in jsonargparse."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first:
                problem = f"{key.value!r} stands in line {first[key.value]} already; put all of it in one place"
                raise _DuplicateKeyError(problem=problem, problem_mark=key.start_mark)
            first[key.value] = key.start_mark.line + 1
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def find_shipped(path: str, folder: str, suffix: str) -> Path:
    """The file ``path``; if it does not exist, the file of EVE-DS with that path or name."""
    name = path if path.endswith(suffix) else path + suffix
    places = [Path(path), HOME / path, HOME / folder / name]
    return next((place for place in places if place.is_file()), Path(path))


def suggest_file(path: str | Path, folder: str, suffix: str) -> str:
    """End of a message about a missing file: a similar name, or the names of all files of EVE-DS."""
    shipped = {file.stem: file.stem for file in sorted((HOME / folder).glob(f"*{suffix}"))}
    beside = {file.stem: str(file) for file in sorted(Path(path).parent.glob(f"*{suffix}"))}
    known = {**shipped, **beside}
    near = difflib.get_close_matches(Path(path).name.removesuffix(suffix), list(known), n=1, cutoff=0.5)
    return f"; did you mean {known[near[0]]}?" if near else f"; EVE-DS comes with {', '.join(shipped)}"


def find_recipe(path: str) -> Path:
    """The file of a value of ``--config``."""
    return find_shipped(path, *RECIPES)


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """(files of ``--config`` in order, rest of the command line); recipes of EVE-DS may be given by name.

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
        files.append(str(find_recipe(file)))
    return files, rest


def read_yaml(path: str | Path, option: str = "") -> Any:
    """Read a YAML file.

    Args:
        path: the file.
        option: option that names it, for messages.
    Raises:
        UserError: unreadable, not YAML, or a duplicate key; the message names file and line.
    """
    source = f"{option} {path}".strip()
    check_regular(path, streams=True)
    try:
        loader = _Loader(_content(path))
        node = loader.get_single_node()
        for number, _ in enumerate(_plain_nodes(node)):
            if number > MAX_NODES:
                raise _NodeError(f"its aliases (*name) stand for more than {MAX_NODES} values; write fewer")
        return loader.construct_document(node) if node is not None else None
    except RecursionError as error:
        raise UserError(f"{source}: is nested deeper than {MAX_DEPTH} levels") from error
    except OSError as error:
        others = suggest_file(path, *RECIPES) if option and isinstance(error, FileNotFoundError) else ""
        raise UserError(f"{source}: {error.strerror or error}{others}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 text") from error
    except ValueError as error:  # also from Python, for a number with thousands of digits or an invalid date
        raise UserError(f"{source}: {error}") from error
    except _TAG_ERRORS as error:
        raise UserError(f"{source}: not valid YAML: a value does not fit the tag (!!...) before it") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{place}: {getattr(error, 'problem', error)}") from error


_stream_texts: dict[tuple[int, int], str] = {}  # by device and inode: a pipe can be read only once


def _content(path: str | Path) -> str:
    """The text of a file; that of a pipe is cached."""
    found = os.stat(path)
    key = found.st_dev, found.st_ino
    if key in _stream_texts:
        return _stream_texts[key]
    text = Path(path).read_text(encoding="utf-8")
    if stat.S_ISFIFO(found.st_mode):
        _stream_texts[key] = text
    return text


def parse_value(typed: str, where: str = "") -> Any:
    """Parse an option's value as YAML; returns the text itself if it is not valid YAML.

    Raises:
        UserError: a duplicate key; only if ``where`` is given, which the message names.
    """
    try:
        found = yaml.load(typed, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError, *_TAG_ERRORS) as error:
        if where and isinstance(error, _DuplicateKeyError):
            raise UserError(f"{where}: {error.problem}") from error
        return typed
    return "" if not typed else found


class _NodeError(ValueError):
    """Valid YAML that is not allowed in a recipe; the message names key and line."""


def _plain_nodes(node: Any, key: str = "", depth: int = 0) -> Iterator[Any]:
    """All nodes below ``node``, with aliases expanded. Raises _NodeError for one that is not plain data."""
    if node is None:
        return
    where = f"{key or 'the file'} in line {node.start_mark.line + 1}"
    if depth > MAX_DEPTH:
        raise _NodeError(f"{key.split('.')[0]!r} is nested deeper than {MAX_DEPTH} levels (or holds itself)")
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
            merged = name.tag.endswith(":merge")  # merged values belong to this mapping
            yield from _plain_nodes(value, key if merged else f"{key}.{label}" if key else label, depth + 1)


def read_run_config(path: Path, *sections: str) -> dict[str, Any]:
    """The tree of the config.yaml that a run stores. Raises UserError as ``read_yaml``, or if it lacks a section."""
    tree = read_yaml(path)
    for name in sections:
        if not isinstance(tree, dict) or not isinstance(tree.get(name), dict):
            raise UserError(f"{path}: no {name!r} section; expected the config.yaml that a run stores")
    return tree


_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)  # of a dataclass, from their text


def known_keys(root: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass tree, sections included."""
    keys = []
    hints = _hints(root)
    for item in dataclasses.fields(root):
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            keys += known_keys(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
    return keys


def hint_of(root: type, key: str) -> Any:
    """The type of a dotted key of a dataclass tree."""
    hint: Any = root
    for name in key.split("."):
        hint = _hints(hint)[name]
    return hint


def check_keys(raw: Any, root: type, source: str) -> None:
    """Raise UserError for the first unknown key in a YAML tree; the message suggests a similar key."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: a config is a YAML mapping of sections, this is {format_value(raw)}")
    known = known_keys(root)
    sections = {key.rpartition(".")[0] for key in known}

    def visit(node: dict[str, Any], prefix: str) -> None:
        for key, value in node.items():
            path = f"{prefix}{key}"
            if path not in known:
                raise UserError(f"{source}: unknown key {path!r}{suggest_key(path, known)}")
            if "." in str(key):
                section, name = str(key).rsplit(".", 1)
                raise UserError(f"{source}: {path!r} is a key with a dot; write {section}: {{{name}: {value}}}")
            if path in sections:
                if not isinstance(value, dict):
                    raise UserError(f"{source}: {path!r} is a section, give a mapping, not {format_value(value)}")
                visit(value, path + ".")
            elif contains_mapping(hint := hint_of(root, path)):  # jsonargparse would import a ``class_path``
                for place, what in type_errors(parse_quoted(value, hint, f"{source}: {path}"), hint, path):
                    raise UserError(f"{format_location(source, place)}: {what}")

    visit(raw, "")


def check_values(settings: Any, prefix: str = "") -> None:
    """Raise UserError for settings (a tree of dataclasses) that lack a value or hold control characters."""
    hints = _hints(type(settings))
    for item in dataclasses.fields(settings):
        key, value = f"{prefix}{item.name}", getattr(settings, item.name)
        if dataclasses.is_dataclass(value):
            check_values(value, f"{key}.")
        elif isinstance(value, str) and (bad := next((char for char in value if ord(char) < 32), None)):
            raise UserError(f"{key} holds the control character {bad!r}; leave it out")
        elif value is None and not has_type(None, hints[item.name]):
            default = "" if isinstance(item.default, _MISSING) else f" ({item.default!r})"
            raise UserError(
                f"{key} is null, but needs a value; write one, or leave the key out for its default{default}"
            )


def section_of(kind: type[Section], values: Any, source: str) -> Section:
    """Build a dataclass from a stored section.

    Raises:
        UserError: a value of the wrong type, or an unknown key; the message names ``source`` and the key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping, this is {format_value(values)}")
    hints = _hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{source}: unknown key {key!r}{suggest_key(str(key), list(hints))}")
        for place, what in type_errors(value, hints[key], key):
            raise UserError(f"{source}: {place}: {what}")
    return kind(**values)


def has_type(value: Any, hint: Any) -> bool:
    """Whether a YAML value has a type: bool, int, float, str, None, lists, mappings, literals and unions of these."""
    return next(type_errors(value, hint, ""), None) is None


def type_errors(value: Any, hint: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, fault) for each part of a YAML value with the wrong type; ``key``: that of the value.

    Dataclasses are represented by mappings.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        if any(has_type(value, choice) for choice in inner):
            return
        if isinstance(value, list) and (lists := [each for each in inner if typing.get_origin(each) is list]):
            yield from type_errors(value, lists[0], key)
            return
    elif origin is list and isinstance(value, list):
        for place, item in enumerate(value):
            yield from type_errors(item, inner[0], f"{key}[{place}]")
        return
    elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
        yield from _type_errors_in_mapping(value, typing.cast(type, hint), key)
        return
    elif _matches(value, hint):
        return
    yield key, f"expected {describe_type(hint)}, got {format_value(value)}"


def parse_quoted(value: Any, hint: Any, where: str) -> Any:
    """Parse quoted values whose type is not a string, as jsonargparse does.

    Raises:
        UserError: a duplicate key in a quoted value; the message names ``where``.
    """
    if isinstance(value, str) and not has_type(value, hint):
        value = parse_value(value, where)
    for kind in typing.get_args(hint) if typing.get_origin(hint) in _UNIONS else (hint,):
        if isinstance(value, list) and typing.get_origin(kind) is list:
            return [parse_quoted(item, typing.get_args(kind)[0], where) for item in value]
        if isinstance(value, dict) and dataclasses.is_dataclass(kind):
            hints = _hints(kind)
            return {key: parse_quoted(item, hints[key], where) if key in hints else item for key, item in value.items()}
    return value


def _type_errors_in_mapping(values: dict[Any, Any], kind: type, key: str) -> Iterator[tuple[str, str]]:
    hints = _hints(kind)
    for name, item in values.items():
        if name in hints:
            yield from type_errors(item, hints[name], f"{key}.{name}" if key else name)
        else:
            yield key, f"unknown key {name!r}{suggest_key(str(name), list(hints))}"
    for item in dataclasses.fields(kind):
        needed = isinstance(item.default, _MISSING) and isinstance(item.default_factory, _MISSING)
        if needed and item.name not in values:
            yield key, f"has no key {item.name!r}"


def _matches(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, typing.get_origin(hint) or hint)


def contains_mapping(hint: Any) -> bool:
    """Whether values of this type contain mappings, as in ``data.sources``."""
    return dataclasses.is_dataclass(hint) or any(contains_mapping(each) for each in typing.get_args(hint))


_UNIONS = (typing.Union, types.UnionType)
_MISSING = type(dataclasses.MISSING)
_TYPE_NAMES = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
_ITEM_NAMES = {int: "integers", float: "numbers", str: "texts"}


def describe_type(hint: Any) -> str:
    """Description of a type for messages."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(describe_type(choice) for choice in inner)
    if origin is typing.Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is list:
        return f"a list of {_ITEM_NAMES.get(inner[0]) or f'mappings ({_fields(inner[0])})'}"
    return _TYPE_NAMES.get(hint) or f"a mapping ({_fields(hint)})"


def _fields(kind: type) -> str:
    return ", ".join(item.name for item in dataclasses.fields(kind))


def format_value(value: Any) -> str:
    """A YAML value for messages: as in a recipe, without secrets, shortened."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return shortened(repr(value) if isinstance(value, str | int | float | list | dict) else str(value))


def format_location(source: str, key: str) -> str:
    """Location of a value for messages: file and key; or option, and key unless it is that of the option."""
    return source if source.rstrip("+") == f"--{key}" else f"{source}: {key}"


def suggest_key(key: str, known: list[str], dashes: str = "") -> str:
    """End of a message about an unknown key: a similar known key, or ""."""
    tails = {item.rsplit(".", 1)[-1]: item for item in known}
    tail = key.rsplit(".", 1)[-1]
    like = difflib.get_close_matches(tail, list(tails), n=len(tails), cutoff=0.5)  # a common section name is not enough
    near = [item for item in difflib.get_close_matches(key, known, n=5, cutoff=0.5) if item.rsplit(".", 1)[-1] in like]
    if not near:
        near = [tails[t] for t in difflib.get_close_matches(tail, list(tails), n=1, cutoff=0.6)]
    return f"; did you mean {dashes}{near[0]}?" if near else ""
