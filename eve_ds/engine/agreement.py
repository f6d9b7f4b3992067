"""One decision for all ranks, and one view of the folder that they share.

On a network file system, a rank may see later what another rank has written. A path may also be a different folder on
each host. So rank 0 decides and broadcasts, and the other ranks wait until they see the same files.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from eve_ds.errors import USER_ERRORS, RankError
from preprocessing.errors import UserError
from preprocessing.local_files import write_text

T = TypeVar("T")
_ONE_FOLDER = "all ranks need one folder, on a file system that their hosts share"
PATIENCE_SECONDS = 75.0  # NFS clients cache a folder's attributes for up to 60 s (acdirmax)


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


def tell(value: T) -> T:
    """Rank 0's value, on every rank. Called by all ranks."""
    if not dist.is_initialized():
        return value
    told = [value]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def decide(decision: Callable[[], T]) -> T:
    """What ``decision`` returns on rank 0, on every rank. A user's error that it raises is raised on all ranks."""
    value: T | None = None
    mistake: Exception | None = None
    if rank_and_world()[0] == 0:
        try:
            value = decision()
        except (*USER_ERRORS, OSError) as error:
            mistake = error
    told = UserError(str(mistake)) if isinstance(mistake, RankError | OSError) else mistake  # for rank 0 to print
    value, told = tell((value, told))
    if mistake or told:
        raise mistake or told  # type: ignore[misc]
    return value  # type: ignore[return-value]


def agree(mistake: str | None) -> None:
    """Raise UserError on all ranks if ``mistake`` is set on any: that of the first such rank. Called by all ranks."""
    found = [told for told in gather(mistake) if told]
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
        first = tell(mine)
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
    token = tell(secrets.token_hex(8))
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
