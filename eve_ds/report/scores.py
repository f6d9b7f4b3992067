"""Top of the page: a summary paragraph, the main numbers, and the table of scores with their baselines."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from eve_ds.report.html import Html, missing, section, tag
from eve_ds.report.run_files import Run, number
from eve_ds.tasks.spec import FinetuneSpec

DASH = "\N{EN DASH}"
RERANKED = "reranked"  # key of the recalls after re-ranking, beside those of the plain ranking
GROUPS = {"": "", RERANKED: ", re-ranked"}  # what a measure is called in each group of scores
# key in metrics.json -> name in the page; "first_values" is the same fine-tuning without pre-training
BASELINES = {
    "first_values": "no pre-training",
    "chance": "chance",
    "majority": "majority",
    "text_only": "text only",
}
MATCHING = "matching"  # key of the scores of retrieval's matching head


@dataclass
class Score:
    """One score and its baselines, in percent.

    Args:
        task: name in the page; empty except in the first row of a task.
        measure: name in the page.
        value: score of the model.
        baselines: the recorded ones, by key of BASELINES.
        interval: its 95 % confidence interval, if that is recorded.
        minor: breakdown of the row above.
    """

    task: str
    measure: str
    value: float
    baselines: dict[str, float] = field(default_factory=dict)
    interval: tuple[float, float] | None = None
    minor: bool = False

    @property
    def margin(self) -> float | None:
        """Percentage points above the best baseline."""
        return self.value - max(self.baselines.values()) if self.baselines else None


def find_scores(run: Run) -> list[Score]:
    """The scores in metrics.json, with their baselines."""
    scores = []
    for name, spec in run.tasks.items():
        part, factor = run.metrics.get(name), spec.to_percent
        if not isinstance(part, dict):
            continue
        title = spec.title
        for key, group, label in measured(spec, [part]):
            baselines = _baselines(part, group, key, key == spec.main_measure, factor)
            interval = _interval(of_group(_section(part, "intervals"), group), key, factor)
            scores.append(Score(title, label, of_group(part, group)[key] * factor, baselines, interval))
            title = ""
            kinds = _section(part, "per_answer_type") if key == "overall" else {}
            untrained = _section(_section(part, "from_first_values"), "per_answer_type")
            for kind, value in kinds.items():
                if number(value) is not None:
                    baseline = number(untrained.get(kind))
                    beside = {} if baseline is None else {"first_values": baseline * factor}
                    within = _interval(_section(_section(part, "intervals"), "per_answer_type"), kind, factor)
                    scores.append(Score("", str(kind), value * factor, beside, within, minor=True))
        scores += _matching(part)
    return scores


def of_group(scores: dict[str, Any], group: str) -> dict[str, Any]:
    """``scores[group]``; ``scores`` itself for the group ""."""
    return _section(scores, group) if group else scores


def measured(spec: FinetuneSpec, scored: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(key, group, name in the page) of each measure that at least two of ``scored`` have (of one: that it has)."""
    for group, more in GROUPS.items():
        for key, label in spec.measures:
            known = sum(number(of_group(scores, group).get(key)) is not None for scores in scored)
            if known >= min(2, len(scored)):
                yield key, group, f"{label}{more}"


def _matching(part: dict[str, Any]) -> Iterator[Score]:
    """How often the matching head is right, if that was measured. One answer to all pairs is right in ``prior``."""
    own, rival = (_section(scores, MATCHING) for scores in (part, _section(part, "from_first_values")))
    if (value := number(own.get("accuracy"))) is not None:
        beside = {"first_values": number(rival.get("accuracy")), "majority": number(own.get("prior"))}
        known = {name: other for name, other in beside.items() if other is not None}
        within = _interval(_section(_section(part, "intervals"), MATCHING), "accuracy", 1)
        yield Score("", "matching accuracy", value, known, within)


def _baselines(part: dict[str, Any], group: str, key: str, main: bool, factor: float) -> dict[str, float]:
    """Baselines of the measure ``key``, in percent, from these entries of ``part``:

    - ``from_first_values[key]``, of the same group;
    - outside of groups, ``chance_KEY``, ``majority_KEY`` and ``text_only_KEY``;
    - for the task's main measure, also ``chance``, ``majority_baseline`` and ``text_only_baseline``.
    """
    untrained = number(of_group(_section(part, "from_first_values"), group).get(key))
    found = {} if untrained is None else {"first_values": untrained * factor}
    for baseline in () if group else BASELINES:
        names = [f"{baseline}_{key}", *([baseline, f"{baseline}_baseline"] if main else [])]
        values = [part[name] for name in names if number(part.get(name)) is not None]
        if values:
            found[baseline] = values[0] * factor
    return found


def _section(part: dict[str, Any], name: str) -> dict[str, Any]:
    """A dictionary in metrics.json; empty if there is none: older runs have no ``from_first_values``."""
    found = part.get(name)
    return found if isinstance(found, dict) else {}


def _interval(intervals: dict[str, Any], key: str, factor: float) -> tuple[float, float] | None:
    """In percent; None where none is recorded."""
    ends = intervals.get(key)
    low, high = (number(end) for end in ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return None if low is None or high is None else (low * factor, high * factor)


def percent(value: float) -> str:
    return f"{value:.1f}\N{NO-BREAK SPACE}%"


def summary(run: Run) -> Html:
    """One paragraph: what was trained, and the main results that the run recorded."""
    metrics, sentences = run.metrics, []
    ranks, experts, stage = (metrics.get(key) for key in ("world_size", "expert_parallel_size", "zero_stage"))
    where = f" on {ranks} process{'es' if ranks != 1 else ''}" if ranks else ""
    parallelism = ((stage, f"ZeRO stage {stage}"), (experts, f"experts distributed over {experts}"))
    how = ", ".join(text for value, text in parallelism if value is not None)
    how = f" ({how})" if how else ""
    if (losses := _losses(metrics)) is not None:
        first, last = losses
        share = f", {last / first:.0%} of its initial value" if first > 0 else ""
        sentences.append(
            f"A vision-language model was pre-trained by masked prediction of pixels and words{where}{how}; "
            f"its loss went from {first:.3g} to {last:.3g}{share}."
        )
    elif where or how:
        sentences.append(f"This run trained{where}{how}.")
    if words := _masked_words(metrics):
        beside = ", ".join(f"{percent(value)} {who}" for who, value in words[1:])
        sentences.append(f"It predicts {percent(words[0][1])} of held-out masked words{beside and f' ({beside})'}.")
    by_name = {(score.task, score.measure): score for score in find_scores(run)}
    for key, text in (
        (("Retrieval", "text R@1"), "ranks a correct caption first for {} of the images"),
        (("VQA", "accuracy"), "answers questions about images with an accuracy of {}"),
        (("NLVR", "accuracy"), "judges {} of the statements about image pairs correctly"),
    ):
        if score := by_name.get(key):
            beside = ", ".join(f"{BASELINES[name]} {percent(value)}" for name, value in score.baselines.items())
            sentences.append(f"It {text.format(percent(score.value))}{f' ({beside})' if beside else ''}.")
    if not sentences:
        sentences.append("The run recorded no scores; its other results are shown below.")
    return tag("p", " ".join(sentences), class_="lead")


def _losses(metrics: dict[str, Any]) -> tuple[float, float] | None:
    part = _section(metrics, "pretrain")
    first, last = number(part.get("loss_first")), number(part.get("loss_last"))
    return (first, last) if first is not None and last is not None else None


def _masked_words(metrics: dict[str, Any]) -> list[tuple[str, float]]:
    """[(input or baseline, accuracy on masked words in percent)], the model first; empty if not recorded."""
    part = _section(metrics, "pretrain")
    names = {"": "", "_other_image": "with another image", "_oracle": "by an oracle that knows the scene"}
    found = [(who, number(part.get(f"words_accuracy{name}"))) for name, who in names.items()]
    known = [(who, 100 * value) for who, value in found if value is not None]
    return known if found[0][1] is not None else []


def tiles(run: Run) -> Html | None:
    """Tiles with the main number of each stage."""
    shown = []
    if (losses := _losses(run.metrics)) is not None:
        speed = number(run.metrics["pretrain"].get("samples_per_second"))
        beside = f"from {losses[0]:.3g}" + (f", {speed:,.0f} samples/s" if speed else "")
        shown.append(("Pre-training loss", f"{losses[1]:.3g}", beside))
    if words := _masked_words(run.metrics):
        beside = ", ".join(f"{percent(value)} {who.removesuffix(' that knows the scene')}" for who, value in words[1:])
        shown.append(("Masked words: accuracy", percent(words[0][1]), beside or "no baseline recorded"))
    for score in find_scores(run):
        if score.task:
            best = max(score.baselines, key=lambda name: score.baselines[name], default=None)
            beside = f"{BASELINES[best]} {percent(score.baselines[best])}" if best else "no baseline recorded"
            shown.append((f"{score.task}: {score.measure}", percent(score.value), beside))
    if not shown:
        return None
    kinds = ("label", "value", "beside")
    cells = [tag("div", [tag("div", text, class_=kind) for kind, text in zip(kinds, tile, strict=True)], class_="tile")
             for tile in shown]  # fmt: skip
    return tag("div", cells, class_="tiles num")


def scores_section(run: Run) -> Html:
    """Section with the table of scores and their baselines."""
    scores = find_scores(run)
    titles = [] if run.single else [spec.title for spec in run.tasks.values()]
    absent = [title for title in titles if not any(score.task == title for score in scores)]
    gaps = [missing(f"scores of {title} (metrics.json has none)") for title in absent]
    if not scores:
        gaps = gaps or [missing("scores (neither metrics.json nor scores_*.json has any)")]
        return section("scores", "Scores", gaps)
    columns = [(name.capitalize(), "n") for name in ("score", *BASELINES.values(), "above best baseline")]
    heads = [("Task", ""), ("Measure", ""), columns[0], ("", ""), *columns[1:]]
    head = tag("tr", [tag("th", title, class_=kind or None) for title, kind in heads])
    table = tag("table", tag("thead", head), tag("tbody", [_row(score) for score in scores]))
    note = (
        "All scores are on held-out images. Text R@k: percentage of images with a correct caption among the top k. "
        "Image R@k: percentage of captions with their image among the top k; re-ranked: by the matching head. "
        "Matching accuracy: percentage of pairs, of an image with its own caption or with one drawn at random, that "
        "the matching head judges right. The marks on the bars are the baselines: the same fine-tuning without "
        "pre-training; random guessing (chance); always the most frequent answer (majority); the best model that does "
        "not see the images (text only). A dash: not defined or not recorded. Below a score: its 95 % confidence "
        "interval over the test examples, by bootstrap."
    )
    lacking = [tag("p", f"{title}: {text}.", class_="note") for title, text in _incomplete(run)]
    whole = tag(
        "details", tag("summary", "All numbers"), tag("pre", json.dumps(run.metrics, indent=1, ensure_ascii=False))
    )
    return section(
        "scores", "Scores", tag("p", note, class_="note"), tag("div", table, class_="wide"), lacking, gaps, whole
    )


def _incomplete(run: Run) -> Iterator[tuple[str, str]]:
    """(title of the task, what is missing) for the scores of incomplete splits."""
    for task, spec in run.tasks.items():
        lack = _section(_section(run.metrics, task), "incomplete")
        parts = {name: _section(lack, name) for name in lack if name != "dropped"}
        whole = [f"{part.get('scored')} of {part.get('of')} {name}" for name, part in parts.items()]
        why = [f"{count} {reason}" for reason, count in sorted(_section(lack, "dropped").items())]
        if whole:
            yield spec.title, f"scored on {', '.join(whole)}; dropped in the preparation: {', '.join(why)}"


def _row(score: Score) -> Html:
    marks = [tag("b", style=f"left: {_clip(value):.1f}%") for value in score.baselines.values()]
    bar = tag("div", tag("i", style=f"width: {_clip(score.value):.1f}%"), marks, class_="bar")
    interval = tag("div", "{:.1f} to {:.1f}".format(*score.interval), class_="fine") if score.interval else None
    margin = DASH if score.margin is None else f"{score.margin:+.1f}"
    numbers = [percent(score.baselines[name]) if name in score.baselines else DASH for name in BASELINES]
    return tag(
        "tr",
        tag("th", score.task),
        tag("td", score.measure),
        tag("td", percent(score.value), interval, class_="n"),
        tag("td", bar),
        [tag("td", text, class_="n") for text in [*numbers, margin]],
        class_="minor" if score.minor else None,
    )


def _clip(value: float) -> float:
    return min(max(value, 0.0), 100.0)
