"""What the model made of single samples: images and words rebuilt, retrievals, answers and judgments."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from eve_ds.report.html import Html, missing, section, tag
from eve_ds.report.images import Images
from eve_ds.report.run_files import SINGLE, Run, Stage, number

Rows = list[dict[str, Any]]
MASK = "[MASK]"
NOT_SHOWN = {"[CLS]", "[SEP]", "[PAD]"}
SPACES = (" ", "\u0120")  # how a byte-level token says that a word begins


def example_sections(run: Run) -> list[Html]:
    """All sections about single samples. In a single run those of its own task alone, else all."""
    made = [
        ("images", "Images rebuilt", "pretrain", "images", _rebuilt),
        ("words", "Words predicted", "pretrain", "words", _words),
        ("to-image", "Captions looking for their image", "itr", "text_to_image", _text_to_image),
        ("to-text", "Images looking for their caption", "itr", "image_to_text", _image_to_text),
        ("vqa", "Questions answered", "vqa", "question", _questions),
        ("nlvr", "Statements judged", "nlvr", "statement", _statements),
    ]
    return [part for row in made if (part := _section(run, *row)) is not None]


def _section(
    run: Run, anchor: str, title: str, stage_name: str, key: str, show: Callable[[Rows, Images], Html]
) -> Html | None:
    stage = run.stages.get(SINGLE if run.single else stage_name)
    if stage is not None and (rows := find_rows(stage, key)):
        return section(anchor, title, show(rows, Images(stage.folder / "samples")))
    if run.single:
        return None
    where = f"{stage_name}/samples/samples.json"
    return section(anchor, title, missing(f"{where} has no such examples" if stage and stage.samples else where))


def find_rows(stage: Stage, key: str) -> Rows:
    """The list called ``key`` in the samples; or, for the two tasks with ``examples``, those that have that field."""
    rows = stage.samples.get(key)
    if rows is None:
        rows = stage.samples.get("examples")
        rows = [row for row in rows if isinstance(row, dict) and key in row] if isinstance(rows, list) else []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _rebuilt(rows: Rows, images: Images) -> Html:
    note = (
        "Held-out images: as they are, with the patches that the model did not see grayed out, and with its guess in "
        "their place. The caption was given whole."
    )
    cards = []
    for row in rows:
        caption = str(row.get("caption", ""))
        strip = [
            tag("figure", images.show(row.get(kind), f"{kind}: {caption}"), tag("figcaption", kind))
            for kind in ("original", "masked", "rebuilt")
        ]
        cards.append(tag("div", tag("div", strip, class_="strip three"), tag("p", caption), class_="card"))
    return Html(tag("p", note, class_="note") + tag("div", cards, class_="cards"))


def _words(rows: Rows, images: Images) -> Html:
    note = "Held-out captions, the image given whole. Where a word was masked, the model's word stands in color"
    texts = [_masked_text(row) for row in rows]
    right, total = sum(r for _, r, _ in texts), sum(n for _, _, n in texts)
    legend = [
        tag("span", "right", class_="chip hit"),
        " and ",
        tag("span", "wrong", tag("s", " for the true one"), class_="chip miss"),
    ]
    score = f". Here {right} of {total} are right."
    return Html(tag("p", note, ": ", legend, score, class_="note") + "".join(text for text, _, _ in texts))


def _masked_text(row: dict[str, Any]) -> tuple[Html, int, int]:
    """A text with its masked places filled in; how many of them are right; how many there are."""
    tokens = row.get("text_masked", [])
    tokens = tokens.split() if isinstance(tokens, str) else [str(token) for token in tokens]
    tokens = [token for token in tokens if token not in NOT_SHOWN]
    truths, guesses = ([str(word) for word in row.get(key, [])] for key in ("truth", "predicted"))
    spelled = [*tokens, *truths, *guesses]
    spaced = any(word.startswith(SPACES) for word in spelled)  # else every token is a word
    places = iter(list(zip_longest(truths, guesses, fillvalue="?")))
    parts: list[Html] = []
    right = total = 0
    for token in tokens:
        if token != MASK:
            parts.append(tag("span", _gap(token, spaced) + _plain(token)))
            continue
        truth, guess = next(places, ("?", "?"))
        hit = truth == guess
        right, total = right + hit, total + 1
        beside = None if hit else tag("s", f" {_plain(truth)}")
        parts.append(tag("span", _gap(truth, spaced)))
        parts.append(tag("span", _plain(guess) or "?", beside, class_=f"chip {'hit' if hit else 'miss'}"))
    return tag("p", parts, class_="words"), right, total


def _gap(token: str, spaced: bool) -> str:
    return " " if not spaced or token.startswith(SPACES) else ""


def _plain(token: str) -> str:
    return token.lstrip("".join(SPACES))


def _text_to_image(rows: Rows, images: Images) -> Html:
    note = "The five images of the held-out pool that the model ranks highest for a caption, best first."
    return Html(tag("p", note, class_="note") + "".join(_image_results(row, images) for row in rows))


def _image_results(row: dict[str, Any], images: Images) -> Html:
    figures = []
    results = _results(row)
    for rank, result in enumerate(results, 1):
        hit = bool(result.get("correct"))
        mark = tag("span", " ✓ its own", class_="right") if hit else None
        caption = tag("figcaption", f"{rank} · {_score(result)}", mark, class_="num")
        shown = images.show(result.get("image"), f"rank {rank}{', correct' if hit else ''}")
        figures.append(tag("figure", shown, caption, class_="hit" if hit else None))
    found = None if any(r.get("correct") for r in results) else tag("span", " ✗ not among these", class_="wrong")
    query = tag("p", "“", str(row.get("query", "")), "”", found)
    return tag("div", query, tag("div", figures, class_="results"), class_="query")


def _image_to_text(rows: Rows, images: Images) -> Html:
    note = "The five captions that the model ranks highest for an image, best first. An image has several of its own."
    cards = []
    for row in rows:
        items = []
        for rank, result in enumerate(_results(row), 1):
            hit = bool(result.get("correct"))
            text = [str(result.get("text", "")), tag("span", " ✓", class_="right") if hit else None]
            cells = [
                tag("span", str(rank), class_="rank"),
                tag("span", text),
                tag("span", _score(result), class_="score"),
            ]
            items.append(tag("li", cells, class_="hit" if hit else None))
        shown = images.show(row.get("image"), "query image")
        cards.append(tag("div", tag("div", shown), tag("ol", items, class_="texts"), class_="side query"))
    return Html(tag("p", note, class_="note") + "".join(cards))


def _results(row: dict[str, Any]) -> Rows:
    results = row.get("results")
    return [result for result in results if isinstance(result, dict)][:5] if isinstance(results, list) else []


def _score(result: dict[str, Any]) -> str:
    score = number(result.get("score"))
    return "" if score is None else f"{score:.2f}"


def _questions(rows: Rows, images: Images) -> Html:
    right = [row for row in rows if _earned(row) > 0]
    wrong = [row for row in rows if _earned(row) == 0]
    note = "Right: at least one person gave that answer. The score is the share of full accuracy that it earns."
    return Html(tag("p", note, class_="note") + _two_groups(right, wrong, lambda row: _question(row, images)))


def _question(row: dict[str, Any], images: Images) -> Html:
    score = _earned(row)
    kind, mark = ("right", "✓") if score > 0 else ("wrong", "✗")
    answers = row.get("answers")
    people = ", ".join(str(answer) for answer in answers) if isinstance(answers, list) else str(answers or "")
    verdict = tag("span", f"{mark} {row.get('predicted', '')}", class_=kind)
    text = tag(
        "div",
        tag("p", str(row.get("question", ""))),
        tag("p", verdict, tag("span", f" · score {score:.2g}", class_="fine")),
        tag("p", f"people: {people or 'nothing that is in the answer list'}", class_="fine"),
    )
    shown = images.show(row.get("image"), "image asked about")
    return tag("div", tag("div", shown, text, class_="side"), class_="card")


def _earned(row: dict[str, Any]) -> float:
    score = row.get("score")
    return number(score) or 0.0


def _statements(rows: Rows, images: Images) -> Html:
    right = [row for row in rows if row.get("predicted") == row.get("label")]
    wrong = [row for row in rows if row.get("predicted") != row.get("label")]
    return _two_groups(right, wrong, lambda row: _statement(row, images))


def _statement(row: dict[str, Any], images: Images) -> Html:
    hit = row.get("predicted") == row.get("label")
    strip = [
        tag("div", images.show(row.get(f"image_{side}"), f"{name} image"))
        for side, name in enumerate(("left", "right"))
    ]
    verdict = tag(
        "span", f"{'✓' if hit else '✗'} says {_truth(row.get('predicted'))}", class_="right" if hit else "wrong"
    )
    fine = tag("span", f" · it is {_truth(row.get('label'))}", class_="fine")
    return tag(
        "div",
        tag("div", strip, class_="strip two"),
        tag("p", str(row.get("statement", ""))),
        tag("p", verdict, fine),
        class_="card",
    )


def _truth(value: Any) -> str:
    return {True: "true", False: "false"}.get(value, "unknown") if isinstance(value, bool) else "unknown"


def _two_groups(right: Rows, wrong: Rows, show: Callable[[dict[str, Any]], Html]) -> Html:
    parts = []
    for title, rows in (("Right", right), ("Wrong", wrong)):
        body = (
            tag("div", [show(row) for row in rows], class_="cards")
            if rows
            else tag("p", "none among these", class_="note")
        )
        parts.append(tag("h3", title) + body)
    return Html("".join(parts))
