"""The GPU kit's runner, with real processes: a section that fails, hangs or is killed loses itself alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import kit_runner
from tests.gpu.kit_runner import Kit, Section, figures_of

GOOD = 'print("text"); print(\'{"answer": 42, "deep": {"er": 0.5}}\'); print("1 passed")'
# A child of its own that outlives the section if its group is not killed, and tells its number.
LINGERING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print('{"child": %d}' % child.pid, flush=True)
"""


def section(name: str, code: str, limit: float = 60.0, least: float = 0.0) -> Section:
    return Section(name, "about it", ["-c", code], limit, least)


def run(out: Path, sections: list[Section], budget: float = 120.0, **variables: str) -> tuple[int, dict[str, Any]]:
    code = Kit(out, sections, time.monotonic() + budget, {"commit": "c0ffee", "machine": {}}, variables).run()
    report = json.loads((out / "report.json").read_text())
    return code, report | {"sections": {one["name"]: one for one in report["sections"]}}


def ended(pid: int) -> bool:
    """Gone, or a zombie that nobody has reaped yet."""
    limit = time.monotonic() + 10
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_each_section_is_told_by_itself(tmp_path: Path) -> None:
    sections = [
        section("good", GOOD),
        section("bad", "print('why'); raise SystemExit(3)"),
        section("hangs", LINGERING + "time.sleep(600)", limit=1.0),
        section("after", "import os; print('{\"device\": \"%s\"}' % os.environ['DEVICE'])"),
    ]
    code, report = run(tmp_path / "out", sections, DEVICE="abacus")
    found = report["sections"]
    assert code == 1 and report["state"] == "done" and report["commit"] == "c0ffee"
    assert [one["state"] for one in found.values()] == ["ok", "failed", "killed", "ok"]
    assert found["good"]["figures"] == {"answer": 42, "deep": {"er": 0.5}} and "text" in found["good"]["tail"]
    assert found["bad"]["why"] == "exit code 3" and found["bad"]["tail"] == "why\n"
    assert found["hangs"]["why"] == "its limit" and 1 <= found["hangs"]["seconds"] < 30
    assert ended(found["hangs"]["figures"]["child"])
    assert found["after"]["figures"] == {"device": "abacus"}
    table = (tmp_path / "out" / "table.txt").read_text()
    assert "commit: c0ffee" in table and "    deep.er: 0.5\n" in table and "hangs" in table
    assert (tmp_path / "out" / "logs" / "good.txt").read_text().startswith("text\n")


def test_all_ok_is_0_and_what_a_section_left_running_is_killed(tmp_path: Path) -> None:
    code, report = run(tmp_path, [section("lingers", LINGERING)])
    lingers = report["sections"]["lingers"]
    assert code == 0 and lingers["state"] == "ok" and ended(lingers["figures"]["child"])


def test_the_budget_kills_what_runs_and_starts_nothing_more(tmp_path: Path) -> None:
    sections = [
        section("needs more", GOOD, least=1000),
        section("runs over", "import time; time.sleep(600)"),
        section("waits", GOOD),
    ]
    code, report = run(tmp_path, sections, budget=1.0)
    states = {name: (one["state"], one["why"]) for name, one in report["sections"].items()}
    assert code == 1 and states == {
        "needs more": ("not run", "budget spent: it needs 1000 s"),
        "runs over": ("killed", "budget spent"),
        "waits": ("not run", "budget spent"),
    }
    code, report = run(tmp_path / "none", [section("good", GOOD)], budget=0.0)
    assert code == 0 and report["sections"]["good"]["why"] == "budget spent"


KIT = """
import sys, time
from pathlib import Path
from tests.gpu.kit_runner import Kit, Section
codes = {"first": "print(1)", "runs": %r, "waits": "print(2)"}
sections = [Section(name, "", ["-c", code], 60.0) for name, code in codes.items()]
sys.exit(Kit(Path(sys.argv[1]), sections, time.monotonic() + 60, {}, {}).run())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_the_section_and_leaves_a_whole_report(
    number: signal.Signals, tmp_path: Path, repository: Path
) -> None:
    ready = tmp_path / "ready"
    code = f"{LINGERING}\nopen({str(ready)!r}, 'w').close()\ntime.sleep(600)"
    kit = subprocess.Popen([sys.executable, "-c", KIT % code, str(tmp_path / "out")], cwd=repository)
    try:
        limit = time.monotonic() + 60
        while not ready.exists():
            assert kit.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        midway = json.loads((tmp_path / "out" / "report.json").read_text())
        kit.send_signal(number)
        assert kit.wait(30) == 128 + number
    finally:
        kit.kill()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert midway["state"] == "running" and report["state"] == f"stopped by {number.name}"
    assert [(one["state"], one["why"]) for one in report["sections"]] == [
        ("ok", ""),
        ("killed", f"the kit got {number.name}"),
        ("not run", f"the kit got {number.name}"),
    ]
    assert ended(report["sections"][1]["figures"]["child"])


def test_a_reader_sees_whole_reports_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that was there is replaced by another one, not written over, and that one is on disk before."""
    order: list[str] = []
    synced, replaced = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), synced(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(f"replace {Path(b).name}"), replaced(a, b))[1])
    kit = Kit(tmp_path, [section("good", GOOD)], time.monotonic() + 60, {}, {})
    kit._write("running")
    with (tmp_path / "report.json").open() as before:
        kit.run()
        assert json.load(before)["state"] == "running"
    assert json.loads((tmp_path / "report.json").read_text())["state"] == "done"
    assert all(order[index - 1] == "fsync" for index, what in enumerate(order) if what.startswith("replace"))
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "table.txt", "logs"}


def test_figures_are_the_last_line_that_is_json() -> None:
    assert figures_of('{"a": 1}\n{"b": 2}\n{not json\n3 passed') == {"b": 2}
    assert figures_of("no figures\n") == {}
    assert dict(kit_runner.flat({"a": {"b": 1.234567}, "c": [1]})) == {"a.b": "1.2346", "c": "[1]"}
