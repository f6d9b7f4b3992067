"""How to reproduce the run: commands, configs, versions."""

from __future__ import annotations

import math
import platform
from importlib import metadata
from typing import Any

from eve_ds.report.html import Html, missing, section, tag
from eve_ds.report.run_files import Run, number

PACKAGES = ("torch", "deepspeed", "numpy", "pyarrow", "tokenizers", "pillow", "jsonargparse", "wandb", "matplotlib")


def commands_section(run: Run) -> Html:
    """The commands as typed, with their run times."""
    if not run.commands:
        return section("commands", "Commands", missing("commands.json"))
    parts = []
    for row in run.commands:
        seconds = _seconds(row)
        took = "time not recorded" if seconds is None else _duration(seconds)
        head = tag("div", tag("span", str(row.get("title", ""))), tag("span", took, class_="num"), class_="step")
        parts.append(head + tag("pre", row["command"]))
    times = [seconds for row in run.commands if (seconds := _seconds(row)) is not None]
    together = " Some ran at the same time." if any(row.get("beside") for row in run.commands) else ""
    total = tag("p", f"{len(run.commands)} commands, {_duration(sum(times))} in total.{together}", class_="note")
    return section("commands", "Commands", total, Html("".join(parts)))


def _seconds(row: dict[str, Any]) -> float | None:
    """Run time of a command; None if it was not recorded or is invalid."""
    seconds = number(row.get("seconds"))
    return seconds if seconds is not None and math.isfinite(seconds) else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def config_section(run: Run) -> Html:
    """The resolved config of each stage, and the versions."""
    parts = []
    for stage in run.stages.values():
        if stage.config is None:
            parts.append(missing(stage.file("config.yaml")))
        else:
            opened = "" if run.single else None
            parts.append(
                tag(
                    "details",
                    tag("summary", f"{stage.title}: {stage.file('config.yaml')}"),
                    tag("pre", stage.config),
                    open=opened,
                )
            )
    if not run.stages:
        parts.append(missing("any stage's config.yaml"))
    return section("config", "Configuration and versions", parts, _versions(run))


def _versions(run: Run) -> Html:
    if run.versions is not None:
        note, versions = "Versions recorded by the run.", {str(k): str(v) for k, v in run.versions.items()}
    else:
        note = "The run recorded none; these are the versions on the machine that wrote this report."
        versions = {"python": platform.python_version(), "platform": platform.platform()}
        for name in PACKAGES:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed"
    rows = [tag("tr", tag("td", name), tag("td", version)) for name, version in versions.items()]
    return Html(
        tag("h3", "Versions")
        + tag("p", note, class_="note")
        + tag("div", tag("table", tag("tbody", rows)), class_="wide")
    )
