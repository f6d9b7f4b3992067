"""Measure time and additional memory of a function."""

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
    """A function to be timed.

    Args:
        run: the timed function.
        prepare: called before every run, not timed.
    """

    run: Callable[[], object]
    prepare: Callable[[], None] = lambda: None


def add_timing_options(parser: ArgumentParser, repeats: int = 7, warmup: int = 2) -> None:
    parser.add_argument("--repeats", type=PositiveInt, default=repeats, help="timed runs; the median is reported")
    parser.add_argument("--warmup", type=NonNegativeInt, default=warmup, help="untimed runs before them")
    parser.add_argument("--device", default="auto", help="auto (the GPU if there is one), cpu, cuda, cuda:1 ...")


def in_turn(
    candidates: Mapping[str, Candidate], device: torch.device, repeats: int, warmup: int
) -> dict[str, list[float]]:
    """Time the candidates alternately, one run each per round, so that a slowdown of the machine affects all of them.

    GPU times are taken between two CUDA events, after a synchronization; CPU times by the wall clock.

    Returns:
        {name: milliseconds of each timed run}.
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


def fits(candidate: Candidate, device: torch.device) -> bool:
    """Whether a run fits in a GPU's memory; on the CPU it is taken to. Masks of tokens x experts x capacity, as
    DeepSpeed's and einsum's layers have, grow with the square of the tokens."""
    if device.type != "cuda":
        return True
    candidate.prepare()
    fitted = True
    try:
        candidate.run()
    except torch.OutOfMemoryError:
        fitted = False
    candidate.prepare()
    torch.cuda.empty_cache()
    return fitted


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one run."""
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
    """Peak memory of one run, bytes, beyond the memory in use before it and without the resulting gradients.

    On the CPU, torch's profiler records every allocation and release of torch's allocator, including those inside of an
    operation; the result is the largest sum of live blocks, without blocks that become gradients. Resident memory is
    not usable: the C library reuses blocks that earlier runs have freed, so the figure would depend on these runs. The
    scratch memory that oneDNN allocates itself inside of a product is not included (it is small: the resident peak,
    with every block returned to the system at once, was within 4 % for our layer). On a GPU it is the peak of the
    allocator, minus the memory in use before and the gradients.

    Args:
        gradients: returns the gradients after the run; ``candidate.prepare`` must set them to None.
    """
    candidate.prepare()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        candidate.run()
        torch.cuda.synchronize(device)
        gradient_bytes = sum(tensor.untyped_storage().nbytes() for tensor in gradients())
        return torch.cuda.max_memory_allocated(device) - before - gradient_bytes
    # acc_events: else torch 2.11 warns.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        candidate.run()
    gradient_blocks = {tensor.untyped_storage().data_ptr() for tensor in gradients()}
    return _peak(_allocations(profiler), gradient_blocks)


def _allocations(profiler: profile) -> list[tuple[int, int]]:
    """(address, bytes) of each allocation on the CPU, in order of time; a release has negative bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    memory = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    memory.sort(key=lambda event: event["ts"])
    return [(event["args"]["Addr"], event["args"]["Bytes"]) for event in memory]


def _peak(allocations: list[tuple[int, int]], excluded: set[int]) -> int:
    """Largest sum of live blocks, bytes, without the last block at each address in ``excluded``."""
    last = {address: index for index, (address, size) in enumerate(allocations) if size > 0 and address in excluded}
    live: dict[int, int] = {}
    total = peak = 0
    for index, (address, size) in enumerate(allocations):
        if size < 0:
            total -= live.pop(address, 0)
        elif last.get(address) != index:
            live[address] = size
            total += size
            peak = max(peak, total)
    return peak
