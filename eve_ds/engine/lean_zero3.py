"""``lean_zero`` for ZeRO 3, whose module of DeepSpeed imports torch's compiler: other runs do without it."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from eve_ds.engine.lean_zero import stacked_norms


class LeanZero3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO 3: the norm by one operation, and no copy of each gradient before and after its reduction.

    DeepSpeed 0.19.8 copies a gradient into a bucket on the stream of the reduction, which waits for that on which it
    was made; once the bucket is full it puts the gradients together by parts, on the same stream, whether they lie in
    the bucket or elsewhere. So they stay where they are until then.
    """

    def drop_buckets(self) -> None:
        """Once, before the first backward pass: gradients are to stay where autograd made them."""
        self.contiguous_gradients = False
        for bucket in self.ipg_buckets.values():
            bucket.buffer = None

    def partition_grads(self, params_to_release: list[Any], grad_partitions: list[Tensor]) -> list[Tensor]:
        """Keep this rank's part of each reduced gradient: copied at the first micro-batch of a step, added at others.
        DeepSpeed calls this on the reduction's stream.

        Args:
            params_to_release: their gradients are freed, but not before this stream has read them. DeepSpeed's own
                forgets that where this rank has no part: it counts on the bucket.
            grad_partitions: flat; empty where this rank has no part.
        Returns:
            The parts kept: views of the optimizer's buffer of gradients.
        """
        places_of = self._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition  # private: it gives no other way
        found = [(places_of[param.ds_id], part) for param, part in zip(params_to_release, grad_partitions, strict=True)]
        parts = [part for _, part in found if part.numel()]
        places = [place.narrow(0, 0, part.numel()) for place, part in found if part.numel()]
        if parts:
            (torch._foreach_copy_ if self.micro_step_id == 0 else torch._foreach_add_)(places, parts)
        for param in params_to_release:
            if not get_accelerator().is_synchronized_device():
                param.grad.record_stream(get_accelerator().current_stream())
            param.grad = None
        return places

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
        """The norm of some gradients over all ranks, or -1 if it is not finite."""
        norms = stacked_norms(gradients, params, norm_type)
        return super().get_grad_norm_direct(norms or gradients, params, norm_type)
