"""Speed in detail: tokens, operations and their share of the peak, memory, step times, and which rank is slow."""

from __future__ import annotations

import logging
import resource
import socket
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from eve_ds.engine.callback import Callback
from eve_ds.engine.distributed import gather
from eve_ds.model.backbone import BackboneOutput
from eve_ds.model.compiled import run_plainly
from eve_ds.model.flops import flop_counter

if TYPE_CHECKING:
    from eve_ds.engine.trainer import Trainer

# Dense bf16 TFLOP/s (V100: fp16) by a part of the device's name, the first that fits: NVIDIA's data sheets of the V100,
# A100, H100 and H200, half of what they give with sparsity.
PEAK_TFLOPS = {
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "V100": 125.0,
}
BACKWARD = 3.0  # forward and backward over forward: each product has two in the backward pass
SLOW = 1.2  # a rank's own time over the ranks' median, from which it is slow
LEAST_LAG = 0.01  # seconds: what a rank of a tiny model is behind is noise
PERSISTENT = 2  # records in a row
GIB = 2**30
_log = logging.getLogger(__name__)


class Performance(Callback):
    """Adds ``perf/...`` to the record of every ``every``-th step: over the steps since the last one, on all ranks.

    In synchronous training all ranks' steps take as long as the slowest one's, so a rank's own time is measured beside
    it: that of the blocks before the first expert layer, in which no rank waits for another (but for ZeRO 3's gathers).
    Operations are counted in the forward pass of the first micro-batch of this process, times three; on the CPU they
    include the rows that pad an expert's.

    Args:
        every: steps.
        peak_tflops: of one device; None takes that of `PEAK_TFLOPS`.
    """

    def __init__(self, every: int, peak_tflops: float | None = None) -> None:
        self.every, self.peak_tflops = every, peak_tflops
        self._hooks: list[Any] = []
        self._counter: FlopCounterMode | None = None
        self._flops: float | None = None  # of a micro-batch
        self._began: Any = None  # when the forward pass that runs began
        self._slow = (-1, 0)  # the slowest rank of the last record if it was slow, and of how many records in a row

    def fit_start(self, trainer: Trainer) -> None:
        task, layers = trainer.task, trainer.task.backbone.moe_layers()
        self._on_gpu = trainer.device.type == "cuda"
        self._clear(trainer)
        self._hooks = [
            task.register_forward_pre_hook(self._forward_begins),
            task.register_forward_hook(self._forward_ends),
            (layers[0] if layers else task.backbone.norm).register_forward_pre_hook(self._own_work_ends),
            task.backbone.register_forward_hook(self._count_tokens, with_kwargs=True),
        ]

    def step_end(self, trainer: Trainer, record: dict[str, float]) -> None:
        """A collective at every ``every``-th step."""
        self._steps.append(record["step_seconds"])
        if trainer.step % self.every:
            return
        ranks = gather(self._mine(trainer))
        micro_batches = len(self._steps) * trainer.accumulation_steps
        record |= interval_metrics(ranks, micro_batches, self._peak(trainer))
        self._name_the_slow(trainer, ranks)
        self._clear(trainer)

    def close(self, trainer: Trainer) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        run_plainly(False)

    def _clear(self, trainer: Trainer) -> None:
        self._steps: list[float] = []
        self._own: list[Any] = []  # seconds, or pairs of CUDA events, a micro-batch each
        self._tokens = torch.zeros(2, dtype=torch.float64, device=trainer.device)  # real ones, padding

    def _mine(self, trainer: Trainer) -> dict[str, Any]:
        """What the other ranks have to know of this one."""
        memory = {"cpu_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}
        if self._on_gpu:
            torch.cuda.synchronize(trainer.device)
            memory["gpu_allocated_gib"] = torch.cuda.max_memory_allocated(trainer.device) / GIB
            memory["gpu_reserved_gib"] = torch.cuda.max_memory_reserved(trainer.device) / GIB
        own = [began.elapsed_time(ended) / 1000 for began, ended in self._own] if self._on_gpu else self._own
        return {
            "host": socket.gethostname(),
            "steps": self._steps,
            "own": statistics.median(own) if own else 0.0,
            "tokens": self._tokens.tolist(),
            "flops": self._flops,
            "memory": memory,
        }

    def _peak(self, trainer: Trainer) -> float | None:
        """TFLOP/s of this rank's device, if known; the table's are those of 16-bit products."""
        if self.peak_tflops is not None or not self._on_gpu or trainer.config.engine.precision == "fp32":
            return self.peak_tflops
        return peak_of(torch.cuda.get_device_name(trainer.device))

    def _name_the_slow(self, trainer: Trainer, ranks: list[dict[str, Any]]) -> None:
        """Warn of the rank that was the slowest by far in `PERSISTENT` records in a row, once."""
        own = [each["own"] for each in ranks]
        slowest = max(range(len(own)), key=own.__getitem__)
        median = statistics.median_low(own)  # of two ranks the faster one
        if own[slowest] <= max(SLOW * median, median + LEAST_LAG):
            self._slow = (-1, 0)
            return
        self._slow = (slowest, self._slow[1] + 1 if self._slow[0] == slowest else 1)
        if self._slow[1] == PERSISTENT and trainer.is_main:
            _log.warning(
                "rank %d on %s is slow, at step %d again: its own part of a micro-batch took %.3g s, the ranks' median "
                "%.3g s",
                slowest,
                ranks[slowest]["host"],
                trainer.step,
                own[slowest],
                median,
            )

    def _forward_begins(self, task: torch.nn.Module, inputs: Any) -> None:
        if not task.training:
            return
        self._began = self._now()
        run_plainly(self._flops is None)  # also in this micro-batch's backward pass
        if self._flops is None:
            self._counter = flop_counter()
            self._counter.__enter__()

    def _forward_ends(self, *_: Any) -> None:
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self._flops = BACKWARD * self._counter.get_total_flops()
            self._counter, self._began = None, None

    def _own_work_ends(self, *_: Any) -> None:
        """In each forward pass, at the first call alone, and not while operations are counted."""
        if self._began is not None and self._counter is None:
            ended = self._now()
            self._own.append((self._began, ended) if self._on_gpu else ended - self._began)
        self._began = None

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @torch.no_grad()
    def _count_tokens(
        self,
        backbone: torch.nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: BackboneOutput | list[BackboneOutput],
    ) -> None:
        if not backbone.training:
            return
        masks = args[2::5] if len(args) > 2 else [kwargs.get("text_mask")]  # of several passes, each has five arguments
        for text_mask, one in zip(masks, output if isinstance(output, list) else [output], strict=True):
            rows, tokens = one.hidden.shape[:2]
            self._tokens[0] += rows * tokens
            if text_mask is not None:
                padding = (text_mask == 0).sum()
                self._tokens += torch.stack([-padding, padding])


def peak_of(name: str) -> float | None:
    """The dense peak of a GPU by its name, TFLOP/s; None if it is unknown."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def interval_metrics(ranks: list[dict[str, Any]], micro_batches: int, peak_tflops: float | None) -> dict[str, float]:
    """The scalars of an interval.

    Args:
        ranks: what each rank found, see ``Performance._mine``.
        micro_batches: of each rank in the interval.
        peak_tflops: of one device.
    """
    seconds = max(sum(each["steps"]) for each in ranks)
    real, padding = (sum(each["tokens"][place] for each in ranks) for place in (0, 1))
    own = [each["own"] for each in ranks]
    found = {
        "perf/tokens_per_second": real / seconds,
        "perf/padding_share": padding / max(real + padding, 1.0),
        "perf/step_seconds_p50": statistics.median(value for each in ranks for value in each["steps"]),
        "perf/step_seconds_max": max(value for each in ranks for value in each["steps"]),
        "perf/own_seconds_p50": statistics.median(own),
        "perf/own_seconds_max": max(own),
        "perf/slowest_rank": own.index(max(own)),
    }
    flops = [each["flops"] for each in ranks if each["flops"] is not None]
    if flops:
        found["perf/tflops_per_device"] = statistics.fmean(flops) * micro_batches / seconds / 1e12
        if peak_tflops:
            found["perf/mfu"] = found["perf/tflops_per_device"] / peak_tflops
    return found | {f"perf/{name}": max(each["memory"][name] for each in ranks) for name in ranks[0]["memory"]}
