"""Why a rank cannot go on, read from what torch, CUDA, NCCL, gloo and the system raise: in a line, with what to do.

Imports neither torch nor anything that does: every command ends through it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from eve_ds.data.worker import explain_worker_death
from eve_ds.environment import launched_rank
from preprocessing.errors import printable

# What gloo (gloo/transport/tcp/pair.cc), NCCL (ncclGetErrorString) and the rendezvous store raise when a rank has left.
_LOST_RANK = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Broken pipe|Gloo connectFullMesh failed|ncclRemoteError|"
    r"remote process exited|NCCL communicator was aborted|Connection was likely closed|failed to recv, got 0 bytes"
)
# What they raise when a collective times out.
_LATE_RANK = re.compile(
    r"Timed out waiting \d+ms|wait timeout after \d+ms|[Tt]imed out after \d+ ?(ms|seconds)|"
    r"Watchdog caught collective operation timeout"
)
# What torch, CUDA and the system raise when memory runs out, or for an impossible size.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator: |(CUDA|HIP)( driver)?( error:)? out of memory|Triton Error \[CUDA\]: out of memory|"
    r"Cuda failure 2 |CUBLAS_STATUS_ALLOC_FAILED|"
    r"Cannot allocate memory|Storage size calculation overflowed"
)
_LESS_MEMORY = (
    "of a run, make the model, the batch or a rank's share smaller: lower engine.micro_batch_size, or set "
    "--model.checkpoint_activations true, ZeRO stage 3 or offload (--deepspeed_config zero3, zero2_offload); python -m "
    "eve_ds.plan tells what fits; of eve_ds.predict, lower --batch_size or --image_size"
)
# The words of torch's OutOfMemoryError (c10/cuda/CUDACachingAllocator.cpp).
_CAPACITY = re.compile(r"^(.*?)\.? GPU \d+ has a total capac?ity of ([\d.]+) (\w+) of which (.+?) is free")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
# Errors of CUDA after which a process can use its GPU no more, in the words of cudaGetErrorString, and what to do.
_FAULTY = (
    "the GPU is faulty: take its host out (drain the node) and have the GPU reset or replaced; nvidia-smi -q -d ECC "
    "counts such errors; on other hosts the same command goes on from the last checkpoint"
)
_SILENT = (
    "the GPU or its driver does not answer: nvidia-smi and dmesg (Xid) on that host say more; if it comes again, take "
    "the host out (drain the node)"
)
_KERNEL = (
    "a wrong access in a kernel, or a faulty GPU: dmesg (Xid) on that host tells a faulty one; on a sound one the same "
    "command with CUDA_LAUNCH_BLOCKING=1 names the kernel"
)
_GPU_FAULTS = (
    (r"uncorrectable (ECC|NVLink) error", _FAULTY),
    (r"fallen off the bus|GPU is lost|unknown error|busy or unavailable|system not yet initialized", _SILENT),
    (r"no CUDA-capable device|No CUDA GPUs are available", _SILENT),
    (r"illegal memory access|misaligned address|illegal instruction|unspecified launch failure", _KERNEL),
    (r"device-side assert|invalid program counter|hardware stack error|launch timed out", _KERNEL),
)
_OF_CUDA = r"(?:(?:CUDA|HIP)(?: driver)?(?: error)?|Triton Error \[CUDA\]|Cuda failure|cuDNN error)\W[^\n]*?"
_FAULTS = [(re.compile(rf"{_OF_CUDA}(?:{words})[^\n]*|\A(?:{words})\Z"), advice) for words, advice in _GPU_FAULTS]
# "ncclSystemError: System call ... failed\nLast error:\n..." (torch/csrc/distributed/c10d/NCCLUtils.cpp).
_NCCL = re.compile(r"(nccl[A-Z]\w+): [^\n]*(?:\n+Last error:\n([^\n]+))?")
_MORE_OF_NCCL = (
    "NCCL_DEBUG=WARN tells more; python -m eve_ds.doctor on that host checks its GPUs and what is set for NCCL"
)

# Says more of a rank that runs out of memory, for its line: the forecast. Set where a run is trained.
tell_memory: Callable[[BaseException], str] | None = None
_place = ""


class Failure(NamedTuple):
    """Why this rank alone cannot go on, and what to do; as text one line that names the rank, its host and its GPU.

    Attributes:
        what: went wrong.
        advice: what to do; "" where ``what`` says it.
        memory: whether it ran out of memory.
        known: what else is known of it.
    """

    what: str
    advice: str = ""
    memory: bool = False
    known: str = ""

    def __str__(self) -> str:
        parts = [self.what + (f" (on {_place})" if _place else ""), self.known, self.advice]
        return f"rank {launched_rank()}: {'; '.join(filter(None, parts))}"


def set_place(text: str) -> None:
    """Name host and GPU of this rank in its failures, as in "node7, GPU 3, GPU-8f2e..."."""
    global _place
    _place = text


def own_failure(error: BaseException) -> Failure | None:
    """What went wrong on this rank: memory, its data loader, its GPU, NCCL. None for other errors and other ranks'."""
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    text = str(error)
    if message := _memory_error(error):
        return Failure(message, _LESS_MEMORY, memory=True)
    if death := explain_worker_death(error):
        return Failure(death)
    for pattern, advice in _FAULTS:
        if found := pattern.search(text):
            return Failure(printable(found[0]), advice)
    if is_lost_rank(error) or is_late_rank(error):
        return None
    if found := _NCCL.search(text):
        return Failure(printable(f"{found[1]}: {found[2]}" if found[2] else found[0]), _MORE_OF_NCCL)
    return None


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank has left."""
    return bool(_LOST_RANK.search(str(error)))


def is_late_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank did not come."""
    return bool(_LATE_RANK.search(str(error)))


def capacity(error: BaseException) -> int | None:
    """Bytes of the GPU whose memory ran out, if the error tells."""
    found = _CAPACITY.search(str(error))
    return int(float(found[2]) * _UNITS[found[3]]) if found and found[3] in _UNITS else None


def _memory_error(error: BaseException) -> str:
    """The part of an error's message that says that memory ran out; "" for other errors."""
    if isinstance(error, MemoryError):
        return printable(" ".join(str(error).split())) or "no memory is left"
    line = next((line for line in str(error).splitlines() if _NO_MEMORY.search(line)), "")
    if found := _CAPACITY.search(line):
        return printable(f"{found[1]} on a GPU of {found[2]} {found[3]}, of which {found[4]} is free")
    return printable(line.partition(". GPU ")[0].rpartition("Allocator: ")[2])
