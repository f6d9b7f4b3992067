"""``python -m eve_ds.bench objective`` at a tiny size: the figures of its rows and of its JSON file add up."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace

from eve_ds.bench import __main__ as bench
from eve_ds.bench import objective, step
from eve_ds.config import PretrainConfig, parse
from eve_ds.errors import exit_code
from eve_ds.plan.__main__ import PretrainPlan
from eve_ds.plan.figures import make_plan

NAMES = ["separate", "joint", "separate_codes", "itc_itm", "itc_itm_mlm", "itc_itm_mlm_mim", "itc_mlm_mim"]
RECIPE = """
model: {image_size: 32, patch_size: 8, dim: 32, depth: 2, num_heads: 4, mlp_hidden: 64, vocab_size: 50,
        max_text_length: 12, text_positions: 12, soft_layers: [1], num_experts: 4, drop_path: 0.0}
objective: {decoder_dim: 16, decoder_depth: 2, decoder_heads: 2}
engine: {precision: fp32, global_batch_size: 64, micro_batch_size: 8}
"""
QUICK = ["--repeats", "2", "--warmup", "1", "--threads", "1", "--device", "cpu", "--squares", "64"]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE, encoding="utf-8")
    return str(path)


def figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "figures.json"
    bench.main(["objective", *arguments, *QUICK, "--json", str(file)])
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_rows_and_document(tmp_path: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "best_precision", lambda device: {"cpu": "fp32"}[device])
    Path(recipe).write_text(RECIPE.replace("precision: fp32", "precision: auto"), encoding="utf-8")
    found = figures(tmp_path, "--config", recipe, "--pairs", "3", "--decoders", "1x8", "--no_forecast")
    rows = {row["objective"]: row for row in found["rows"]}
    assert list(rows) == [*NAMES, "separate_1x8"]
    first = rows["separate"]
    assert first["dtype"] == "fp32"
    for name, row in rows.items():
        assert found[name] == row["samples_per_second"] == pytest.approx(3000 / row["ms"])
        assert row["ms"] == statistics.median(row["all_ms"]) and len(row["all_ms"]) == 2
        assert row["times_as_long"] == pytest.approx(row["ms"] / first["ms"])
        assert row["times_the_flops"] == pytest.approx(row["flops_per_sample"] / first["flops_per_sample"])
        assert row["reached"] == pytest.approx(row["times_as_long"] / row["times_the_flops"])
        reached = row["flops_per_sample"] * row["samples_per_second"] / 1e12
        assert row["share_of_peak"] == pytest.approx(reached / row["peak_tflops"])
        assert row["extra_bytes"] > 0 and row["largest_micro_batch_size"] is None
    assert [rows[name]["paper_largest"] for name in NAMES] == [224, None, 152, None, 80, 64, 132]
    assert rows["itc_itm_mlm"]["paper_times_as_long"] == pytest.approx(6.88 / 2.14)
    for less, more in (
        ("separate_1x8", "separate"),
        ("joint", "separate"),
        ("separate", "separate_codes"),
        ("itc_itm", "itc_itm_mlm"),
        ("itc_itm_mlm", "itc_itm_mlm_mim"),
        ("itc_mlm_mim", "itc_itm_mlm_mim"),
        ("separate", "itc_mlm_mim"),
    ):
        assert rows[less]["flops_per_sample"] < rows[more]["flops_per_sample"], (less, more)
    assert rows["separate_1x8"]["parameters"] < rows["separate"]["parameters"]
    assert rows["separate"]["extra_bytes"] < rows["itc_itm"]["extra_bytes"]


def test_between_steps_there_are_no_gradients() -> None:
    module = torch.nn.Linear(2, 2)
    module(torch.ones(1, 2)).sum().backward()
    objective._forget_gradients({"one": module})
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_largest_micro_batch_is_the_planners(recipe: str) -> None:
    options = Namespace(config=recipe, world_size=8, memory="4.5GiB")
    separate, rival = (objective.largest_micro_batch(options, objective.OBJECTIVES[x]) for x in ("separate", "itc_itm"))
    plan = parse(PretrainPlan, ["--config", recipe, "--task", "itc_itm", "--device_memory", "4.5GiB"], "test")
    assert make_plan(plan)["memory"]["without_checkpointing"]["largest_micro_batch_size"] == rival > 0
    assert separate > rival


def test_operations_are_the_sum_of_the_parts(recipe: str) -> None:
    """All four losses are EVE's two passes and those of contrast and matching; no pass is shared, none is left out."""

    def count(name: str) -> float:
        return step.flops_of(parse(PretrainConfig, ["--config", recipe, *objective.OBJECTIVES[name]], "test"), 1)

    separate, pairs = count("separate"), count("itc_itm")
    assert count("itc_itm_mlm_mim") == pytest.approx(separate + pairs, rel=1e-6)
    words = count("itc_itm_mlm") - pairs
    assert 0.5 * separate < words < separate
    assert 0 < count("itc_mlm_mim") - separate < 0.5 * pairs


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--decoders", "4"], "--decoders 4: expected DEPTHxWIDTH"),
        (["--decoders", "1x9"], "objective.decoder_dim=9"),
        (["--memory", "80 giga"], "--device_memory=80 giga"),
        (["--config", "none.yaml"], "none.yaml"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], culprit: str, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = exit_code(lambda: bench.main(["objective", "--config", recipe, *arguments, "--threads", "1"]))
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and culprit in error
