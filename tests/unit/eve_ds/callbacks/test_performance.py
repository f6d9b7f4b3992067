"""Speed in detail: tokens and operations against the planner's count, what ranks send, who is named as slow."""

from __future__ import annotations

import itertools
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eve_ds.callbacks import performance
from eve_ds.callbacks.performance import Performance, interval_metrics, peak_of
from eve_ds.config import PretrainConfig, parse
from eve_ds.plan.meta_model import build
from eve_ds.plan.work import flops_per_sample
from eve_ds.tasks.masked_modeling import MaskedModeling
from tests.support.tiny import caption_batch, masked_task

ROWS = 64


def trainer_of(task: MaskedModeling) -> Any:
    engine = SimpleNamespace(precision="fp32")
    return SimpleNamespace(
        task=task,
        step=0,
        accumulation_steps=1,
        is_main=True,
        device=torch.device("cpu"),
        config=SimpleNamespace(engine=engine),
    )


def train(callback: Performance, trainer: Any, steps: int, micro: int = 1) -> list[dict[str, float]]:
    callback.fit_start(trainer)
    records = []
    for _ in range(steps):
        trainer.task.train()
        for part in range(micro):
            trainer.task(caption_batch(ROWS, seed=part)).loss.backward()
        trainer.step += 1
        records.append({"step": float(trainer.step), "step_seconds": 0.5})
        callback.step_end(trainer, records[-1])
        trainer.task.eval()
        with torch.no_grad():
            trainer.task(caption_batch(ROWS))  # an evaluation does not count
    callback.close(trainer)
    return records


def test_tokens_times_and_memory_of_an_interval() -> None:
    trainer = trainer_of(masked_task())
    records = train(Performance(2, peak_tflops=0.001), trainer, 4, micro=2)
    assert [sorted(record.keys() - {"step", "step_seconds"}) != [] for record in records] == [False, True] * 2
    text = int(caption_batch(ROWS)["text_mask"].sum())
    width = caption_batch(ROWS)["text_mask"].numel()
    images = (1 + 4) * ROWS + (1 + 16) * ROWS  # a quarter of the patches in the first pass, all in the second
    for record in records[1::2]:
        # 2 steps of 2 micro-batches of 2 passes in 1 second
        assert record["perf/tokens_per_second"] == pytest.approx(4 * (images + 2 * text))
        assert record["perf/padding_share"] == pytest.approx(2 * (width - text) / (images + 2 * width))
        assert record["perf/step_seconds_p50"] == record["perf/step_seconds_max"] == 0.5
        assert 0 < record["perf/own_seconds_p50"] == record["perf/own_seconds_max"] < 10
        assert record["perf/mfu"] == pytest.approx(record["perf/tflops_per_device"] * 1000)
        assert 0.05 < record["perf/cpu_rss_gib"] < 100 and record["perf/slowest_rank"] == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_operations_are_those_that_the_planner_counts(checkpointing: bool) -> None:
    """Within 3 %: there forward and backward are counted; here forward, times three, though images need no gradient."""
    options = ["--model.image_size=32", "--model.patch_size=8", "--model.dim=32", "--model.depth=3"]
    options += ["--model.num_heads=4", "--model.mlp_hidden=64", "--model.vocab_size=50", "--model.max_text_length=12"]
    options += ["--model.text_positions=12", "--model.soft_layers=[1,2]", "--model.num_experts=4"]
    options += ["--objective.decoder_dim=32", "--objective.decoder_depth=1", "--objective.decoder_heads=4"]
    config = parse(PretrainConfig, [*options, "--engine.precision=fp32"], "test")
    expected = flops_per_sample(config, build(config, 0), 12, 0)
    callback, trainer = Performance(1), trainer_of(masked_task(checkpoint_activations=checkpointing))
    whole = caption_batch(ROWS)
    whole["text_mask"][:] = True
    callback.fit_start(trainer)
    trainer.task.train()(whole).loss.backward()
    record = {"step_seconds": 2.0}
    trainer.step = 1
    callback.step_end(trainer, record)
    trainer.accumulation_steps = 3
    nothing = {"step_seconds": 1.0}  # of the step before nothing is left
    callback.step_end(trainer, nothing)
    assert nothing["perf/tokens_per_second"] == nothing["perf/own_seconds_max"] == 0
    assert nothing["perf/step_seconds_max"] == 1
    assert nothing["perf/tflops_per_device"] == pytest.approx(2 * 3 * record["perf/tflops_per_device"])
    callback.close(trainer)
    assert record["perf/tflops_per_device"] == pytest.approx(expected * ROWS / 2 / 1e12, rel=0.03)
    assert "perf/mfu" not in record  # a CPU's peak is unknown


@pytest.mark.parametrize("soft_layers", [[1, 2], []])
def test_own_time_ends_at_the_first_experts_or_the_last_norm(soft_layers: list[int]) -> None:
    callback, trainer, batch = Performance(9), trainer_of(masked_task(soft_layers=soft_layers)), caption_batch(2)
    callback.fit_start(trainer)
    clock = itertools.count()
    callback._now = lambda: next(clock)  # type: ignore[method-assign]
    with torch.no_grad():
        for trains in (True, True, False, True):
            trainer.task.train(trains)(batch)  # two passes through the backbone
    assert callback._own == [1, 1]  # not of the first one, whose operations were counted, nor of an evaluation
    callback.close(trainer)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trainer.task.modules())


def test_a_mask_may_be_passed_by_name() -> None:
    callback, trainer, batch = Performance(9), trainer_of(masked_task()), caption_batch(2)
    callback.fit_start(trainer)
    real = int(batch["text_mask"].sum())
    with torch.no_grad():
        trainer.task.backbone.train()(None, batch["text_ids"], text_mask=batch["text_mask"])
    assert callback._tokens.tolist() == [real, batch["text_mask"].numel() - real]


def rank(own: float, steps: list[float] | None = None, **memory: float) -> dict[str, Any]:
    return {
        "host": f"node{own:g}",
        "steps": steps or [1.0, 1.0],
        "own": own,
        "tokens": [30.0, 10.0],
        "flops": 2e12,
        "memory": memory or {"cpu_rss_gib": 1.0},
    }


def test_ranks_are_taken_together() -> None:
    found = interval_metrics(
        [
            rank(1.0, [1.0, 2.0], gpu_allocated_gib=3.0) | {"flops": 1e12},
            rank(4.0, [1.0, 3.0], gpu_allocated_gib=2.0) | {"flops": 3e12},
        ],
        8,
        10.0,
    )
    assert found == {
        "perf/tokens_per_second": 15.0,
        "perf/padding_share": 0.25,
        "perf/step_seconds_p50": 1.5,
        "perf/step_seconds_max": 3.0,
        "perf/own_seconds_p50": 2.5,
        "perf/own_seconds_max": 4.0,
        "perf/slowest_rank": 1,
        "perf/tflops_per_device": 4.0,  # 8 micro-batches of 2 TFLOP on each device in 4 seconds
        "perf/mfu": 0.4,
        "perf/gpu_allocated_gib": 3.0,
    }
    assert "perf/tflops_per_device" not in interval_metrics([rank(1.0) | {"flops": None}], 8, 10.0)


def test_a_rank_that_stays_slow_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    trainer, callback = trainer_of(masked_task()), Performance(1)
    callback.fit_start(trainer)
    for own, lines in [
        ([1, 1.1, 1], 0),  # within 20 %
        ([1, 1.3, 1], 0),
        ([1.3, 1, 1], 0),  # another one: noise
        ([1, 1.3, 1], 0),
        ([1, 1.3, 1], 1),
        ([1, 1.3, 1], 1),  # once
        ([1, 1, 1], 1),
        ([1, 2, 1], 1),
        ([1, 2, 1], 2),  # anew
        ([1, 1, 1], 2),
        ([0.003, 0.005, 0.003], 2),  # milliseconds
        ([0.003, 0.005, 0.003], 2),
        ([0.003, 0.005, 0.003], 2),
        ([1, 1.3], 2),  # beside the faster one of two
        ([1, 1.3], 3),
    ]:
        monkeypatch.setattr(performance, "gather", lambda mine, own=own: [rank(value) for value in own])
        trainer.step += 1
        callback.step_end(trainer, {"step_seconds": 1.0})
        assert len(caplog.records) == lines, own
    assert (
        "rank 1 on node1.3 is slow, at step 5 again: " in caplog.text
        and "took 1.3 s, the ranks' median 1 s" in caplog.text
    )
    trainer.is_main = False
    for own in ([1, 1, 1], [1, 2, 1], [1, 2, 1]):
        monkeypatch.setattr(performance, "gather", lambda mine, own=own: [rank(value) for value in own])
        callback.step_end(trainer, {"step_seconds": 1.0})
    assert len(caplog.records) == 3  # rank 0 tells
    callback.close(trainer)


@pytest.mark.parametrize(
    ("precision", "given", "peak"), [("bf16", None, 989.0), ("fp16", None, 989.0), ("fp32", None, None), ("fp32", 5, 5)]
)
def test_the_peak_is_that_of_16_bits_or_the_given_one(
    monkeypatch: pytest.MonkeyPatch, precision: str, given: float | None, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    callback, trainer = Performance(1, given), trainer_of(masked_task())
    callback.fit_start(trainer)
    assert callback._peak(trainer) == given  # on the CPU
    callback._on_gpu, trainer.config.engine.precision = True, precision
    assert callback._peak(trainer) == peak
    callback.peak_tflops = 7.0
    assert callback._peak(trainer) == 7.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_by_name(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak
