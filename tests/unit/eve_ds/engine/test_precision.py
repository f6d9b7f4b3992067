"""What `engine.precision: auto` comes to."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from eve_ds import config as config_tree
from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.config_sections import EngineConfig, OptimizerConfig
from eve_ds.engine import deepspeed_config
from eve_ds.engine.deepspeed_config import best_precision, load_deepspeed_config, precision_of, settle_precision
from preprocessing.errors import UserError


def seconds(dtype: torch.dtype) -> float:
    """Of the slowest kind of product of a backward pass, both factors stored by rows; the best of a few."""
    left, right = torch.ones(256, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(left, right)
        taken.append(time.perf_counter() - began)
    return min(taken)


def test_auto_never_takes_a_dtype_that_is_many_times_slower() -> None:
    chosen, other = (
        (torch.bfloat16, torch.float32) if best_precision("cpu") == "bf16" else (torch.float32, torch.bfloat16)
    )
    assert seconds(chosen) < 4 * seconds(other)


@pytest.mark.parametrize("best", ["bf16", "fp32"])
def test_auto_is_the_best_one_and_what_is_named_stays(best: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_config, "multiplies_bf16", lambda device: best == "bf16")
    assert precision_of(EngineConfig()) == best
    for named in ("bf16", "fp32"):
        assert precision_of(EngineConfig(precision=named)) == named
    filled = load_deepspeed_config("ds_configs/zero1.json", EngineConfig(), OptimizerConfig(), 1)
    assert filled["bf16"]["enabled"] == (best == "bf16")


@pytest.mark.parametrize("best", ["bf16", "fp32"])
def test_a_run_goes_on_in_the_numbers_it_began_with(best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_config, "multiplies_bf16", lambda device: best == "bf16")
    fresh = PretrainConfig(output_dir=str(tmp_path))
    settle_precision(fresh, rank=0)
    assert fresh.engine.precision == best
    for stored in ("bf16", "fp32"):
        begun = PretrainConfig(output_dir=str(tmp_path), engine=EngineConfig(precision=stored))  # type: ignore[arg-type]
        folder = tmp_path / stored
        folder.mkdir()
        config_tree.save(begun, folder / "config.yaml")
        found = []
        for entry in (".lock", "metrics.jsonl"):  # a start that failed; a run
            (folder / entry).touch()
            resumed = PretrainConfig(output_dir=str(folder))
            settle_precision(resumed, rank=0)
            found.append(resumed.engine.precision)
        assert found == [best, stored]


@pytest.mark.parametrize("text", ["", "engine: 3", "engine: {precision: auto}", "\x00", "engine: {precision: [1]}"])
def test_a_folder_that_is_no_run_decides_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").touch()
    config = PretrainConfig(output_dir=str(tmp_path))
    settle_precision(config, rank=0)
    assert config.engine.precision == best_precision()


def test_rank_0_warns_of_slow_numbers(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(deepspeed_config, "multiplies_bf16", lambda device: False)
    for rank, named, words in (
        (0, "bf16", "--engine.precision auto"),
        (1, "bf16", ""),
        (0, "fp32", ""),
        (0, "auto", ""),
    ):
        settle_precision(PretrainConfig(engine=EngineConfig(precision=named)), rank)  # type: ignore[arg-type]
        assert words in caplog.text and len(caplog.messages) == bool(words)
        caplog.clear()


def test_fp16_goes_on_where_it_can_and_is_refused_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = PretrainConfig(output_dir=str(tmp_path), engine=EngineConfig(precision="fp16"))
    config_tree.save(begun, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").touch()
    monkeypatch.setattr(deepspeed_config, "_takes_fp16", lambda: True)
    resumed = PretrainConfig(output_dir=str(tmp_path))
    settle_precision(resumed, rank=0)
    assert resumed.engine.precision == "fp16"
    monkeypatch.setattr(deepspeed_config, "_takes_fp16", lambda: False)
    with pytest.raises(UserError, match=r"engine\.precision=fp16: needs GPUs from the V100 on"):
        settle_precision(begun, rank=0)


@pytest.mark.parametrize("how", ["evaluate", "zeroshot"])
def test_a_run_that_scores_alone_is_neither_refused_nor_warned(
    how: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It computes in fp32: a recipe for GPUs may be scored anywhere."""
    monkeypatch.setattr(deepspeed_config, "multiplies_bf16", lambda device: False)
    monkeypatch.setattr(deepspeed_config, "_takes_fp16", lambda: False)
    for named in ("bf16", "fp16"):
        settle_precision(FinetuneConfig(engine=EngineConfig(precision=named), **{how: True}), rank=0)  # type: ignore[arg-type]
    assert not caplog.messages
