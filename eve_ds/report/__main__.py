"""Write the report of a run as one HTML page that needs no network.

    python -m eve_ds.report --run runs/demo --out report.html

Takes the folder of the demo (metrics.json, commands.json and the stages pretrain/ itr/ vqa/ nlvr/) or of one training
run. The page lists missing parts as missing.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from evaluation.common import Parser, run, write_text
from eve_ds.errors import setup_logging
from eve_ds.report.curves import curves_section, experts_section
from eve_ds.report.example_sections import example_sections
from eve_ds.report.html import Html, page, tag
from eve_ds.report.provenance import commands_section, config_section
from eve_ds.report.run_files import Run, read_run
from eve_ds.report.scores import scores_section, summary, tiles
from eve_ds.weights.model_folder import MODEL, exported_step, newer_checkpoint, step_of


def build(folder: Path) -> Html:
    """Build the page about the run in ``folder``.

    Raises:
        InputError: no such folder, no run in it, or a damaged file; named in the message.
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
        *_newer_checkpoints(found),
        tiles(found),
        tag("nav", links, aria_label="Contents"),
    )


def _newer_checkpoints(found: Run) -> list[Html]:
    """A note for each stage that has continued after its model was exported and its scores and samples were written."""
    notes = []
    for stage in found.stages.values():
        exported, newest = exported_step(stage.folder / MODEL), newer_checkpoint(stage.folder)
        if exported is not None and newest is not None:
            stale = f"{stage.title}: scores, samples and the exported model are from step {exported}"
            notes.append(
                tag("p", f"{stale}; the run has since continued to step {step_of(newest)} and is not finished.")
            )
    return notes


def _titles(sections: list[Html]) -> list[tuple[str, str]]:
    """(anchor, title as markup) of each section."""
    pattern = re.compile(r'<section id="([a-z-]+)"><h2>(.*?)</h2>')
    return [match.groups() for part in sections if (match := pattern.match(part))]  # type: ignore[misc]


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m eve_ds.report``."""
    parser = Parser(prog="python -m eve_ds.report", description=__doc__)
    parser.add_argument(
        "--run", required=True, type=Path, metavar="DIR", help="folder of the demo or of a training run"
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="HTML file to write, such as report.html"
    )
    options = parser.parse_args(arguments)
    content = build(options.run)
    write_text(options.out, content)
    print(f"wrote {options.out} ({len(content.encode()) / 1e6:.1f} MB)")


if __name__ == "__main__":
    setup_logging(0)
    sys.exit(run(main))
