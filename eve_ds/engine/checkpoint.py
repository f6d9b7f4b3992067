"""Checkpoints that are whole or not there, and resume into the same topology or another.

DeepSpeed writes a folder per tag, not atomically. A tag is never used twice, and ``complete.json`` (manifest.py) is
renamed into the folder after everything else: a folder without it is a killed run's, and is not read.

The same topology is loaded as it is, bit for bit. Into any other the ranks convert the checkpoint together to
DeepSpeed's universal format, in a folder beside it that is deleted once it is loaded.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from eve_ds.engine.manifest import COMPLETE, Hashes, Manifest, Topology, experts_of, file_names, hash_files
from eve_ds.engine.universal import ShardedState, write_common, write_parameters
from eve_ds.errors import RankError, UserError

UNIVERSAL = ".universal"
_UNWRITABLE = re.compile(r"PytorchStreamWriter|inline_container")  # how torch.save tells that the disk is full
MISLEADING = (
    "zero_to_fp32.py",
    "zero_to_torch.py",
)  # DeepSpeed copies these in; with experts they lose weights in silence


def save(engine: Any, folder: Path, step: int, topology: Topology, state: dict[str, Any]) -> Path:
    """Save ``engine`` as ``folder/step_NNNNNNNN`` and mark it whole. Called by all ranks; returns the folder."""
    tag = _tag(step)
    target = folder / tag
    if dist.get_rank() == 0 and target.exists():
        shutil.rmtree(target)  # the rest of a save that was killed: it has no complete.json, or we would have resumed
    dist.barrier()
    with _told_if_full(target):
        engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
    if dist.get_rank() == 0:
        for script in MISLEADING:
            (folder / script).unlink(missing_ok=True)
    dist.barrier()
    hashes = _hash_together(target)
    if dist.get_rank() == 0:
        experts = experts_of(engine.module)
        Manifest(step, topology, experts, deepspeed.__version__, state, hashes).write(target)
    dist.barrier()
    return target


@contextlib.contextmanager
def _told_if_full(target: Path) -> Iterator[None]:
    """Turn what torch.save says of a full disk into a RankError, and remove ``target``: it would keep the disk full."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        if isinstance(error, RuntimeError) and not _UNWRITABLE.search(str(error)):
            raise
        shutil.rmtree(target, ignore_errors=True)
        raise RankError(
            f"rank {dist.get_rank()}: {target} cannot be written, most often because the disk is full; make room, and "
            "the same command goes on from the last whole checkpoint"
        ) from error


def _tag(step: int) -> str:
    return f"step_{step:08d}"


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint under ``folder``, or None."""
    whole = [path.parent for path in folder.glob(f"step_*/{COMPLETE}")]
    return max(whole, default=None)


def check(path: Path) -> Manifest:
    """Read ``complete.json`` and compare files, hashes and contents with it. Called by all ranks.

    Raises:
        UserError: a file is missing, damaged, or was written for another topology than the manifest says.
    """
    manifest = Manifest.read(path)
    if path.name != _tag(manifest.step):
        raise UserError(f"{path}: holds step {manifest.step}, so it was renamed; call it {_tag(manifest.step)} again")
    manifest.check_sizes(path)
    manifest.check_hashes(path, _hash_together(path))
    manifest.check_contents(path)
    return manifest


def load(engine: Any, path: Path, topology: Topology, identity: Mapping[str, str]) -> Manifest:
    """Check ``path`` and load it into a fresh ``engine``. Called by all ranks; returns the manifest.

    Hyper-parameters stay the engine's own; weights, Adam's moments and its step count are the checkpoint's.

    Args:
        identity: {what: fingerprint} of the run and of what it reads; the checkpoint's must be the same.
    Raises:
        UserError: as ``check``, or the checkpoint is another run's, or has other MoE layers or numbers of experts.
    """
    manifest = check(path)
    for what, value in identity.items():
        if manifest.state.get("identity", {}).get(what, value) != value:
            raise UserError(
                f"{path}: the {what} is not the one that this checkpoint was trained with; put that back, or start in "
                "another output_dir"
            )
    experts = experts_of(engine.module)
    saved, wanted = ({name: e["num_experts"] for name, e in each.items()} for each in (manifest.experts, experts))
    if saved != wanted:
        raise UserError(
            f"{path}: has experts in {saved}, the model in {wanted}; resume with the model that it was written for"
        )
    settings = [_hyper_parameters(group) for group in engine.optimizer.param_groups]
    if manifest.topology == topology and manifest.experts == experts:
        engine.load_checkpoint(str(path.parent), tag=path.name)
    else:
        _load_universal(engine, path, manifest)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    _set_steps(engine, manifest.step - manifest.skipped_steps)
    return manifest


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, and what killed runs left. Called by rank 0 alone."""
    last = newest(folder)
    if last is None:
        return
    whole = sorted(path.parent for path in folder.glob(f"step_*/{COMPLETE}"))
    half = [path for path in folder.glob("step_*") if not (path / COMPLETE).exists() and path < last]
    for path in [*whole[:-keep], *half, *folder.glob(f"{UNIVERSAL}_*")]:
        (path / COMPLETE).unlink(missing_ok=True)  # first, so that a killed deletion leaves no "whole" folder
        shutil.rmtree(path)


def _load_universal(engine: Any, path: Path, manifest: Manifest) -> None:
    """Convert ``path`` with all ranks, load it, and delete the converted folder."""
    folder = path.with_name(f"{UNIVERSAL}_{path.name}")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a resume that was killed: perhaps half-written
        folder.mkdir()
    dist.barrier()
    state = ShardedState(path, manifest)
    with _told_if_full(folder):
        write_parameters(state, folder, state.split(world_size)[rank])
        if rank == 0:
            write_common(state, folder)
    dist.barrier()
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        engine._config.load_universal_checkpoint = False
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)


def _hyper_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _set_steps(engine: Any, step: int) -> None:
    """Give each parameter group a step count of its own, in the form and on the device that its optimizer needs.

    DeepSpeed's ZeRO 3 loads a universal checkpoint with one step tensor shared by all groups, so that each of them
    counts for all (losses drift by 2e-3). It also leaves the tensor on the host, and torch's fused Adam wants it beside
    the weights. DeepSpeed's own Adams count in plain integers.

    Raises:
        UserError: a group was left out by the load.
    """
    optimizer = engine.optimizer.optimizer
    for parameter, state in optimizer.state.items():
        if float(state["step"]) != step:
            raise UserError(
                f"a parameter group has Adam step {float(state['step']):g} after loading, not {step}; this checkpoint "
                "cannot be resumed: start in another output_dir"
            )
        as_tensor = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.tensor(float(step), device=parameter.device) if as_tensor else step


def _hash_together(path: Path) -> Hashes:
    """Hashes of all files below ``path``, the work shared among the ranks."""
    mine = hash_files(path, file_names(path)[dist.get_rank() :: dist.get_world_size()], threads=1)
    parts: list[Hashes] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return dict(sorted((name, value) for part in parts for name, value in part.items()))
