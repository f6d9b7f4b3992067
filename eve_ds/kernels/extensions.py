"""Where DeepSpeed's compiled operations are kept. Standard library only."""

from __future__ import annotations

import hashlib
import os
import sys
from importlib import metadata
from pathlib import Path


def extensions_folder() -> Path:
    """The folder of this Python environment's compiled operations: TORCH_EXTENSIONS_DIR if set, else one of our own.

    In a checkout that is ``.torch_extensions``; an installed package uses the user's cache, because its own folder may
    be shared or read-only. Each environment has a subfolder: ninja rebuilds an operation, without a message, whenever
    the path of Python or torch changes.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    versions = f"python {sys.version.split()[0]}, torch {version('torch')}, deepspeed {version('deepspeed')}"
    digest = hashlib.sha256(f"{versions}, {sys.prefix}".encode()).hexdigest()[:8]
    checkout = Path(__file__).resolve().parents[2]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = checkout if (checkout / "pyproject.toml").is_file() else cache / "eve-ds"
    return folder / ".torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}-{digest}"


def version(package: str) -> str:
    """The installed version of ``package``, or "absent"."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
