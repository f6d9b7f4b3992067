"""Versions of the libraries, and whether they load. Each is loaded in a child process, since a broken one may crash."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from evaluation.common import without_secrets

IMPORT_TIMEOUT_S = 180
REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements.txt"

# The last line that a child prints is ``Package.detail``. mpi4py must not start MPI, which can hang without mpirun.
SNIPPETS = {
    "deepspeed": "import deepspeed",
    "triton": "import triton",
    "pyarrow": "import pyarrow",
    "torchvision": "import torchvision",
    "mpi4py": "import mpi4py; mpi4py.rc.initialize = False\n"
    "from mpi4py import MPI; print(MPI.Get_library_version().splitlines()[0])",
}


@dataclass(frozen=True)
class Package:
    """A library.

    Attributes:
        version: None if it is not installed.
        problem: why it does not load; "" if it loads or was not tried.
        detail: for mpi4py, the MPI library that it uses.
    """

    version: str | None
    problem: str = ""
    detail: str = ""


def version(package: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def pins() -> dict[str, str]:
    """Exact versions that EVE-DS requires: from requirements.txt, or from the metadata of the installed package."""
    if REQUIREMENTS.is_file():
        lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    else:
        lines = metadata.requires("eve-ds") or [] if version("eve-ds") else []
    found = (re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?\s*==\s*([^\s;#]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def triton_wanted() -> str | None:
    """The version of Triton that the installed torch requires; None for a CPU build, which requires none."""
    required = metadata.requires("torch") or [] if version("torch") else []
    found = (re.match(r"triton\s*==\s*([\d.]+)", line) for line in required)
    return next((match[1] for match in found if match), None)


def packages() -> dict[str, Package]:
    """The libraries that can make a run fail, each loaded once."""
    installed = {name: version(name) for name in SNIPPETS}
    present = [name for name in SNIPPETS if installed[name] is not None]
    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        loaded = dict(zip(present, pool.map(_load, present), strict=True))
    return {name: Package(found, *loaded.get(name, ("", ""))) for name, found in installed.items()}


def _load(name: str) -> tuple[str, str]:
    """(problem, detail)"""
    code, output, errors = run([sys.executable, "-c", SNIPPETS[name]], IMPORT_TIMEOUT_S)
    if code == 0:
        return "", output.strip().splitlines()[-1] if name == "mpi4py" and output.strip() else ""
    return last_line(errors) or f"its import ended with exit code {code}", ""


def torch_side(*, measure: bool) -> tuple[dict[str, Any], str]:
    """(what ``torch_side`` found, why it failed or ""). What it found before a failure is kept."""
    command = [sys.executable, "-m", "eve_ds.doctor.torch_side", *(["--measure"] if measure else [])]
    code, output, errors = run(command, IMPORT_TIMEOUT_S)
    found: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    return found, "" if code == 0 else last_line(errors) or f"exit code {code}"


def run(command: list[str], timeout: float) -> tuple[int, str, str]:
    """(exit code, output, errors) of a command; 127 if it cannot be started, 124 after ``timeout`` seconds."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=timeout, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return 124, "", f"{Path(command[0]).name} did not answer in {timeout:.0f} s"
    except OSError as error:
        return 127, "", f"{command[0]}: {error.strerror}"
    return done.returncode, done.stdout, done.stderr


def last_line(text: str) -> str:
    """The error line of a traceback, at most 200 characters: the last line without indent, of an exception if any."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line[0].isspace()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Warning)\b", line)]
    return without_secrets((errors or lines or [""])[-1])[:200]
