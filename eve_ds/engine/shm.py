"""DeepSpeed's shared-memory buffers: 66 MiB for each rank in /dev/shm, which DeepSpeed never removes.

``deepspeed_shm_comm`` creates ``deepspeed_allreduce_buffer_UID_ADDRESS_PORT_RANK`` when all ranks share a host and the
deepspeed launcher started them (it alone sets LOCAL_SIZE). See deepspeed/ops/csrc/cpu/comm/shm.cpp, ``shm_initialize``.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from eve_ds.engine.environment import OPERATION, operation_is_built

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "deepspeed_allreduce_buffer"

log = logging.getLogger(__name__)


def skip_unbuilt_operation() -> None:
    """Keep ``init_distributed`` from compiling the operation in silence on all ranks at once; gloo serves without it.

    Call it before ``deepspeed.init_distributed``. Training never uses the operation (only DeepSpeed's tensor-parallel
    inference does), so nothing gets slower. ``python -m eve_ds.build_ops`` compiles it in the open.
    """
    if operation_is_built():
        return
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__[OPERATION] = False


def release_own_buffer(rank: int) -> None:
    """Unlink this rank's buffer; its memory then goes back to the system when the ranks end, however they end.

    Call it on every rank after ``init_distributed`` and a barrier: by then each rank has mapped all buffers, and names
    are used for nothing else.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    (SHARED_MEMORY / f"{PREFIX}_{os.getuid()}_{address}_{port}_{rank}").unlink(missing_ok=True)


def remove_shm_leftovers() -> list[Path]:
    """Remove the buffers of this user's dead ranks and return what was removed.

    A buffer that a living process of this host has mapped or open stays. Call it before ``init_distributed``, on one
    rank of a node: until that rank has joined, no other rank of the job gets as far as opening buffers.
    """
    ours = [path for path in SHARED_MEMORY.glob(f"{PREFIX}_{os.getuid()}_*") if _owner(path) == os.getuid()]
    if not ours:
        return []
    in_use = _names_in_use()
    removed = [path for path in ours if str(path) not in in_use]
    for path in removed:
        path.unlink(missing_ok=True)
    if removed:
        log.debug("removed %d shared-memory buffers that dead ranks left in %s", len(removed), SHARED_MEMORY)
    return removed


def _owner(path: Path) -> int | None:
    try:
        return path.lstat().st_uid
    except FileNotFoundError:  # removed since the folder was listed
        return None


def _names_in_use() -> set[str]:
    """Paths of buffers that a process has mapped or holds open, as far as /proc lets this user see: its own ones."""
    names: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            maps = (process / "maps").read_text(encoding="utf-8", errors="replace")
            names.update(line[line.index("/") :] for line in maps.splitlines() if PREFIX in line and "/" in line)
            for descriptor in os.scandir(process / "fd"):
                target = os.readlink(descriptor.path)
                if PREFIX in target:
                    names.add(target)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's, who cannot map our files
    return names
