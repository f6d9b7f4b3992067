"""What ours is compared with: DeepSpeed's MoE layer, the dispatch-mask one, and attention in other ways.

Each takes the weights of our own layer, so that all do the same work.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.model.block import Attention
from eve_ds.model.moe import MoE
from preprocessing.errors import UserError

EINSUM_FILE = Path(__file__).resolve().parents[2] / "tests" / "support" / "einsum_moe.py"

AttentionCore = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def einsum_moe(layer: MoE, capacity_factor: float = 1.0) -> nn.Module:
    """The dispatch-mask layer (GShard) over the weights of ``layer``; the tests keep it as their reference.

    Raises:
        UserError: it is not there, as in an installed package.
    """
    spec = importlib.util.spec_from_file_location("eve_ds_einsum_moe", EINSUM_FILE)
    if spec is None or spec.loader is None or not EINSUM_FILE.is_file():
        raise UserError(
            f"{EINSUM_FILE}: the einsum reference comes with a clone of the repository; run the benchmark there, or "
            "leave it out (bench moe: --rivals deepspeed; bench step: --no_plain)"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EinsumMoE(layer, capacity_factor)


class ExpertMLP(nn.Module):
    """fc2(activation(fc1(x))) of plain torch layers, for DeepSpeed to copy."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(F.gelu(h) if self.activation == "gelu" else F.silu(1.702 * h) / 1.702)


class DeepSpeedMoE(nn.Module):
    """``deepspeed.moe.layer.MoE`` with a copy of the weights of ``layer``.

    No noise on the second choice and no random order in the queue, as in evaluation. It knows nothing of modality and
    padding.

    Args:
        layer: all of its experts must live here.
        capacity_factor: as ours, on top of the factor k; tokens beyond the capacity are dropped.
        drop_tokens: False: the capacity is what the fullest expert needs (``capacity_factor`` is not used), and every
            token is served, as in ours.
    Raises:
        UserError: DeepSpeed is not installed.
    """

    def __init__(self, layer: MoE, capacity_factor: float = 1.0, drop_tokens: bool = True) -> None:
        super().__init__()
        try:
            from deepspeed.moe.layer import MoE as Layer
        except ImportError as error:
            raise UserError(
                f"{error}: pip install -r requirements.txt, or leave it out (bench moe: --rivals einsum; bench step: "
                "--no_deepspeed)"
            ) from error
        experts = layer.experts
        hidden, dim = experts.fc1_weight.shape[1:]
        expert = ExpertMLP(dim, hidden, experts.activation)
        self.moe = Layer(
            dim,
            expert,
            num_experts=layer.num_experts,
            k=layer.top_k,
            capacity_factor=capacity_factor,
            drop_tokens=drop_tokens,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.to(experts.fc1_weight.device, experts.fc1_weight.dtype)
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(layer.router.weight)
            for index, copied in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
                copied.fc1.weight.copy_(experts.fc1_weight[index])
                copied.fc1.bias.copy_(experts.fc1_bias[index])
                copied.fc2.weight.copy_(experts.fc2_weight[index])
                copied.fc2.bias.copy_(experts.fc2_bias[index])

    def forward(self, x: Tensor, modality: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [B, N, D] -> y [B, N, D] and its load-balancing loss. ``modality`` and ``valid`` are not used."""
        y, aux, _ = self.moe(x)
        return y, aux


def plain_core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(d) + bias) v for [B, h, N, d], as the formula stands; the softmax in float32."""
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v


def sdpa_core(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """torch's fused attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


class ReferenceAttention(nn.Module):
    """``Attention`` with another way from queries, keys and values to the output.

    Args:
        attention: whose layers it uses (the same tensors).
        core: (q, k, v [B, h, N, d], bias) -> [B, h, N, d].
    """

    def __init__(self, attention: Attention, core: AttentionCore) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = attention.qkv, attention.proj, attention.num_heads
        self.core = core

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, N, D], bias from ``key_bias`` or None -> [B, N, D]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.core(q, k, v, bias).transpose(1, 2).reshape(batch, tokens, dim))


def replace(module: nn.Module, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]) -> int:
    """Put ``make(part)`` in the place of every part of that kind; returns how many there were."""
    found = [
        (parent, name, child)
        for parent in module.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
    for parent, name, child in found:
        setattr(parent, name, make(child))
    return len(found)
