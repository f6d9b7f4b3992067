"""A feed-forward network, fc2(activation(fc1(x))), as one autograd node that keeps the input of the activation but not
its output. ``expert_mlp`` does the same for the experts of a layer.

Shapes: R rows, D dim, H hidden. h is fc1's output, a the activation's; dz is the gradient of the loss with respect to
z.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALLEST = 32 << 20  # bytes; glibc caches smaller blocks
PAGE = 4096  # bytes; NumPy's large arrays start 16 bytes after a page, and writing a product there takes up to 2 x

_arrays: dict[int, list[np.ndarray]] = {}
aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """f(x) = plain(scale x) / scale; the matrix products before and after it apply both factors.

    Attributes:
        name: in ``ACTIVATIONS``.
        plain: the function without scale.
        scale: e.g. 1.702 for x sigmoid(1.702 x), which is silu(1.702 x) / 1.702.
        forward: (x, out=) writes plain(x).
        backward: (gradient, x, grad_input=) writes gradient * plain'(x); may be in place.
    """

    name: str
    plain: Callable[[Tensor], Tensor]
    scale: float
    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """f(x), by plain autograd."""
        return self.plain(x) if self.scale == 1 else self.plain(self.scale * x) / self.scale


ACTIVATIONS = {
    activation.name: activation
    for activation in (
        Activation("gelu", F.gelu, 1.0, aten.gelu.out, aten.gelu_backward.grad_input),
        Activation("quick_gelu", F.silu, 1.702, aten.silu.out, aten.silu_backward.grad_input),
    )
}


def mlp(
    x_RD: Tensor, fc1_weight_HD: Tensor, fc1_bias_H: Tensor, fc2_weight_DH: Tensor, fc2_bias_D: Tensor, activation: str
) -> Tensor:
    """fc2(activation(fc1(x))).

    Args:
        x_RD: rows.
        fc1_weight_HD: weight of fc1.
        fc1_bias_H: bias of fc1.
        fc2_weight_DH: weight of fc2.
        fc2_bias_D: bias of fc2.
        activation: a name in ``ACTIVATIONS``.
    Returns:
        [R, D] in x's dtype.
    """
    if torch.compiler.is_compiling():  # which fuses what lies between the products, and chooses what is kept
        a_RH = ACTIVATIONS[activation](F.linear(x_RD, fc1_weight_HD, fc1_bias_H))
        return F.linear(a_RH, fc2_weight_DH, fc2_bias_D)
    return _MLP.apply(x_RD, fc1_weight_HD, fc1_bias_H, fc2_weight_DH, fc2_bias_D, ACTIVATIONS[activation])


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        fc1_weight_HD: Tensor,
        fc1_bias_H: Tensor,
        fc2_weight_DH: Tensor,
        fc2_bias_D: Tensor,
        activation: Activation,
    ) -> Tensor:
        scale = activation.scale
        h_RH = torch.addmm(fc1_bias_H, x_RD, fc1_weight_HD.t(), beta=scale, alpha=scale)
        ctx.save_for_backward(x_RD, h_RH, fc1_weight_HD, fc2_weight_DH)
        ctx.activation = activation
        a_RH = activation.forward(h_RH, out=torch.empty_like(h_RH))
        return torch.addmm(fc2_bias_D, a_RH, fc2_weight_DH.t(), alpha=1 / scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, h_RH, fc1_weight_HD, fc2_weight_DH = ctx.saved_tensors
        activation, dy_RD = ctx.activation, dy_RD.contiguous()
        dfc1_weight_HD, dfc2_weight_DH = reused_empty_like(fc1_weight_HD), reused_empty_like(fc2_weight_DH)
        a_RH = activation.forward(h_RH, out=torch.empty_like(h_RH))  # recomputed: cheaper than keeping it
        torch.addmm(dfc2_weight_DH, dy_RD.t(), a_RH, beta=0, alpha=1 / activation.scale, out=dfc2_weight_DH)
        dh_RH = torch.mm(dy_RD, fc2_weight_DH, out=a_RH)
        activation.backward(dh_RH, h_RH, grad_input=dh_RH)  # the two scales cancel
        torch.mm(dh_RH.t(), x_RD, out=dfc1_weight_HD)
        return torch.mm(dh_RH, fc1_weight_HD), dfc1_weight_HD, dh_RH.sum(dim=0), dfc2_weight_DH, dy_RD.sum(dim=0), None


def reused_empty_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like`` for a contiguous tensor; a large one on the CPU reuses the memory of an earlier result that
    no tensor refers to any more.

    glibc returns blocks of 32 MiB and more to the kernel when they are freed, and a new one costs page faults: for
    weight gradients of experts, as much time as a third of their matrix products. The cache holds as many buffers of a
    size as were ever in use at once.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < SMALLEST:
        return torch.empty_like(tensor)
    arrays = _arrays.setdefault(size, [])
    # A tensor made from an array refers to it for as long as any view of the tensor lives.
    free = (index for index in range(len(arrays)) if sys.getrefcount(arrays[index]) == _UNUSED)
    index = next(free, len(arrays))
    if index == len(arrays):
        arrays.append(np.empty(size + PAGE, dtype=np.uint8))
    start = -arrays[index].ctypes.data % PAGE
    return torch.from_numpy(arrays[index][start : start + size]).view(tensor.dtype).view(tensor.shape)


def _count_unused() -> int:
    """``sys.getrefcount`` of an array that only its list refers to (2; other Python versions may differ)."""
    arrays = [np.empty(0, dtype=np.uint8)]
    return sys.getrefcount(arrays[0])


_UNUSED = _count_unused()
