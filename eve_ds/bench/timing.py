"""How long something takes, and how much memory it needs on top of what is there."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Candidate:
    """Something to be timed.

    Args:
        run: what is timed.
        prepare: called before every run, outside the time.
    """

    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None


def add_timing_options(parser: ArgumentParser, repeats: int = 7, warmup: int = 2) -> None:
    parser.add_argument("--repeats", type=PositiveInt, default=repeats, help="timed runs; the median is reported")
    parser.add_argument("--warmup", type=NonNegativeInt, default=warmup, help="runs before them that are not timed")
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda, cuda:1 ...")


def in_turn(
    candidates: Mapping[str, Candidate], device: torch.device, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Time the candidates in turn, one run each a round, so that what slows the machine for a while slows all of them.

    On a GPU between two events on its stream, after it has finished what came before; else by the wall clock.

    Returns:
        milliseconds of each timed run, by name.
    """
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + repeats):
        for name, candidate in candidates.items():
            candidate.prepare()
            ms = milliseconds(candidate.run, device)
            if turn >= warmup:
                taken[name].append(ms)
    return taken


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in taken.items()}


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of one run."""
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    torch.cuda.synchronize(device)
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return float(start.elapsed_time(end))


def extra_bytes(candidate: Candidate, gradients: Callable[[], Iterable[Tensor]], device: torch.device) -> int:
    """Peak memory of one run, in bytes, beyond what was there before it and the gradients that it leaves.

    On the CPU every allocation and release of torch's allocator is recorded by its profiler, those inside an operation
    too, and the largest sum of what lives at once is taken; blocks that end up as gradients never count. The process's
    resident memory would not do: what an earlier run has freed and the C library keeps is used again unseen, so the
    figure would depend on what ran before. Not seen is the scratch space that oneDNN takes by itself inside a product
    (little: with every block returned to the system at once, the resident peak was within 4 % for our layer).
    On a GPU it is the allocator's own peak, less what was there and the gradients.

    Args:
        gradients: the gradients after the run; they must be None before it (``candidate.prepare``).
    """
    candidate.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        candidate.run()
        torch.cuda.synchronize(device)
        kept = sum(tensor.untyped_storage().nbytes() for tensor in gradients())
        return torch.cuda.max_memory_allocated(device) - before - kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        candidate.run()
    kept_blocks = {tensor.untyped_storage().data_ptr() for tensor in gradients()}
    return _peak(_allocations(profiler), kept_blocks)


def _allocations(profiler: profile) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation on the CPU in order of time; negative bytes are a release."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    memory.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in memory]


def _peak(allocations: list[tuple[int, int]], kept_blocks: set[int]) -> int:
    """Largest sum of live blocks. The last block at an address in ``kept_blocks`` never counts."""
    kept = {address: place for place, (address, size) in enumerate(allocations) if size > 0 and address in kept_blocks}
    live: dict[int, int] = {}
    total = peak = 0
    for place, (address, size) in enumerate(allocations):
        if size < 0:
            total -= live.pop(address, 0)
        elif kept.get(address) != place:
            live[address] = size
            total += size
            peak = max(peak, total)
    return peak
