"""LayerNorm over the last dimension: NVIDIA Apex's fused kernel on CUDA where Apex is installed, torch's elsewhere.

torch's own CUDA kernel is fused as well; Apex is faster in the backward pass of narrow rows. The Apex branch could not
be run here (no GPU): a test with a stand-in for Apex checks the arguments, no more.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.kernels.choices import Alternative, Choice

APEX_HOW = "build NVIDIA Apex from source with --cpp_ext --cuda_ext (github.com/NVIDIA/apex); never `pip install apex`"


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al., arXiv 1607.06450).

    Args:
        x: [..., D]; differentiable.
        weight: [D].
        bias: [D].
        eps: added to the (biased) variance.
    Returns:
        [..., D]; statistics are taken in float32.
    """
    # The compiler fuses torch's own with what stands around it, and cannot look into Apex's.
    fused = None if torch.compiler.is_compiling() or not _apex_takes(x, weight) else _apex_layer_norm()
    if fused is not None:
        return fused(x, weight, bias, weight.shape, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` over the last dimension, with weight and bias, that runs ``layer_norm``; the same parameters."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


def _apex_takes(x: Tensor, weight: Tensor) -> bool:
    """Apex needs one dtype; under autocast it computes in bf16 where torch uses float32, so torch's kernel is used."""
    return x.is_cuda and x.dtype == weight.dtype and x.numel() > 0 and not torch.is_autocast_enabled("cuda")


@functools.cache
def apex_state() -> tuple[bool, str, str]:
    """(whether NVIDIA Apex with its LayerNorm kernel is installed, the reason, how to get it). Runs none of its code.

    PyPI's ``apex`` is an unrelated web toolkit: it has no folder ``normalization``.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return False, "NVIDIA Apex is not installed", APEX_HOW
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    if not any((folder / "normalization").is_dir() for folder in folders):
        return False, "the `apex` installed is PyPI's web toolkit, not NVIDIA's", f"pip uninstall apex, then {APEX_HOW}"
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return False, "NVIDIA Apex was built without its CUDA extensions", APEX_HOW
    return True, "NVIDIA Apex is installed", ""


@functools.cache
def _apex_layer_norm() -> Callable[[Tensor, Tensor, Tensor, torch.Size, float], Tensor] | None:
    if not apex_state()[0]:
        return None
    return importlib.import_module("apex.normalization.fused_layer_norm").fused_layer_norm_affine


def choice(device: torch.device) -> Choice:
    """What serves tensors on ``device``."""
    available, reason, how = apex_state()
    if device.type != "cuda" and "web toolkit" not in reason:
        available, reason, how = False, "for CUDA tensors", ""
    return Choice(
        "LayerNorm",
        (
            Alternative("Apex fused_layer_norm", available, reason, how),
            Alternative("torch layer_norm", True, "always runs"),
        ),
    )
