"""What a gauge sees of this process, and what is told of it beside a forecast."""

from __future__ import annotations

import logging

import pytest
import torch

from eve_ds.engine.memory_gauge import SLACK, Gauge, Held, told

GIB = 2**30
CPU = torch.device("cpu")


def held(peak: float, free: float = 40) -> Held:
    return Held(int(peak * GIB), int((peak + 1) * GIB), int(free * GIB), 80 * GIB)


def test_a_gauge_sees_what_was_held_for_a_moment() -> None:
    warm = torch.ones(1)  # torch's own start
    gauge = Gauge(CPU, lambda: 1)
    torch.zeros(100 * 2**20 // 4).add_(warm)  # 100 MiB, gone when it is read
    found = gauge.read()
    assert 90 * 2**20 < found.peak < 160 * 2**20 < found.whole < found.total and 0 < found.free < found.total


def test_the_fullest_rank_and_the_least_free_one_are_told() -> None:
    line, warnings = told([held(10), held(12, free=50), held(11, free=30)], on_gpu=True, forecast=12 * GIB)
    assert line == (
        "at most 12.0 GiB of tensors (rank 1), 13.0 GiB reserved by torch; the plan forecasts 12.0 GiB; 38% of "
        "80.0 GiB free"
    )
    assert warnings == []


@pytest.mark.parametrize(
    ("peak", "free", "forecast", "expected"),
    [
        (11.1, 40, 10, ["11% more than the plan forecasts"]),
        (10.9, 40, 10, []),
        (0.2, 40, 0.01, []),  # below SLACK
        (10.0, 3.9, 10, ["4.9% of the GPU's memory is free"]),
        (10.0, 4.1, 10, []),
        (20.0, 1.0, 10, ["100% more", "1.2% of the GPU"]),
        (20.0, 40, None, []),
    ],
)
def test_what_is_worth_a_warning(peak: float, free: float, forecast: float | None, expected: list[str]) -> None:
    assert SLACK == GIB // 4
    _, warnings = told([held(peak, free)], True, None if forecast is None else int(forecast * GIB))
    assert len(warnings) == len(expected)
    assert all(part in warning for part, warning in zip(expected, warnings, strict=True))


def test_a_forecast_that_fails_is_a_warning(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def forecast() -> int:
        raise NotImplementedError("my task has no meta batch")

    monkeypatch.setattr(logging.getLogger("eve_ds"), "propagate", True)
    found = Gauge(CPU, forecast).report()
    assert found is not None and "; no forecast; " in found[0] and found[1] == []
    assert "no forecast of the memory: NotImplementedError: my task has no meta batch" in caplog.text
