"""Saving and loading of checkpoints: each is complete or ignored, and loads into any topology.

DeepSpeed writes a folder per tag, not atomically. So a tag is never used twice, and ``complete.json``
(checkpoint_record.py) is renamed into the folder after everything else is on disk: a folder without it was left by a
killed run, and is not read. Older checkpoints are deleted only when the new one is on disk, so a power loss at any time
leaves a complete one. resume.py chooses the checkpoint that a run resumes from.

A checkpoint of the same topology is loaded bit for bit. For another topology, all ranks together convert it to
DeepSpeed's universal format, in a folder beside it that is deleted after the load.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import PARAM_SHAPES

from eve_ds.engine import distributed
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
from eve_ds.engine.identity import Identity, summarized
from eve_ds.engine.loss_scale import keep_settings
from eve_ds.engine.resume import hash_share, joined, split_by_size, tag_of
from eve_ds.engine.watchdog import mark
from eve_ds.engine.whole_weights import ShardedState, write_common, write_parameters
from eve_ds.errors import RankError
from eve_ds.weights.model_folder import all_checkpoints, complete_checkpoints, path_exists, step_of
from preprocessing.errors import UserError, shortened
from preprocessing.local_files import sync_path

_log = logging.getLogger(__name__)
UNIVERSAL = ".universal"
held: set[Path] = set()  # checkpoints that are being copied elsewhere: `prune` leaves them until later
CALLBACKS = "callbacks.pt"  # the states of callbacks, in a checkpoint whose run has any
_UNWRITABLE = re.compile(r"PytorchStreamWriter|inline_container")  # in torch.save's error when the disk is full
MISLEADING = ("zero_to_fp32.py", "zero_to_torch.py")  # copied in by DeepSpeed; they lose expert weights silently


def save(
    engine: Any,
    folder: Path,
    step: int,
    topology: Topology,
    state: dict[str, Any],
    callback_states: Mapping[str, Any] | None = None,
    rank_files: Mapping[str, Any] | None = None,
) -> Path:
    """Save ``engine`` as ``folder/step_NNNNNNNN``, mark it complete and return that folder. Called by all ranks.

    On return the checkpoint and the metrics written so far are on disk.

    Args:
        state: the trainer's own, as JSON holds it.
        callback_states: {name: state}; those of rank 0 are stored, in a file of their own.
        rank_files: {file name: content} of this rank, to be stored beside DeepSpeed's files.
    """
    tag = tag_of(step)
    target = folder / tag
    distributed.decide(lambda: _make_way(target))
    with disk_full_as_rank_error(target):
        with _syncing(engine) as written:
            engine.save_checkpoint(str(folder), tag=tag, client_state=state, save_latest=False)
            if callback_states and dist.get_rank() == 0:
                engine.checkpoint_engine.save(dict(callback_states), str(target / CALLBACKS))
            for name, content in (rank_files or {}).items():
                engine.checkpoint_engine.save(content, str(target / name))
            mine = hash_share(target, _shares_by_host(target, written))
    hashes = joined(mine)  # after this, the files of all ranks are on disk
    manifest = Manifest(step, topology, experts_of(engine.module), deepspeed.__version__, state, hashes)
    distributed.decide(lambda: _complete(target, manifest))
    return target


def checkpoint_bytes(parameters: int, precision: str, zero_stage: int, averages: bool = False) -> int:
    """Size of a checkpoint: Adam's two moments and the master copy in fp32, below ZeRO 3 also the weights themselves.

    Args:
        parameters: of the whole model.
        precision: bf16, fp16 or fp32.
        zero_stage: 1 to 3.
        averages: of the weights (``optimizer.ema``), fp32, are in it, too.
    """
    weights = 0 if zero_stage == 3 else 4 if precision == "fp32" else 2
    return parameters * (3 * 4 + weights + 4 * averages)


def _make_way(target: Path) -> None:
    """Remove what a killed save left at ``target``. Raises RankError if it is a complete checkpoint."""
    if path_exists(target / COMPLETE):
        raise RankError(
            f"rank 0: {target} is whole, though it was not seen when the run began; start the same command again"
        )
    if target.exists():
        shutil.rmtree(target)


@contextlib.contextmanager
def _syncing(engine: Any) -> Iterator[list[Path]]:
    """Context that lists the files that ``engine`` writes in it. A thread syncs them; the context ends after the last.

    The rank that wrote a file syncs it, because the unwritten pages are in its host's memory. torch.save computes no
    CRC-32, which takes as long as the write: complete.json holds the SHA-256 of each file.
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
    """The files of ``target`` that each rank hashes: some of those that its own host wrote. Called by all ranks."""
    mine = {str(path.relative_to(target)): path.stat().st_size for path in written}
    seen = file_names(target) if dist.get_rank() == 0 else []
    gathered = distributed.gather((distributed.host(), mine, seen))
    hosts, files = [host for host, _, _ in gathered], [each for _, each, _ in gathered]
    known = {name for each in files for name in each}
    files[0].update({name: 0 for name in gathered[0][2] if name not in known})  # scripts that DeepSpeed copied there
    shares: list[list[str]] = [[] for _ in gathered]
    for host in set(hosts):
        ranks = [rank for rank, its in enumerate(hosts) if its == host]
        sizes = {name: size for rank in ranks for name, size in files[rank].items()}
        for rank, share in zip(ranks, split_by_size(sizes, len(ranks)), strict=True):
            shares[rank] = share
    return shares


def _complete(target: Path, manifest: Manifest) -> None:
    """Mark a checkpoint complete after all ranks synced their files. Called by rank 0, which waits to see them."""
    folder, run = target.parent, target.parent.parent
    sizes: Sizes = {name: size for name, (size, _) in manifest.files.items()}
    distributed.await_view(lambda: file_sizes(target, sizes), sizes, str(target))
    inside = {target / name for name in manifest.files}
    with disk_full_as_rank_error(target):
        for script in MISLEADING:
            (folder / script).unlink(missing_ok=True)
        for path in (*run.glob("*.jsonl"), *{file.parent for file in inside}, target, folder, run):
            sync_path(path)
        manifest.write(target)


@contextlib.contextmanager
def disk_full_as_rank_error(target: Path) -> Iterator[None]:
    """Turn the errors of a full disk into RankError, and remove ``target`` to free the space."""
    try:
        yield
    except (RuntimeError, OSError, UserError) as error:
        if isinstance(error, RuntimeError) and not _UNWRITABLE.search(str(error)):
            raise
        if isinstance(error, UserError) and not isinstance(error.__cause__, OSError):
            raise  # about what was read: `write_atomic` has the OSError as its cause
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
    """Load the checked checkpoint ``path`` into a new ``engine``. Called by all ranks.

    Weights, Adam's moments and its step count are the checkpoint's. Hyper-parameters stay the engine's own.

    Args:
        manifest: of ``path``, as ``resume.check`` or ``resume.sound`` returned it.
        identity: of this run; the checkpoint's must be equal. None for a checkpoint that this run branches from
            (``first_weights.branch_point``).
        scratch: folder for a conversion; by default that of ``path``.
    Raises:
        UserError: the checkpoint is another run's, or has other MoE layers or numbers of experts.
    """
    found = identity_in(path, manifest).differences(identity) if identity else []
    if found:
        raise UserError(
            f"{path}: is a checkpoint of another run: {summarized(found)}; make these equal to go on, or start in "
            "another output_dir"
        )
    experts = experts_of(engine.module)
    saved, wanted = ({name: e["num_experts"] for name, e in each.items()} for each in (manifest.experts, experts))
    if saved != wanted:
        raise UserError(
            f"{path}: has experts in {saved}, the model in {wanted}; resume with the model that it was written for"
        )
    settings = [_hyper_parameters(group) for group in engine.optimizer.param_groups]
    scaler = engine.optimizer.loss_scaler
    if same_layout(engine, path, manifest, topology):
        mark(f"the load of {path}")
        engine.load_checkpoint(str(path.parent), tag=path.name)
    else:
        _load_universal(engine, path, manifest, scratch or path.parent)
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)
    keep_settings(engine, scaler)
    _set_steps(engine, manifest.step - manifest.skipped_steps)


def load_callback_states(path: Path, manifest: Manifest) -> dict[str, Any]:
    """{name: state} as ``save`` was given on rank 0; empty if no callback had a state. For any topology.

    The tensors are read, not mapped: a callback may keep them until after the checkpoint is deleted.
    """
    return load_file(path / CALLBACKS, mmap=False) if CALLBACKS in manifest.files else {}


def same_layout(engine: Any, path: Path, manifest: Manifest, topology: Topology) -> bool:
    """Whether the flat tensors in a checkpoint's files are those of ``engine``, rank by rank."""
    as_it_is = manifest.topology == topology and manifest.experts == experts_of(engine.module)
    return as_it_is and _same_groups(engine, path, topology)


def _same_groups(engine: Any, path: Path, topology: Topology) -> bool:
    """Whether the checkpoint has the engine's precision and parameter groups (these depend on lr and weight decay)."""
    saved = load_file(model_file(path, topology.zero_stage, dist.get_rank()))
    groups = [list(group) for group in engine._get_zero_param_shapes()]
    halves = [saved["ds_config"].get(name, {}).get("enabled", False) for name in ("bf16", "fp16")]
    same_precision = halves == [engine.bfloat16_enabled(), engine.fp16_enabled()]
    return [list(group) for group in saved[PARAM_SHAPES]] == groups and same_precision


def identity_in(path: Path, manifest: Manifest) -> Identity:
    """The identity of the run that wrote the checkpoint ``path``. Raises UserError if it cannot be read."""
    try:
        return Identity.from_tree(manifest.state.get("identity", {}))
    except ValueError as error:
        raise UserError(f"{path / COMPLETE}: {error}; take another checkpoint") from error


def prune(folder: Path, keep: int, steps: Collection[int] = ()) -> None:
    """Delete all but the newest ``keep`` complete checkpoints and those of ``steps``, and what killed runs left; spare
    those in ``held``. Called by rank 0 only.
    """
    try:
        complete, found = complete_checkpoints(folder), all_checkpoints(folder)
        kept = [path for path in complete if path in complete[-keep:] or step_of(path) in steps]
    except OSError:  # tried again after the next save
        return
    if not kept:
        return
    older = [path for path in found[: found.index(kept[-1])] if path not in kept and path not in held]
    for path in [*older, *folder.glob(f"{UNIVERSAL}_*")]:
        try:
            (path / COMPLETE).unlink(missing_ok=True)  # first: a killed deletion leaves no folder that looks complete
            shutil.rmtree(path)
        except OSError as error:  # some file systems need free space to delete; the new checkpoint is complete
            _log.warning("%s: cannot be removed now (%s); it is tried again after the next save", path, error.strerror)


def _load_universal(engine: Any, path: Path, manifest: Manifest, scratch: Path) -> None:
    """Convert ``path`` into a folder below ``scratch``, on all ranks together, load that and delete it."""
    folder = scratch / f"{UNIVERSAL}_{path.name}"
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # from a killed resume: perhaps incomplete
        folder.mkdir(parents=True)
    distributed.barrier()
    state = ShardedState(path, manifest)
    mark(f"the conversion of {path}")
    with disk_full_as_rank_error(folder):
        write_parameters(state, folder, state.split(world_size)[rank])
        if rank == 0:
            write_common(state, folder)
    distributed.barrier()
    distributed.same_view(lambda: file_sizes(folder, file_names(folder)), str(folder))
    engine._config.load_universal_checkpoint = True
    mark(f"the load of {folder}")
    try:
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
    finally:
        engine._config.load_universal_checkpoint = False
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # `prune` tries again


def _hyper_parameters(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "step")}


def _set_steps(engine: Any, step: int) -> None:
    """Give each parameter group its own step count, in the type and on the device that its optimizer needs.

    When DeepSpeed's ZeRO 3 loads a universal checkpoint, all groups share one step tensor, so that each group's step
    increments the count of all (losses drift by 2e-3). It also leaves the tensor on the host; torch's fused Adam needs
    it on the device of the weights. DeepSpeed's own Adam optimizers count in integers.

    Raises:
        UserError: the load left a group out.
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
