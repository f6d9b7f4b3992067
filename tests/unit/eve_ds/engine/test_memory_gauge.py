"""What a gauge sees of this process, and what is told of it beside a forecast."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eve_ds import rank_failure
from eve_ds.callbacks.memory_check import MOST_EVENTS, MemoryCheck
from eve_ds.engine import memory_gauge
from eve_ds.engine.memory_gauge import SLACK, Gauge, Held, size, told

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


def test_the_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "mount/slurm/job_7"
    (job / "step_0").mkdir(parents=True)
    for group, limit, used, cached in ((job, 16, 12, 2), (job / "step_0", "max", 11, 2), (job.parent, 12, 13, 0)):
        (group / "memory.max").write_text(f"{limit if limit == 'max' else limit * GIB}\n")
        (group / "memory.current").write_text(f"{used * GIB}\n")
        (group / "memory.stat").write_text(f"anon 5\nfile 7\ninactive_file {cached * GIB}\nactive_file 9\n")
    (tmp_path / "cgroup").write_text("3:memory:/old\n0::/slurm/job_7/step_0\n")
    limits = memory_gauge.control_groups(tmp_path, tmp_path / "mount")
    assert limits == [(6 * GIB, 16 * GIB), (0, 12 * GIB)]
    (tmp_path / "cgroup").write_text("3:memory:/old\n")
    assert memory_gauge.control_groups(tmp_path, tmp_path / "mount") == []
    monkeypatch.setattr(memory_gauge, "control_groups", lambda: limits)
    found = Gauge(CPU, lambda: 1).read()
    assert (found.free, found.total) == (0, 12 * GIB)


def test_the_fullest_rank_and_the_least_free_one_are_told() -> None:
    small = Held(GIB, 14 * GIB, 20 * GIB, 40 * GIB)  # half of it is free, though these are the fewest bytes
    ranks = [held(10), held(12, free=50), held(11, free=30), small]
    line, warnings = told(ranks, on_gpu=True, forecast=12 * GIB)
    assert line == (
        "at most 12.0 GiB of tensors (rank 1), 14.0 GiB reserved by torch; the plan forecasts 12.0 GiB; 38% of "
        "80.0 GiB free"
    )
    assert warnings == []
    line, (warning,) = told([Held(310 << 20, GIB, GIB // 2, 20 * GIB)], on_gpu=False, forecast=None)
    assert line == (
        "at most 310 MiB beyond what was resident before the model was built (rank 0), 1.00 GiB resident in all; "
        "no forecast; 2% of 20.0 GiB free"
    )
    assert warning.startswith("memory: 2.5% of the host's memory is free")
    for on_gpu in (True, False):  # a CPU's resident memory is more than its tensors
        _, (warning,) = told([held(12)], on_gpu, forecast=10 * GIB)
        assert ("that glibc keeps" in warning) is not on_gpu


def test_sizes_have_three_digits() -> None:
    assert [size(int(count * GIB)) for count in (0.5, 1, 9.99, 10, 120)] == [
        "512 MiB",
        "1.00 GiB",
        "9.99 GiB",
        "10.0 GiB",
        "120.0 GiB",
    ]


def test_an_earlier_peak_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_gauge, "_PROCESS", tmp_path)
    (tmp_path / "status").write_text("VmHWM:\t  900 kB\nVmRSS:\t  500 kB\n")
    gauge = Gauge(CPU, lambda: 1)
    assert (tmp_path / "clear_refs").read_text() == "5"  # proc(5): sets the peak to what is resident now
    for peak, beyond in ((900, 400), (450, 0)):
        (tmp_path / "status").write_text(f"VmHWM:\t  {peak} kB\nVmRSS:\t  300 kB\n")
        found = gauge.read()
        assert (found.peak, found.whole) == (beyond * 1024, peak * 1024)


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


@pytest.mark.parametrize(("free", "asked"), [(41, False), (40, True), (3, True)])
def test_where_plenty_is_free_no_forecast_is_made(free: int, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fullest rank counts; without a limit the forecast is always made."""
    made = []
    gauge = Gauge(CPU, lambda: len(made.append(1) or made))  # type: ignore[func-returns-value]
    monkeypatch.setattr(memory_gauge, "gather", lambda mine: [held(1, 70), held(1, free)])
    for plenty, expected in ((0.5, asked), (1.0, True)):
        found = gauge.report(plenty)
        assert found is not None and ("no forecast" not in found[0]) == bool(made) == expected
        made.clear()


def trainer(folder: Path, device: str, snapshot: bool = True) -> Any:
    config = SimpleNamespace(logging=SimpleNamespace(memory_snapshot=snapshot))
    steps = {"start_step": 4, "step": 4, "task_name": "vqa"}
    return SimpleNamespace(config=config, device=torch.device(device), output_dir=folder, rank=1, **steps)


@pytest.mark.parametrize(("device", "plenty"), [("cpu", 0.5), ("cuda", 1.0)])
def test_the_first_step_of_a_process_is_compared_and_no_other(
    device: str, plenty: float, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """On a GPU with the forecast, however much is free."""
    made, reports = trainer(tmp_path, device), iter([(plenty, ("little", ["too much"]))])
    check = MemoryCheck(SimpleNamespace(report=lambda given: dict([next(reports)])[given]))  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO, "eve_ds.callbacks.memory_check"):
        logging.getLogger("eve_ds.callbacks.memory_check").addHandler(caplog.handler)
        try:
            for made.step in (5, 6):
                check.step_end(made, {})
        finally:
            logging.getLogger("eve_ds.callbacks.memory_check").removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"vqa: step 5  memory: little", "too much"}


@pytest.mark.parametrize(
    ("device", "snapshot", "error", "written"),
    [
        ("cuda", True, torch.cuda.OutOfMemoryError("out of memory"), "memory_rank_1.pickle"),
        ("cuda", True, ValueError("another error"), None),
        ("cuda", True, None, None),
        ("cuda", False, torch.cuda.OutOfMemoryError("out of memory"), "memory_rank_1.txt"),
        ("cpu", True, torch.cuda.OutOfMemoryError("out of memory"), None),
    ],
)
def test_allocations_are_recorded_where_asked_and_what_held_the_memory_is_written_when_it_runs_out(
    device: str,
    snapshot: bool,
    error: Exception | None,
    written: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: calls.append(given))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_text("it"))
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: "a table")
    check = MemoryCheck(Gauge(CPU, lambda: 5 * GIB))
    check.fit_start(made := trainer(tmp_path, device, snapshot))
    with contextlib.suppress(ValueError, torch.cuda.OutOfMemoryError):
        try:
            if error is not None:
                raise error
        finally:
            check.close(made)
    check.close(made)
    recorded = device == "cuda" and snapshot
    assert calls == ([{"max_entries": MOST_EVENTS}, {"enabled": None}] if recorded else [])
    assert [path.name for path in tmp_path.rglob("memory*")] == ([written] if written else [])
    where = f"; what held the memory is in {tmp_path}/profile/{written}" if written else ""
    assert tell_memory(MemoryError()) == f"the plan forecasts 5.00 GiB{where}"


def tell_memory(error: Exception) -> str:
    assert rank_failure.tell_memory is not None
    return rank_failure.tell_memory(error)


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        (24, "of engine.micro_batch_size=32 24 fits"),
        (0, "of engine.micro_batch_size=32 not even 1 fits"),
        (32, "by it engine.micro_batch_size=32 fits: experts that are loaded unevenly"),
    ],
)
def test_a_rank_without_memory_tells_the_micro_batch_that_fits(fits: int, said: str) -> None:
    asked: list[int] = []
    gauge = Gauge(CPU, lambda: 90 * GIB, lambda total: (asked.append(total) or 32, fits))  # type: ignore[func-returns-value]
    words = (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 3 has a total capacity of {} of which 0 bytes is free."
    )
    told = gauge.shortage(torch.OutOfMemoryError(words.format("79.25 GiB")))
    assert told.startswith(f"the plan forecasts 90.0 GiB; {said}") and asked == [int(79.25 * GIB)]
    assert gauge.shortage(MemoryError()) == "the plan forecasts 90.0 GiB"  # how large its memory is nobody said


def test_a_rank_without_memory_ends_in_its_line_where_a_forecast_fails() -> None:
    assert Gauge(CPU, lambda: 1 // 0).shortage(MemoryError()) == ""
