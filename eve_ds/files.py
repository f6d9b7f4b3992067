"""Text and JSON files that are whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preprocessing.local_files import write_atomic


def write_text(path: Path, text: str) -> None:
    write_atomic(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """As all JSON files of EVE-DS are laid out."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
