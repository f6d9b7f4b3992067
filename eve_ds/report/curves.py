"""Training section: small charts of all metrics in metrics.jsonl, and the load of the experts."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from eve_ds.report.charts import Line, line_chart, short
from eve_ds.report.html import Html, missing, section, tag
from eve_ds.report.run_files import SINGLE, STAGES, Curve, Run, Stage, number

TITLES = {
    "loss": "Loss",
    "mim_loss": "Masked patches: loss",
    "mim_code_loss": "Codes of masked patches: loss",
    "mim_code_accuracy": "Codes of masked patches: accuracy",
    "mlm_loss": "Masked words: loss",
    "mlm_accuracy": "Masked words: accuracy",
    "mim_loss by input": "Masked patches: held-out loss, by text given",
    "mim_code_loss by input": "Codes of masked patches: held-out loss, by text given",
    "mim_code_accuracy by input": "Codes of masked patches: held-out accuracy, by text given",
    "mlm_loss by input": "Masked words: held-out loss, by image given",
    "mlm_accuracy by input": "Masked words: held-out accuracy, by image given",
    "itc_loss": "Contrastive loss",
    "itm_loss": "Matching loss",
    "aux_loss": "Load balancing loss (1: balanced)",
    "router_z_loss": "Router z-loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "samples_per_second": "Samples per second",
    "wait_fraction": "Fraction of time waiting for data",
    "txt_r1": "Recall at 1: image to text",
    "img_r1": "Recall at 1: text to image",
    "soft_accuracy": "VQA accuracy over the answer list",
}
BY_INPUT = re.compile(r"(?P<metric>.+)_(?P<input>shuffled|no_image)")  # a held-out metric with other inputs
ORDER = ["loss", "mim_loss", "mim_code_loss", "mim_code_accuracy", "mlm_loss", "mlm_accuracy"]
ORDER += ["mim_loss by input", "mlm_loss by input", "mlm_accuracy by input", "itc_loss", "itm_loss"]
ORDER_LAST = ["lr", "samples_per_second", "grad_norm", "wait_fraction", "aux_loss", "router_z_loss"]
FROM_ZERO = {"lr", "samples_per_second", "wait_fraction", "mlm_accuracy", "mlm_accuracy by input"}
FROM_ZERO |= {"mim_code_accuracy", "mim_code_accuracy by input"}
NO_CHART = re.compile(r"replaced|step|epoch|samples|step_seconds|(txt|img)_(r5|r10|r_mean)|time")
SPLITS = {"": "training", "val": "held out", "val_ema": "held out, averaged weights", "test": "test"}
INPUTS = {"true": "true", "shuffled": "shuffled", "no_image": "none"}
COLORS = {"": 0, "val": 1, "true": 1, "no_image": 3}  # index in the page's colors; 2 for any other


def curves_section(run: Run) -> Html:
    """Section with small charts of each training stage."""
    names = list(run.stages) if run.single else list(STAGES)
    parts = [_stage(run.stages[name]) if name in run.stages else _absent(name) for name in names]
    keys = [tag("span", tag("span", class_="key", style=f"background: var(--c{n + 1})"), text)
            for n, text in enumerate(("training (thin: recorded, thick: running mean)", "held out"))]  # fmt: skip
    return section("training", "Training", tag("div", keys, class_="legend"), parts)


def _absent(name: str) -> Html:
    return Html(tag("h3", STAGES[name]) + missing(f"the folder {name}/ of this stage"))


def _stage(stage: Stage) -> Html:
    head = None if stage.name == SINGLE else tag("h3", stage.title)
    groups = group_curves(stage.curves)
    if not groups:
        return Html((head or "") + missing(f"{stage.file('metrics.jsonl')} (or a record in it)"))
    notes = []
    if stage.damaged:
        notes.append(f"{stage.damaged} line(s) of {stage.file('metrics.jsonl')} could not be read.")
    bad = {key: sum(not math.isfinite(v) for v in curve.values) for key, curve in stage.curves.items()}
    notes += [f"{key} was not finite in {count} record(s)." for key, count in bad.items() if count]
    charts = [_chart(stage, name, curves) for name, curves in groups.items()]
    return Html(
        (head or "") + tag("div", charts, class_="charts") + (tag("p", " ".join(notes), class_="note") if notes else "")
    )


def group_curves(curves: dict[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Group curves into charts: ``loss`` and ``val/loss`` share one. Losses come first, speed and optimizer last.

    ``val/mlm_loss_shuffled`` and ``val/mlm_loss_no_image`` share a chart ``mlm_loss by input`` with ``val/mlm_loss``.
    """
    groups: dict[str, dict[str, Curve]] = {}
    for key, curve in curves.items():
        split, _, name = key.rpartition("/")
        if split == "data/samples":
            continue
        split = "" if split == "data" else split  # the loader's metrics belong to training
        if NO_CHART.fullmatch(name) or not any(math.isfinite(value) for value in curve.values):
            continue
        if found := BY_INPUT.fullmatch(name):
            if split == "val_ema":  # their lines are those of the weights
                continue
            name, split = f"{found['metric']} by input", found["input"]
        groups.setdefault(name, {})[split] = curve
    for name, group in groups.items():
        true = groups.get(name.removesuffix(" by input"), {})
        if true is not group and "val" in true:
            group["true"] = true["val"]

    def rank(name: str) -> tuple[int, int]:
        if name in ORDER:
            return 0, ORDER.index(name)
        return (2, ORDER_LAST.index(name)) if name in ORDER_LAST else (1, 0)

    return {name: dict(sorted(groups[name].items(), key=_line_order)) for name in sorted(groups, key=rank)}


def _line_order(line: tuple[str, Curve]) -> tuple[int, str]:
    """Sort key of a chart's lines: the order of SPLITS and INPUTS, then others by name."""
    known = [*SPLITS, *INPUTS]
    return (known.index(line[0]) if line[0] in known else len(known)), line[0]


def _chart(stage: Stage, name: str, curves: dict[str, Curve]) -> Html:
    labels = SPLITS | INPUTS
    lines = [
        Line(labels.get(kind, kind), curve, COLORS.get(kind, 2), dots=bool(kind), smooth=name != "lr")
        for kind, curve in curves.items()
    ]
    title = TITLES.get(name, name.replace("_", " ").capitalize())
    headline: list[Html | str] = []
    for kind, line in zip(curves, lines, strict=True):
        headline.append(" · " if headline else "")
        if kind in INPUTS:  # other colors are in the legend of the section
            headline.append(tag("span", "", class_="key", style=f"background: var(--c{line.color + 1})"))
        headline.append(_headline(name, line))
    caption = tag("figcaption", tag("div", title), tag("div", headline, class_="last num"))
    return tag("figure", caption, line_chart(f"{stage.title}, {title}", lines, zero=name in FROM_ZERO))


def _headline(name: str, line: Line) -> str:
    """The value beside a chart's title: the median of a noisy metric, the latest value of a loss or score."""
    finite = [value for value in line.curve.values if math.isfinite(value)]
    if name in ("samples_per_second", "wait_fraction", "grad_norm"):
        return f"median {short(float(np.median(finite)), 3)}"
    if name == "lr":
        return f"peak {short(max(finite), 3)}"
    tail = finite[-1:] if line.dots else finite[-20:]
    return f"{line.label} {short(float(np.mean(tail)), 3)}"


def experts_section(run: Run) -> Html:
    """Section with the fraction of each layer's image tokens and words routed to each expert."""
    stages = [stage for stage in run.stages.values() if stage.samples.get("expert_load")]
    layers = [layer for stage in stages for layer in _layers(stage.samples["expert_load"])]
    if not layers:
        return section("experts", "Experts", missing("expert load (pretrain/samples/samples.json has none)"))
    note = (
        "Percentage of each soft-routing layer's image tokens, and of its words, that were routed to each expert. With "
        "a balanced load all numbers of a row are equal. If the two rows of a layer differ, its experts specialize by "
        "modality. Dashed cells: experts with less than a tenth of a balanced load."
    )
    experts = max(len(row) for layer in layers for row in layer["counts"])
    head = tag("tr", tag("th", "layer"), tag("th", "expert"), [tag("th", str(e), class_="c") for e in range(experts)])
    rows = [_load_row(layer, modality, experts) for layer in layers for modality in range(len(layer["counts"][:2]))]
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="heat")
    return section("experts", "Experts", tag("p", note, class_="note"), tag("div", table, class_="wide"))


def _layers(load: Any) -> list[dict[str, Any]]:
    """The layers with valid counts."""
    layers = load.get("layers") if isinstance(load, dict) else None
    found = [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
    return [layer | {"counts": counts} for layer in found if (counts := _counts(layer.get("counts")))]


def _counts(rows: Any) -> list[list[float]]:
    """[modalities][experts]; empty if ``rows`` is not of that form."""
    if not isinstance(rows, list) or not all(isinstance(row, list) for row in rows):
        return []
    counts = [[number(count) for count in row] for row in rows]
    known = [[count for count in row if count is not None and 0 <= count < math.inf] for row in counts]
    return known if list(map(len, known)) == list(map(len, counts)) else []


def _load_row(layer: dict[str, Any], modality: int, experts: int) -> Html:
    """Table row of one layer and modality; ``modality``: 0 images, 1 words."""
    counts = layer["counts"][modality]
    shares = [count / (sum(counts) or 1) for count in counts]
    strongest = max(shares, default=0.0) or 1.0
    color = ("--c1-rgb", "--c2-rgb")[modality]
    cells = [
        _load_cell(share, count, experts, color, share / strongest) for share, count in zip(shares, counts, strict=True)
    ]
    name = tag("th", f"{layer.get('layer', '?')}", rowspan=len(layer["counts"][:2])) if modality == 0 else None
    return tag("tr", name, tag("th", ("images", "words")[modality]), cells, class_="first" if modality == 0 else None)


def _load_cell(share: float, count: float, experts: int, color: str, strength: float) -> Html:
    idle = share < 0.1 / experts
    style = None if idle else f"background: rgba(var({color}), {0.75 * strength:.2f})"
    return tag("td", f"{100 * share:.0f}", style=style, class_="idle" if idle else None, title=f"{count:,.0f} tokens")
