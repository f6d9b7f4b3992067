"""What a process sets before DeepSpeed compiles or loads anything. Standard library only, so importing it is quick."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from importlib import metadata
from pathlib import Path

OPERATION = "deepspeed_shm_comm"
STAMP = "eve_ds_stamp.txt"
_log = logging.getLogger(__name__)


def prepare_environment() -> None:
    """Set the variables that DeepSpeed and torch read. Call it before deepspeed is imported and the first tensor made;
    twice is as good as once.

    - TORCH_EXTENSIONS_DIR: compiled operations go into a folder of the project's own (a set variable is kept).
    - TORCH_FORCE_WEIGHTS_ONLY_LOAD=1: DeepSpeed asks torch.load for whole pickles, which can run code; this forbids it.
      TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD goes, with a word: torch reads no file at all where both are set.
    - DS_ACCELERATOR=cpu with a CPU build of torch: DeepSpeed need not search, and warn that it found none.
    - THP_MEM_ALLOC_ENABLE=1: torch puts large CPU tensors into huge pages. Page faults on fresh memory cost more than
      elementwise arithmetic (measured: SiLU on 140 MB takes 77 ms with small pages, 36 with huge ones).
    - PATH: this environment's bin first, so that one ninja is found. Two versions rebuild each other's work.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(extensions_folder()))
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", ""):
        _log.warning("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is not heeded: no code from files of weights is run")
    if _version("torch").endswith("+cpu"):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    programs = str(Path(sys.prefix) / "bin")
    path = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry != programs]
    os.environ["PATH"] = os.pathsep.join([programs, *path])


def extensions_folder() -> Path:
    """Where this Python environment keeps compiled operations: TORCH_EXTENSIONS_DIR if set, else in the checkout.

    An installed package keeps them in the user's cache: its own folder may be all users', or not writable.

    Ninja rebuilds an operation whenever the paths of Python or torch change, so each environment has a subfolder.
    """
    if "TORCH_EXTENSIONS_DIR" in os.environ:
        return Path(os.environ["TORCH_EXTENSIONS_DIR"])
    digest = hashlib.sha256(environment_identity().encode()).hexdigest()[:8]
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    checkout = Path(__file__).resolve().parents[2]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = checkout if (checkout / "pyproject.toml").is_file() else cache / "eve-ds"
    return folder / ".torch_extensions" / f"{version}-{digest}"


def operation_folder() -> Path:
    """The folder in which torch builds DeepSpeed's shared-memory communication operation."""
    return extensions_folder() / OPERATION


def environment_identity() -> str:
    """One line naming all that a compiled operation depends on: Python, torch, DeepSpeed, and where they are."""
    return (
        f"python {sys.version.split()[0]}, torch {_version('torch')}, deepspeed {_version('deepspeed')}, {sys.prefix}"
    )


def operation_is_built() -> bool:
    """Whether ``python -m eve_ds.build_ops`` has compiled the operation for this very environment."""
    folder = operation_folder()
    try:
        stamp = (folder / STAMP).read_text(encoding="utf-8")
    except OSError:
        return False
    return stamp.strip() == environment_identity() and (folder / f"{OPERATION}.so").is_file()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
