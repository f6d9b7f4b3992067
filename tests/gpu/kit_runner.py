"""Runs the sections of the GPU kit, each a process group of its own, and writes the report after each.

A section that fails, hangs or is killed loses itself alone: its limit ends its whole group, and nothing that it printed
is lost, because its output goes to a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from preprocessing.local_files import write_json, write_text

ROOT = Path(__file__).resolve().parents[2]
POLL_SECONDS = 0.05
TAIL = 4000  # characters of a section's output in the report; all of it is in OUT/logs
OK, FAILED, KILLED, NOT_RUN = "ok", "failed", "killed", "not run"


@dataclass(frozen=True)
class Section:
    """A command of the kit.

    Args:
        name: in the report, and of its log.
        about: one line for ``--list``.
        arguments: after the interpreter. Its last line that is a JSON object holds its figures.
        limit: seconds, after which its process group is killed.
        least: seconds without which it is not started.
        on_cpu: also in the dry run.
    """

    name: str
    about: str
    arguments: Sequence[str]
    limit: float
    least: float = 0.0
    on_cpu: bool = True


@dataclass
class Result:
    """What became of a section: ``state`` is ok, failed, killed or not run; ``why`` where it is not ok."""

    name: str
    state: str = NOT_RUN
    why: str = "its turn has not come"
    seconds: float | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    tail: str = ""


class Kit:
    """Sections in order, until they are done, the budget is spent or a signal comes.

    Args:
        out: folder of ``report.json``, ``table.txt`` and ``logs``.
        sections: to run.
        deadline: of ``time.monotonic``, when the budget is spent.
        facts: of machine and code, for the report.
        environment: variables of the sections, beside those of this process.
    """

    def __init__(
        self,
        out: Path,
        sections: Sequence[Section],
        deadline: float,
        facts: Mapping[str, Any],
        environment: Mapping[str, str],
    ) -> None:
        self.out, self.sections, self.deadline, self.facts = out, sections, deadline, dict(facts)
        self.environment = {**os.environ, **environment}
        self.results = [Result(section.name) for section in sections]
        self._signal: signal.Signals | None = None

    def run(self) -> int:
        """Exit code: 0 if all sections that ran are ok, 1 if not, 128 + the signal's number if one came."""
        with self._signals():
            for section, result in zip(self.sections, self.results, strict=True):
                if self._signal is not None:
                    result.why = f"the kit got {self._signal.name}"
                elif self.deadline - time.monotonic() <= section.least:
                    result.why = f"budget spent: it needs {section.least:.0f} s" if section.least else "budget spent"
                else:
                    result.why = "running"
                    self._write("running")
                    self._run(section, result)
                    print(line_of(result), flush=True)
            self._write("done" if self._signal is None else f"stopped by {self._signal.name}")
        if self._signal is not None:
            return 128 + self._signal
        return int(any(result.state in (FAILED, KILLED) for result in self.results))

    def _run(self, section: Section, result: Result) -> None:
        log = self.out / "logs" / f"{section.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        with log.open("wb") as output:
            child = subprocess.Popen(
                [sys.executable, *section.arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        killed = self._await(child.pid, began + section.limit)
        # Before the child is reaped its number, the group's, belongs to nobody else.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        code = child.wait()
        result.seconds = round(time.monotonic() - began, 1)
        text = log.read_text(encoding="utf-8", errors="replace")
        result.tail, result.figures = text[-TAIL:], figures_of(text)
        result.state = KILLED if killed else FAILED if code else OK
        result.why = killed or (f"exit code {code}" if code else "")

    def _await(self, pid: int, limit: float) -> str:
        """Wait for the end of a child, without reaping it; returns why it must be killed, "" if it ended by itself."""
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if self._signal is not None:
                return f"the kit got {self._signal.name}"
            if time.monotonic() >= min(limit, self.deadline):
                return "its limit" if limit <= self.deadline else "budget spent"
            time.sleep(POLL_SECONDS)
        return ""

    def _write(self, state: str) -> None:
        report = {"state": state, **self.facts, "sections": [asdict(result) for result in self.results]}
        write_json(self.out / "report.json", report)
        write_text(self.out / "table.txt", table_of(report))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGINT and SIGHUP (a lost terminal) end the section that runs, and the kit after a last report."""

        def note(number: int, _: object) -> None:
            self._signal = signal.Signals(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def figures_of(text: str) -> dict[str, Any]:
    """The last line that is a JSON object."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(json.JSONDecodeError):
                return dict(json.loads(line))
    return {}


def line_of(result: Result) -> str:
    seconds = "" if result.seconds is None else f"{result.seconds:.1f} s"
    return f"{result.name:<20} {result.state:<8} {seconds:>8}  {result.why}".rstrip()


def table_of(report: Mapping[str, Any]) -> str:
    """A line a section, its figures indented below."""
    facts = [f"{name}: {value}" for name, value in report.items() if name not in ("sections", "machine")]
    lines = [*facts, *(f"{name}: {value}" for name, value in report.get("machine", {}).items()), ""]
    for values in report["sections"]:
        lines.append(line_of(Result(**values)))
        lines += [f"    {name}: {value}" for name, value in flat(values["figures"])]
    return "\n".join(lines) + "\n"


def flat(figures: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested figures as dotted names, numbers with five digits."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", f"{value:.5g}" if isinstance(value, float) else str(value)
