"""Start and end of the process group, for every launcher; one decision for all ranks, and one view of the folder that
they share.

On a network file system, a rank may see later what another rank has written. A path may also be a different folder on
each host. So rank 0 decides and broadcasts, and the other ranks wait until they see the same files.
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import secrets
import socket
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from eve_ds import environment, rank_failure
from eve_ds.engine import watchdog
from eve_ds.engine.determinism import be_deterministic
from eve_ds.environment import launched_rank, launcher_values, prepare_environment
from eve_ds.errors import RankError, StopError, finish_together
from preprocessing.errors import UserError
from preprocessing.local_files import write_text

LOCAL_RANK = "EVE_DS_LOCAL_RANK"  # the true local rank, since LOCAL_RANK has to hold the GPU's index for DeepSpeed
# torchrun's and deepspeed's, mpirun's, srun's. mpirun's come first: within a Slurm job its daemons have SLURM_* set.
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS")
LOCAL_RANKS = (LOCAL_RANK, "LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")

BACKSTOP_SECONDS = 60.0  # collectives time out at least so long after the watchdog, whose message says more
T = TypeVar("T")
_ONE_FOLDER = "all ranks need one folder, on a file system that their hosts share"
PATIENCE_SECONDS = 75.0  # NFS clients cache a folder's attributes for up to 60 s (acdirmax)


def launched_world() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher set them; (0, 1, 0) without a launcher."""
    world_size = next(iter(launcher_values(WORLD_SIZES, os.environ)), 1)
    local_rank = next(iter(launcher_values(LOCAL_RANKS, os.environ)), 0)
    return launched_rank(), int(world_size), int(local_rank)


def check_world(expert_parallel_size: int, num_experts: int, world_size: int | None = None) -> None:
    """Raise UserError unless ``expert_parallel_size`` divides both the world size and the number of experts."""
    world_size = launched_world()[1] if world_size is None else world_size
    option = f"engine.expert_parallel_size={expert_parallel_size}"
    if expert_parallel_size < 1:
        raise UserError(f"{option} must be at least 1")
    if world_size % expert_parallel_size:
        raise UserError(
            f"{option} does not divide the world size {world_size}; choose a divisor of the number of ranks"
        )
    if num_experts % expert_parallel_size:
        raise UserError(f"{option} does not divide model.num_experts={num_experts}; choose a divisor of it")


def collective_seconds(timeout_seconds: float) -> float:
    """Timeout of collectives: longer than the watchdog needs to report (``watchdog.PATIENCE``)."""
    return max(1.5 * timeout_seconds, timeout_seconds + BACKSTOP_SECONDS)


def start(timeout_seconds: float = 600, deterministic: bool = False) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo elsewhere) and return this rank's device.

    ``deterministic``: see ``be_deterministic``, which must be called before CUDA starts.

    Raises:
        UserError: several ranks were launched without MASTER_ADDR and MASTER_PORT, MASTER_PORT is no port, or the
            ranks cannot meet there.
    """
    rank, world_size, local_rank = launched_world()
    prepare_environment()
    if deterministic:
        be_deterministic()
    _quiet()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank))
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        if "OMPI_COMM_WORLD_RANK" in os.environ and world_size > 1:
            _meet_by_mpi()
        elif world_size == 1:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(environment.free_port()))
        else:
            raise UserError(
                f"rank {rank} of {world_size} has no MASTER_ADDR and MASTER_PORT; export both (as "
                "launch/slurm/pretrain.sbatch does), or use deepspeed or torchrun"
            )
    _check_port(os.environ["MASTER_PORT"])
    torch.set_num_threads(environment.compute_threads(len(os.sched_getaffinity(0)), world_size, os.environ))
    if world_size > (environment.local_world_size(os.environ) or 1):
        environment.listen_where_others_reach(os.environ["MASTER_ADDR"])
    import deepspeed

    disable_shm_operation()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        os.environ[LOCAL_RANK] = str(local_rank)
        local_rank = environment.device_ordinal(local_rank, torch.cuda.device_count(), os.environ)
        os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed takes its device from it
        torch.cuda.set_device(local_rank)
        environment.prepare_nccl(collective_seconds(timeout_seconds))
    rank_failure.set_place(_place(local_rank if on_gpu else None))
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=datetime.timedelta(seconds=collective_seconds(timeout_seconds)),
        )
    except dist.DistError as error:
        raise RankError(f"rank {rank} on {socket.gethostname()}: {_unreachable(error)}") from error
    barrier()
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks. On GPUs on the rank's own: a process group of one rank has no device bound to it, and torch
    warns that it guesses one."""
    dist.barrier(device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None)


def disable_shm_operation() -> None:
    """Keep ``init_distributed`` from compiling and loading ``deepspeed_shm_comm`` on a CPU (deepspeed/comm/torch.py).

    The compile takes a minute on every rank, and the operation leaves 66 MiB per rank in /dev/shm. Only DeepSpeed's
    tensor-parallel inference uses it. Call this before ``deepspeed.init_distributed``. It sets the whole table of
    compatible operations, which DeepSpeed 0.19.8 reads for this one operation alone, and saves the search for compilers
    that fills it.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}


@contextlib.contextmanager
def joined(timeout_seconds: float = 600, deterministic: bool = False) -> Iterator[torch.device]:
    """``start``, and leave the process group at the end.

    Raises:
        RankError: this rank alone cannot go on: it ran out of memory, or its GPU or NCCL failed.
    """
    device = start(timeout_seconds, deterministic)
    try:
        yield device
        barrier()  # not after an error: the other ranks may never come
    except BaseException as error:
        failure = rank_failure.own_failure(error)
        # Found out while the others still wait: once this rank has left, they end, and launchers then end all.
        line = str(_with_details(failure, error)) if failure else ""
        _leave_group(error)
        if failure:
            raise RankError(line) from error
        raise
    _leave_group()


def _leave_group(error: BaseException | None = None) -> None:
    """Stop watching, and leave the group. After an error not NCCL's: that waits for collectives that the other ranks
    have launched. They do not notice, as those of gloo do, so they are told."""
    on_nccl = dist.get_backend() == "nccl"
    everywhere = isinstance(error, UserError | StopError) and not isinstance(error, RankError)
    watchdog.stop(leaves=error is not None and on_nccl and not everywhere)
    if error is None or not on_nccl:
        dist.destroy_process_group()


def _with_details(failure: rank_failure.Failure, error: BaseException) -> rank_failure.Failure:
    if failure.memory:
        return failure._replace(known=rank_failure.tell_memory(error) if rank_failure.tell_memory else "")
    path = watchdog.keep_traceback(error)
    return failure._replace(known=f"where: {path}" if path else "")


def _place(gpu: int | None) -> str:
    """Where this rank runs. Asked at the start: CUDA answers no more once the GPU has failed."""
    if gpu is None:
        return socket.gethostname()
    uuid = getattr(torch.cuda.get_device_properties(gpu), "uuid", None)
    return f"{socket.gethostname()}, GPU {gpu}" + (f", GPU-{uuid}" if uuid else "")


def _check_port(text: str) -> None:
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 1 << 16:
        raise UserError(
            f"MASTER_PORT={text}: is no port from 1 to 65535; give another one (deepspeed and torchrun: --master_port "
            "N; srun: export MASTER_PORT=N)"
        )


def _unreachable(error: Exception) -> str:
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error):
        return (
            f"{where}, where the ranks are to meet, is taken, perhaps by another run; give the launcher another port "
            "(deepspeed and torchrun: --master_port N; srun: export MASTER_PORT=N)"
        )
    return f"the ranks cannot meet at {where} ({str(error).splitlines()[0]}); check MASTER_ADDR and MASTER_PORT"


def _quiet() -> None:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # caused by DeepSpeed


def _meet_by_mpi() -> None:
    """Set MASTER_ADDR and MASTER_PORT, which mpirun does not: rank 0 broadcasts its address through MPI."""
    import mpi4py

    mpi4py.rc.finalize = False  # it waits for the other ranks, which a failed rank must not do
    from mpi4py import MPI

    finish_together.append(MPI.Finalize)  # mpirun kills the other ranks if one ends without it
    communicator = MPI.COMM_WORLD
    place = (_own_address(), environment.free_port()) if communicator.Get_rank() == 0 else None
    address, port = communicator.bcast(place, root=0)
    os.environ.update(MASTER_ADDR=str(address), MASTER_PORT=str(port))


def _own_address() -> str:
    try:
        addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        addresses = []
    return addresses[0] if addresses else "127.0.0.1"


def rank_and_world() -> tuple[int, int]:
    """(rank, world size); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def place() -> str:
    """This rank, for messages, as in "rank 1 on host node7"."""
    return f"rank {rank_and_world()[0]} on host {socket.gethostname()}"


def host() -> str:
    """An identifier of the host. Hosts may share a name, and containers on one host may have different names."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def gather(value: T) -> list[T]:
    """Each rank's value, in rank order. Called by all ranks."""
    if not dist.is_initialized():
        return [value]
    found: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast(value: T) -> T:
    """Rank 0's value, on every rank. Called by all ranks."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def decide(decision: Callable[[], T]) -> T:
    """What ``decision`` returns on rank 0, on every rank. A user's error that it raises is raised on all ranks."""
    value: T | None = None
    mistake: Exception | None = None
    if rank_and_world()[0] == 0:
        try:
            value = decision()
        except (UserError, OSError) as error:
            mistake = error
    everywhere = UserError(str(mistake)) if isinstance(mistake, RankError | OSError) else mistake  # for rank 0 to print
    value, everywhere = broadcast((value, everywhere))
    if mistake or everywhere:
        raise mistake or everywhere  # type: ignore[misc]
    return value  # type: ignore[return-value]


def agree(mistake: str | None) -> None:
    """Raise UserError on all ranks if ``mistake`` is set on any: that of the first such rank. Called by all ranks."""
    found = [each for each in gather(mistake) if each]
    if found:
        raise UserError(found[0])


def same_view(look: Callable[[], T], what: str) -> T:
    """What ``look`` returns on rank 0, once it returns the same on every rank. Called by all ranks.

    Args:
        look: returns what this rank sees in the shared folder now.
        what: names the folder in the error.
    Raises:
        UserError: some rank still sees something else after ``PATIENCE_SECONDS``.
    """
    for _ in _waiting():
        mine = look()
        first = broadcast(mine)
        views = gather((place(), mine == first))
        others = [where for where, same in views if not same]
        if not others:
            return first
    raise UserError(
        f"{what}: {others[0]} does not see there what {views[0][0]} sees, nor after {PATIENCE_SECONDS:.0f} s; "
        f"{_ONE_FOLDER}"
    )


def await_view(look: Callable[[], T], expected: T, what: str) -> None:
    """Wait until ``look`` returns what other ranks have written. Raises UserError as ``same_view``."""
    for _ in _waiting():
        if look() == expected:
            return
    raise UserError(
        f"{what}: {place()} does not see all that other ranks wrote there, nor after {PATIENCE_SECONDS:.0f} s; "
        f"{_ONE_FOLDER}"
    )


def _waiting() -> Iterator[None]:
    """Yield at growing intervals for ``PATIENCE_SECONDS``, equally often on every rank."""
    pause, waited = 0.1, 0.0
    yield
    while waited < PATIENCE_SECONDS:
        time.sleep(pause)
        waited += pause
        pause = min(2 * pause, 5.0)
        yield


def prove_shared(folder: Path, option: str) -> None:
    """Raise UserError unless all ranks read from ``folder`` what rank 0 writes into it. Called by all ranks.

    Args:
        folder: exists on rank 0.
        option: names the folder in the error.
    """
    if rank_and_world()[1] == 1:
        return
    token = broadcast(secrets.token_hex(8))
    file = folder / f".seen-{token}"  # a new name, which no host can have cached as missing
    is_first = rank_and_world()[0] == 0
    try:
        decide(lambda: _leave(file, token))
        same_view(lambda: token if is_first else _content(file), option)
    finally:
        if is_first:
            file.unlink(missing_ok=True)


def _leave(file: Path, token: str) -> None:
    for old in file.parent.glob(".seen-*"):  # from starts that were killed
        old.unlink(missing_ok=True)
    write_text(file, token)


def _content(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        return str(error.strerror)
