"""``lean_zero`` for ZeRO 3, whose module of DeepSpeed imports torch's compiler: other runs do without it."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from eve_ds.engine.lean_zero import stacked_norms


class LeanZero3(DeepSpeedZeroOptimizer_Stage3):
    """ZeRO 3: the norm by one operation. Its two copies of each gradient stay."""

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> Tensor:
        """The norm of some gradients over all ranks, or -1 if it is not finite."""
        norms = stacked_norms(gradients, params, norm_type)
        return super().get_grad_norm_direct(norms or gradients, params, norm_type)
