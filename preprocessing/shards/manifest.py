"""The manifest of a split: read and checked. A leaf that anyone may import."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from preprocessing.errors import UserError
from preprocessing.json_text import load_json
from preprocessing.local_files import check_regular
from preprocessing.shards.schema import KINDS, MANIFEST, SCHEMA_VERSION

ANSWER_LIST_HASH = "answer_list_sha256"  # the field with the `answers_sha256` of a VQA split

_FIELDS = {"kind": str, "split": str, "rows": int, "samples": int, "shards": list, "dropped": dict}
_SHARD_FIELDS = {"file": str, "rows": int, "samples": int, "bytes": int, "sha256": str}


class RemoteFolder(Protocol):
    """A folder behind a URI (running.storage.RemotePath): the part of pathlib.Path that `read_manifest` needs."""

    def __truediv__(self, name: str, /) -> Any:
        """The file `name` in it, which has `read_bytes`."""
        ...


def read_manifest(directory: str | os.PathLike[str] | RemoteFolder) -> dict[str, Any]:
    """Read and check `directory/manifest.json`, the manifest of one split folder.

    Raises UserError when it is missing, is not valid JSON, has another schema version, lacks a field, or names a file
    outside the folder.
    """
    path = (Path(directory) if isinstance(directory, str | os.PathLike) else directory) / MANIFEST
    if isinstance(path, Path):
        check_regular(path)
    try:
        manifest: Any = load_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {directory} is not a prepared split folder, run a converter") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); prepare the split again") from None
    except ValueError as error:
        raise UserError(f"{path}: invalid JSON ({error}); prepare the split again") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}; prepare it again")
    _check_fields(path, "", manifest, _FIELDS)
    if manifest["kind"] not in KINDS:
        raise UserError(f"{path}: kind {manifest['kind']!r} is none of {', '.join(KINDS)}; prepare the split again")
    for index, shard in enumerate(manifest["shards"]):
        _check_fields(path, f"shards[{index}].", shard, _SHARD_FIELDS)
    dropped_list = manifest.get("dropped_list")
    for record in (*manifest["shards"], *([dropped_list] if isinstance(dropped_list, dict) else [])):
        _check_file_name(path, record.get("file"))
    checked: dict[str, Any] = manifest
    return checked


def _check_fields(path: Path, prefix: str, record: Any, fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: field {prefix}{name} is missing or no {kind.__name__}; prepare the split again")


def _check_file_name(path: Path, name: Any) -> None:
    """Raise UserError where `name` is a string, but not the name of a file in the manifest's own folder."""
    if isinstance(name, str) and (name in ("", ".", "..") or "/" in name or not name.isprintable()):
        raise UserError(f"{path}: file {name!r} is not in the folder of the manifest; prepare the split again")


def answers_sha256(answers: Sequence[str]) -> str:
    """The hash of an answer list. A VQA split's manifest records the hash of the list that its labels index."""
    return hashlib.sha256(json.dumps(list(answers)).encode()).hexdigest()
