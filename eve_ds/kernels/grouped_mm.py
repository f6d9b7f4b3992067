"""Grouped matrix products (rows of group e with weight e): torch's grouped kernel for bf16 on Hopper and Blackwell, a
loop of plain products elsewhere. Biases and sums per group: Triton's on CUDA.

Shapes: R rows sorted by group, E groups, K and N the widths of a product. Rows beyond the last group belong to none.

``torch.nn.functional.grouped_mm`` has its one-launch kernel for bf16 on CUDA devices of compute capability 9 and 10. It
accepts other devices and dtypes, the CPU too, but runs a loop of ``mm`` there after copying the offsets to the host
(PyTorch's aten/src/ATen/native/GroupedMMUtils.h, ``_grouped_mm_fallback``), which is no better than the loop here. It
leaves rows of no group unset, and on capability 10 the weight gradients of groups without rows
(pytorch/pytorch#172439); it refuses strides and addresses that are no multiples of 16 bytes, and has no bias.

These functions take no part in autograd: they are the pieces of an ``autograd.Function`` (``kernels/expert_mlp.py``).
``make test`` cannot run the grouped kernel itself without a GPU; the code around it is tested through torch's CPU
fallback.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.kernels.choices import Alternative, Choice, triton_serves
from eve_ds.kernels.groups import Groups, zero_empty_groups_, zero_rest_

CAPABILITIES = (9, 10)  # compute capability, major: where torch's grouped kernel exists
ALIGNMENT_BYTES = 16


def grouped_mm(x_RK: Tensor, weights_EKN: Tensor, groups: Groups) -> Tensor:
    """Rows of group e times ``weights[e]``. For x @ w.T with w [E, N, K], pass ``w.mT``, a view.

    Args:
        x_RK: [R, K].
        weights_EKN: [E, K, N] in x's dtype.
        groups: where the groups' rows are.
    Returns:
        [R, N] in x's dtype, products summed in float32; unspecified values in rows of no group.
    """
    if _grouped_kernel_takes(x_RK, weights_EKN):
        return F.grouped_mm(x_RK, weights_EKN, offs=groups.offsets)
    out_RN = x_RK.new_empty(x_RK.shape[0], weights_EKN.shape[2])
    for group, rows in groups.slices():
        torch.mm(x_RK[rows], weights_EKN[group], out=out_RN[rows])
    return out_RN


def grouped_weight_gradient(dy_RN: Tensor, x_RK: Tensor, groups: Groups) -> Tensor:
    """The gradient of w [E, N, K] in y = x @ w[e].T: dy.T @ x over each group's rows.

    Args:
        dy_RN: [R, N].
        x_RK: [R, K] in dy's dtype.
        groups: where the groups' rows are.
    Returns:
        [E, N, K] in dy's dtype, summed in float32; zeros for a group without rows.
    """
    if _grouped_kernel_takes(dy_RN, x_RK):
        return zero_empty_groups_(F.grouped_mm(dy_RN.t(), x_RK, offs=groups.offsets), groups)
    dw_ENK = dy_RN.new_zeros(len(groups), dy_RN.shape[1], x_RK.shape[1])
    for group, rows in groups.slices():
        torch.mm(dy_RN[rows].t(), x_RK[rows], out=dw_ENK[group])
    return dw_ENK


def add_group_bias_(y_RN: Tensor, bias_EN: Tensor, groups: Groups) -> Tensor:
    """Add ``bias[e]`` to the rows of group e, in place, and set rows of no group to zero.

    Args:
        y_RN: [R, N], contiguous where the Triton kernel serves (CUDA).
        bias_EN: [E, N], rows may be strided.
        groups: where the groups' rows are.
    Returns:
        ``y_RN``.
    """
    if triton_serves(y_RN) and y_RN.is_contiguous():
        from eve_ds.kernels import triton_groups  # imports triton, which need not be installed

        return triton_groups.add_group_bias_(y_RN, bias_EN, groups.offsets)
    return zero_rest_(plainly_add_group_bias_(y_RN, bias_EN, groups), groups)


def plainly_add_group_bias_(y_RN: Tensor, bias_EN: Tensor, groups: Groups) -> Tensor:
    """``add_group_bias_`` in plain PyTorch, which leaves rows of no group unspecified."""
    if groups.on_host:
        for group, rows in groups.slices():
            y_RN[rows] += bias_EN[group]
        return y_RN
    last = len(groups) - 1
    return y_RN.add_(bias_EN.index_select(0, groups.group_of_row(y_RN.shape[0]).clamp(max=last)))


def grouped_sum(y_RN: Tensor, groups: Groups) -> Tensor:
    """The sum of each group's rows: the gradient of its bias.

    Args:
        y_RN: [R, N], contiguous where the Triton kernel serves (CUDA).
        groups: where the groups' rows are.
    Returns:
        [E, N] in y's dtype, summed in float32; zeros for a group without rows.
    """
    if triton_serves(y_RN) and y_RN.is_contiguous():
        from eve_ds.kernels import triton_groups

        return triton_groups.grouped_sum(y_RN, groups.offsets)
    return plainly_grouped_sum(y_RN, groups)


def plainly_grouped_sum(y_RN: Tensor, groups: Groups) -> Tensor:
    """``grouped_sum`` without Triton."""
    if _grouped_kernel_takes(y_RN):
        # A product with eight columns of ones (8 x 2 bytes meet the kernel's alignment).
        ones_R8 = y_RN.new_ones(y_RN.shape[0], ALIGNMENT_BYTES // y_RN.element_size())
        return zero_empty_groups_(F.grouped_mm(ones_R8.t(), y_RN, offs=groups.offsets), groups)[:, 0]
    sums_EN = y_RN.new_zeros(len(groups), y_RN.shape[1])
    for group, rows in groups.slices():
        torch.sum(y_RN[rows], dim=0, out=sums_EN[group])
    return sums_EN


def _grouped_kernel_takes(*operands: Tensor) -> bool:
    """Whether torch's one-launch kernel takes these operands: bf16, aligned, on a device that has it, or on meta."""
    return (operands[0].is_meta or has_grouped_kernel(operands[0].device)) and all(
        operand.dtype == torch.bfloat16 and _aligned(operand) for operand in operands
    )


def has_grouped_kernel(device: torch.device) -> bool:
    """Whether torch has its one-launch grouped product for ``device``."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device)[0] in CAPABILITIES


def _aligned(operand: Tensor) -> bool:
    """Not empty, address and both widths in multiples of 16 bytes, one of the last two dimensions dense; a matrix by
    rows: its groups start at any of them, and in a matrix by columns that is any address, which torch's kernel asserts
    on the device, and a process cannot use its GPU after that."""
    unit = ALIGNMENT_BYTES // operand.element_size()
    inner, outer = sorted(operand.stride()[-2:])
    widths = (outer, operand.shape[-1], *(operand.shape[-2:] if operand.dim() == 3 else ()))
    if inner != 1 or operand.numel() == 0 or operand.data_ptr() % ALIGNMENT_BYTES:
        return False
    if operand.dim() == 2 and operand.stride(1) != 1:
        return False
    return not any(width % unit for width in widths)


def choice(device: torch.device) -> Choice:
    """The implementation for bf16 tensors on ``device``."""
    available = has_grouped_kernel(device)
    if available:
        reason = "bf16 on compute capability 9 or 10"
    elif device.type == "cuda":
        reason = f"this device is {torch.cuda.get_device_name(device)}; compute capability 9 or 10 is needed"
    else:
        reason = "for CUDA devices of compute capability 9 or 10 (H100, H200, B200)"
    return Choice(
        "grouped matrix products (experts)",
        (
            Alternative("torch grouped_mm", available, reason),
            Alternative("one product per expert", True, "always runs"),
        ),
    )
