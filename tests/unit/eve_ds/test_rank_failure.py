"""What a rank says of errors of GPUs, NCCL, gloo and the store, in their own words, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from eve_ds import rank_failure
from eve_ds.environment import prepare_nccl
from eve_ds.errors import exit_code

BACKEND, NETWORK, STORE = dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError
NO_MEMORY = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 14.31 MiB is "
    "free. Process 2493055 has 12.02 GiB memory in use. Including non-PyTorch memory, this process has 67.05 GiB "
    "memory in use. Of the allocated memory 66.11 GiB is allocated by PyTorch, and 411.48 MiB is reserved by "
    "PyTorch but unallocated."
)
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:3763, {}, NCCL version 2.28.8\n{}\n"
    "Last error:\n{}\n"
)
INTERNAL = "ncclInternalError: Internal check failed."
SYSTEM = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error."
REMOTE = "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely."
USAGE = "ncclInvalidUsage: This usually reflects invalid usage of NCCL library."
UNHANDLED = "ncclUnhandledCudaError: Call to CUDA function failed."
MORE = "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be"
LATE = (
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=3, OpType=ALLREDUCE, NumelIn=1, "
    "NumelOut=1, Timeout(ms)=900000) ran for 900055 milliseconds before timing out."
)


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eve_ds.errors.time.sleep", lambda _: None)
    monkeypatch.setattr(rank_failure, "_place", "node7, GPU 3, GPU-8f2e")
    monkeypatch.setenv("RANK", "11")


def ended(error: Exception, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    def main() -> None:
        raise error

    return exit_code(main), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "what", "advice"),
    [
        (
            torch.OutOfMemoryError(NO_MEMORY),
            "CUDA out of memory. Tried to allocate 20.00 MiB on a GPU of 79.11 GiB, of which 14.31 MiB is free",
            "lower engine.micro_batch_size",
        ),
        (torch.AcceleratorError(f"CUDA error: out of memory{MORE}"), "CUDA error: out of memory", "eve_ds.plan"),
        (RuntimeError("CUDA driver error: out of memory"), "CUDA driver error: out of memory", "eve_ds.plan"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "Triton Error [CUDA]: out of memory", "eve_ds.plan"),
        (
            BACKEND(NCCL.format("unhandled cuda error", UNHANDLED, "Cuda failure 2 'out of memory'")),
            "Cuda failure 2 'out of memory'",
            "eve_ds.plan",
        ),
        (
            RuntimeError("unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)"),
            "unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)",
            "eve_ds.plan",
        ),
        (
            torch.AcceleratorError(f"CUDA error: uncorrectable ECC error encountered{MORE}"),
            "CUDA error: uncorrectable ECC error encountered",
            "drain the node",
        ),
        (
            torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{MORE}"),
            "CUDA error: an illegal memory access was encountered",
            "CUDA_LAUNCH_BLOCKING=1",
        ),
        (
            BACKEND(
                NCCL.format("unhandled cuda error", UNHANDLED, "Cuda failure 700 'an illegal memory access was e'")
            ),
            "Cuda failure 700 'an illegal memory access was e'",
            "CUDA_LAUNCH_BLOCKING=1",
        ),
        (
            RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
            "Triton Error [CUDA]: device-side assert triggered",
            "CUDA_LAUNCH_BLOCKING=1",
        ),
        (RuntimeError("No CUDA GPUs are available"), "No CUDA GPUs are available", "nvidia-smi"),
        (
            RuntimeError("CUDA unknown error - this may be due to an incorrectly set up environment"),
            "CUDA unknown error - this may be due to an incorrectly set up environment",
            "nvidia-smi",
        ),
        (
            torch.AcceleratorError("CUDA error: no CUDA-capable device is detected"),
            "CUDA error: no CUDA-capable device is detected",
            "nvidia-smi",
        ),
        (
            BACKEND(
                NCCL.format("unhandled system error", SYSTEM, "Error while creating shared memory segment /dev/shm/n")
            ),
            "ncclSystemError: Error while creating shared memory segment /dev/shm/n",
            "eve_ds.doctor",
        ),
        (
            BACKEND(
                NCCL.format("invalid usage", USAGE, "Duplicate GPU detected : rank 0 and rank 1 both on device 61000")
            ),
            "ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on device 61000",
            "NCCL_DEBUG=WARN",
        ),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_fails_on_this_rank_is_told_in_a_line(
    error: Exception, what: str, advice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = ended(error, capsys)
    assert code == 2 and said.startswith(f"error: rank 11: {what} (on node7, GPU 3, GPU-8f2e); ")
    assert advice in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            BACKEND(NCCL.format("remote process exited or there was a network error", REMOTE, "socketProgress")),
            "has ended",
        ),
        (
            BACKEND(NCCL.format("internal error", INTERNAL, "Net : Connection closed by remote peer h<50260>")),
            "has ended",
        ),
        (BACKEND("NCCL communicator was aborted on rank 0. "), "has ended"),
        (NETWORK("failed to recv, got 0 bytes"), "has ended"),
        (NETWORK("Connection reset by peer"), "has ended"),
        (RuntimeError("[..] Connection closed by peer [127.0.0.1]:1"), "has ended"),
        (BACKEND(LATE), "does not answer"),
        (STORE("wait timeout after 900000ms, keys: /default_pg/0//cuda//barrier"), "does not answer"),
    ],
)
def test_another_rank_that_is_gone_or_late_is_told_in_a_line(
    error: Exception, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = ended(error, capsys)
    assert code == 3 and line.startswith(f"rank 11: another rank {said}")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    "bug",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx(...)`"),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("an unknown error of ours"),
        RuntimeError("unknown error in a parser"),
        BACKEND("Default process group is not initialized"),
    ],
)
def test_a_bug_stays_one(bug: RuntimeError, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(bug)):
        ended(bug, capsys)


def test_the_capacity_of_a_gpu() -> None:
    assert rank_failure.capacity(RuntimeError(NO_MEMORY)) == int(79.11 * 2**30)
    assert rank_failure.capacity(RuntimeError(NO_MEMORY.replace("79.11 GiB", "512.00 MiB"))) == 2**29
    assert rank_failure.capacity(MemoryError()) is None


LEAVES = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from eve_ds.engine import distributed, watchdog
from eve_ds.errors import RankError
from preprocessing.errors import UserError

def fail(run, backend, error):
    try:
        with distributed.joined():
            watchdog.start(run, 0, 1, 60)
            dist.get_backend = lambda *_: backend
            raise {"alone": RankError, "everywhere": UserError, "bug": KeyError}[error]("a failure")
    except (UserError, KeyError):
        word = run / watchdog.FOLDER / watchdog.ASKED
        left = word.is_file() and "rank 0 on" in word.read_text()
        (run / "found.json").write_text(json.dumps([dist.is_initialized(), left]))

for case in sys.argv[2:]:  # one import for all
    run = Path(sys.argv[1], case)
    run.mkdir()
    child = os.fork()
    if not child:
        fail(run, *case.split("-"))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, case
"""


def test_a_rank_that_fails_does_not_wait_in_nccls_group_and_leaves_word(tmp_path: Path) -> None:
    stays_and_leaves_word = {
        "nccl-alone": [True, True],
        "nccl-bug": [True, True],
        "nccl-everywhere": [True, False],  # the others know, and may have more to do
        "gloo-alone": [False, False],
    }
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    command = [sys.executable, "-c", LEAVES, str(tmp_path), *stays_and_leaves_word]
    left = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert left.returncode == 0, left.stderr
    found = {case: json.loads((tmp_path / case / "found.json").read_text()) for case in stays_and_leaves_word}
    assert found == stays_and_leaves_word


def test_nccl_leaves_the_end_of_a_run_to_us_and_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1"})
    prepare_nccl(900.5)
    assert os.environ == {
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "901",
        "TORCH_NCCL_RETHROW_CUDA_ERRORS": "0",
        "TORCH_NCCL_LOG_CPP_STACK_ON_UNCLEAN_SHUTDOWN": "0",
    }
