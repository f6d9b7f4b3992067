"""YAML recipes: which of them a command line names, reading them, and every key checked.

Python's YAML reader takes the last of two equal keys and says nothing; here that is an error, as the standard has it.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from eve_ds.errors import UserError
from preprocessing.schema import check_regular


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


def split_options(argv: list[str]) -> tuple[list[str], list[str]]:
    """The files that ``--config`` names, in order, and the rest of the command line.

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
        files.append(file)
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
        # A subclass of SafeLoader: it makes nothing but plain data.
        return yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{source}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"{source}: not valid YAML{place}: {getattr(error, 'problem', error)}") from error


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


def nearest(key: str, known: list[str], dashes: str = "") -> str:
    """The end of a message about an unknown key: the known one that is most like it, if any is."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        tails = {item.rsplit(".", 1)[-1]: item for item in known}
        near = [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(tails), n=1, cutoff=0.6)]
    return f"; did you mean {dashes}{near[0]}?" if near else ""
