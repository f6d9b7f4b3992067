"""Draws label_curve.svg from label_curve.csv: VQA accuracy by the number of labeled images (pretraining_study.md)."""

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
COLORS = {"pre-trained": "#0b6e4f", "initial values": "#b5541c"}

matplotlib.rcParams["svg.hashsalt"] = "label_curve"  # the same file from the same figures


def main() -> None:
    found: dict[str, dict[int, list[float]]] = {start: defaultdict(list) for start in COLORS}
    with (HERE / "label_curve.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            found[row["start"]][int(row["labeled_images"])].append(float(row["accuracy"]))

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for start, color in COLORS.items():
        counts = sorted(found[start])
        for count in counts:
            axes.plot([count] * len(found[start][count]), found[start][count], ".", color=color, alpha=0.6)
        axes.plot(counts, [mean(found[start][count]) for count in counts], color=color, label=start)
    axes.set(xscale="log", xlabel="labeled images", ylabel="VQA accuracy, percent", ylim=(30, 100))
    axes.set_xticks(counts, [f"{count:,}" for count in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(title="mean, and each of three seeds", frameon=False)
    figure.savefig(HERE / "label_curve.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
