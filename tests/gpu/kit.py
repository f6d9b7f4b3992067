"""All checks and figures of a machine with one GPU, in one command.

    python -m tests.gpu.kit --out DIR [--budget 540] [--device cuda|cpu] [--only SECTION ...] [--list]

Each section is a process with a limit of its own. After each, DIR/report.json (card, versions, commit; per section
state, seconds, figures and the end of its output) and DIR/table.txt are written anew, DIR/logs has all output. Sections
that the budget leaves no time for are "not run". Exit code: 0 if all that ran are ok; 1 if one failed or was killed.
On the CPU (--device cpu, the default without a GPU) the same code runs at tiny sizes: a dry run, whose figures say
nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from evaluation.common import Parser
from eve_ds.errors import run_command
from preprocessing.errors import UserError
from tests.gpu.kit_runner import ROOT, Kit, Section
from tests.gpu.kit_sections import sections

MACHINE_SECONDS = 120  # importing torch from a cold disk


def main() -> int:
    began = time.monotonic()
    options = _parser().parse_args()
    known = {section.name: section for section in sections("cuda", Path())}
    if options.list:
        for section in known.values():
            print(f"{section.name:<20} {section.limit:>4.0f} s  {section.about}")
        return 0
    if unknown := [name for name in options.only or () if name not in known]:
        raise UserError(f"--only {unknown[0]}: no such section; --list shows them")
    if options.out is None:
        raise UserError("--out is missing: name a folder for the report")
    out = Path(options.out).absolute()
    machine = _machine()
    device = options.device or ("cuda" if machine["cuda_found"] else "cpu")
    if device == "cuda" and not machine["cuda_found"]:
        raise UserError("--device cuda: torch finds no CUDA device; --device cpu is the dry run")
    chosen = _chosen(sections(device, out / "work"), device, options.only)
    facts = {"device": device, "commit": _commit(), "budget": options.budget, "started": time.strftime("%F %T %z")}
    environment = {"EVE_DS_KIT_DEVICE": device, "WANDB_MODE": "disabled"}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # DeepSpeed takes a GPU where it finds one
    return Kit(out, chosen, began + options.budget, facts | {"machine": machine}, environment).run()


def _parser() -> Parser:
    parser = Parser(prog="python -m tests.gpu.kit", description=__doc__)
    parser.add_argument("--out", help="folder of the report; existing reports in it are replaced")
    parser.add_argument("--budget", type=float, default=540, help="seconds for all sections (default 540)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda if there is one")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="these sections alone, in the usual order")
    parser.add_argument("--list", action="store_true", help="the sections, their limits and what they do")
    return parser


def _chosen(found: list[Section], device: str, only: list[str] | None) -> list[Section]:
    """Raises UserError where a section was asked for that is none of this device's."""
    here = [section for section in found if device == "cuda" or section.on_cpu]
    names = [section.name for section in here]
    if missing := [name for name in only or () if name not in names]:
        raise UserError(f"--only {missing[0]}: has no dry run; it needs a CUDA device")
    return [section for section in here if only is None or section.name in only]


def _machine() -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.gpu.kit_machine"]
    ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=MACHINE_SECONDS, check=True)
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def _commit() -> str:
    """HEAD, with "+" where tracked files differ from it; "unknown" in a copy without its history."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout else "") if head.returncode == 0 else "unknown"


if __name__ == "__main__":
    run_command(main)
