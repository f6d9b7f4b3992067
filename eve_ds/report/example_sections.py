"""Sections with the model's output on single samples: reconstructions, retrievals, answers and judgments."""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from eve_ds.report.html import Html, missing, section, tag
from eve_ds.report.images import Images
from eve_ds.report.run_files import SINGLE, Run, Stage, number

Rows = list[dict[str, Any]]
MASK = "[MASK]"
FORMER_KEYS = {"images": "pictures"}  # in samples.json of runs before the keys were renamed
HIDDEN_TOKENS = {"[CLS]", "[SEP]", "[PAD]"}
SPACES = (" ", "\u0120")  # start of a word in byte-level tokens


def example_sections(run: Run) -> list[Html]:
    """The sections about single samples: of a single run only those of its task, otherwise all."""
    sections = [
        ("images", "Reconstructed images", "pretrain", "images", _reconstructions),
        ("words", "Predicted words", "pretrain", "words", _words),
        ("to-image", "Text-to-image retrieval", "itr", "text_to_image", _text_to_image),
        ("to-text", "Image-to-text retrieval", "itr", "image_to_text", _image_to_text),
        ("vqa", "Visual question answering", "vqa", "question", _questions),
        ("nlvr", "Statements about image pairs", "nlvr", "statement", _statements),
    ]
    return [part for row in sections if (part := _section(run, *row)) is not None]


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
    """The list ``key`` of the samples; for the two tasks with ``examples``, those that have the field ``key``."""
    rows = stage.samples.get(key, stage.samples.get(FORMER_KEYS.get(key, "")))
    if rows is None:
        rows = stage.samples.get("examples")
        rows = [row for row in rows if isinstance(row, dict) and key in row] if isinstance(rows, list) else []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


RESULTS = {  # what the third of an objective's images shows
    "rebuilt": "the model's reconstruction of these patches",
    "right": "those of these patches whose code the model predicted",
}


def _reconstructions(rows: Rows, images: Images) -> Html:
    result = "right" if any("right" in row for row in rows) else "rebuilt"
    note = (
        f"Held-out images: the original, the input with masked patches in gray, and {RESULTS[result]}. The model was "
        "given the whole caption."
    )
    cards = []
    for row in rows:
        caption = str(row.get("caption", ""))
        strip = [
            tag("figure", images.show(row.get(kind), f"{kind}: {caption}"), tag("figcaption", kind))
            for kind in ("original", "masked", result)
        ]
        cards.append(tag("div", tag("div", strip, class_="strip three"), tag("p", caption), class_="card"))
    return Html(tag("p", note, class_="note") + tag("div", cards, class_="cards"))


def _words(rows: Rows, images: Images) -> Html:
    note = "Held-out captions, each with its whole image. The model's predictions for masked words are in color"
    texts = [_masked_text(row) for row in rows]
    right, total = sum(r for _, r, _ in texts), sum(n for _, _, n in texts)
    legend = [
        tag("span", "correct", class_="chip hit"),
        " and ",
        tag("span", "wrong", tag("s", " instead of this word"), class_="chip miss"),
    ]
    score = f". Here {right} of {total} are correct."
    return Html(tag("p", note, ": ", legend, score, class_="note") + "".join(text for text, _, _ in texts))


def _masked_text(row: dict[str, Any]) -> tuple[Html, int, int]:
    """(text with the masked words filled in, number of correct ones, number of masked words)."""
    tokens = row.get("text_masked", [])
    tokens = tokens.split() if isinstance(tokens, str) else [str(token) for token in tokens]
    tokens = [token for token in tokens if token not in HIDDEN_TOKENS]
    truths, guesses = ([str(word) for word in row.get(key, [])] for key in ("truth", "predicted"))
    words = [*tokens, *truths, *guesses]
    spaced = any(word.startswith(SPACES) for word in words)  # otherwise every token is a word
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
    note = "For each caption, the five held-out images that the model ranks highest, best first."
    return Html(tag("p", note, class_="note") + "".join(_image_results(row, images) for row in rows))


def _image_results(row: dict[str, Any], images: Images) -> Html:
    figures = []
    results = _results(row)
    for rank, result in enumerate(results, 1):
        hit = bool(result.get("correct"))
        mark = tag("span", " ✓ correct", class_="right") if hit else None
        caption = tag("figcaption", f"{rank} · {_score(result)}", mark, class_="num")
        shown = images.show(result.get("image"), f"rank {rank}{', correct' if hit else ''}")
        figures.append(tag("figure", shown, caption, class_="hit" if hit else None))
    found = None if any(r.get("correct") for r in results) else tag("span", " ✗ not in the top five", class_="wrong")
    query = tag("p", "“", str(row.get("query", "")), "”", found)
    return tag("div", query, tag("div", figures, class_="results"), class_="query")


def _image_to_text(rows: Rows, images: Images) -> Html:
    note = (
        "For each image, the five held-out captions that the model ranks highest, best first. "
        "An image has several correct captions."
    )
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
    right = [row for row in rows if _accuracy(row) > 0]
    wrong = [row for row in rows if _accuracy(row) == 0]
    note = "Correct: at least one annotator gave that answer. The score is the VQA accuracy of the answer, from 0 to 1."
    return Html(tag("p", note, class_="note") + _two_groups(right, wrong, lambda row: _question(row, images)))


def _question(row: dict[str, Any], images: Images) -> Html:
    score = _accuracy(row)
    kind, mark = ("right", "✓") if score > 0 else ("wrong", "✗")
    answers = row.get("answers")
    people = ", ".join(str(answer) for answer in answers) if isinstance(answers, list) else str(answers or "")
    verdict = tag("span", f"{mark} {row.get('predicted', '')}", class_=kind)
    text = tag(
        "div",
        tag("p", str(row.get("question", ""))),
        tag("p", verdict, tag("span", f" · score {score:.2g}", class_="fine")),
        tag("p", f"annotators: {people or 'no answer that is in the answer list'}", class_="fine"),
    )
    shown = images.show(row.get("image"), "image of the question")
    return tag("div", tag("div", shown, text, class_="side"), class_="card")


def _accuracy(row: dict[str, Any]) -> float:
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
        "span", f"{'✓' if hit else '✗'} predicted {_truth(row.get('predicted'))}", class_="right" if hit else "wrong"
    )
    fine = tag("span", f" · label {_truth(row.get('label'))}", class_="fine")
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
    for title, rows in (("Correct", right), ("Wrong", wrong)):
        body = tag("div", [show(row) for row in rows], class_="cards") if rows else tag("p", "none", class_="note")
        parts.append(tag("h3", title) + body)
    return Html("".join(parts))
