"""A Transformer block: attention, then a feed-forward part that routes hard by modality, softly among experts or not.

Shapes: B samples, N tokens (image tokens first, then text), D dim, h heads, d = D / h, H hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.kernels.attention import attention
from eve_ds.kernels.layer_norm import LayerNorm
from eve_ds.kernels.mlp import mlp
from eve_ds.model.compiled import compilable
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import MoE

# Finite, so that a row whose keys are all masked does not become NaN; the exponential of it less any score is 0.
MASKED = -1e30  # in fp16, which has no such number, half of the lowest that it has
# Factors of drop path, [2, B] in the block's dtype: of the attention branch (row 0) and the feed-forward branch (row 1)
# of each sample; 0 drops it. None: no drop path.
BranchFactors = Tensor | None


def key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B, 1, 1, N] from valid [B, N] bool: 0 where a token may be attended to, else low."""
    masked = max(MASKED, torch.finfo(dtype).min / 2)
    bias = torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, masked)
    return bias[:, None, None, :]


class QKV(nn.Linear):
    """Queries, keys and values in one product, [.., D] -> [.., 3 D]; biases on queries and values alone (BEiT)."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.weight, bias)


class Attention(nn.Module):
    """Self-attention over all tokens of a sample.

    Args:
        dim: D.
        num_heads: h; divides D.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QKV(dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, N, D], bias from ``key_bias`` (None: attend to all) -> [B, N, D]."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(attention(q, k, v, bias).transpose(1, 2).reshape(batch, tokens, dim))


class MLP(nn.Module):
    """fc2(activation(fc1(x))), D -> H -> D."""

    def __init__(self, dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        fc1, fc2 = self.fc1, self.fc2
        y = mlp(x.flatten(0, -2), fc1.weight, fc1.bias, fc2.weight, fc2.bias, self.activation)
        return y.view_as(x)


class Block(nn.Module):
    """Base of the kinds of block: pre-LayerNorm attention, LayerScale, drop path.

    Args:
        config: the model's shape.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, config.num_heads)
        self.attention_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.mlp_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def attend(self, x: Tensor, bias: Tensor | None, factors: BranchFactors) -> Tensor:
        """x [B, N, D] after the attention branch."""
        branch = self.attention(self.attention_norm(x), bias)
        return self.add(x, branch, self.attention_scale, None if factors is None else factors[0])

    def add(self, x: Tensor, branch: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
        """x + scale * branch, the branch of each sample times its factor [B]."""
        return torch.addcmul(x, branch if factor is None else branch * factor[:, None, None], scale)


class HardBlock(Block):
    """Hard routing: image tokens to an image MLP, text tokens to a text MLP, each after its own LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.image_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.text_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.image_mlp = MLP(config.dim, config.mlp_hidden, config.activation)
        self.text_mlp = MLP(config.dim, config.mlp_hidden, config.activation)

    @compilable
    def forward(self, x: Tensor, bias: Tensor | None, num_image_tokens: int, factors: BranchFactors = None) -> Tensor:
        """x [B, N, D], its first ``num_image_tokens`` tokens from the image -> [B, N, D]."""
        x = self.attend(x, bias, factors)
        parts = []
        if num_image_tokens:
            parts.append(self.image_mlp(self.image_norm(x[:, :num_image_tokens])))
        if num_image_tokens < x.shape[1]:
            parts.append(self.text_mlp(self.text_norm(x[:, num_image_tokens:])))
        branch = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.add(x, branch, self.mlp_scale, None if factors is None else factors[1])


class SharedBlock(Block):
    """No routing: image and text tokens to the same MLP, after the same LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.shared_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.shared_mlp = MLP(config.dim, config.mlp_hidden, config.activation)

    @compilable
    def forward(self, x: Tensor, bias: Tensor | None, num_image_tokens: int, factors: BranchFactors = None) -> Tensor:
        """As ``HardBlock.forward``."""
        x = self.attend(x, bias, factors)
        branch = self.shared_mlp(self.shared_norm(x))
        return self.add(x, branch, self.mlp_scale, None if factors is None else factors[1])


class SoftBlock(Block):
    """Soft routing: all tokens, after one LayerNorm, to a mixture of experts."""

    def __init__(self, config: ModelConfig, moe: MoE) -> None:
        super().__init__(config)
        self.moe_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.moe = moe
        self.jitters = config.router_jitter > 0

    @compilable
    def before_experts(self, x: Tensor, bias: Tensor | None, factors: BranchFactors) -> tuple[Tensor, Tensor]:
        """x [B, N, D] after the attention branch, and normalized for the experts. Compiled alone of this block: the
        experts bring their own kernels, and after them there is one addition."""
        x = self.attend(x, bias, factors)
        return x, self.moe_norm(x)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        modality: Tensor,
        valid: Tensor | None,
        factors: BranchFactors = None,
        draw: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            x: [B, N, D].
            bias: from ``key_bias``, or None.
            modality: [N] int64.
            valid: [B, N] bool, or None.
            factors: of the branches.
            draw: [B] in [0, 1), from which the router takes each sample's jitter. None: from torch's generator.
        Returns:
            [B, N, D], and shares of losses as from ``MoE``.
        """
        x, tokens = self.before_experts(x, bias, factors)
        # By name, and only with router jitter: MoE layers of other classes, and hooks on them, take three arguments.
        drawn = {"draw": draw} if self.jitters and draw is not None else {}
        branch, aux = self.moe(tokens, modality, valid, **drawn)
        return self.add(x, branch, self.mlp_scale, None if factors is None else factors[1]), aux
