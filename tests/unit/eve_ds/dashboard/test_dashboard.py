"""The workspace that is built: a section a group, and every metric of docs/metrics.md in a panel over the step."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluation.common import InputError
from eve_ds.callbacks import metric_groups
from eve_ds.callbacks.metric_groups import grouped
from eve_ds.config_sections import LoggingConfig
from eve_ds.dashboard.__main__ import PACKAGE, main, workspace
from eve_ds.dashboard.panels import AXIS, KINDS, PROJECT, SECTIONS

KEY = re.compile(r"`([a-z0-9_/A-Z]+)`")
AT_LEAST = {"train", "eval", "optim", "moe", "data", "perf", "gpu"}


def documented(repository: Path) -> set[str]:
    """Names on dashboards of the metrics in the tables of docs/metrics.md; one layer, kind and source for all."""
    rows = (repository / "docs/metrics.md").read_text(encoding="utf-8").split("## Divergence")[0].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    names = {name for cell in cells for name in KEY.findall(cell)} - {"step"}
    for pattern, own in (("layer_N", "layer_11"), ("/KIND", "/expert.w1"), ("/SOURCE", "/coco")):
        names = {name.replace(pattern, own) for name in names}
    return {grouped(name) for name in names}


def test_every_documented_metric_is_in_a_panel(repository: Path) -> None:
    panels = [panel for group in SECTIONS.values() for panel in group]
    charts = [panel for panel in panels if not panel.images]
    shown, patterns = {name for panel in charts for name in panel.metrics}, [p.pattern for p in charts if p.pattern]
    names = documented(repository)
    assert len(names) > 60 and {"train/loss", "optim/lr", "moe/layer_11/dead_experts", "val/r_mean"} <= names
    left = {name for name in names - shown if not any(re.search(pattern, name) for pattern in patterns)}
    assert left == set(), "add them to eve_ds/dashboard/panels.py"
    assert shown <= names, "no such metrics are documented"
    assert all(any(re.search(pattern, name) for name in names) for pattern in patterns)


def test_axis_and_project_are_those_of_the_runs() -> None:
    assert (AXIS, PROJECT) == (metric_groups.AXIS, LoggingConfig().wandb_project)


def test_images_are_shown_by_the_names_they_are_logged_by() -> None:
    from tests.support.tiny_tasks import tiny_batch, tiny_task

    shown = {kind for name in ("pretrain", "pretrain_codes") for kind in tiny_task(name).reconstruct(tiny_batch(2))}  # type: ignore[attr-defined]
    assert shown == set(KINDS)
    keys = [name for panel in (*SECTIONS["samples"], *SECTIONS["moe"]) if panel.images for name in panel.metrics]
    assert keys[:3] == ["samples/p0_original", "samples/p0_masked", "samples/p0_rebuilt"] and len(keys) == 8 * 4 + 1
    assert keys[-1] == "moe/expert_load"


def test_the_workspace_has_a_section_a_group_and_draws_over_the_step() -> None:
    view: dict[str, Any] = workspace("team", "eve-ds", "EVE-DS")._to_model().model_dump(by_alias=True)
    assert (view["entity"], view["project"], view["displayName"]) == ("team", "eve-ds", "EVE-DS")
    section = view["spec"]["section"]
    assert section["settings"]["xAxis"] == "step" and section["settings"]["shouldAutoGeneratePanels"] is False
    groups = section["panelBankConfig"]["sections"]
    assert [group["name"] for group in groups] == list(SECTIONS) and AT_LEAST <= set(SECTIONS)
    for group in groups:
        assert group["localPanelSettings"]["xAxis"] == "step" and group["isOpen"]
        assert len(group["panels"]) == len(SECTIONS[group["name"]])
        for panel, given in zip(group["panels"], SECTIONS[group["name"]], strict=True):
            drawn = panel["config"]
            if given.images:
                assert (panel["viewType"], drawn["mediaKeys"]) == ("Media Browser", list(given.metrics))
                continue
            assert (panel["viewType"], drawn["xAxis"]) == ("Run History Line Plot", "step")
            assert (drawn["metrics"], drawn["metricRegex"]) == (list(given.metrics), given.pattern or None)
            assert drawn["useMetricRegex"] is (True if given.pattern else None)


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "wandb", None)  # it goes no further
    with pytest.raises(InputError, match=f"^the dashboard needs .*; pip install {PACKAGE}$"):
        main([])
    assert PACKAGE in (repository / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    assert f"pip install {PACKAGE}" in (repository / "docs/metrics.md").read_text(encoding="utf-8")
