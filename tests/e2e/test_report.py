"""`python -m eve_ds.report` as it is typed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.support.made_run import make_run
from tests.support.page import Page
from tests.support.ranks import LIMIT


def test_the_command_writes_a_self_contained_page(tmp_path: Path, repository: Path) -> None:
    run_folder = make_run(tmp_path / "demo")
    out = tmp_path / "new" / "report.html"
    command = [sys.executable, "-m", "eve_ds.report", "--run", str(run_folder), "--out", str(out)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    content = out.read_text(encoding="utf-8")
    assert "http" not in content
    assert "@import" not in content
    assert "url(http" not in content
    page = Page(content)
    for name, attributes in page.tags:
        assert name not in ("script", "link", "iframe", "object")
        for attribute in ("src", "href", "xlink:href", "srcset"):
            assert (attributes.get(attribute) or "#").startswith(("#", "data:image/"))
    anchors = {attributes.get("id") for name, attributes in page.tags if name == "section"}
    links = {(attributes.get("href") or "")[1:] for name, attributes in page.tags if name == "a"}
    assert links == anchors
    assert len(links) == 11


def test_the_command_says_what_it_leaves_out(tmp_path: Path, repository: Path) -> None:
    run, out = make_run(tmp_path / "demo") / "vqa", tmp_path / "report.html"
    (run / "config.yaml").write_text("task: gone.task:SPEC\n")
    command = [sys.executable, "-m", "eve_ds.report", "--run", str(run), "--out", str(out)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert done.returncode == 0 and out.exists() and done.stderr.count("\n") == 1
    assert done.stderr.startswith(
        f"WARNING: {run}: its scores are not shown: task gone.task:SPEC: there is no module gone"
    )


def test_a_watched_run_ends_by_ctrl_c(tmp_path: Path, repository: Path) -> None:
    run, out = make_run(tmp_path / "demo") / "vqa", tmp_path / "report.html"
    command = [sys.executable, "-m", "eve_ds.report", "--run", str(run), "--out", str(out), "--watch", "1"]
    watching = subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert watching.stdout is not None
        assert watching.stdout.readline() == f"writing {out} every 1 s; Ctrl-C ends it\n"
        watching.send_signal(signal.SIGINT)
        _, told = watching.communicate(timeout=LIMIT)
    finally:
        watching.kill()
    assert (watching.returncode, told) == (130, "")
    assert "training, step 60, last record " in Page(out.read_text(encoding="utf-8")).text
