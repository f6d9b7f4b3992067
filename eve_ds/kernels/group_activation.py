"""What lies between an expert layer's grouped products: bias and activation, and their gradients. One Triton kernel
each on CUDA (and a small one for the bias's gradient), in place of six passes over [P, H] in plain PyTorch.

Shapes: R rows sorted by group, E groups, H hidden. h is fc1's output, a the activation's; dz is the gradient of the
loss with respect to z. The Triton kernels were run under TRITON_INTERPRET=1 and compiled for sm_80 and sm_90, but not
timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eve_ds.kernels.choices import Choice, triton_choice, triton_serves
from eve_ds.kernels.grouped_mm import grouped_sum, plainly_add_group_bias_
from eve_ds.kernels.groups import Groups
from eve_ds.kernels.mlp import Activation


def bias_activation_(x_RH: Tensor, bias_EH: Tensor, groups: Groups, activation: Activation) -> Tensor:
    """x becomes h = x + bias[e] in the rows of group e, in place.

    Args:
        x_RH: contiguous where the Triton kernel is to serve.
        bias_EH: in x's dtype; rows may be strided.
        groups: where the groups' rows are.
        activation: of ``ACTIVATIONS``.
    Returns:
        activation(h), [R, H] in x's dtype; as h unspecified in rows of no group.
    """
    if triton_serves(x_RH) and x_RH.is_contiguous():
        from eve_ds.kernels import triton_groups  # imports triton, which need not be installed

        return triton_groups.bias_activation_(x_RH, bias_EH, groups.offsets, activation.name)
    return _plain(plainly_add_group_bias_(x_RH, bias_EH, groups) * activation.scale, activation)


def activation_gradient_(da_RH: Tensor, h_RH: Tensor, groups: Groups, activation: Activation) -> tuple[Tensor, Tensor]:
    """da becomes dh, in place; both of one dtype, contiguous where the Triton kernel is to serve.

    Returns:
        activation(h) [R, H], computed again: cheaper than keeping it; as dh unspecified in rows of no group. And the
        bias's gradient [E, H], as ``grouped_sum`` of dh.
    """
    if triton_serves(da_RH) and da_RH.is_contiguous() and h_RH.is_contiguous():
        from eve_ds.kernels import triton_groups

        return triton_groups.activation_gradient_(da_RH, h_RH, groups.offsets, activation.name)
    scaled_RH = h_RH * activation.scale
    activation.backward(da_RH, scaled_RH, grad_input=da_RH)  # the two scales cancel
    return _plain(scaled_RH, activation), grouped_sum(da_RH, groups)


def _plain(scaled_RH: Tensor, activation: Activation) -> Tensor:
    """activation(h) from scale x h, in its memory."""
    activation.forward(scaled_RH, out=scaled_RH)
    return scaled_RH if activation.scale == 1 else scaled_RH.div_(activation.scale)


def choice(device: torch.device) -> Choice:
    """The implementation for tensors on ``device``."""
    return triton_choice("bias and activation (experts that use grouped_mm)", device)
