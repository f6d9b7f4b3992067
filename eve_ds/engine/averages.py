"""A moving average of the weights: fp32, beside the master weights of each rank.

DeepSpeed 0.19.8's ZeRO keeps the fp32 master weights of a rank in one flat tensor per parameter group. An average is
taken value by value, so that each rank averages its own part: dense weights and experts alike, at any stage, padding
included. To evaluate or export the averages, they and the masters are swapped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eve_ds.engine.checkpoint import same_layout
from eve_ds.engine.checkpoint_record import Manifest, Topology, load_file
from eve_ds.engine.whole_weights import ShardedState
from eve_ds.errors import StopError

CHUNK = 2**24  # values swapped at a time: the copy that it takes is 64 MiB
_KEY = "averages"


def file_name(rank: int) -> str:
    """Name of the file of a rank's averages in a checkpoint."""
    return f"averages_rank_{rank}.pt"


class Averages:
    """The averages of this rank's master weights; at first these themselves. Memory: 4 bytes for each.

    Args:
        engine: DeepSpeed's, of ZeRO 1, 2 or 3; its optimizer may be offloaded to the host, where the averages are then.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self._by_parameter = hasattr(self.optimizer, "fp32_partitioned_groups_flat")  # ZeRO 3
        self.values = [master.clone() for master in self._masters]

    @property
    def _masters(self) -> list[Tensor]:
        name = "fp32_partitioned_groups_flat" if self._by_parameter else "single_partition_of_fp32_groups"
        return [master.data for master in getattr(self.optimizer, name)]

    def update(self, decay: float) -> None:
        """``average = decay * average + (1 - decay) * master``, in place."""
        torch._foreach_lerp_(self.values, self._masters, 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """While open, masters and weights of the model are the averages; then every bit is what it was.

        A collective at both ends. StopError, which all ranks raise together, may end the block. After any other error
        the averages stay in the model: swapping back would wait for ranks that have no error; and the run ends.
        """
        self._exchange()
        try:
            yield
        except StopError:
            self._exchange()
            raise
        self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap values, not tensors: DeepSpeed holds views of the masters."""
        if self._by_parameter:
            self.optimizer.checkpoint_event_prologue()  # releases parameters that are gathered, with their old values
        for average, master in zip(self.values, self._masters, strict=True):
            for ours, theirs in zip(average.split(CHUNK), master.split(CHUNK), strict=True):
                kept = ours.clone()
                ours.copy_(theirs)
                theirs.copy_(kept)
        if self._by_parameter:
            for group in range(len(self.values)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            self.optimizer.checkpoint_event_epilogue()  # gathers those that stay whole on every rank
        else:
            self.optimizer.update_lp_params()

    def files(self) -> dict[str, Any]:
        """{name: content} of this rank's file in a checkpoint."""
        return {file_name(dist.get_rank()): {_KEY: self.values}}

    def load(self, path: Path, manifest: Manifest, topology: Topology) -> bool:
        """Take over the averages of the verified checkpoint ``path``, bit for bit, whatever its topology.

        Returns:
            False if it holds none; then nothing has changed.
        """
        if file_name(0) not in manifest.files:
            return False
        if same_layout(self.engine, path, manifest, topology):
            for average, saved in zip(self.values, _read(path, dist.get_rank()), strict=True):
                average.copy_(saved)
            return True
        parts = [_read(path, rank) for rank in range(manifest.topology.world_size)]
        state = ShardedState(path, manifest).with_masters(parts)
        for name, parameter in self.engine.module.named_parameters():
            for group, start, first, count in self._places(parameter):
                whole = state.whole(name)
                if state.num_experts(name):
                    ep_size = topology.expert_parallel_size  # ranks of an expert-parallel group are neighbors
                    whole = whole.chunk(ep_size)[dist.get_rank() % ep_size]
                self.values[group].narrow(0, start, count).copy_(whole.flatten().narrow(0, first, count))
        return True

    def _places(self, parameter: nn.Parameter) -> Iterator[tuple[int, int, int, int]]:
        """Where this rank's part of a parameter is: (flat tensor, start in it, first value of the parameter, count);
        nothing if it has no part."""
        found: Any = parameter
        if self._by_parameter:
            group, start, size = self.optimizer.grad_position[self.optimizer.get_param_id(found)]
            first = size * self.optimizer._get_param_partition_rank(found)
            if first < found.ds_numel:
                yield group, start, first, min(size, found.ds_numel - first)  # the last part is padded
        elif (mapping := found._hp_mapping) is not None:
            flat, own = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield mapping.param_group_index, flat.start, own.start, own.numel


def _read(path: Path, rank: int) -> list[Tensor]:
    return list(load_file(path / file_name(rank))[_KEY])
