"""The code that runs: its version, and the state of the git checkout that it runs from, if it does."""

from __future__ import annotations

import logging
import subprocess
import threading
import tomllib
from pathlib import Path
from typing import Any

from eve_ds.environment import version
from preprocessing.errors import shortened, without_secrets

ROOT = Path(__file__).resolve().parents[2]  # the checkout, if the code runs from one
MAX_DIFF = 256 << 10  # bytes
MAX_NAMES = 200  # untracked files and folders
GIT_SECONDS = 2.0  # for each of two git commands; a healthy one takes some hundredths of a second
_log = logging.getLogger(__name__)


def own_version(root: Path = ROOT) -> str:
    """Of EVE-DS: that of the checkout, or else of the installed package."""
    try:
        return str(tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return version("eve-ds")


def code(root: Path) -> dict[str, Any]:
    """State of the git checkout ``root``: commit, branch, dirty (tracked files differ from the commit), diff (of these,
    at most ``MAX_DIFF`` bytes), diff_is_cut, untracked (names alone).

    Empty if ``root`` is no checkout, as of an installed wheel, whose version is among the packages'. If git is missing
    or fails, one line is logged, and what is not known is left out.
    """
    if not (root / ".git").exists():
        return {}
    found: dict[str, Any] = {}
    try:
        status, _ = _git(root, ["status", "--porcelain=v2", "--branch", "--untracked-files=normal"])
        lines = status.splitlines()
        for key, name in (("commit", "# branch.oid "), ("branch", "# branch.head ")):
            found[key] = next((line[len(name) :] for line in lines if line.startswith(name)), None)
        found["dirty"] = any(line[:1] in "12u" for line in lines if line)
        found["untracked"] = [without_secrets(line[2:]) for line in lines if line.startswith("? ")][:MAX_NAMES]
        if found["dirty"]:
            diff, found["diff_is_cut"] = _git(root, ["diff", "HEAD", "--no-color", "--no-ext-diff", "--no-textconv"])
            found["diff"] = without_secrets(diff)
    except (OSError, ValueError) as error:
        _log.warning("provenance: the state of the checkout %s is not recorded: %s", root, shortened(str(error), 200))
    return found


def _git(root: Path, arguments: list[str]) -> tuple[str, bool]:
    """Output of a git command, at most ``MAX_DIFF`` bytes; and whether it was cut.

    Raises:
        OSError: git is not there.
        ValueError: it failed, or took longer than ``GIT_SECONDS``.
    """
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(root), *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        limit = threading.Timer(GIT_SECONDS, process.kill)
        limit.start()
        try:
            assert process.stdout is not None and process.stderr is not None
            output = process.stdout.read(MAX_DIFF + 1)
            cut = len(output) > MAX_DIFF
            if cut:
                process.kill()  # it would wait for a reader
            told = process.stderr.read(2000).decode(errors="replace").strip()
            failed = process.wait() != 0 and not cut
        finally:
            limit.cancel()
    if failed:
        late = f"git {arguments[0]} took longer than {GIT_SECONDS:g} s"
        raise ValueError(late if process.returncode < 0 else " ".join(told.split()) or f"git {arguments[0]} failed")
    if cut:  # at the end of a line: half an address is not recognized as one, and its password would be shown
        output = output[:MAX_DIFF].rpartition(b"\n")[0]
    return output.decode(errors="replace"), cut
