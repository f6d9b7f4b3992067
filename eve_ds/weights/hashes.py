"""``hashes.json`` of a model folder: the SHA-256 of its files, by name, so that a flipped bit is not loaded in silence.

A folder without it, made earlier or by hand, loads as it is; so does a file that it does not name, but for the weights,
which every writer names.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from eve_ds.weights.errors import WeightsError
from preprocessing.json_text import dump_json, load_json
from preprocessing.local_files import write_atomic

HASHES, WEIGHTS = "hashes.json", "model.safetensors"


def write_hashes(folder: Path, names: tuple[str, ...]) -> None:
    """Write the hashes of those of the files ``names`` that are in ``folder``: last of all, and atomically."""
    write_atomic(
        folder / HASHES, dump_json({name: _hash(folder / name) for name in names if (folder / name).is_file()})
    )


def read_hashes(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of a folder's files; empty where it has no ``hashes.json``. Raises WeightsError if damaged."""
    path = folder / HASHES
    if not path.is_file():
        return {}
    try:
        found = load_json(path.read_bytes())
    except (OSError, ValueError) as error:
        found = error
    sound = isinstance(found, dict) and all(isinstance(value, str) for value in found.values())
    if not sound or (WEIGHTS not in found and (folder / WEIGHTS).is_file()):
        raise WeightsError(f"{path}: is damaged; copy the folder again, or delete that file to load without a check")
    return found


def check_hash(path: Path, sha256: str) -> None:
    """Raise WeightsError unless the file is there and has that hash."""
    try:
        same = _hash(path) == sha256
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror}, but {HASHES} names it; copy the folder again") from None
    if not same:
        raise WeightsError(
            f"{path}: its SHA-256 is not the one in {HASHES} beside it: its bytes have changed; copy the folder again "
            f"(after an edit that is meant, delete {HASHES})"
        )


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
