"""Weights & Biases to the end of the wire: `wandb sync`, online runs and a dashboard, with a stand-in of its server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eve_ds.dashboard.panels import SECTIONS
from tests.support.ranks import REPOSITORY
from tests.support.wandb_server import ENTITY, StoredRun, WandbServer, clients, wandb_server

LIMIT = 480  # seconds; a hang, not a slow machine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbServer]:
    with wandb_server(tmp_path) as running:
        yield running
        until = time.monotonic() + LIMIT
        while left := clients(running):  # the core of a process that was killed ends a moment later
            assert time.monotonic() < until, f"left behind: {left}"
            time.sleep(0.05)
    assert running.problems == []


def started(server: WandbServer, *command: str, code: int = 0, **more: str) -> str:
    """Run ``python -m command`` such that it can reach the stand-in alone. Returns what it printed."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= server.environment | {"PYTHONPATH": str(REPOSITORY)} | more
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=REPOSITORY,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=LIMIT,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def piece(folder: Path, mode: str, start: int, last: int, killed: bool = False) -> dict[str, Any]:
    return {"folder": str(folder), "mode": mode, "start": start, "last": last, "killed": killed}


def check(run: StoredRun, folder: Path, losses: list[float]) -> None:
    """Each step once and in order, with these losses; one value at the end of each whole piece; the config."""
    assert (run.entity, run.project) == (ENTITY, "pieces")
    assert run.name == (folder / "wandb_id").read_text().strip() and run.attributes["displayName"] == folder.name
    assert [row["_step"] for row in run.history] == [row["step"] for row in run.history]
    assert [(row["step"], row["train/loss"]) for row in run.history] == list(enumerate(losses, 1))
    assert run.config["logging"]["wandb_project"] == "pieces" and run.config["world_size"] == 2
    axis, others = run.config["_wandb"]["m"][:2]  # MetricRecord by field number: name, glob_name, step_metric_index
    assert (axis["1"], others["2"], others["5"]) == ("step", "*", 1)


def test_pieces_of_a_run_arrive_as_one_run(server: WandbServer, tmp_path: Path) -> None:
    """Offline, the first piece is killed before wandb has written anything, and synced with the second, from step 4 on.

    Online, the second piece goes back from step 7 to step 4 and is killed before wandb has sent its first step, 8; the
    third goes on from there. Late, the first piece did not reach the server.
    """
    offline, online, late = (tmp_path / name for name in ("offline", "online", "late"))
    for folder in (offline, online, late):
        folder.mkdir()
    pieces = [piece(offline, "offline", 0, 7, killed=True), piece(offline, "offline", 4, 9)]
    pieces += [piece(online, "online", 0, 7), piece(online, "online", 4, 9, killed=True)]
    pieces += [piece(online, "online", 8, 10), piece(late, "offline", 0, 3), piece(late, "online", 3, 4)]
    printed = started(
        server, "tests.support.wandb_pieces", json.dumps(pieces),
        WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL="0", WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL="3600",
    )  # fmt: skip
    sent, caught_up = server.runs.values()
    assert "WARNING" not in printed and sent.attributes["displayName"] == "online"
    check(caught_up, late, [1.0, 2, 3, 3 + 4])
    told = started(server, "wandb", "sync", *map(str, sorted(offline.glob("wandb/offline-run-*"))))
    assert told.count("Finished syncing") == 1 and "ERROR" not in told, told
    synced = server.runs[(offline / "wandb_id").read_text().strip()]
    check(synced, offline, [1.0, 2, 3, 4, 4 + 5, 4 + 6, 4 + 7, 4 + 8, 4 + 9])
    check(sent, online, [1.0, 2, 3, 4, 5, 6, 7, 4 + 8, 8 + 9, 8 + 10])
    assert (synced.exit_codes, sent.exit_codes) == ([0], [0, 0]) and len(server.runs) == 3
    assert [row["step"] for row in synced.history if "val/loss" in row] == [9]
    assert [row["step"] for row in sent.history if "val/loss" in row] == [7, 10]


def test_a_dashboard_is_saved(server: WandbServer) -> None:
    told = started(server, "eve_ds.dashboard", "--project", "pieces")
    (view,) = server.views.values()
    assert (view["entityName"], view["projectName"], view["displayName"]) == (ENTITY, "pieces", "EVE-DS")
    assert told.splitlines()[-1].startswith(f"saved {server.url}/{ENTITY}/pieces?nw=")
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections] == list(SECTIONS)
    told = started(server, "eve_ds.dashboard", code=2, WANDB_API_KEY="")
    assert told.splitlines() == ["error: Weights & Biases: No API key configured. Use `wandb login` to log in."]
