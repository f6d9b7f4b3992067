"""Whole weights of a model that ranks hold in parts: its export as a folder that loads without DeepSpeed, the reading
of checkpoints of any world size, expert placement and ZeRO stage, and the universal format.

DeepSpeed 0.19.8 splits fp32 master weights and Adam's moments into one flat tensor per parameter group and rank:

- stages 1 and 2: the parameters of a group are concatenated, and the tensor is split into equal parts, one for each
  rank that shares the group; ``param_slice_mappings`` lists the fragments that a rank holds;
- stage 3: each parameter is split into equal parts, the last one padded;
- an expert is shared only by ranks with the same place in their expert-parallel groups (e, e + EP, e + 2 EP, ...).

``write_parameters`` and ``write_common`` write the universal format, which DeepSpeed's ``load_universal`` reads.
DeepSpeed's own converter is not used: it first writes every fragment to a file of its own, and its folders can only be
loaded at the ZeRO stage that they came from.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    CAT_DIM,
    EP_IS_EXPERT_PARAM,
    EP_NUM_EXPERTS,
    OPTIMIZER_STATE_DICT,
    PARAM,
    PARAM_GROUPS,
    PARAM_SHAPES,
)
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from eve_ds import config as config_tree
from eve_ds.engine.checkpoint_record import COMPLETE, DamagedError, Manifest, load_file, model_file, optimizer_files
from eve_ds.engine.distributed import barrier
from eve_ds.engine.watchdog import mark, mark_again
from eve_ds.model.moe import MoE
from eve_ds.weights.model_card import write_card
from eve_ds.weights.model_folder import HASHED, HASHES, metadata, write_hashes
from preprocessing.errors import UserError
from preprocessing.local_files import make_folder, write_atomic, write_json
from preprocessing.text.tokenizer import Tokenizer

MASTER = "fp32"
STATES = (MASTER, "exp_avg", "exp_avg_sq")
_NO_MODULE = -1  # an id that no module has, for ZeRO 3's record of the modules that use a parameter


class ShardedState:
    """Master weights and Adam moments of a checkpoint by parameter name. Files are memory-mapped.

    Args:
        path: the checkpoint's folder, checked by the caller (``Manifest.check``).
        manifest: its manifest.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        topology = manifest.topology
        self.path, self.stage, self.ep_size = path, topology.zero_stage, topology.expert_parallel_size
        self.world_size = topology.world_size
        self.model_state = load_file(model_file(path, self.stage))
        self._shards = [load_file(file)[OPTIMIZER_STATE_DICT] for file in optimizer_files(path, self.world_size)]
        self._group = {name: i for i, group in enumerate(self.model_state[PARAM_SHAPES]) for name in group}
        self._local_shape = {
            name: tuple(shape) for group in self.model_state[PARAM_SHAPES] for name, shape in group.items()
        }  # of an expert weight: [E / EP, ...]
        self._experts = {
            f"{layer}.experts.{weight}": int(placement["num_experts"])
            for layer, placement in manifest.experts.items()
            for weight in ("w1", "w2", "w3")
        }
        self._fragments = self._fragments_by_group if self.stage == 3 else self._fragments_by_mapping
        self.names = list(self._group)

    def with_masters(self, parts: list[list[Tensor]]) -> ShardedState:
        """This, with other values in place of the master weights: flat fp32 tensors, by rank and parameter group."""
        for shard, own in zip(self._shards, parts, strict=True):
            shard |= {"single_partition_of_fp32_groups": own, "fp32_flat_groups": own}
        return self

    @property
    def step(self) -> float:
        """Adam's step count. Raises UserError unless it is the same for all parameters."""
        steps = {float(state["step"]) for shard in self._shards for state in self._adam(shard).values()}
        if len(steps) != 1:
            raise UserError(f"{self.path}: its parameters have Adam step counts {sorted(steps)}, not one")
        return steps.pop()

    @property
    def common(self) -> dict[str, Any]:
        """The entries of rank 0's optimizer file that belong to no parameter."""
        kept = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
        return {key: self._shards[0][key] for key in kept if key in self._shards[0]}

    def split(self, parts: int) -> list[list[str]]:
        """The names of the parameters in ``parts`` lists of about equal size in bytes."""
        names = sorted(self.names, key=lambda name: -math.prod(self._local_shape[name]))
        return [names[part::parts] for part in range(parts)]

    def num_experts(self, name: str) -> int | None:
        """The number of experts of all ranks if ``name`` is an expert weight [E, ...], else None."""
        return self._experts.get(name)

    def whole(self, name: str, state: str = MASTER) -> Tensor:
        """A parameter's ``state`` (one of STATES): fp32, in its whole shape, experts [E, ...] in order.

        Raises:
            UserError: the fragments do not add up to the parameter.
        """
        if name not in self._experts:
            return self._join(name, state, range(self.world_size))
        places = range(self.ep_size)  # rank = place + EP x copy, as DeepSpeed makes its groups
        return torch.cat([self._join(name, state, range(place, self.world_size, self.ep_size)) for place in places])

    def _join(self, name: str, state: str, ranks: Iterable[int]) -> Tensor:
        mark_again()
        shape = self._local_shape[name]
        flat = torch.cat([part for rank in ranks for part in self._fragments(rank, name, state)])
        count = math.prod(shape)
        if not count <= flat.numel() < count + self.world_size:  # stage 3 pads
            raise UserError(f"{self.path}: {name} has {flat.numel()} values of {state}, not {count}")
        return flat[:count].view(shape)

    def _adam(self, shard: dict[str, Any]) -> dict[int, dict[str, Any]]:
        """{parameter group: {"step", "exp_avg", "exp_avg_sq"}} of a rank."""
        optimizer = shard[OPTIMIZER_STATE_DICT if self.stage == 3 else BASE_OPTIMIZER_STATE]
        return dict(optimizer["state"])

    def _fragments_by_mapping(self, rank: int, name: str, state: str) -> Iterator[Tensor]:
        """Stages 1 and 2: the part of a parameter that a rank holds, if any."""
        shard, group = self._shards[rank], self._group[name]
        place = shard["param_slice_mappings"][group].get(name)
        if place is not None:
            masters = shard["single_partition_of_fp32_groups"]
            flat = masters[group] if state == MASTER else self._adam(shard)[group][state]
            yield flat.narrow(0, place.start, place.numel)

    def _fragments_by_group(self, rank: int, name: str, state: str) -> Iterator[Tensor]:
        """Stage 3: every rank's equal part."""
        shard, group = self._shards[rank], self._group[name]
        placements = shard.get("ds_zero_partition_groups")  # only models with experts have them
        parts = placements[group]["partition_count"] if placements else self.world_size
        start = 0
        for other, shape in self.model_state[PARAM_SHAPES][group].items():
            size = -(-math.prod(shape) // parts)
            if other == name:
                flat = shard["fp32_flat_groups"][group] if state == MASTER else self._adam(shard)[group][state]
                yield flat.narrow(0, start, size)
                return
            start += size


def consolidated_state(checkpoint: Path) -> dict[str, Tensor]:
    """The fp32 master weights of a checkpoint, read by one process without a process group.

    Args:
        checkpoint: a folder ``step_NNNNNNNN`` with ``complete.json``; any ZeRO stage, ranks, expert-parallel size.
    Returns:
        {parameter name: fp32 CPU tensor}, experts whole [E, ...] as in ``eve_ds.engine.whole_weights.full_state``.
    Raises:
        UserError: no whole checkpoint, a damaged one, or one whose files disagree with its manifest.
    """
    state = _open(checkpoint)
    return {name: state.whole(name) for name in state.names}


def write_parameters(state: ShardedState, folder: Path, names: Iterable[str]) -> None:
    """Write ``folder/zero/NAME/{fp32,exp_avg,exp_avg_sq,step}.pt`` for each of ``names``."""
    step = state.step
    for name in names:
        kind: dict[str, Any] = {CAT_DIM: 0}
        if experts := state.num_experts(name):
            kind |= {EP_IS_EXPERT_PARAM: True, EP_NUM_EXPERTS: experts}
        target = folder / "zero" / name
        for key in STATES:
            _save({PARAM: state.whole(name, key), **kind}, target / f"{key}.pt")
        _save(torch.tensor(step), target / "step.pt")


def write_common(state: ShardedState, folder: Path) -> None:
    """Write what DeepSpeed loads apart from the parameters, in the layouts of all three stages."""
    # Stages 1 and 2 zip these with the run's own groups, whose number depends on the experts that a rank holds, and
    # stop at the shorter list; stage 3 copies the values of the first one into every group. Hence many empty groups.
    groups: list[dict[str, Any]] = [{"params": []} for _ in state.names]
    common = {**state.common, "ds_version": state.model_state["ds_version"], PARAM_GROUPS: groups}
    common[OPTIMIZER_STATE_DICT] = {"state": {0: {"step": torch.tensor(state.step)}}, PARAM_GROUPS: groups}
    _save(common, folder / "zero" / "optimizer_state.pt")
    records = {key: value for key, value in state.model_state.items() if key != "module"} | {"module": {}}
    for stage in (2, 3):
        _save(records, model_file(folder, stage))


def _open(checkpoint: Path) -> ShardedState:
    manifest = Manifest.read(checkpoint)
    try:
        manifest.check(checkpoint)
    except DamagedError as error:
        if (checkpoint / COMPLETE).exists():
            raise
        raise UserError(
            f"{checkpoint}: was removed while it was read, by a run that goes on there; try again"
        ) from error
    return ShardedState(checkpoint, manifest)


def _save(value: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as stream:
        torch.save(value, stream)


@contextlib.contextmanager
def gathered(module: nn.Module, zero_stage: int) -> Iterator[None]:
    """While open, each rank holds the full weights of the module (of the experts, its own), for use without the engine.
    What is written into them meanwhile is lost at ZeRO 3, and stays below it.

    A collective under ZeRO 3; does nothing below it.
    """
    if zero_stage < 3:
        yield
        return
    parameters: list[Any] = list(module.parameters())
    with deepspeed.zero.GatheredParameters(parameters):
        for parameter in parameters:  # marked as in use: else the first module to finish releases its parameters
            parameter.ds_active_sub_modules.add(_NO_MODULE)
        try:
            yield
        finally:
            for parameter in parameters:
                parameter.ds_active_sub_modules.discard(_NO_MODULE)


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """{name: fp32 CPU tensor} of all weights with all ranks' experts; {} but on rank 0. Called by all ranks."""
    groups = {}
    for prefix, layer in module.named_modules():
        if isinstance(layer, MoE) and layer.ep_size > 1:
            groups.update({f"{prefix}.experts.{name}": layer.ep_group for name, _ in layer.experts.named_parameters()})
    state = {}
    for name, parameter in module.named_parameters():
        value = safe_get_full_fp32_param(parameter)
        value = (parameter.detach().float() if value is None else value.detach()).contiguous()
        if name in groups:
            parts = [torch.empty_like(value) for _ in range(dist.get_world_size(groups[name]))]
            dist.all_gather(parts, value, group=groups[name])
            value = torch.cat(parts)
        if dist.get_rank() == 0:
            state[name] = value.cpu().clone()
    return state


def export_model(
    module: nn.Module,
    config: Any,
    tokenizer: Tokenizer,
    folder: Path,
    step: int,
    companions: Mapping[str, Any] | None = None,
) -> None:
    """Write model.safetensors, config.yaml, tokenizer.json, README.md (the card), hashes.json and ``companions``.

    Each file is written atomically. Called by all ranks.

    Args:
        module: the trained module.
        config: the resolved tree.
        tokenizer: of the run.
        folder: is made if it does not exist.
        step: optimizer steps so far; stored in the metadata of the weights.
        companions: {name: content} of the JSON files that the task's head needs, such as VQA's answer list.
    """
    mark(f"the export into {folder}")
    state = full_state(module)
    if dist.get_rank() == 0:
        make_folder(folder)
        (folder / HASHES).unlink(missing_ok=True)  # of an earlier export
        config_tree.save(config, folder / "config.yaml")
        tokenizer.save(folder)
        for name, content in (companions or {}).items():
            write_json(folder / name, content)
        write_atomic(folder / "model.safetensors", safetensors_bytes(state, metadata=metadata(step)))
        write_card(folder, step)
        write_hashes(folder, HASHED)
    barrier()
