"""Run a function as several ranks, each a fresh process, without a TCP port of ours: they meet through a file."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

GRACE_SECONDS = 0.3  # a failing rank breaks its peers: wait for the one that failed first to write its traceback


class RankFailedError(AssertionError):
    """A rank raised; the message holds its traceback."""


def run_distributed_test(
    fn: Callable[..., None],
    world_size: int,
    backend: str = "gloo",
    timeout: float = 240,
    args: Sequence[Any] = (),
) -> None:
    """Call ``fn(*args)`` on every rank of a new process group, one thread a rank.

    Args:
        fn: importable by its module and name (a top-level function); torch.distributed is initialized when it runs.
        world_size: ranks.
        backend: of torch.distributed.
        timeout: seconds until everything is killed.
        args: for ``fn``; sent to the processes.
    Raises:
        RankFailedError: with the traceback of the rank that failed first; the other ranks are killed.
        TimeoutError: the ranks did not end in time (a collective that not all of them reached, most often).
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        shared = (world_size, backend, timeout, folder, fn, tuple(args))
        ranks = [context.Process(target=_rank, args=(rank, *shared), daemon=True) for rank in range(world_size)]
        try:
            for process in ranks:
                process.start()
            _await(ranks, time.monotonic() + timeout, Path(folder))
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                if process.pid is not None:
                    process.join()


def _await(ranks: list[BaseProcess], deadline: float, folder: Path) -> None:
    running = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while running:
        ended = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            raise TimeoutError(f"ranks {sorted(running.values())} of {len(ranks)} did not end in time")
        for sentinel in ended:
            rank = running.pop(sentinel)
            ranks[rank].join()
            if ranks[rank].exitcode != 0:
                time.sleep(GRACE_SECONDS)
                raise RankFailedError(_first_failure(folder, rank, ranks[rank].exitcode))


def _first_failure(folder: Path, rank: int, exitcode: int | None) -> str:
    reports = sorted(folder.glob("failure-*.txt"))  # named by time
    if reports:
        return reports[0].read_text(encoding="utf-8")
    return f"rank {rank} ended with exit code {exitcode} and no traceback"


def _rank(
    rank: int,
    world_size: int,
    backend: str,
    timeout: float,
    folder: str,
    fn: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    import torch  # here: the variables above must stand first
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            backend,
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        fn(*args)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001  an assertion, SystemExit, anything: the parent must hear of it
        report = f"rank {rank} of {world_size}:\n{traceback.format_exc()}"
        Path(folder, f"failure-{time.time_ns()}-{rank}.txt").write_text(report, encoding="utf-8")
        # Not sys.exit: tearing down a broken process group can hang.
        os._exit(1)
    os._exit(0)  # a thread of gloo that lets go of a tensor while the interpreter is taken down aborts (errors.py)
