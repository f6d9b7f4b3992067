"""Charts: what is averaged away, what is not, and that the page's colors reach them."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from eve_ds.report.charts import Line, condense, line_chart, running_mean, short
from eve_ds.report.curves import group_curves
from eve_ds.report.run_files import Curve


def curve(values: list[float]) -> Curve:
    return Curve([float(step) for step in range(1, len(values) + 1)], values)


def test_short_curves_are_drawn_as_they_are() -> None:
    steps, values = condense(curve([3, 1, 2]))
    assert (steps.tolist(), values.tolist()) == ([1, 2, 3], [3, 1, 2])


def test_long_curves_are_averaged_over_equal_intervals() -> None:
    steps, values = condense(curve([float(i) for i in range(1000)]), points=10)
    assert values.tolist() == [49.5 + 100 * i for i in range(10)]
    assert steps.tolist() == [50.5 + 100 * i for i in range(10)]


def test_values_that_are_not_finite_are_ignored() -> None:
    _, values = condense(curve([1, math.nan, 3, math.nan, math.nan, math.nan, math.inf, 5]), points=4)
    assert values[0] == 1
    assert values[1] == 3
    assert math.isnan(values[2])
    assert values[3] == 5


def test_running_mean() -> None:
    assert running_mean(np.full(50, 2.0)) == pytest.approx(np.full(50, 2.0))
    line = np.arange(101.0)
    assert running_mean(line)[10:90] == pytest.approx(line[10:90])
    noisy = np.where(np.arange(100) % 2, 1.0, np.nan)
    assert running_mean(noisy, window=0.1) == pytest.approx(np.ones(100))


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0], [math.nan] * 3, [1e-5, 3e-5], [0.0] * 500, [1e9, -1e9]])
def test_any_curve_can_be_drawn(values: list[float]) -> None:
    svg = line_chart(
        'a "chart" of <this> & that', [Line("training", curve(values)), Line("held out", curve(values), 1, dots=True)]
    )
    assert svg.startswith("<svg viewBox=")
    assert 'aria-label="a &quot;chart&quot; of &lt;this> &amp; that: training, held out"' in svg
    assert "#0" not in svg
    assert "http" not in svg
    assert "<style" not in svg


def test_colors_come_from_the_page() -> None:
    svg = line_chart("x", [Line("training", curve([1.0, 2.0])), Line("held out", curve([1.0, 2.0]), 1)])
    for variable in ("var(--c1)", "var(--c2)", "var(--grid)", "var(--muted)"):
        assert variable in svg


def test_of_a_curve_that_is_not_drawn_itself_the_running_mean_sets_the_axis() -> None:
    noisy = curve([float(300 * (-1) ** step) for step in range(100)])
    assert ">200<" in line_chart("x", [Line("run", noisy)])
    assert ">200<" not in line_chart("x", [Line("run", noisy, raw=False)])


def test_numbers_are_short() -> None:
    """Five digits and a power of ten would be cut off left of a chart."""
    values = [0, 0.5, 1.8e-3, 863.25, 9999, 10_000, 50_830, 999_000, 1_000_000, 2_500_000, -3.2e9]
    expected = ["0", "0.5", "0.0018", "863", "9999", "10k", "50.83k", "999k", "1M", "2.5M", "-3.2G"]
    assert [short(value, 3) for value in values] == expected
    assert [short(value, 3) for value in (999.6, 9999.7, 999_960, -12_345_678)] == ["999.6", "10k", "1M", "-12.35M"]
    assert (short(0.2615, 4), short(1_000_100, 6)) == ("0.2615", "1.0001M")
    drawn = str(line_chart("tokens", [Line("perf", curve([42_000, 52_000, 51_000]))]))
    assert "e+0" not in drawn and "k</text>" in drawn


def test_a_single_evaluation_is_at_a_whole_step() -> None:
    line, fractions = Line("held out", Curve([3.0], [1.5]), dots=True), r">(?:2|3)\.\d+<"
    svg = line_chart("x", [line])
    assert ">3<" in svg and not re.search(fractions, svg)
    assert re.search(fractions, line_chart("x", [line], whole=False))


def test_curves_of_one_name_share_a_chart_and_losses_come_first() -> None:
    names = [
        "step",
        "lr",
        "samples_per_second",
        "odd",
        "mim_loss",
        "loss",
        "val/loss",
        "val/txt_r1",
        "val/txt_r5",
        "epoch",
    ]
    groups = group_curves({name: curve([1.0]) for name in names} | {"gone": curve([math.nan])})
    assert list(groups) == ["loss", "mim_loss", "odd", "txt_r1", "lr", "samples_per_second"]
    assert list(groups["loss"]) == ["", "val"]


def test_averaged_weights_have_lines_of_their_own() -> None:
    names = ("loss", "val/loss", "val_ema/loss", "val/mlm_loss_shuffled", "val_ema/mlm_loss_shuffled")
    groups = group_curves({name: curve([float(place)]) for place, name in enumerate(names)})
    assert list(groups["loss"]) == ["", "val", "val_ema"]
    assert groups["mlm_loss by input"]["shuffled"].values == [3.0] and len(groups) == 2


def test_loader_metrics_belong_to_training() -> None:
    names = ("data/wait_fraction", "data/replaced", "data/samples/coco", "loss", "val/loss")
    groups = group_curves({name: curve([1.0]) for name in names})
    assert {name: list(group) for name, group in groups.items()} == {"loss": ["", "val"], "wait_fraction": [""]}


def test_metrics_with_other_inputs_share_a_chart() -> None:
    names = [
        "mlm_loss",
        "val/mlm_loss",
        "val/mlm_loss_no_image",
        "val/mlm_loss_shuffled",
        "val/mim_loss_shuffled",
        "lr",
    ]
    curves = {name: curve([float(place)]) for place, name in enumerate(names)}
    gone = {"val/mlm_accuracy": curve([0.5]), "val/mlm_accuracy_shuffled": curve([math.nan])}
    groups = group_curves(curves | gone)
    assert list(groups) == ["mlm_loss", "mlm_accuracy", "mim_loss by input", "mlm_loss by input", "lr"]
    assert list(groups["mlm_loss"]) == ["", "val"]
    assert {kind: line.values for kind, line in groups["mlm_loss by input"].items()} == {
        "true": [1.0],
        "shuffled": [3.0],
        "no_image": [2.0],
    }
    assert list(groups["mim_loss by input"]) == ["shuffled"]
