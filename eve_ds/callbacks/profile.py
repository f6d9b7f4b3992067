"""A torch.profiler trace of a few steps, per rank, and where rank 0's time went by kind of operation."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from eve_ds.callbacks.memory_check import FOLDER
from eve_ds.engine.callback import Callback
from eve_ds.engine.watchdog import mark
from preprocessing.local_files import write_text

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

WAITING, OTHER = "waiting for data", "other (Python, copies to the device, idle)"
# A kind's operations by name; the first that fits an operation or one that it is part of.
KINDS = {
    "collectives": re.compile(r"c10d::|gloo:|nccl:|record_param_comms|_AllToAll|_GatherRows"),
    "optimizer": re.compile(r"Optimizer\.step#|_fused_adam"),
    # bmm: the products of plain attention (model/block.py), which nothing else takes.
    "attention": re.compile(
        r"scaled_dot_product|(flash|efficient|cudnn)_attention|aten::_?softmax|aten::(baddbmm|bmm)\b"
    ),
    "matrix products": re.compile(
        r"aten::(mm|addmm|addmv|mv|linear|_?grouped_mm|_scaled_mm|_addmm_activation|conv\w*)\b"
    ),
    "norms, elementwise, copies": re.compile(r"aten::"),
}
_log = logging.getLogger(__name__)


@dataclass
class Spent:
    """Of one kind of operation.

    Attributes:
        seconds: in operations of this kind alone, without those of other kinds that they call.
        calls: how many there were.
    """

    seconds: float = 0.0
    calls: int = 0


class Profile(Callback):
    """Traces steps into ``output_dir/profile/rank_N.json.gz``, for https://ui.perfetto.dev, and sums up rank 0's.

    The trace ends early where the run does. A run that resumes within the steps traces the rest of them.

    Args:
        steps: to trace, counted from 1, a range without gaps.
    """

    def __init__(self, steps: range) -> None:
        self.steps = steps
        self._profile: Any = None
        self._began = self._waited = 0.0
        self._waits = self._first = 0

    def fit_start(self, trainer: Trainer) -> None:
        if self.steps[-1] <= trainer.start_step and trainer.is_main:
            _log.info("logging.profile: the run goes on from step %d, so nothing is traced", trainer.start_step)

    def step_start(self, trainer: Trainer) -> None:
        if self._profile is None and trainer.step + 1 in self.steps:
            gpu = [ProfilerActivity.CUDA] if trainer.device.type == "cuda" else []
            self._first, self._waited, self._waits = trainer.step + 1, 0.0, 0
            # Of one cycle there is nothing to accumulate; but without it torch 2.11 warns that it does not.
            self._profile = profile(activities=[ProfilerActivity.CPU, *gpu], acc_events=True)
            self._profile.start()
            self._began = time.perf_counter()

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        if self._profile is None:
            return
        self._waited += record["data/wait_fraction"] * record["step_seconds"]
        self._waits += trainer.accumulation_steps
        if trainer.step == self.steps[-1]:
            self._write(trainer)

    def fit_end(self, trainer: Trainer) -> None:
        if self._profile is not None:
            self._write(trainer)

    def close(self, trainer: Trainer) -> None:
        if self._profile is not None:  # the training failed
            self._profile.stop()
            self._profile = None

    def _write(self, trainer: Trainer) -> None:
        """Write the trace and the summary. A full disk is a warning: nobody's training ends for a trace."""
        wall = time.perf_counter() - self._began
        mark("the trace of the profiler")
        found, self._profile = self._profile, None
        found.stop()
        folder = trainer.output_dir / FOLDER
        try:
            folder.mkdir(exist_ok=True)
            found.export_chrome_trace(str(folder / f"rank_{trainer.rank}.json.gz"))
            if not trainer.is_main:
                return
            spent = by_kind(found.events(), trainer.device.type == "cuda", wall, Spent(self._waited, self._waits))
            text = summary(spent, self._first, trainer.step)
            write_text(folder / "summary.txt", f"{text}\n")
        except OSError as error:
            _log.warning("%s: no trace of this rank: %s", folder, error.strerror)
            return
        for line in text.splitlines():
            _log.info("%s", line)


def by_kind(events: Iterable[Any], on_gpu: bool, wall: float, waiting: Spent) -> dict[str, Spent]:
    """Where ``wall`` seconds went, by kind. What no operation accounts for is ``OTHER``.

    Args:
        events: of ``torch.profiler``. On a GPU the time of their kernels counts, else that of the thread that computes.
        on_gpu: which of the two.
        wall: seconds.
        waiting: for data, which is no operation.
    """
    found = [event for event in events if event.device_type == DeviceType.CPU]
    if not on_gpu:  # not the loader's thread, nor gloo's, whose end the computing thread waits for
        busy: dict[int, float] = {}
        for event in found:
            busy[event.thread] = busy.get(event.thread, 0.0) + event.self_cpu_time_total
        found = [event for event in found if event.thread == max(busy, key=lambda thread: busy[thread])]
    spent = {kind: Spent() for kind in (*KINDS, WAITING, OTHER)}
    spent[WAITING] = waiting
    for event in found:
        kind, above = _kind(event), event.cpu_parent
        spent[kind].seconds += (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        spent[kind].calls += above is None or _kind(above) != kind  # aten::to calls aten::copy_: one call
    told = sum(one.seconds for one in spent.values())
    spent[OTHER].seconds += max(wall - told, 0.0)
    return spent


def _kind(event: Any) -> str:
    """That of an operation or of the nearest one above it that has a kind of its own, as the optimizer's steps have."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    for kind, pattern in KINDS.items():
        if any(pattern.search(name) for name in names):
            return kind
    return OTHER


def summary(spent: dict[str, Spent], first: int, last: int) -> str:
    """The shares as a table, the greatest first."""
    total = sum(one.seconds for one in spent.values())
    lines = [f"profile: steps {first} to {last} of rank 0, {total:.3g} s"]
    lines += [
        f"  {kind:44} {one.seconds / total:6.1%} {one.seconds:10.3f} s {one.calls:9} calls"
        for kind, one in sorted(spent.items(), key=lambda item: -item[1].seconds)
    ]
    return "\n".join(lines)
