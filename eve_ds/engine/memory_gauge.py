"""What the ranks hold at most, of a GPU's tensors or of resident memory, beside what the plan forecasts."""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eve_ds.engine.distributed import gather, rank_and_world
from eve_ds.rank_failure import capacity

Forecast = Callable[[], int]  # bytes of a rank; plan.forecast makes it, which this layer may not import
Fitting = Callable[[int], tuple[int, int]]
ABOVE = 1.1  # times the forecast: more is worth a warning
# Bytes above the forecast that mean nothing: kernels and workspaces of libraries, which are no tensors of the step.
SLACK = 256 * 2**20
LEAST_FREE = 0.05  # of the device's memory: less is worth a warning
LOWER = "a longer text may not fit: lower engine.micro_batch_size, or set --model.checkpoint_activations true"
_PROCESS = Path("/proc/self")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """Bytes of one rank.

    Attributes:
        peak: most that tensors held on a GPU; on a CPU, by how much resident memory grew since the `Gauge` was made.
        whole: most that torch reserved on a GPU; on a CPU, most that was resident, libraries included.
        free: of the device's memory, now; on a CPU, the host's, or less where a control group limits this process.
        total: the device's memory; on a CPU, the host's, or the limit.
    """

    peak: int
    whole: int
    free: int
    total: int


class Gauge:
    """Make it before the model is built.

    Args:
        device: this rank's.
        forecast: returns the bytes that a rank should hold at most. It is called on rank 0 alone, or on a rank that
            runs out of memory.
        fitting: bytes of a GPU -> (micro-batch of the run, the largest one up to it that fits, by the forecast).

    Attributes:
        snapshot: file that tells what held the memory when it ran out; None where none was written.
    """

    def __init__(self, device: torch.device, forecast: Forecast, fitting: Fitting | None = None) -> None:
        self.device, self.forecast, self.fitting = device, forecast, fitting
        self.snapshot: Path | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):  # where that is forbidden, an earlier peak counts, too
            (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # the peak starts anew (proc(5))
        self._before = _read(_PROCESS / "status", "VmRSS")

    def read(self) -> Held:
        """What was held at most since this gauge was made."""
        if self.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            peak, reserved = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            return Held(peak, reserved, free, total)
        whole = _read(_PROCESS / "status", "VmHWM")
        return Held(max(whole - self._before, 0), whole, *host_memory())

    def report(self, plenty: float = 1.0) -> tuple[str, list[str]] | None:
        """(a line, warnings) on rank 0, None elsewhere. Called by all ranks.

        Args:
            plenty: share of the memory. Where more is free on all ranks, no forecast is made.
        """
        held = gather(self.read())
        if rank_and_world()[0] != 0:
            return None
        scarce = any(each.free <= plenty * each.total for each in held)
        return told(held, self.device.type == "cuda", self._forecast_or_none() if scarce else None)

    def shortage(self, error: BaseException) -> str:
        """What is known of ``error``, by which this rank ran out of memory: forecast, what fits, and the snapshot."""
        said = []
        try:
            said.append(f"the plan forecasts {size(self.forecast())}")
            total = capacity(error) or (self.read().total if self.device.type == "cuda" else None)
            if self.fitting and total:
                said.append(_room(*self.fitting(total)))
        except Exception as failure:  # noqa: BLE001  code of others runs in it, and the host may lack memory for it, too
            _log.debug("no forecast of the memory: %s: %s", type(failure).__name__, failure)
        if self.snapshot:
            said.append(f"what held the memory is in {self.snapshot}")
        return "; ".join(said)

    def _forecast_or_none(self) -> int | None:
        """None, with a warning, where there is no forecast: a task of the user's own may lack what the plan asks of it,
        and nobody's training ends for a forecast."""
        try:
            return self.forecast()
        except Exception as error:  # noqa: BLE001  code of others runs in it
            _log.warning("no forecast of the memory: %s: %s", type(error).__name__, error)
            return None


def host_memory() -> tuple[int, int]:
    """(free, total) bytes of the host's memory, or of the control group above this process that leaves less free."""
    host = Path("/proc/meminfo")
    return min([(_read(host, "MemAvailable"), _read(host, "MemTotal")), *control_groups()])


def _read(file: Path, name: str) -> int:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def control_groups(process: Path = _PROCESS, mount: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """(bytes that are free, limit) of each control group above this process that limits its memory.

    Containers and Slurm's jobs have such limits. Version 2 alone (``memory.max``, ``memory.current``); what the kernel
    can drop of the cached files counts as free, as in the host's ``MemAvailable``.
    """
    lines = (process / "cgroup").read_text(encoding="utf-8").splitlines() if (process / "cgroup").is_file() else []
    own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    found = []
    for group in (mount / own, *(mount / own).parents) if own is not None else ():
        with contextlib.suppress(OSError, ValueError):  # no such file: the root of the tree; "max": no limit
            limit = int((group / "memory.max").read_text(encoding="ascii"))
            used = int((group / "memory.current").read_text(encoding="ascii"))
            cached = re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(encoding="ascii"), re.M)
            found.append((max(0, limit - used + (int(cached[1]) if cached else 0)), limit))
    return found


def told(found: Sequence[Held], on_gpu: bool, forecast: int | None) -> tuple[str, list[str]]:
    """(a line, warnings) on what the ranks hold.

    Args:
        found: of each rank, in rank order.
        on_gpu: whether the ranks run on GPUs.
        forecast: bytes by the plan; None where there is none.
    """
    fullest = max(range(len(found)), key=lambda rank: found[rank].peak)
    held, tightest = found[fullest], min(found, key=lambda each: each.free / each.total)
    what = "of tensors" if on_gpu else "beyond what was resident before the model was built"
    whole = "reserved by torch" if on_gpu else "resident in all"
    free = tightest.free / tightest.total
    line = f"at most {size(held.peak)} {what} (rank {fullest}), {size(max(each.whole for each in found))} {whole}; "
    line += "no forecast" if forecast is None else f"the plan forecasts {size(forecast)}"
    warnings = []
    if forecast is not None and held.peak > max(ABOVE * forecast, forecast + SLACK):
        kept = "" if on_gpu else "freed memory that glibc keeps, "
        warnings.append(
            f"memory: {size(held.peak)} are {held.peak / forecast - 1:.0%} more than the plan forecasts: experts that "
            f"are loaded unevenly, the loading of a checkpoint, callbacks of your own, {kept}or an error of the plan"
        )
    if free < LEAST_FREE:
        warnings.append(f"memory: {free:.1%} of the {'GPU' if on_gpu else 'host'}'s memory is free; {LOWER}")
    return f"{line}; {free:.0%} of {size(tightest.total)} free", warnings


def _room(rows: int, most: int) -> str:
    if most == rows:
        return (
            f"by it engine.micro_batch_size={rows} fits: experts that are loaded unevenly, other processes on the GPU, "
            "fragments (PYTORCH_ALLOC_CONF=expandable_segments:True) or an error of the plan"
        )
    return f"of engine.micro_batch_size={rows} " + (f"{most} fits" if most else "not even 1 fits")


def size(count: int) -> str:
    """``1.50 GiB``, ``12.0 GiB`` or ``310 MiB``."""
    if count < 2**30:
        return f"{count / 2**20:.0f} MiB"
    return f"{count / 2**30:.2f} GiB" if count < 10 * 2**30 else f"{count / 2**30:.1f} GiB"
