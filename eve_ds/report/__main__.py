"""Everything that a run left behind, on one page that needs no network.

    python -m eve_ds.report --run runs/demo --out report.html

Takes the demo's folder (metrics.json, commands.json and the stages pretrain/ itr/ vqa/ nlvr/) or the folder of one
training run. What is missing there is said to be missing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from evaluation.common import Parser, run, write_text
from eve_ds.report.curves import curves_section, experts_section
from eve_ds.report.example_sections import example_sections
from eve_ds.report.html import Html, page, tag
from eve_ds.report.provenance import commands_section, config_section
from eve_ds.report.run_files import Run, read_run
from eve_ds.report.scores import scores_section, summary, tiles
from eve_ds.weights.model_folder import MODEL, exported_step, newer_checkpoint, step_of


def build(folder: Path) -> Html:
    """The page about the run in ``folder``.

    Raises:
        InputError: no such folder, no run in it, or a damaged file, which the message names.
    """
    found = read_run(folder)
    sections = [scores_section(found), curves_section(found)]
    if not found.single or any(stage.samples.get("expert_load") for stage in found.stages.values()):
        sections.append(experts_section(found))
    sections += [*example_sections(found), commands_section(found), config_section(found)]
    name = folder.resolve().name
    return page(f"EVE-DS: {name}", _head(found, name, sections), sections)


def _head(found: Run, name: str, sections: list[Html]) -> Html:
    links = [tag("a", Html(title), href=f"#{anchor}") for anchor, title in _titles(sections)]
    kind = "training run" if found.single else "pre-training, fine-tuning and scores"
    return tag(
        "header",
        tag("p", f"EVE-DS · {kind}", class_="kicker"),
        tag("h1", f"Report of {name}"),
        summary(found),
        *_left_behind(found),
        tiles(found),
        tag("nav", links, aria_label="Contents"),
    )


def _left_behind(found: Run) -> list[Html]:
    """A word for each run that has gone on since its model was exported, and its scores and samples were written."""
    told = []
    for stage in found.stages.values():
        exported, newest = exported_step(stage.folder / MODEL), newer_checkpoint(stage.folder)
        if exported is not None and newest is not None:
            step = f"{stage.title}: scores, samples and the exported model are of step {exported}"
            told.append(tag("p", f"{step}; the run has gone on to step {step_of(newest)} since, and is not finished."))
    return told


def _titles(sections: list[Html]) -> list[tuple[str, str]]:
    """Anchor and title (markup) of each section."""
    pattern = re.compile(r'<section id="([a-z-]+)"><h2>(.*?)</h2>')
    return [match.groups() for part in sections if (match := pattern.match(part))]  # type: ignore[misc]


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m eve_ds.report``."""
    parser = Parser(prog="python -m eve_ds.report", description=__doc__)
    parser.add_argument(
        "--run", required=True, type=Path, metavar="DIR", help="folder of the demo or of a training run"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FILE", help="the page, as in report.html")
    options = parser.parse_args(arguments)
    content = build(options.run)
    write_text(options.out, content)
    print(f"wrote {options.out} ({len(content.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    sys.exit(run(main))
