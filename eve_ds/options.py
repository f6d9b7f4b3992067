"""Options of a command line: the objects that they name by import path, and one-line messages for their errors. Each
message has the option or file, the expected type, and the given value.

The messages of jsonargparse take several lines, and refer to Python types and to its own implementation.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from eve_ds.recipes import (
    MAX_DEPTH,
    check_keys,
    contains_mapping,
    format_location,
    format_value,
    hint_of,
    known_keys,
    parse_value,
    read_yaml,
    suggest_key,
    type_errors,
)
from preprocessing.errors import UserError, shortened, without_secrets

# Type in a message of jsonargparse -> description; the first match is used.
_TYPES = {
    "PositiveInt": "an integer above 0",
    "NonNegativeInt": "an integer, 0 or more",
    "PositiveFloat": "a number above 0",
    "<class 'int'>": "an integer",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
}
_GIVEN = (r"Given value: (.*)", r"Got value: (.*)", r" (\S+) does not conform", r": '([^']*)'$")


def values_of(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """(name, value as typed) of ``--name value`` and ``--name=value``; the value is None if it is missing."""
    for place, option in enumerate(argv):
        name, equals, value = option.partition("=")
        following = argv[place + 1] if place + 1 < len(argv) else "--"
        if name.startswith("--"):
            yield name[2:], value if equals else None if following.startswith("--") else following


def join_negative_numbers(argv: list[str]) -> list[str]:
    """``--name -1e-3`` -> ``--name=-1e-3``: argparse takes a leading dash for an option, except in -1 and -.5."""
    words: list[str] = []
    for word in argv:
        if words and re.fullmatch(r"--[^=]+", words[-1]) and re.match(r"-[\d.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def check_options(root: type, options: list[str]) -> None:
    """Raise UserError for the first option that is unknown, has no value, or holds a mapping with invalid keys."""
    known = known_keys(root)
    for option in options:
        _check_depth(option)
    for name, typed in values_of(options):
        key = name.rstrip("+")
        check_secrets(typed, f"--{name}")
        if key in ("help", "print_config"):
            continue
        if key not in known:
            raise UserError(f"unknown option --{key}{suggest_key(key, known, '--')}")
        if typed is None:
            raise UserError(f"--{name}: no value follows")
        if contains_mapping(hint_of(root, key)):
            _check_mapping(root, name, typed)


def check_secrets(value: Any, key: str = "", source: str = "") -> None:
    """Refuse passwords and keys in URLs, which would appear in config.yaml, logs, the report and wandb.

    Raises:
        UserError: names the ``source`` (a file or an option) and the setting.
    """
    if isinstance(value, str) and (hidden := without_secrets(value)) != value:
        where = f"{source}: {key}={hidden}" if source and key else f"{source or key}={hidden}"
        raise UserError(f"{where}: holds a user, a password or a key; leave them out, and give them in variables")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, inner in items:
        check_secrets(inner, f"{key}.{name}" if key else f"{name}", source)


def _check_mapping(root: type, name: str, typed: str) -> None:
    """Raise UserError for an unknown key or a wrong type in ``--SECTION {...}`` or ``--data.sources [...]``."""
    key, (source, value) = name.rstrip("+"), _given(root, name, typed)
    if dataclasses.is_dataclass(hint_of(root, key)) and not isinstance(value, dict):
        if source != f"--{name}":
            raise UserError(f"{source}: expected a mapping with the keys of {name}, this is {format_value(value)}")
        raise UserError(
            f"--{name}: is a section; give a key of it and a value, as in --{name}.KEY {format_value(value)}"
        )
    check_secrets(value, key, source)  # also of values in a file
    tree = [value] if name.endswith("+") and not isinstance(value, list) else value
    for part in reversed(key.split(".")):
        tree = {part: tree}
    check_keys(tree, root, source)


def _given(root: type, name: str, typed: str) -> tuple[str, Any]:
    """(source, value) of an option; the value of a section may be the name of a file that holds it."""
    if is_section_file(root, name, typed):
        return f"--{name} {typed}", read_yaml(typed, f"--{name}")
    return f"--{name}", parse_value(typed, f"--{name}")


def is_section_file(root: type, name: str, typed: str) -> bool:
    """Whether an option is a section and its value names a file."""
    section = name in known_keys(root) and dataclasses.is_dataclass(hint_of(root, name))
    return section and os.path.exists(typed) and not os.path.isdir(typed)


def inline_section_files(root: type, options: list[str]) -> list[str]:
    """Replace section files that can be read only once, such as ``<(command)``, by their content."""
    words = []
    for before, word in zip(["", *options], options, strict=False):
        name, equals, typed = word.partition("=") if word.startswith("--") else (before, "", word)
        if is_section_file(root, name[2:], typed) and not Path(typed).is_file():
            typed = as_one_line(read_yaml(typed))
        words.append(f"{name}{equals}{typed}" if word.startswith("--") else typed)
    return words


def as_one_line(tree: Any) -> str:
    """YAML in one line."""
    return yaml.safe_dump(tree, default_flow_style=True, width=10**9)


def _check_depth(option: str) -> None:
    """Raise UserError for brackets nested too deeply: the parser would take minutes, then fail."""
    depth = 0
    for char in option:
        depth += (char in "[{") - (char in "]}")
        if depth > MAX_DEPTH:
            raise UserError(f"the command line: {shortened(option, 40)} is nested deeper than {MAX_DEPTH} levels")


def explain_parse_error(root: type, recipes: list[str], options: list[str], error: Exception) -> str:
    """Message for an error of the parser of a config tree, with the file or option at fault.

    Args:
        root: the dataclass of the tree.
        recipes: the YAML files.
        options: the rest of the command line.
        error: raised by the parser.
    """
    found = [(path, place, what) for path in recipes for place, what in type_errors(read_yaml(path), root, "")]
    for name, typed in values_of(options):
        if typed is not None and name not in ("help", "print_config"):
            (source, value), key = _given(root, name, typed), name.rstrip("+")
            added = name.endswith("+") and not isinstance(value, list)
            found += [
                (source, place, what)
                for place, what in type_errors([value] if added else value, hint_of(root, key), key)
            ]
    named = re.findall(r'Parser key "([^"]+)"', str(error))[-1:]  # the innermost
    matching = [each for each in found if {each[0].strip("-+"), each[1]} & set(named)]
    for where, place, what in matching or found[: len(named)]:
        return f"{format_location(where, place)}: {what}"
    return f"{one_line(error)}; see --help"


def one_line(error: Exception) -> str:
    """Message for an error of a command-line parser, in one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    if found := re.fullmatch(r"argument (--\S+): expected (?:one|at least one) argument", text):
        return f"{found[1]}: no value follows"
    if found := re.fullmatch(r"[Uu]nrecognized arguments: (.*)", text):
        return f"{shortened(found[1], 200)}: no option takes this"
    if found := re.match(r'Parser key "(?:[^"]*\.)?([^".]+)"', text):
        kinds = [described for kind, described in _TYPES.items() if kind in text]
        given = [match for pattern in _GIVEN if (match := re.search(pattern, text))]
        if kinds and given:
            null = " or null" if "NoneType" in text else ""
            return f"--{found[1]}: expected {kinds[0]}{null}, got {format_value(given[0][1])}"
    return shortened(text, 400)


def import_object(path: str, option: str = "") -> Any:
    """Import what ``path`` names. The module is found on ``sys.path``: the working directory and PYTHONPATH are on it.

    Args:
        path: ``module:name``; both may be dotted.
        option: the option that holds the path, for the error message.
    Raises:
        UserError: the path is malformed, its module cannot be imported, or it has no such name.
    """
    source = f"{option} {path}".strip()
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise UserError(f"{source}: not an import path; write module:name, as in my_package.mine:MyClass")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise UserError(f"{source}: {_failure(module_name, error)}") from error
        raise UserError(
            f"{source}: there is no module {error.name}; start in the folder that holds it, or add that to PYTHONPATH"
        ) from error
    except Exception as error:
        raise UserError(f"{source}: {_failure(module_name, error)}") from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise UserError(f"{source}: {module_name} has no {name}; check the spelling") from error
    return found


def _failure(module_name: str, error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"{module_name} cannot be imported ({type(error).__name__}: {error}, at {last.filename}:{last.lineno}); "
        f'`python -c "import {module_name}"` shows where'
    )
