"""DeepSpeed's ZeRO optimizers with few operations per gradient: what a GPU waits for is the launches, not the work.

Of the 10,020 operations that a step of EVE-Base launched, DeepSpeed 0.19.8 launched 6,000; 4,186 of them searched its
322 gradients for NaN and infinity (one H100; docs/benchmarks.md). Here

- that search is left out (stages 1 and 2): a gradient that is not finite makes the norm, which is reduced over all
  ranks, not finite, and DeepSpeed skips such a step. It does so with ``compute_grad_norm`` and ``check_grad_overflow``,
  which ``deepspeed_keys`` insists on, as it does on ``contiguous_gradients``;
- the norm is taken of all gradients of a group by one ``foreach`` operation, on a GPU in float32 (DeepSpeed: float64),
  so that one beyond 1e19 counts as not finite;
- gradients are copied into the buffer of a reduction, and out of it, together (stages 1 and 2). Each copy runs on the
  stream on which DeepSpeed makes it (with ``overlap_comm``: out of the buffer, on that of the reduction), later there
  than DeepSpeed's, but before any other stream is made to wait for it. Until then a gradient keeps its own memory: at
  most a buffer's size more;
- at stage 3 they are not copied into a buffer: ``lean_zero3``.

One Python hook per gradient remains, which DeepSpeed needs.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


def make_lean(optimizer: Any) -> None:
    """Replace the methods of a ZeRO optimizer, as ``deepspeed.initialize`` made it, by those below. Offloaded
    optimizers, which look at gradients in host memory, stay as they are."""
    offloads = getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False)
    if offloads:
        return
    if type(optimizer) is DeepSpeedZeroOptimizer:
        optimizer.__class__ = LeanZero12
    elif type(optimizer).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        from eve_ds.engine.lean_zero3 import LeanZero3  # only here: it imports torch's compiler

        optimizer.__class__ = LeanZero3
        optimizer.drop_buckets()


def stacked_norms(gradients: Any, params: Any, norm_type: float) -> list[Tensor]:
    """[a vector of the gradients' norms], which DeepSpeed gets in place of the gradients: it has the same norm as they
    have together; [] if there are none.

    Arguments as of its ``get_grad_norm_direct``, which pairs them by ``zip`` and skips parameters that model
    parallelism or pipelines replicate: there are none here.
    """
    counted = [each for each in gradients if not getattr(each, "_zero_padding", False)][: len(params)]
    if not counted:
        return []
    dtype = torch.float32 if counted[0].is_cuda else torch.float64  # on the CPU a float32 sum loses digits
    return [torch.stack(torch._foreach_norm(counted, norm_type, dtype=dtype))]


class LeanZero12(DeepSpeedZeroOptimizer):
    """ZeRO 1 and 2."""

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: ``step`` goes on to the norm, and sets ``overflow`` if that is not finite."""
        self.overflow = False

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
        """The norm of some gradients over all ranks, or -1 if it is not finite."""
        return super().get_grad_norm_direct(stacked_norms(gradients, params, norm_type), params, norm_type)

    def reduce_independent_p_g_buckets_and_remove_grads(self, param: Any, i: int) -> None:
        """Add a gradient to the bucket that is reduced next, and reduce that first if it is full.

        DeepSpeed 0.19.8's own, but that the copy into the bucket comes later, and without what our settings never
        reach: zenflow, folded expert parallelism, and the events of offloading.
        """
        gradient = self.get_gradient_for_reduction(param)
        alone = param.numel() > self.reduce_bucket_size or not getattr(param, "ds_grad_is_ready", True)
        if gradient is None or not param.numel() or alone:
            if gradient is not None and self.overlap_comm and not get_accelerator().resolves_data_dependency():
                # It is reduced where it lies. DeepSpeed lets go of it while that stream may still read and write it.
                gradient.record_stream(self.reduction_stream)
            super().reduce_independent_p_g_buckets_and_remove_grads(param, i)
            return
        comm_dtype = self.get_param_comm_dtype(param)
        bucket = self.ipg_buckets[comm_dtype]
        if bucket.elements + param.numel() > self.reduce_bucket_size:
            self.reduce_ipg_grads(comm_dtype=comm_dtype)
            if self.overlap_comm:
                bucket.index = 1 - bucket.index  # of two buffers: the other is being reduced
        param_id = self.get_param_id(param)
        if self.params_already_reduced[param_id]:
            raise AssertionError(f"parameter {param_id}: its gradient has been reduced before in this backward pass")
        place = bucket.buffer[bucket.index].narrow(0, bucket.elements, param.numel())
        self._queue_copy(gradient, place)
        bucket.copy_streams.add(get_accelerator().current_stream())  # that of the reduction waits for these
        bucket.elements += param.numel()
        bucket.grads.append(gradient)
        bucket.params.append((i, param.param_idx_in_group, param_id))
        bucket.has_moe_params = bucket.has_moe_params or is_moe_param(param)

    def reduce_ipg_grads(self, comm_dtype: torch.dtype | None = None) -> None:
        """Reduce the gradients of a bucket (None: of all), and keep those of this rank's partition."""
        self._flush_copies()
        super().reduce_ipg_grads(comm_dtype=comm_dtype)
        self._flush_copies()

    def copy_grads_in_partition(self, param: Tensor, group_idx: int | None = None) -> None:
        """Keep a reduced gradient elsewhere than in the bucket, which is about to be used again."""
        group_idx = self._get_param_group_idx(param) if group_idx is None else group_idx
        if self._use_compact_grad_partition_buffer(group_idx):
            super().copy_grads_in_partition(param, group_idx)
            return
        gradient = self.get_gradient_for_reduction(param)
        if self.grads_in_partition is None:  # type: ignore[has-type]
            self.grads_in_partition_offset = 0
            size = sum(each.numel() for group in self.params_in_partition for each in group)
            self.grads_in_partition = torch.empty(size, dtype=self.dtype, device=gradient.device)
        place = self.grads_in_partition.narrow(0, self.grads_in_partition_offset, param.numel())
        self._queue_copy(gradient, place)
        self.grads_in_partition_offset += param.numel()

    def _queue_copy(self, gradient: Tensor, place: Tensor) -> None:
        # By stream. No __init__ of this class has run: it was put in the place of DeepSpeed's.
        copies = self.__dict__.setdefault("_copies", {})
        copies.setdefault(get_accelerator().current_stream(), []).append((gradient, place))

    def _flush_copies(self) -> None:
        """Copy each queued gradient to its place, on the stream on which it was queued, and make it a view of that."""
        for stream, copies in self.__dict__.pop("_copies", {}).items():
            with get_accelerator().stream(stream):
                torch._foreach_copy_([place for _, place in copies], [gradient.view(-1) for gradient, _ in copies])
            for gradient, place in copies:
                gradient.data = place.view_as(gradient)
