"""Write the report of a run, or the comparison of runs, as one HTML page that needs no network.

    python -m eve_ds.report --run runs/demo --out report.html
    python -m eve_ds.report --run runs/base --out report.html --watch
    python -m eve_ds.report runs/A runs/B --out compare.html
    python -m eve_ds.report errors --run runs/vqa --html errors.html     (--help says more)

--run takes the folder of the demo (metrics.json, commands.json and the stages pretrain/ itr/ vqa/ nlvr/) or of one
training run. The page lists missing parts as missing. With --watch it is written again and again while the run trains,
and an open browser reloads it; this ends with the run, or with Ctrl-C. Folders without --run, two to six of training
runs, are compared: curves over steps, samples and hours, scores with tests, and what differs in config, code and data.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from evaluation.common import Parser, run, write_text
from eve_ds.errors import setup_logging
from eve_ds.report.compare import build_comparison
from eve_ds.report.curves import curves_section, experts_section
from eve_ds.report.error_page import errors_command
from eve_ds.report.example_sections import example_sections
from eve_ds.report.html import Html, page, tag
from eve_ds.report.provenance import commands_section, config_section
from eve_ds.report.run_files import Run, read_run
from eve_ds.report.scores import scores_section, summary, tiles
from eve_ds.report.watch import DEFAULT_SECONDS, MOST_SECONDS, Watched, watch
from eve_ds.weights.model_folder import MODEL, exported_step, newer_checkpoint, step_of


def build(folder: Path, watched: Watched | None = None) -> Html:
    """Build the page about the run in ``folder``.

    Args:
        folder: the run's.
        watched: of a page that is written while the run trains: how far it is.
    Raises:
        InputError: no such folder, no run in it, or a damaged file; named in the message.
    """
    found = read_run(folder)
    sections = [scores_section(found), curves_section(found)]
    if not found.single or any(stage.samples.get("expert_load") for stage in found.stages.values()):
        sections.append(experts_section(found))
    sections += [*example_sections(found), commands_section(found), config_section(found)]
    name = folder.resolve().name
    status = tag("p", watched.status, class_="status") if watched else None
    return page(
        f"EVE-DS: {name}", _head(found, name, sections, status), sections, refresh=watched.refresh if watched else None
    )


def _head(found: Run, name: str, sections: list[Html], status: Html | None) -> Html:
    links = [tag("a", Html(title), href=f"#{anchor}") for anchor, title in _titles(sections)]
    kind = "training run" if found.single else "pre-training, fine-tuning and scores"
    return tag(
        "header",
        tag("p", f"EVE-DS · {kind}", class_="kicker"),
        tag("h1", f"Report of {name}"),
        status,
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
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["errors"]:
        errors_command(words[1:])
        return
    parser = Parser(prog="python -m eve_ds.report", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, metavar="DIR", help="folders of training runs to compare")
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder of the demo or of a training run")
    parser.add_argument(
        "--out", required=True, type=Path, metavar="FILE", help="HTML file to write, such as report.html"
    )
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=DEFAULT_SECONDS, metavar="SECONDS",
        help=f"write the page again every SECONDS (default {DEFAULT_SECONDS}) while the run trains",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if (options.run is None) == (not options.runs):
        parser.error("give --run DIR for the report of one run, or the folders of two to six runs to compare them")
    if options.runs and options.watch:
        parser.error("--watch goes with --run DIR: a comparison is written once")
    if options.watch:
        watch(options.run, options.out, options.watch, build)
        return
    content = build(options.run) if options.run else build_comparison(options.runs)
    write_text(options.out, content)
    print(f"wrote {options.out} ({len(content.encode(errors='replace')) / 1e6:.1f} MB)")


def _seconds(text: str) -> int:
    try:
        seconds = int(text)
    except ValueError:
        seconds = 0
    if not 1 <= seconds <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds from 1 to {MOST_SECONDS}")
    return seconds


if __name__ == "__main__":
    setup_logging(0)
    sys.exit(run(main))
