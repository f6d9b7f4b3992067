"""Save a Weights & Biases workspace in a project: a section for each group of metrics, all curves over the step.

    python -m eve_ds.dashboard --entity TEAM --project eve-ds

Needs a login (WANDB_API_KEY, or wandb login) and a package more: pip install wandb-workspaces==0.4.13. The sections and
panels are in eve_ds/dashboard/panels.py. Each call adds a view to the project; runs are not changed.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from evaluation.common import InputError, Parser, run
from eve_ds.dashboard.panels import AXIS, PROJECT, SECTIONS, Panel
from eve_ds.errors import setup_logging

PACKAGE = "wandb-workspaces==0.4.13"


def workspace(entity: str, project: str, name: str) -> Any:
    """The workspace, a ``wandb_workspaces.workspaces.Workspace`` that is not saved yet.

    Args:
        entity: user or team.
        project: its project there.
        name: of the view.
    """
    import wandb_workspaces.workspaces as ws

    sections = [
        ws.Section(
            name=group,
            panels=[_drawn(panel) for panel in panels],
            is_open=True,
            panel_settings=ws.SectionPanelSettings(x_axis=AXIS),
        )
        for group, panels in SECTIONS.items()
    ]
    return ws.Workspace(
        entity=entity, project=project, name=name, sections=sections, settings=ws.WorkspaceSettings(x_axis=AXIS)
    )


def _drawn(panel: Panel) -> Any:
    import wandb_workspaces.reports.v2 as wr

    if panel.images:
        return wr.MediaBrowser(title=panel.title, media_keys=list(panel.metrics))
    return wr.LinePlot(title=panel.title, x=AXIS, y=list(panel.metrics), metric_regex=panel.pattern or None)


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m eve_ds.dashboard``."""
    parser = Parser(prog="python -m eve_ds.dashboard", description=__doc__)
    parser.add_argument("--project", default=PROJECT, help="its name (default %(default)s)")
    parser.add_argument("--entity", help="user or team that the project belongs to (default: the account's)")
    parser.add_argument("--name", default="EVE-DS", help="of the view that is saved (default %(default)s)")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise InputError(f"the dashboard needs a package that is not installed; pip install {PACKAGE}")
    import wandb
    from wandb.sdk.lib.service.service_connection import WandbApiFailedError

    try:
        if not (entity := options.entity or wandb.Api().default_entity):
            raise InputError("--entity is missing: the account has no default")
        saved = workspace(entity, options.project, options.name).save()
    except (wandb.errors.Error, WandbApiFailedError) as error:
        raise InputError(f"Weights & Biases: {' '.join(str(error).split())}") from error
    print(f"saved {saved.url}")


if __name__ == "__main__":
    setup_logging(0)
    sys.exit(run(main))
