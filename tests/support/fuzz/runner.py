"""Runs damaged inputs through the program in forked children, whose time and memory are bounded.

A child does many cases, one after the other, and tells of each before it begins it and after it has ended. So a case
that hangs, aborts or eats the memory is known by its number, and the next child goes on after it.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import random
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.fuzz.mutate import CANARY, damaged

CPU_SECONDS = 60  # of a case: none needs a tenth of it on a slow machine
WAIT_SECONDS = 240.0  # for a case that uses no processor at all: it waits for something that never comes
MEMORY = 3 << 30  # that a case may allot beyond what the process has
# Control characters, and those that turn the direction of writing: what a terminal would obey.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_TOLD = re.compile(r"^(\S+: )?(error|preprocessing)", re.MULTILINE)
_CODE = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "pty.spawn")


class Wrong(AssertionError):
    """An input was taken, and what was read is not what is there."""


@dataclass(frozen=True)
class Target:
    """A reader and a sound input for it.

    Args:
        name: for reports.
        files: {path below the folder: content} of the sound input.
        victims: those of them to damage.
        read: reads the input in a folder, raises Wrong where it took what is not there, and returns an exit code.
        damage: (path, content, random) -> content; as the file's kind is, where it is not given.
        mend: called when the damage is done, to make hashes right again and the like.
    """

    name: str
    files: Mapping[str, bytes]
    victims: Sequence[str]
    read: Callable[[Path], int]
    damage: Callable[[str, bytes, random.Random], bytes] = damaged
    mend: Callable[[Path], None] = field(default=lambda folder: None)


@dataclass(frozen=True)
class Fault:
    """What should not be.

    Args:
        case: (target, number), by which it can be run again.
        kind: traceback, hang, death, wrong, code, message.
        text: more of it.
    """

    case: tuple[str, int]
    kind: str
    text: str


def run(targets: Sequence[Target], count: int, seed: int = 0, first: int = 0) -> tuple[Counter[str], list[Fault]]:
    """Run ``count`` cases, shared evenly among the targets: numbers ``first`` and following of each.

    Returns how many cases were taken and refused by target, as {"target taken": n}, and the faults.
    """
    cases = [(target, first + number // len(targets)) for number in range(count) for target in
             [targets[number % len(targets)]]]  # fmt: skip
    cases.sort(key=lambda case: [target.name for target in targets].index(case[0].name))
    tally: Counter[str] = Counter()
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory(prefix="eve-ds-fuzz-") as scratch:
        done = 0
        while done < len(cases):
            done += _batch(cases[done:], seed, Path(scratch), tally, faults)
    return tally, faults


def sound(target: Target, folder: Path) -> int:
    """Read the sound input of a target in this process; returns the exit code."""
    _write(target, folder)
    target.mend(folder)
    return target.read(folder)


def one(target: Target, number: int, folder: Path, seed: int = 0) -> int:
    """Make case ``number`` in ``folder`` and run it in this process; returns the exit code. For looking at a fault."""
    _write(target, folder)
    _damage(target, number, folder, seed)
    return target.read(folder)


def _batch(cases: list[tuple[Target, int]], seed: int, scratch: Path, tally: Counter[str], faults: list[Fault]) -> int:
    """Run cases in one child until it is done or a case ends it. Returns how many were run."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(cases, seed, scratch, writing)
    os.close(writing)
    done = 0
    hung = False
    with open(reading, "rb") as answers:
        while True:
            if not select.select([answers], [], [], WAIT_SECONDS)[0]:
                hung = True
                os.kill(child, signal.SIGKILL)
                break
            line = answers.readline()
            if not line:
                break
            outcome, text = json.loads(line)
            target, number = cases[done]
            if outcome in ("taken", "refused"):
                tally[f"{target.name} {outcome}"] += 1
            else:
                faults.append(Fault((target.name, number), outcome, text))
            done += 1
    status = os.waitpid(child, 0)[1]
    if done < len(cases):
        target, number = cases[done]
        code = os.waitstatus_to_exitcode(status)
        kind = "hang" if hung or code == -signal.SIGXCPU else "death"
        faults.append(Fault((target.name, number), kind, f"exit code {code}"))
        done += 1
    return done


def _child(cases: list[tuple[Target, int]], seed: int, scratch: Path, writing: int) -> None:
    """Never returns."""
    code = 1
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # pytest's would print the stacks of a death that is looked for
        ran: list[str] = []
        platform.processor()  # asks `uname`, once: for the provenance
        sys.addaudithook(lambda event, args: ran.append(f"{event} {args!r}"[:200]) if event in _CODE else None)
        os.chdir(scratch)  # where code that is run would leave its mark
        sys.stdout, sys.stderr = (open(number, "w", closefd=False, errors="backslashreplace") for number in (1, 2))
        for place, (target, number) in enumerate(cases):
            spent = resource.getrusage(resource.RUSAGE_SELF)
            soft = int(spent.ru_utime + spent.ru_stime) + CPU_SECONDS
            resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
            folder = scratch / f"{os.getpid()}-{place}"  # another for each: readers may remember what lay where
            os.write(writing, (json.dumps(_case(target, number, folder, seed, ran)) + "\n").encode())
            shutil.rmtree(folder, ignore_errors=True)
        code = 0
    except BaseException:  # noqa: BLE001  # of the harness: told, and the case is a death
        traceback.print_exc()
    finally:
        os._exit(code)


def _write(target: Target, folder: Path) -> None:
    for name, content in target.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _damage(target: Target, number: int, folder: Path, seed: int) -> str:
    rng = random.Random(f"{seed} {target.name} {number}")
    victim = rng.choice(list(target.victims))
    content = target.damage(victim, target.files[victim], rng)
    (folder / victim).write_bytes(content)
    target.mend(folder)
    return victim


def _case(target: Target, number: int, folder: Path, seed: int, ran: list[str]) -> tuple[str, str]:
    ran.clear()
    _write(target, folder)
    _damage(target, number, folder, seed)
    with tempfile.TemporaryFile() as told:
        kept = os.dup(1), os.dup(2)
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
        try:
            outcome, text = _outcome(target, folder)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for own, descriptor in zip(kept, (1, 2), strict=True):
                os.dup2(own, descriptor)
                os.close(own)
        told.seek(0)
        output = told.read().decode("utf-8", "backslashreplace")
    if ran or os.path.exists(CANARY):
        outcome, text = "code", str(ran)
        Path(CANARY).unlink(missing_ok=True)
    elif outcome in ("taken", "refused") and (odd := _CONTROL.search(output.replace("\r\n", "\n"))):
        outcome, text = "message", f"prints {odd[0]!r}: {output[max(0, odd.start() - 200) : odd.end() + 100]!r}"
    elif outcome == "refused" and ("Traceback" in output or not (text or _TOLD.search(output))):
        outcome, text = "message", f"says {output[-600:]!r}"
    return outcome, text


def _outcome(target: Target, folder: Path) -> tuple[str, str]:
    try:
        code: Any = target.read(folder)
    except SystemExit as error:
        code = error.code
    except Wrong as error:
        return "wrong", str(error)[:1000]
    except BaseException as error:  # noqa: BLE001  # the very thing that is looked for
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))
        return "traceback", f"{type(error).__name__}: {str(error)[:200]} at {where}"
    if code not in (0, 1, 2):
        return "message", f"exit code {code}"
    return ("taken", "refused", "refused")[code], "verify" if code == 1 else ""
