"""Each shape of attention that a training meets on a GPU is tried once, before it is used, on random inputs against the
plain formula in float32. A backend that is off is switched off for the process, and torch takes the next.

Fused backends have been wrong for some shapes alone: cuDNN's gradient of q is not a number where there is a mask, the
number of tokens leaves 64 when divided by 128, and all scores of a row are low (pytorch#196678).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes

from eve_ds.engine.distributed import launched_world
from eve_ds.kernels.attention import AttentionFunction, Trial, attention, make_trial, tolerance, worst_error
from eve_ds.model.block import Attention, Block
from eve_ds.tasks.base import Task

SWITCHES = {
    SDPBackend.CUDNN_ATTENTION: ("cuDNN", torch.backends.cuda.enable_cudnn_sdp),
    SDPBackend.FLASH_ATTENTION: ("flash attention", torch.backends.cuda.enable_flash_sdp),
    SDPBackend.EFFICIENT_ATTENTION: ("memory-efficient attention", torch.backends.cuda.enable_mem_efficient_sdp),
}
_log = logging.getLogger(__name__)


def _choice(trial: Trial) -> int:
    """The backend that ``F.scaled_dot_product_attention`` takes, a value of ``SDPBackend``."""
    return torch._fused_sdp_choice(trial.q, trial.k, trial.v, trial.bias)


def _same(x: Tensor) -> Tensor:
    return x


class AttentionGuard:
    """Tries each shape that passes through the blocks it watches.

    Args:
        run: the attention of the model.
        choice: the backend that it takes for a trial, a value of ``SDPBackend``.
    """

    def __init__(self, run: AttentionFunction = attention, choice: Callable[[Trial], int] = _choice) -> None:
        self._run, self._choice = run, choice
        self._seen: set[tuple[Any, ...]] = set()

    def watch(self, module: nn.Module) -> None:
        """Look at what enters the blocks within ``module``, in training. A block's hook runs as it stands where the
        block's own code is compiled, and before it is."""
        for part in module.modules():
            if isinstance(getattr(part, "attention", None), Attention):
                part.register_forward_pre_hook(self._before_block)

    def _before_block(self, block: Any, args: tuple[Any, ...]) -> None:
        passes = block.passes(*args) if isinstance(block, Block) else [(args[0], None)]
        for x, bias, *_ in passes:
            self._look_at(block, x, bias)

    def _look_at(self, block: Any, x: Tensor, bias: Tensor | None) -> None:
        heads = block.attention.num_heads
        shape = (x.shape, x.dtype, heads, bias is None)
        if shape in self._seen or 0 in x.shape or not (block.training and torch.is_grad_enabled()):
            return
        self._seen.add(shape)
        # Neither the FLOP counter of the first step nor activation checkpointing, which both see the block, see this.
        with _disable_current_modes(), saved_tensors_hooks(_same, _same):
            self.check(x, heads, bias)

    def check(self, x: Tensor, heads: int, bias: Tensor | None) -> None:
        """Switch off, with a warning, each backend that is off for inputs like x [B, N, D] with the mask ``bias``
        [B, 1, 1, N]. The last, torch's formula in float32, is taken as it is. Synchronizes."""
        trial = make_trial(x, heads, bias)
        for _ in SWITCHES:
            backend = SDPBackend(self._choice(trial))
            if backend not in SWITCHES or (error := worst_error(self._run, trial)) <= tolerance(x.dtype):
                return
            name, switch = SWITCHES[backend]
            switch(False)
            found = f"off by {error:.2g} (rounding explains {tolerance(x.dtype):.2g})"
            _log.warning(
                "rank %d: attention by %s is %s at [%d samples, %d heads, %d tokens, width %d] in %s, %s; it is "
                "switched off, and another backend computes",
                launched_world()[0],
                name,
                "not finite" if error == float("inf") else found,
                *trial.q.shape,
                str(x.dtype).removeprefix("torch."),
                "without a mask" if bias is None else "with a mask",
            )


def guard_attention(task: Task, device: torch.device) -> None:
    """Watch the blocks of a task that trains. On the CPU, attention is the plain formula: nothing is done there.

    Ranks need not agree: each has its own device, and any sound backend gives the same to rounding.
    """
    if device.type == "cuda":
        AttentionGuard().watch(task)
