"""The profiler's steps, and its summary against operations whose number is known."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from eve_ds.callbacks.profile import KINDS, OTHER, WAITING, Profile, Spent, by_kind, summary
from eve_ds.config_sections import LoggingConfig
from preprocessing.errors import UserError


def trainer(folder: Path, start: int = 0, total: int = 6, rank: int = 0) -> SimpleNamespace:
    names = {"output_dir": folder, "start_step": start, "step": start, "total_steps": total, "rank": rank}
    return SimpleNamespace(**names, is_main=rank == 0, accumulation_steps=2, device=torch.device("cpu"))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("eve_ds"), "propagate", True)
    caplog.set_level(logging.INFO, "eve_ds")
    return caplog


def run(callback: Profile, made: SimpleNamespace) -> None:
    callback.fit_start(made)
    while made.step < made.total_steps:
        callback.step_start(made)
        torch.ones(64, 64) @ torch.ones(64, 64)
        made.step += 1
        callback.step_end(made, {"data/wait_fraction": 0.5, "step_seconds": 0.002})
    callback.fit_end(made)
    callback.close(made)


@pytest.mark.parametrize(
    ("given", "expected"), [("10:20", range(10, 21)), ("1:1", range(1, 2)), ("5:54", range(5, 55)), (None, range(0))]
)
def test_steps(given: str | None, expected: range) -> None:
    config = LoggingConfig(profile=given)
    config.check()
    assert config.profiled == expected


@pytest.mark.parametrize("wrong", ["", "10", "20:10", "0:5", "5:55", "a:b", "1:2:3", "-3:4", "1-4"])
def test_a_wrong_range_is_named(wrong: str) -> None:
    with pytest.raises(UserError, match=r"logging.profile=.* must be FIRST:LAST, two steps as in 10:20.* 50 at most"):
        LoggingConfig(profile=wrong).check()


def test_steps_beyond_the_end() -> None:
    LoggingConfig(profile="6:9").check_steps(6)
    with pytest.raises(UserError, match=r"logging\.profile=7:9: the run ends with step 6"):
        LoggingConfig(profile="7:9").check_steps(6)


@pytest.mark.parametrize(
    ("steps", "start", "told"), [((2, 4), 0, "2 to 4"), ((2, 4), 2, "3 to 4"), ((5, 9), 0, "5 to 6"), ((2, 4), 4, "")]
)
def test_what_is_traced(
    steps: tuple[int, int], start: int, told: str, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    """From a fresh start, a resume within the steps and behind them, and with an end before theirs."""
    run(Profile(range(steps[0], steps[1] + 1)), trainer(tmp_path, start))
    text = tmp_path / "profile/summary.txt"
    assert text.exists() == bool(told) and (tmp_path / "profile/rank_0.json.gz").exists() == bool(told)
    if told:
        first, last = map(int, told.split(" to "))
        waited = next(line for line in text.read_text().splitlines() if WAITING in line)
        assert f"steps {told} of rank 0" in text.read_text()
        assert f"{0.001 * (last - first + 1):.3f} s" in waited and f"{2 * (last - first + 1)} calls" in waited
    assert ("the run goes on from step 4, so nothing is traced" in log.text) == (not told)


def test_other_ranks_have_traces_and_no_summary(tmp_path: Path) -> None:
    run(Profile(range(2, 3)), trainer(tmp_path, rank=1))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["rank_1.json.gz"]


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path: Path, log: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("")
    run(Profile(range(2, 3)), trainer(tmp_path))
    assert f"{tmp_path / 'profile'}: no trace of this rank: File exists" in log.text


def test_a_training_that_fails_ends_the_profiler(tmp_path: Path) -> None:
    callback = Profile(range(1, 3))
    callback.step_start(trainer(tmp_path))  # type: ignore[arg-type]
    assert torch.autograd._profiler_enabled()
    callback.close(trainer(tmp_path))  # type: ignore[arg-type]
    assert not torch.autograd._profiler_enabled() and not list(tmp_path.iterdir())
    callback.close(trainer(tmp_path))  # type: ignore[arg-type]


def event(name: str, thread: int, cpu: float, device: float = 0.0, **other: Any) -> SimpleNamespace:
    """An operation of so many seconds."""
    times = {"self_cpu_time_total": 1e6 * cpu, "self_device_time_total": 1e6 * device}
    own = {"name": name, "thread": thread, "device_type": DeviceType.CPU, "cpu_parent": None}
    return SimpleNamespace(**times, **(own | other))


def test_whose_time_counts() -> None:
    """That of the busiest thread, or that of the kernels of all threads (the backward pass has one of its own)."""
    events = [
        event("aten::mm", 1, cpu=3.0, device=2.0),
        event("gloo:all_reduce", 2, cpu=2.5, device=0.5),
        event("aten::mul", 1, cpu=1.0, device=1.0),
        event("kernel", 1, cpu=20.0, device=20.0, device_type=DeviceType.CUDA),
    ]
    names = ("matrix products", "collectives", "norms, elementwise, copies", WAITING, OTHER)
    for on_gpu, wall, expected in (
        (False, 6.0, [3.0, 0.0, 1.0, 0.5, 1.5]),
        (False, 2.0, [3.0, 0.0, 1.0, 0.5, 0.0]),  # the clocks differ: nothing is less than none
        (True, 6.0, [2.0, 0.5, 1.0, 0.5, 2.0]),
    ):
        spent = by_kind(events, on_gpu, wall, Spent(0.5, 1))
        assert [spent[name].seconds for name in names] == pytest.approx(expected)


def test_kinds() -> None:
    """Each kind has the operations that were run, and nothing is counted twice or lost."""
    weight = torch.nn.Parameter(torch.ones(32, 32))
    weight.grad = torch.ones(32, 32)
    optimizer = torch.optim.AdamW([weight], foreach=True)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as traced:
        x = torch.ones(4, 32, 32)
        for _ in range(3):
            torch.mm(x[0], weight)
        torch.bmm(x, x).softmax(-1)
        F.layer_norm(x, [32])
        F.gelu(x)
        optimizer.step()
    events = traced.events()
    spent = by_kind(events, False, wall=10.0, waiting=Spent(2.0, 5))
    assert set(spent) == {*KINDS, WAITING, OTHER}
    calls = {kind: one.calls for kind, one in spent.items()}
    assert (calls["matrix products"], calls["attention"], calls["optimizer"]) == (3, 2, 1)  # bmm and softmax
    assert calls["norms, elementwise, copies"] == 1 + 3 + 2  # ones; x[0] three times; the norm, GELU
    assert spent["collectives"] == Spent() and spent[WAITING] == Spent(2.0, 5)
    assert sum(one.seconds for one in spent.values()) == pytest.approx(10.0)
    operations = sum(event.self_cpu_time_total for event in events) / 1e6
    assert spent[OTHER].seconds == pytest.approx(10.0 - 2.0 - operations, abs=operations / 2)
    shares = [float(line.split("%")[0].split()[-1]) for line in summary(spent, 1, 2).splitlines()[1:]]
    assert len(shares) == 7 and sum(shares) == pytest.approx(100, abs=0.5) and shares == sorted(shares, reverse=True)
