"""Objects that an option names by import path, such as ``my_package.mine:MyCallback``."""

from __future__ import annotations

import importlib
import traceback
from typing import Any

from preprocessing.errors import UserError


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
