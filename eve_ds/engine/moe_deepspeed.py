"""The MoE layer as DeepSpeed 0.19.8 needs it: the one file that touches DeepSpeed's private expert API.

DeepSpeed treats a subclass of ``AutoEPMoELayer`` as its own expert layer: experts' gradients are reduced over the ranks
that hold the same experts and divided by the whole world, ZeRO 1 to 3 partition them within that group, and checkpoints
hold exactly the parameters named ``experts.w1``, ``w2`` and ``w3``, per expert: hence the names in ``model.experts``.
The regression test: tests/multirank/test_deepspeed_equals_single.py.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.utils import groups

from eve_ds.model.moe import MoE


class DeepSpeedMoE(MoE, AutoEPMoELayer):
    """``eve_ds.model.moe.MoE`` with its experts distributed over ``ep_size`` ranks by DeepSpeed.

    Arguments, inputs and outputs are those of ``MoE``. Groups are made when ``deepspeed.initialize`` calls
    ``set_deepspeed_parallelism``; ranks 0 .. ep_size-1 share one copy of the experts, the next ep_size ranks another.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        MoE.__init__(self, *args, **kwargs)  # calls nn.Module.__init__ alone: AutoEPMoELayer's wants a layer to replace
        self.ep_group_name = self.expert_group_name = f"ep_size_{self.ep_size}"
        placement = {
            "allreduce": False,
            "group_name": self.ep_group_name,
            "ds_zero_partition_group_name": self.ep_group_name,
            "ds_zero_placement_family": "autoep_expert",
        }
        for parameter in self.experts.parameters():
            for name, value in placement.items():
                setattr(parameter, name, value)

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, folding_group_handles: Any = None
    ) -> None:
        """Make or find the expert-parallel group and describe where each expert lives (for universal checkpoints)."""
        if self.ep_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                self.ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel_
            )
        self.ep_group = groups._get_expert_parallel_group(self.ep_group_name)
        if dist.get_rank(self.ep_group) != self.ep_rank:
            raise RuntimeError(
                f"rank {dist.get_rank()} built the experts of ep_rank {self.ep_rank} but DeepSpeed gave it ep_rank "
                f"{dist.get_rank(self.ep_group)}; build the layer with ep_rank = rank % expert_parallel_size"
            )
        placement = legacy_uniform_autoep_placement_descriptor(self.num_experts, self.num_local_experts, self.ep_size)
        self.expert_placement_descriptor = placement
        for parameter in self.experts.parameters():
            shape = [self.num_experts, *getattr(parameter, "ds_shape", parameter.shape)[1:]]
            description = {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: shape,
                AUTOEP_PARAM_EP_RANK: self.ep_rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, self.ep_rank)),
            }
            setattr(parameter, DS_AUTOEP_UC_META, description)

    forward: Any = MoE.forward
