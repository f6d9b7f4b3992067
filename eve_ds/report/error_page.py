"""A page of predictions with their images, the most confident mistakes first, to filter and search; needs no network.

    python -m eve_ds.report errors --run runs/vqa --html errors.html
    python -m eve_ds.report errors --run runs/vqa --split val --data data/vqa --limit 500 --html errors.html

--run takes the folder that a fine-tuning, or its --evaluate, has written: details_SPLIT.parquet tells what was
predicted and how sure the model was, and the prepared data set has the images, texts and right answers. Of more
predictions than --limit, the page shows the most confident wrong ones, and right ones for a quarter of the places.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.common import InputError, Parser, write_text
from eve_ds.data.samples import row_text
from eve_ds.data.shards import Row, Split
from eve_ds.data.sources import open_split
from eve_ds.recipes import read_run_config
from eve_ds.report.details import Details
from eve_ds.report.html import Child, Html, page, tag
from eve_ds.report.images import embedded
from eve_ds.report.run_files import newest_start
from eve_ds.tasks.registry import find_spec
from eve_ds.tasks.spec import evenly_spaced
from eve_ds.weights.model_folder import CONFIG
from preprocessing.errors import UserError
from preprocessing.shards.schema import IMAGE_COLUMNS, SAMPLE_COLUMN

SIDE = 200  # pixels of an image, at most
LIMIT, MOST = 200, 2000  # predictions on a page
RIGHT_SHARE = 4  # one in so many is a right one, if there are enough wrong ones
RESULTS = {"wrong": "wrong", "right": "right", "unknown": "answer not known"}

SCRIPT = """
const form = document.querySelector("#filter"), list = document.querySelector("#cases");
const cards = [...list.children];
function update() {
  const { result, kind, words, order } = Object.fromEntries(new FormData(form));
  let shown = 0;
  for (const card of cards) {
    const own = card.dataset;
    card.hidden = !((!result || own.result === result) && (!kind || own.kind === kind)
      && own.words.includes(words.trim().toLowerCase()));
    shown += !card.hidden;
  }
  const sign = order === "rising" ? 1 : -1;
  list.append(...cards.sort((a, b) => sign * (a.dataset.confidence - b.dataset.confidence)));
  document.querySelector("#shown").textContent = `${shown} of ${cards.length} shown`;
}
form.addEventListener("input", update);
form.addEventListener("submit", (event) => event.preventDefault());
update();
"""
STYLE = """
#filter { display: flex; flex-wrap: wrap; gap: 0.6rem 1.2rem; align-items: center; position: sticky; top: 0; z-index: 1;
  background: var(--paper); padding: 0.7rem 0; font-size: 0.92rem; }
#filter select, #filter input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--line);
  border-radius: 5px; padding: 0.15rem 0.4rem; }
.card[hidden] { display: none; }
"""


@dataclass(frozen=True)
class Case:
    """One prediction as the page shows it.

    Attributes:
        images: files, each with what it shows.
        kind: of the answer or the query, to filter by.
        query: question, statement or caption; "" where an image asks.
        prediction: what the model said.
        truth: what is right, "" where it is not known.
        note: more, or "".
    """

    images: list[tuple[bytes, str]]
    kind: str
    query: str
    prediction: str
    truth: str
    note: str = ""


Predicted = Mapping[str, Any]  # a row of details_SPLIT.parquet


def _question(split: Split, details: Predicted) -> Case:
    _, row, item = split.sample(details["sample"])
    known = {
        column: row.item(column, item) or [] if row.entries(column) else [] for column in ("answers", "answer_scores")
    }
    answers = dict(zip(known["answers"], known["answer_scores"], strict=True))
    ranked = sorted(answers, key=lambda answer: -answers[answer])
    truth = ", ".join(f"{answer} ({answers[answer]:.2g})" for answer in ranked)
    image = (row.blob("image"), "the image")
    return Case([image], _answer_type(ranked), row_text(row, "questions", item), str(details["prediction"]), truth)


def _answer_type(ranked: list[str]) -> str:
    """As VQA v2 names the types; by the best answer, since prepared data do not hold them."""
    if not ranked:
        return "unknown"
    return "yes/no" if ranked[0] in ("yes", "no") else "number" if re.fullmatch(r"\d+", ranked[0]) else "other"


def _statement(split: Split, details: Predicted) -> Case:
    _, row, item = split.sample(details["sample"])
    images = [(row.blob(column), side) for column, side in zip(IMAGE_COLUMNS["nlvr"], ("left", "right"), strict=True)]
    truth = str(row.item("answers", item)) if row.entries("answers") else ""
    kind = {"true": "True", "false": "False"}.get(truth.lower(), "")
    return Case(images, kind or "unknown", row_text(row, "questions", item), str(details["prediction"]), kind)


def _search(split: Split, details: Predicted) -> Case:
    """A text that asks for its image, or an image that asks for one of its texts."""
    note = f"the right one has rank {details['rank']}"
    if details["query"] == "text":
        number, row, item = split.sample(details["sample"])
        images = [(split.row(details["prediction"]).blob("image"), "found")]
        if number != details["prediction"]:
            images.append((row.blob("image"), "right"))
        text = row_text(row, "caption", item)
        return Case(images, "text asks for image", text, f"image {details['prediction']}", f"image {number}", note)
    row = split.row(details["sample"])
    _, owner, item = split.sample(details["prediction"])
    found, texts = row_text(owner, "caption", item), _texts(row)
    return Case([(row.blob("image"), "the image")], "image asks for text", "", found, " | ".join(texts), note)


def _texts(row: Row) -> list[str]:
    value = row.value(SAMPLE_COLUMN["caption"])
    return [value] if isinstance(value, str) else list(value)


def _caption(split: Split, details: Predicted) -> Case:
    """Of a user's own task, whose answers are not known here."""
    _, row, item = split.sample(details["sample"])
    images = [(row.blob("image"), "the image")]
    return Case(images, "caption", row_text(row, "caption", item), str(details["prediction"]), "")


READERS: dict[str, Callable[[Split, Predicted], Case]] = {"vqa": _question, "nlvr": _statement, "caption": _caption}


def chosen(score: np.ndarray, confidence: np.ndarray, limit: int) -> dict[str, tuple[np.ndarray, int]]:
    """Which predictions the page shows: {"wrong" or "right" or "unknown": (their rows, how many there are in all)}.

    Args:
        score: [N], above 0 where right, NaN where the answer is not known.
        confidence: [N].
        limit: of all groups.
    """
    order = np.argsort(-confidence, kind="stable")
    groups = {
        "wrong": order[score[order] <= 0],
        "right": order[score[order] > 0],
        "unknown": order[np.isnan(score[order])],
    }
    right = min(len(groups["right"]), max(limit // RIGHT_SHARE, limit - len(groups["wrong"])))
    wrong = min(len(groups["wrong"]), limit - right)
    spread = {"right": right, "unknown": limit - right - wrong}
    shown = {name: groups[name][evenly_spaced(len(groups[name]), count)] for name, count in spread.items()}
    shown["wrong"] = groups["wrong"][:wrong]
    return {name: (shown[name], len(groups[name])) for name in RESULTS}


def build_errors(run: Path, split: str, data: Path | None, limit: int) -> tuple[Html, str]:
    """The page, and a line that says what is on it.

    Raises:
        InputError: the run has no details of the split.
        UserError: the data set is not there, or not the one that was scored.
    """
    config = read_run_config(run / CONFIG, "data")
    task = find_spec(str(config.get("task")))
    details = Details(run / f"details_{split}.parquet", task.samples.kind)
    reader = _search if details.search else READERS.get(task.samples.kind)
    if reader is None:
        raise InputError(f"--run {run}: there is no page for data of kind {task.samples.kind!r}")
    home = Path(str(config["data"].get("path") or ""))
    opened = _open(run, home, split, data, task.samples.kind, details.scored)
    details.check_split(opened)
    parts = chosen(details.score, details.confidence, limit)
    rows = [(int(place), result) for result, (places, _) in parts.items() for place in places]
    rows.sort(key=lambda found: -details.confidence[found[0]])
    cards, kinds = [], set()
    for place, result in rows:
        row = details.row(place)
        case = reader(opened, row)
        kinds.add(case.kind)
        cards.append(_card(case, result, row))
    counts = [f"{len(places):,} of {total:,} {RESULTS[name]}" for name, (places, total) in parts.items() if total]
    line = f"{', '.join(counts)} (of those left out: wrong ones are less confident, others lie between those shown)"
    line = line if sum(total for _, total in parts.values()) > len(rows) else ", ".join(counts)
    title = f"Predictions of {run.resolve().name} on {split}"
    body = [
        tag("header", tag("p", "EVE-DS · errors", class_="kicker"), tag("h1", title), tag("p", line, class_="note")),
        tag("style", Html(STYLE)),
        _form(sorted(kinds)),
        tag("div", cards, id="cases", class_="cards"),
        tag("script", Html(SCRIPT)),
    ]
    return page(title, *body), ", ".join(counts)


def _open(run: Path, home: Path, split: str, data: Path | None, kind: str, scored: str) -> Split:
    """The split that was scored: in ``data``, or where the run read it, at ``home``; ``scored``: its fingerprint."""
    places = [data] if data else [home, Path(str(newest_start(run).get("directory", ""))) / home]
    tried = []
    for place in places:
        try:
            opened = open_split(place, split, kind)
            break
        except UserError as error:
            tried.append(str(error))
    else:
        raise UserError(f"{tried[0]} (--data names the prepared data set that was scored)")
    if scored != opened.fingerprint:
        raise UserError(f"{opened.name}: is not the data that was scored ({run}); name that data set with --data")
    return opened


def _form(kinds: list[str]) -> Html:
    def choice(name: str, label: str, values: Mapping[str, str]) -> Html:
        options = [tag("option", text, value=value) for value, text in values.items()]
        return tag("label", f"{label} ", tag("select", options, name=name))

    return tag(
        "form",
        choice("result", "Show", {"": "all", **RESULTS}),
        choice("kind", "Type", {"": "all", **{kind: kind for kind in kinds}}),
        choice("order", "Confidence", {"falling": "highest first", "rising": "lowest first"}),
        tag("label", "Search ", tag("input", type="search", name="words", autocomplete="off")),
        tag("span", id="shown", class_="num"),
        id="filter",
    )


def _card(case: Case, result: str, details: Predicted) -> Html:
    confidence, score = details["confidence"], details["score"]
    figures = [tag("figure", _image(*image), tag("figcaption", image[1])) for image in case.images]
    measure = "similarity" if "rank" in details else "confidence"
    partly = f" (score {score:.2g})" if score is not None and 0 < score < 1 else ""
    told: list[Child] = [
        tag("p", case.query) if case.query else None,
        tag(
            "p",
            tag("span", case.prediction, class_=result),
            f" · {measure} {confidence:.3f} · {RESULTS[result]}{partly}",
        ),
        tag("p", f"right: {case.truth}", class_="fine") if case.truth else None,
        tag("p", f"{case.note + ' · ' if case.note else ''}sample {details['sample']} · {case.kind}", class_="fine"),
    ]
    words = " ".join((case.query, case.prediction, case.truth)).lower()
    return tag(
        "article",
        tag("div", figures, class_="strip two" if len(figures) > 1 else "strip"),
        told,
        class_="card",
        data_result=result,
        data_kind=case.kind,
        data_confidence=f"{confidence:.6g}",
        data_words=words,
    )


def _image(content: bytes, description: str) -> Html:
    try:
        source, small = embedded(content, SIDE)
    except Exception as error:  # noqa: BLE001  # decoders raise any exception on corrupt bytes
        return tag("span", "no image", class_="absent", title=type(error).__name__)
    return tag("img", src=source, alt=description, class_="pixelated" if small else None, loading="lazy")


def errors_command(arguments: list[str]) -> None:
    """The command ``python -m eve_ds.report errors``."""
    parser = Parser(prog="python -m eve_ds.report errors", description=__doc__)
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="folder of a fine-tuning or a scoring")
    parser.add_argument("--split", default="test", help="whose predictions (default test)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="the prepared data set; by default the run's own")
    parser.add_argument("--limit", type=int, default=LIMIT, help=f"predictions to show (default {LIMIT})")
    parser.add_argument("--html", required=True, type=Path, metavar="FILE", help="page to write, such as errors.html")
    options = parser.parse_args(arguments)
    if not 1 <= options.limit <= MOST:
        parser.error(f"--limit {options.limit} is not from 1 to {MOST}")
    try:
        content, line = build_errors(options.run, options.split, options.data, options.limit)
    except UserError as error:
        raise InputError(str(error)) from error
    write_text(options.html, content)
    print(f"wrote {options.html} ({len(content.encode(errors='replace')) / 1e6:.1f} MB): {line}")
