"""EVE's backbone: one Transformer for images, texts and pairs.

Shapes: B samples, P patches, K kept patches, L text tokens, N = all tokens (class token, patches, text), D dim.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eve_ds.kernels.layer_norm import LayerNorm
from eve_ds.model.block import Block, HardBlock, SharedBlock, SoftBlock, key_bias
from eve_ds.model.compiled import runs_compiled
from eve_ds.model.embeddings import ImageEmbedding, TextEmbedding
from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import IMAGE, TEXT, MoE


class BackboneOutput(NamedTuple):
    """The output of ``Backbone``.

    Attributes:
        hidden: [B, N, D] after the final norm; class token, (kept) patches, text.
        before_norm: [B, N, D], the same before the final norm (published retrieval evaluation reads these).
        aux_per_layer: [soft layers] float32, this rank's share of each layer's load-balancing loss, unweighted.
        aux_loss: their mean, float32 scalar; 0 without soft layers.
        num_image_tokens: tokens of the image, class token included; 0 for text alone.
        router_z_loss: this rank's share of the router z-loss, unweighted, mean over the soft layers, float32 scalar; 0
            if its weight is 0.
    """

    hidden: Tensor
    before_norm: Tensor
    aux_per_layer: Tensor
    aux_loss: Tensor
    num_image_tokens: int
    router_z_loss: Tensor


@dataclass
class _Stream:
    """A pass on its way through the blocks."""

    x: Tensor
    bias: Tensor | None
    valid: Tensor | None
    modality: Tensor
    num_image_tokens: int
    factors: Tensor | None
    draws: Tensor | None
    aux: list[Tensor]


class Backbone(nn.Module):
    """Embeddings, blocks and final norm.

    Initial values: normal with standard deviation ``init_std``, biases 0 (BEiT), LayerScale constant, drawn from
    torch's global generator; routers and modality vectors with 0.02 whatever ``init_std`` is. Each MoE layer draws a
    seed for its experts from it, so that they have the same values at any expert-parallel size.

    Args:
        config: the shape.
        moe_layer: class (or factory) of the softly routing layers, called with ``MoE``'s keywords.
        published_routing: route and count padding as the published code does.
    Raises:
        UserError: the config makes no model.
    """

    def __init__(
        self, config: ModelConfig, moe_layer: Callable[..., MoE] = MoE, published_routing: bool = False
    ) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.image_embedding = ImageEmbedding(config.dim, config.patch_size, config.num_patches)
        self.text_embedding = TextEmbedding(config.dim, config.vocab_size, config.text_positions, config.norm_eps)
        self.embedding_norm = LayerNorm(config.dim, eps=config.norm_eps)
        self.blocks = nn.ModuleList(self._block(i, moe_layer, published_routing) for i in range(config.depth))
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)
        self._initialize(config.init_std, config.position_std)

    def _block(self, index: int, moe_layer: Callable[..., MoE], published_routing: bool) -> Block:
        config = self.config
        if index not in config.soft_layers:
            return (SharedBlock if index in config.shared_layers else HardBlock)(config)
        moe = moe_layer(
            dim=config.dim,
            hidden=config.mlp_hidden,
            num_experts=config.num_experts,
            top_k=config.top_k,
            activation=config.activation,
            capacity_factor=config.capacity_factor,
            modality_to_experts=config.modality_to_experts,
            published_routing=published_routing,
            seed=int(torch.randint(2**31, (), device="cpu")),
            init_std=config.init_std,
            modality_routing=config.modality_routing,
            z_loss=config.router_z_loss_weight > 0,
            jitter=config.router_jitter,
        )
        return SoftBlock(config, moe)

    @torch.no_grad()
    def _initialize(self, std: float, position_std: float) -> None:
        """Initial values of all modules but the experts, which get ``init_std`` when they are made."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
                # Patches have 3 p p inputs, which is D in EVE-Base; for a smaller D, keep the output's scale.
                width = module.weight[0].numel() if isinstance(module, nn.Conv2d) else self.config.dim
                nn.init.trunc_normal_(module.weight, std=std * min(1.0, self.config.dim / width) ** 0.5)
                bias = getattr(module, "bias", None)
                if bias is not None:
                    nn.init.zeros_(bias)
        image, text = self.image_embedding, self.text_embedding
        for vector in (image.class_token, image.positions, image.type_vector, text.positions, text.type_vector):
            nn.init.trunc_normal_(vector, std=position_std)

    def moe_layers(self) -> list[MoE]:
        """The softly routing layers, in order."""
        return [block.moe for block in self.blocks if isinstance(block, SoftBlock)]

    def forward(
        self,
        images: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        patch_keep: Tensor | None = None,
        draws: Tensor | None = None,
        *others: Tensor | None,
    ) -> Any:
        """Encode images, texts, or pairs, in one pass or in several. With a process group a collective of all ranks
        (see ``MoE.forward``).

        Args:
            images: [B, 3, H, W] float.
            text_ids: [B, L] int64; masked words are [MASK] ids already.
            text_mask: [B, L] bool or int, true on words, false on padding. None: no padding.
            patch_keep: [B, K] int64, the visible patches, encoded in this order. None: all.
            draws: [2 depth, B] float between 0 and 1, which decide on drop path in training: of each block's attention,
                then of its feed-forward part. With ``router_jitter`` another row for each block, [3 depth, B]: its
                router's jitter comes from it. None: from torch's generator.
            others: these five of a second pass, and so on. All go through a block before the next one, and together:
                compiled, a weight has one product and one gradient for all passes, and a block one graph.
        Returns:
            ``BackboneOutput``; with others a list of one for each pass.
        Raises:
            ValueError: neither images nor texts, or sizes that do not fit the model.
        """
        streams = [self._embed(images, text_ids, text_mask, patch_keep, draws)]
        streams += [self._embed(*others[start : start + 5]) for start in range(0, len(others), 5)]
        self._through_blocks(streams)
        outputs = [self._output(each) for each in streams]
        return outputs if others else outputs[0]

    @property
    def better_together(self) -> bool:
        """Whether several passes are better off together: where all blocks run compiled. One of a user's own class, put
        in place of ours, may take a single pass."""
        return all(map(runs_compiled, self.blocks))

    def _embed(
        self,
        images: Tensor | None,
        text_ids: Tensor | None,
        text_mask: Tensor | None,
        patch_keep: Tensor | None,
        draws: Tensor | None,
    ) -> _Stream:
        if images is None and text_ids is None:
            raise ValueError("the backbone needs images, text_ids or both")
        parts = []
        if images is not None:
            parts.append(self.image_embedding(images, patch_keep))
        num_image_tokens = parts[0].shape[1] if parts else 0
        if text_ids is not None:
            parts.append(self.text_embedding(text_ids))
        x = self.embedding_norm(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        valid = _valid(x, num_image_tokens, text_mask if text_ids is not None else None)
        modality = torch.full((x.shape[1],), TEXT, device=x.device)
        modality[:num_image_tokens] = IMAGE
        bias = None if valid is None else key_bias(valid, x.dtype)
        return _Stream(x, bias, valid, modality, num_image_tokens, self._branch_factors(x, draws), draws, [])

    def _output(self, stream: _Stream) -> BackboneOutput:
        x, aux = stream.x, stream.aux
        shares = torch.stack(aux) if aux else torch.zeros(0, device=x.device)
        with_z = shares.ndim == 2
        aux_per_layer, *z_per_layer = shares.unbind(1) if with_z else (shares,)
        aux_loss, *z_losses = (share.mean() if aux else share.sum() for share in (aux_per_layer, *z_per_layer))
        z_loss = z_losses[0] if with_z else torch.zeros_like(aux_loss)
        return BackboneOutput(self.norm(x), x, aux_per_layer, aux_loss, stream.num_image_tokens, z_loss)

    def _through_blocks(self, streams: Sequence[_Stream]) -> None:
        """All passes through all blocks, one block after the other."""
        for number, block in enumerate(self.blocks):
            soft = isinstance(block, SoftBlock)
            args = itertools.chain(*(self._args(each, number, soft) for each in streams))
            if self.config.checkpoint_activations and torch.is_grad_enabled():
                out = checkpoint(block, *args, use_reentrant=False)
            else:
                out = block(*args)
            for each, own in zip(streams, out if len(streams) > 1 else [out], strict=True):
                each.x = own[0] if soft else own
                each.aux += [own[1]] if soft else []

    def _args(self, stream: _Stream, number: int, soft: bool) -> tuple[Any, ...]:
        """What a block takes of a pass."""
        factors, draws, depth = stream.factors, stream.draws, self.config.depth
        own = None if factors is None else factors[2 * number : 2 * number + 2]
        if not soft:
            return stream.x, stream.bias, stream.num_image_tokens, own
        draw = draws[2 * depth + number] if draws is not None and self.config.router_jitter else None
        return stream.x, stream.bias, stream.modality, stream.valid, own, draw

    def _branch_factors(self, x: Tensor, draws: Tensor | None) -> Tensor | None:
        """Factors of all branches, [2 depth, B] in x's dtype: in training 0 where a sample's draw is below the block's
        rate of drop path, else 1 / (1 - rate). For all blocks at once, and no number of a block's own: so all of them
        run the same compiled code."""
        config = self.config
        if not (self.training and config.drop_path):
            return None
        draws = (
            torch.rand(2 * config.depth, x.shape[0], device=x.device) if draws is None else draws[: 2 * config.depth]
        )
        # Without values they are no other pass's: each rehearsal counts its own, fake tensors stay in their mode; and
        # the compiler warns of a cache.
        keeps = type(x) is Tensor and not x.is_meta and not torch.compiler.is_compiling()
        make = _drop_path_rates if keeps else _drop_path_rates.__wrapped__
        rates, kept = make(config.depth, config.drop_path, x.device)
        return ((draws >= rates) / kept).to(x.dtype)


@functools.lru_cache(maxsize=8)
def _drop_path_rates(depth: int, last: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each branch the rate of drop path, from 0 in the first block to ``last`` in the last one, and 1 minus it, both
    [2 depth, 1] float32: made once, not in each pass."""
    rates = torch.arange(depth, dtype=torch.float64, device=device) * last
    rates = (rates / max(1, depth - 1)).repeat_interleave(2)[:, None]
    return rates.float(), (1 - rates).float()


def _valid(x: Tensor, num_image_tokens: int, text_mask: Tensor | None) -> Tensor | None:
    """[B, N] bool, False on padding; None when nothing is padded."""
    if text_mask is None:
        return None
    image = torch.ones(x.shape[0], num_image_tokens, dtype=torch.bool, device=x.device)
    return torch.cat([image, text_mask.bool()], dim=1)
