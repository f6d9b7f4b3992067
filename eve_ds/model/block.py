"""A Transformer block: attention, then a feed-forward part that routes hard by modality, softly among experts or not.

Shapes: B samples, N tokens (image tokens first, then text), D dim, h heads, d = D / h, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.kernels.attention import attention
from eve_ds.kernels.layer_norm import LayerNorm
from eve_ds.kernels.mlp import mlp
from eve_ds.model.compiled import compilable, runs_compiled
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import MoE, Routed

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
        return self.proj(self.heads(self.qkv(x), bias))

    def heads(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """From ``qkv`` [B, N, 3 D] to what ``proj`` takes, [B, N, D]."""
        batch, tokens, width = qkv.shape
        dim = width // 3
        q, k, v = qkv.view(batch, tokens, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return attention(q, k, v, bias).transpose(1, 2).reshape(batch, tokens, dim)


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


def _rows(parts: list[Tensor]) -> Tensor:
    """[B, N, D], each of its own B and N, to all their rows [R, D]."""
    return torch.cat([part.flatten(0, 1) for part in parts])


def _split(rows: Tensor, parts: list[Tensor]) -> list[Tensor]:
    """The inverse of ``_rows``, for rows of another width."""
    sizes = [part.shape[0] * part.shape[1] for part in parts]
    return [each.view(*part.shape[:2], rows.shape[1]) for each, part in zip(rows.split(sizes), parts, strict=True)]


class Block(nn.Module):
    """Base of the kinds of block: pre-LayerNorm attention, LayerScale, drop path.

    Args:
        config: the model's shape.
    """

    Pass: ClassVar[type[Any]]  # a named tuple: what ``forward`` takes of each pass

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.attention = Attention(config.dim, config.num_heads)
        self.attention_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))
        self.mlp_scale = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def passes(self, *args: Any) -> list[Any]:
        """What ``forward`` takes, by pass."""
        size = len(self.Pass._fields)
        return [self.Pass(*args[start : start + size]) for start in range(0, len(args), size)]

    def attend_together(self, passes: Sequence[Any]) -> list[Tensor]:
        """x of each pass after the attention branch; compiled, each product is one for all passes."""
        if len(passes) == 1 or not torch.compiler.is_compiling():
            return [self.attend(each.x, each.bias, each.factors) for each in passes]
        xs = [each.x for each in passes]
        qkvs = _split(self.attention.qkv(self.attention_norm(_rows(xs))), xs)
        heads = [self.attention.heads(qkv, each.bias) for qkv, each in zip(qkvs, passes, strict=True)]
        branches = _split(self.attention.proj(_rows(heads)), heads)
        return [
            self.add(each.x, branch, self.attention_scale, None if each.factors is None else each.factors[0])
            for each, branch in zip(passes, branches, strict=True)
        ]

    def attend(self, x: Tensor, bias: Tensor | None, factors: BranchFactors) -> Tensor:
        """x [B, N, D] after the attention branch."""
        branch = self.attention(self.attention_norm(x), bias)
        return self.add(x, branch, self.attention_scale, None if factors is None else factors[0])

    def add(self, x: Tensor, branch: Tensor, scale: Tensor, factor: Tensor | None) -> Tensor:
        """x + scale * branch, the branch of each sample times its factor [B]."""
        return torch.addcmul(x, branch if factor is None else branch * factor[:, None, None], scale)


class DensePass(NamedTuple):
    """What a block without experts takes of one pass of the backbone."""

    x: Tensor
    bias: Tensor | None
    num_image_tokens: int
    factors: BranchFactors = None


class DenseBlock(Block):
    """A block without experts."""

    Pass = DensePass

    @compilable
    def forward(
        self, x: Tensor, bias: Tensor | None, num_image_tokens: int, factors: BranchFactors = None, *others: Any
    ) -> Any:
        """One pass, or several.

        Args:
            x: [B, N, D], its first ``num_image_tokens`` tokens from the image.
            bias: from ``key_bias``, or None.
            num_image_tokens: of x.
            factors: of the branches.
            others: these four of a second pass, and so on, flat as ``compilable`` takes arguments. Compiled, each
                product of a hard block is one for all passes.
        Returns:
            [B, N, D]; with others a tuple of one for each pass.
        """
        outs = self.several(self.passes(x, bias, num_image_tokens, factors, *others))
        return outs if others else outs[0]

    def one(self, given: DensePass) -> Tensor:
        """A pass by itself."""
        raise NotImplementedError

    def several(self, passes: Sequence[DensePass]) -> tuple[Tensor, ...]:
        """Several passes."""
        return tuple(self.one(each) for each in passes)


class HardBlock(DenseBlock):
    """Hard routing: image tokens to an image MLP, text tokens to a text MLP, each after its own LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.image_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.text_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.image_mlp = MLP(config.dim, config.mlp_hidden, config.activation)
        self.text_mlp = MLP(config.dim, config.mlp_hidden, config.activation)

    def one(self, given: DensePass) -> Tensor:
        x, bias, num_image_tokens, factors = given
        x = self.attend(x, bias, factors)
        parts = []
        if num_image_tokens:
            parts.append(self.image_mlp(self.image_norm(x[:, :num_image_tokens])))
        if num_image_tokens < x.shape[1]:
            parts.append(self.text_mlp(self.text_norm(x[:, num_image_tokens:])))
        branch = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return self.add(x, branch, self.mlp_scale, None if factors is None else factors[1])

    def several(self, passes: Sequence[DensePass]) -> tuple[Tensor, ...]:
        """All rows of all passes through each layer at once, so that a weight has one product, and one gradient. Only
        the compiler does without copies for that: it writes and reads rows where they are to lie."""
        if len(passes) == 1 or not torch.compiler.is_compiling():
            return super().several(passes)
        xs = self.attend_together(passes)
        starts = [each.num_image_tokens for each in passes]
        images = self._fed(self.image_mlp, self.image_norm, [x[:, :start] for x, start in zip(xs, starts, strict=True)])
        texts = self._fed(self.text_mlp, self.text_norm, [x[:, start:] for x, start in zip(xs, starts, strict=True)])
        return tuple(
            self.add(x, torch.cat(branch, dim=1), self.mlp_scale, None if each.factors is None else each.factors[1])
            for x, *branch, each in zip(xs, images, texts, passes, strict=True)
        )

    def _fed(self, feed: MLP, norm: LayerNorm, parts: list[Tensor]) -> list[Tensor]:
        rows = _rows(parts)
        return _split(feed(norm(rows)), parts) if len(rows) else parts


class SharedBlock(DenseBlock):
    """No routing: image and text tokens to the same MLP, after the same LayerNorm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.shared_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.shared_mlp = MLP(config.dim, config.mlp_hidden, config.activation)

    def one(self, given: DensePass) -> Tensor:
        x = self.attend(given.x, given.bias, given.factors)
        branch = self.shared_mlp(self.shared_norm(x))
        return self.add(x, branch, self.mlp_scale, None if given.factors is None else given.factors[1])


class SoftPass(NamedTuple):
    """What a softly routing block takes of one pass of the backbone."""

    x: Tensor
    bias: Tensor | None
    modality: Tensor
    valid: Tensor | None
    factors: BranchFactors = None
    draw: Tensor | None = None


class SoftBlock(Block):
    """Soft routing: all tokens, after one LayerNorm, to a mixture of experts."""

    Pass = SoftPass

    def __init__(self, config: ModelConfig, moe: MoE) -> None:
        super().__init__(config)
        self.moe_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.moe = moe
        self.jitters = config.router_jitter > 0

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        modality: Tensor,
        valid: Tensor | None,
        factors: BranchFactors = None,
        draw: Tensor | None = None,
        *others: Any,
    ) -> Any:
        """One pass, or several.

        Args:
            x: [B, N, D].
            bias: from ``key_bias``, or None.
            modality: [N] int64.
            valid: [B, N] bool, or None.
            factors: of the branches.
            draw: [B] in [0, 1), from which the router takes each sample's jitter. None: from torch's generator.
            others: these six of a second pass, and so on.
        Returns:
            [B, N, D], and shares of losses as from ``MoE``; with others a tuple of such pairs.
        """
        args = (x, bias, modality, valid, factors, draw, *others)
        passes = self.passes(*args)
        if getattr(self.moe, "routes_together", False) and runs_compiled(self):  # a layer of another class does not
            outs = self._after(*self.before_experts(*args))
        else:
            outs = tuple(self._one(each) for each in passes)
        return outs if others else outs[0]

    def _one(self, given: SoftPass) -> tuple[Tensor, Tensor]:
        x = self.attend(given.x, given.bias, given.factors)
        # By name, and only with router jitter: MoE layers of other classes, and hooks on them, take three arguments.
        drawn = {"draw": given.draw} if self.jitters and given.draw is not None else {}
        branch, aux = self.moe(self.moe_norm(x), given.modality, given.valid, **drawn)
        return self.add(x, branch, self.mlp_scale, None if given.factors is None else given.factors[1]), aux

    @compilable
    def before_experts(self, *args: Any) -> tuple[list[Tensor], Routed]:
        """What ``forward`` takes -> of each pass x [B, N, D] after the attention branch, and where the tokens go.
        Compiled alone of this block: the experts bring their own kernels, and after them there is one addition."""
        passes = self.passes(*args)
        xs = self.attend_together(passes)
        normed = [self.moe_norm(x) for x in xs]
        routed = self.moe.route([(x, p.modality, p.valid, p.draw) for x, p in zip(normed, passes, strict=True)])
        weights = routed.weights
        if passes[0].factors is not None:  # the factor of the branch is that of all its choices
            factors = [each.factors[1].float()[:, None].expand(each.x.shape[:2]) for each in passes]
            weights = weights * torch.cat([each.flatten() for each in factors])[:, None]
        # Not _replace: what that makes the compiler of torch 2.11 cannot return.
        return xs, Routed(**{**routed._asdict(), "weights": weights.to(routed.tokens.dtype)})

    def _after(self, xs: list[Tensor], routed: Routed) -> tuple[tuple[Tensor, Tensor], ...]:
        branches, shares = self.moe(routed)
        # The scale for all passes at once, and not by addcmul, whose gradients take a product more each.
        scaled = _split(branches * self.mlp_scale, xs)
        return tuple((x + branch, aux) for x, branch, aux in zip(xs, scaled, shares, strict=True))
