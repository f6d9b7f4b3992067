"""Checkpoints that are whole or not there, and resume into the same topology or another.

DeepSpeed writes a folder per tag, not atomically. A tag is never used twice, and ``complete.json`` (manifest.py) is
renamed into the folder after everything else is on disk: a folder without it is a killed run's, and is not read. What
is older goes only when that is on disk, too, so a power loss at any instant leaves a whole checkpoint. Which one a run
goes on from says soundness.py.

The same topology is loaded as it is, bit for bit. Into any other the ranks convert the checkpoint together to
DeepSpeed's universal format, in a folder beside it that is deleted once it is loaded.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import PARAM_SHAPES

from eve_ds.engine import agreement
from eve_ds.engine.checkpoint_record import (
    COMPLETE,
    Manifest,
    Sizes,
    Topology,
    experts_of,
    file_names,
    file_sizes,
    load_file,
    model_file,
)
from eve_ds.engine.identity import Identity, told
from eve_ds.engine.soundness import hash_share, joined, split_by_size, tag_of
from eve_ds.engine.universal import ShardedState, write_common, write_parameters
from eve_ds.engine.watchdog import mark
from eve_ds.errors import RankError, UserError
from eve_ds.weights.model_folder import all_checkpoints, complete_checkpoints, path_exists
from preprocessing.shards.schema import DataError, printable, shortened, sync_path

UNIVERSAL = ".universal"
_UNWRITABLE = re.compile(r"PytorchStreamWriter|inline_container")  # how torch.save tells that the disk is full
MISLEADING = (
    "zero_to_fp32.py",
    "zero_to_torch.py",
)  # DeepSpeed copies these in; with experts they lose weights in silence


def save(engine: Any, folder: Path, step: int, topology: Topology, state: dict[str, Any]) -> Path:
    """Save ``engine`` as ``folder/step_NNNNNNNN`` and mark it whole. Called by all ranks; returns the folder.

    On return the checkpoint is on disk, and so is what the run had written of its metrics.
    """
    tag = tag_of(step)
    target = folder / tag
    agreement.decide(lambda: _make_way(target))
    with _told_if_full(target):
        with _syncing(engine) as written:
            engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
            mine = hash_share(target, _shares_by_host(target, written))
    hashes = joined(mine)  # and all ranks' files are on disk
    manifest = Manifest(step, topology, experts_of(engine.module), deepspeed.__version__, state, hashes)
    agreement.decide(lambda: _complete(target, manifest))
    return target


def _make_way(target: Path) -> None:
    """Remove what a save that was killed has left under the name of a new one. Raises RankError if it is whole."""
    if path_exists(target / COMPLETE):
        raise RankError(
            f"rank 0: {target} is whole, though it was not seen when the run began; start the same command again"
        )
    if target.exists():
        shutil.rmtree(target)


@contextlib.contextmanager
def _syncing(engine: Any) -> Iterator[list[Path]]:
    """The files that this rank's ``engine`` writes meanwhile. Another thread has each on disk; the block ends after it.

    The rank that wrote a file syncs it: its host holds what is not on disk yet. Its parts have no CRC-32, which takes
    as long as writing them: complete.json holds the SHA-256 of each file.
    """
    written: list[Path] = []
    save, checksums = engine.checkpoint_engine.save, torch.serialization.get_crc32_options()

    def save_and_sync(state_dict: Any, path: str) -> None:
        save(state_dict, path)
        written.append(Path(path))
        syncs.append(disk.submit(sync_path, path))

    with ThreadPoolExecutor(1, "checkpoint-disk") as disk:
        syncs: list[Any] = []
        engine.checkpoint_engine.save = save_and_sync
        torch.serialization.set_crc32_options(False)
        try:
            yield written
        finally:
            torch.serialization.set_crc32_options(checksums)
            del engine.checkpoint_engine.save
        for sync in syncs:
            sync.result()


def _shares_by_host(target: Path, written: list[Path]) -> list[list[str]]:
    """Which files of ``target`` each rank hashes: such as its host has written, and so has at hand. Called by all."""
    mine = {str(path.relative_to(target)): path.stat().st_size for path in written}
    seen = file_names(target) if dist.get_rank() == 0 else []
    told = agreement.gather((agreement.host(), mine, seen))
    hosts, files = [host for host, _, _ in told], [each for _, each, _ in told]
    known = {name for each in files for name in each}
    files[0].update({name: 0 for name in told[0][2] if name not in known})  # what DeepSpeed has copied there
    shares: list[list[str]] = [[] for _ in told]
    for host in set(hosts):
        ranks = [rank for rank, its in enumerate(hosts) if its == host]
        sizes = {name: size for rank in ranks for name, size in files[rank].items()}
        for rank, share in zip(ranks, split_by_size(sizes, len(ranks)), strict=True):
            shares[rank] = share
    return shares


def _complete(target: Path, manifest: Manifest) -> None:
    """Mark a checkpoint whole, which all ranks have on disk. Called by rank 0, which must see all of it."""
    folder, run = target.parent, target.parent.parent
    sizes: Sizes = {name: size for name, (size, _) in manifest.files.items()}
    agreement.await_view(lambda: file_sizes(target, sizes), sizes, str(target))
    inside = {target / name for name in manifest.files}
    with _told_if_full(target):
        for script in MISLEADING:
            (folder / script).unlink(missing_ok=True)
        for path in (*run.glob("*.jsonl"), *{file.parent for file in inside}, target, folder, run):
            sync_path(path)
        manifest.write(target)


@contextlib.contextmanager
def _told_if_full(target: Path) -> Iterator[None]:
    """Turn what says that the disk is full into a RankError, and remove ``target``: it would keep the disk full."""
    try:
        yield
    except (RuntimeError, OSError, DataError) as error:
        if isinstance(error, RuntimeError) and not _UNWRITABLE.search(str(error)):
            raise
        shutil.rmtree(target, ignore_errors=True)
        raise RankError(
            f"rank {dist.get_rank()}: {target} cannot be written, most often because the disk is full ("
            f"{shortened(' '.join(str(error).split()), 200)}); make room, and the same command goes on from the last "
            "whole checkpoint"
        ) from error


def load(
    engine: Any,
    path: Path,
    manifest: Manifest,
    topology: Topology,
    identity: Identity | None,
    scratch: Path | None = None,
) -> None:
    """Load ``path``, which was checked, into a fresh ``engine``. Called by all ranks.

    Hyper-parameters stay the engine's own; weights, Adam's moments and its step count are the checkpoint's.

    Args:
        manifest: of ``path``, as ``check`` or ``sound`` returned it.
        identity: of the run and of what it reads; the checkpoint's must be the same. None: of another run, a branch of
            which this one is (``initial.branch_point``).
        scratch: where a conversion may write; by default beside ``path``.
    Raises:
        UserError: the checkpoint is another run's, or has other MoE layers or numbers of experts.
    """
    found = identity_in(path, manifest).differences(identity) if identity else []
    if found:
        raise UserError(
            f"{path}: is a checkpoint of another run: {told(found)}; make these equal to go on, or start in another "
            "output_dir"
        )
    experts = experts_of(engine.module)
    saved, wanted = ({name: e["num_experts"] for name, e in each.items()} for each in (manifest.experts, experts))
    if saved != wanted:
        raise UserError(
            f"{path}: has experts in {saved}, the model in {wanted}; resume with the model that it was written for"
        )
    settings = [_hyper_parameters(group) for group in engine.optimizer.param_groups]
    as_it_is = manifest.topology == topology and manifest.experts == experts
    if as_it_is and (identity or _same_groups(engine, path, topology)):
        mark(f"the load of {path}")
        engine.load_checkpoint(str(path.parent), tag=path.name)
    else:
        _load_universal(engine, path, manifest, scratch or path.parent)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    _set_steps(engine, manifest.step - manifest.skipped_steps)


def _same_groups(engine: Any, path: Path, topology: Topology) -> bool:
    """Whether a checkpoint was cut like the engine: another learning rate or decay may group parameters otherwise."""
    saved = load_file(model_file(path, topology.zero_stage, dist.get_rank()))
    groups = [list(group) for group in engine._get_zero_param_shapes()]
    bf16 = saved["ds_config"].get("bf16", {}).get("enabled", False)
    return [list(group) for group in saved[PARAM_SHAPES]] == groups and bf16 == engine.bfloat16_enabled()


def identity_in(path: Path, manifest: Manifest) -> Identity:
    """Of the run that wrote the checkpoint ``path``. Raises UserError if what it holds is none."""
    try:
        return Identity.from_tree(manifest.state.get("identity", {}))
    except ValueError as error:
        raise UserError(f"{path / COMPLETE}: {error}; take another checkpoint") from error


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` whole checkpoints, and what killed runs left. Called by rank 0 alone."""
    try:
        kept, found = complete_checkpoints(folder)[-keep:], all_checkpoints(folder)
    except OSError:  # it is looked at again after the next save
        return
    if not kept:
        return
    older = [path for path in found[: found.index(kept[-1])] if path not in kept]
    for path in [*older, *folder.glob(f"{UNIVERSAL}_*")]:
        try:
            (path / COMPLETE).unlink(missing_ok=True)  # first, so that a killed deletion leaves no "whole" folder
            shutil.rmtree(path)
        except OSError as error:  # some file systems need room to delete; the new checkpoint is whole
            told = f"{path}: cannot be removed now ({error.strerror}); it is tried again after the next save"
            print(printable(told), file=sys.stderr, flush=True)


def _load_universal(engine: Any, path: Path, manifest: Manifest, scratch: Path) -> None:
    """Convert ``path`` with all ranks into a folder below ``scratch``, load it, and delete the converted folder."""
    folder = scratch / f"{UNIVERSAL}_{path.name}"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a resume that was killed: perhaps half-written
        folder.mkdir(parents=True)
    dist.barrier()
    state = ShardedState(path, manifest)
    mark(f"the conversion of {path}")
    with _told_if_full(folder):
        write_parameters(state, folder, state.split(world_size)[rank])
        if rank == 0:
            write_common(state, folder)
    dist.barrier()
    agreement.same_view(lambda: file_sizes(folder, file_names(folder)), str(folder))
    engine._config.load_universal_checkpoint = True
    mark(f"the load of {folder}")
    try:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        engine._config.load_universal_checkpoint = False
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # `prune` tries again


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
