"""YAML recipes: which of them a command line names, reading them, and every key checked.

Python's YAML reader takes the last of two equal keys and says nothing; here that is an error, as the standard has it.
So is a key with nothing behind it, which YAML takes for null, and what is neither text, number, list nor mapping.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml

from eve_ds.errors import UserError
from preprocessing.schema import check_regular

Section = TypeVar("Section")
HOME = Path(__file__).resolve().parents[1]  # of eve_ds and ds_configs: the checkout, or site-packages
DEEPEST, MOST_NODES = 20, 10_000  # a recipe has four levels and a hundred nodes
_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}


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
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
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


def recipe(path: str) -> Path:
    """The recipe that ``--config`` names."""
    return shipped(path, "eve_ds/configs", ".yaml")


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
        loader = _Loader(Path(path).read_text(encoding="utf-8"))
        node = loader.get_single_node()
        for number, _ in enumerate(_plain_nodes(node)):
            if number > MOST_NODES:
                raise UserError(f"{source}: its aliases (*name) stand for more than {MOST_NODES} values; write fewer")
        return loader.construct_document(node) if node is not None else None
    except RecursionError as error:
        raise UserError(f"{source}: is nested deeper than {DEEPEST} levels") from error
    except _NodeError as error:
        raise UserError(f"{source}: {error}") from error
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 text") from error
    except ValueError as error:  # Python reads no number of thousands of digits, and no day beyond its month
        raise UserError(f"{source}: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{place}: {getattr(error, 'problem', error)}") from error


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


def model_section(path: Path) -> dict[str, Any]:
    """The ``model`` section of the config that a run stores.

    Raises:
        UserError: as ``read_yaml``, or there is no such section.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise UserError(f"{path}: no 'model' section; expected the config.yaml that a run stores")
    return raw["model"]


def known_keys(root: type, prefix: str = "") -> list[str]:
    """All dotted keys of a dataclass tree, sections included."""
    keys = []
    hints = typing.get_type_hints(root)
    for item in dataclasses.fields(root):
        keys.append(prefix + item.name)
        if dataclasses.is_dataclass(hints[item.name]):
            keys += known_keys(typing.cast(type, hints[item.name]), f"{prefix}{item.name}.")
    return keys


def check_keys(raw: Any, root: type, source: str) -> None:
    """Raise UserError naming the first unknown key in a YAML tree, and the nearest known one."""
    if not isinstance(raw, dict):
        raise UserError(f"{source}: a config is a YAML mapping of sections, this is a {type(raw).__name__}")
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
                    raise UserError(f"{source}: {path!r} is a section, give a mapping in place of {value!r}")
                visit(value, path + ".")

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
            default = "" if isinstance(item.default, type(dataclasses.MISSING)) else f" ({item.default!r})"
            raise UserError(
                f"{key} is null, but needs a value; write one, or leave the key out for its default{default}"
            )


def section_of(kind: type[Section], values: Any, source: str) -> Section:
    """The dataclass with the values of a stored section.

    Raises:
        UserError: a value of the wrong type, an unknown key; the message names ``source`` and the key.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: expected a mapping, this is {values!r:.60}")
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{source}: unknown key {key!r}{nearest(str(key), list(hints))}")
        if not fits(value, hints[key]):
            raise UserError(f"{source}: {key}={value!r:.60} has the wrong type; expected {_told(hints[key])}")
    return kind(**values)


def fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is of a type: bool, int, float, str, None, lists, literals and unions of them."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, choice) for choice in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is list:
        return isinstance(value, list) and all(fits(item, inner[0]) for item in value)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _told(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def nearest(key: str, known: list[str], dashes: str = "") -> str:
    """The end of a message about an unknown key: the known one that is most like it, if any is."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        tails = {item.rsplit(".", 1)[-1]: item for item in known}
        near = [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.6)]
    return f"; did you mean {dashes}{near[0]}?" if near else ""
