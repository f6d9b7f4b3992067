"""A feed-forward network, fc2(activation(fc1(x))), as one autograd node that keeps what comes before the activation
but not what comes after it. ``expert_mlp`` does the same for many networks.

Shapes: R rows, D dim, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from eve_ds.kernels.buffers import reused_empty_like

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """f(x) = plain(scale x) / scale, so that both factors ride along with the matrix products around it.

    Attributes:
        plain: the function without scale.
        scale: e.g. 1.702 for x sigmoid(1.702 x), which is silu(1.702 x) / 1.702.
        forward: (x, out=) writes plain(x).
        backward: (gradient, x, grad_input=) writes gradient * plain'(x); may be in place.
    """

    plain: Callable[[Tensor], Tensor]
    scale: float
    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """f(x), by plain autograd."""
        return self.plain(x) if self.scale == 1 else self.plain(self.scale * x) / self.scale


ACTIVATIONS = {
    "gelu": Activation(F.gelu, 1.0, aten.gelu.out, aten.gelu_backward.grad_input),
    "quick_gelu": Activation(F.silu, 1.702, aten.silu.out, aten.silu_backward.grad_input),
}


def mlp(x_RD: Tensor, w1_HD: Tensor, b1_H: Tensor, w2_DH: Tensor, b2_D: Tensor, activation: str) -> Tensor:
    """fc2(activation(fc1(x))).

    Args:
        x_RD: rows.
        w1_HD: weight of fc1.
        b1_H: bias of fc1.
        w2_DH: weight of fc2.
        b2_D: bias of fc2.
        activation: a name in ``ACTIVATIONS``.
    Returns:
        [R, D] in x's dtype.
    """
    return _MLP.apply(x_RD, w1_HD, b1_H, w2_DH, b2_D, ACTIVATIONS[activation])


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, w1_HD: Tensor, b1_H: Tensor, w2_DH: Tensor, b2_D: Tensor, activation: Activation
    ) -> Tensor:
        scale = activation.scale
        h_RH = torch.addmm(b1_H, x_RD, w1_HD.t(), beta=scale, alpha=scale)
        ctx.save_for_backward(x_RD, h_RH, w1_HD, w2_DH)
        ctx.activation = activation
        a_RH = activation.forward(h_RH, out=torch.empty_like(h_RH))
        return torch.addmm(b2_D, a_RH, w2_DH.t(), alpha=1 / scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RD: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, h_RH, w1_HD, w2_DH = ctx.saved_tensors
        activation, dy_RD = ctx.activation, dy_RD.contiguous()
        dw1_HD, dw2_DH = reused_empty_like(w1_HD), reused_empty_like(w2_DH)
        a_RH = activation.forward(h_RH, out=torch.empty_like(h_RH))  # computed anew: cheaper than keeping it
        torch.addmm(dw2_DH, dy_RD.t(), a_RH, beta=0, alpha=1 / activation.scale, out=dw2_DH)
        dh_RH = torch.mm(dy_RD, w2_DH, out=a_RH)
        activation.backward(dh_RH, h_RH, grad_input=dh_RH)  # both scales cancel here
        torch.mm(dh_RH.t(), x_RD, out=dw1_HD)
        return torch.mm(dh_RH, w1_HD), dw1_HD, dh_RH.sum(dim=0), dw2_DH, dy_RD.sum(dim=0), None
