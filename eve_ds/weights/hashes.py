"""``hashes.json`` of a model folder: {file name: SHA-256}, so that corrupted files are not loaded silently.

A folder without it (from an older version, or made by hand) is loaded unchecked, and so is a file that it does not
list. Only the weights must be listed, since every writer lists them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from preprocessing.errors import UserError
from preprocessing.json_text import dump_json, load_json
from preprocessing.local_files import write_atomic

HASHES, WEIGHTS = "hashes.json", "model.safetensors"


def write_hashes(folder: Path, names: tuple[str, ...]) -> None:
    """Write the hashes of those files ``names`` that exist in ``folder``, atomically; call it last."""
    write_atomic(
        folder / HASHES, dump_json({name: _hash(folder / name) for name in names if (folder / name).is_file()})
    )


class HashError(UserError):
    """A model folder that is not as it was written. Nothing else may be loaded in its place."""


def read_hashes(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of a folder's files; empty without ``hashes.json``. Raises HashError if that is damaged."""
    path = folder / HASHES
    if not path.is_file():
        return {}
    try:
        found = load_json(path.read_bytes())
    except (OSError, ValueError) as error:
        found = error
    sound = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    if not sound or (WEIGHTS not in found and (folder / WEIGHTS).is_file()):
        raise HashError(f"{path}: is damaged; copy the folder again, or delete that file to load without a check")
    return found


def check_hash(path: Path, sha256: str) -> None:
    """Raise HashError unless the file exists and has this hash."""
    try:
        same = _hash(path) == sha256
    except OSError as error:
        raise HashError(f"{path}: {error.strerror}, but {HASHES} names it; copy the folder again") from None
    if not same:
        raise HashError(
            f"{path}: its SHA-256 is not the one in {HASHES} beside it: its bytes have changed; copy the folder again "
            f"(after an intended edit, delete {HASHES})"
        )


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
