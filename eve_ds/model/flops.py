"""How many floating-point operations the model's matrix products take: plain arithmetic on its shape.

A multiply-add counts as two. Left out are elementwise work (norms, activations, softmax, LayerScale), gathers, sums
written as products (a token's modality vector, the mean gate: less than 0.5 %), and what activation checkpointing
computes twice: these are the model's operations, the numerator of model FLOPs utilisation (Chowdhery et al., PaLM,
arXiv 2204.02311, appendix B). The CPU pads experts' rows and masked words to multiples (model/dispatch.py,
tasks/masked.py); that is not counted either.

Shapes: B samples, N tokens a sample, D dim, H hidden, E experts, k choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

from eve_ds.model.model_config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """Operations of the forward and of the backward pass."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Flops:
        return Flops(times * self.forward, times * self.backward)

    __rmul__ = __mul__


def product(rows: int, inner: int, columns: int, input_gradient: bool = True) -> Flops:
    """[rows, inner] x [inner, columns], and backward one product as large for each factor that has a gradient.

    Args:
        input_gradient: the first factor has one, too; pixels, for one, have none.
    """
    forward = 2 * rows * inner * columns
    return Flops(forward, (2 if input_gradient else 1) * forward)


def mlp(rows: int, dim: int, hidden: int) -> Flops:
    """D -> H -> D."""
    return product(rows, dim, hidden) + product(rows, hidden, dim)


def attention(batch: int, tokens: int, dim: int) -> Flops:
    """Queries, keys, values and output, [B, N, D]; scores and weighted sums are N x N whatever is masked."""
    inner = batch * product(tokens, dim, tokens)  # all heads together: h (D / h) = D
    return product(batch * tokens, dim, 3 * dim) + 2 * inner + product(batch * tokens, dim, dim)


def backbone_flops(
    config: ModelConfig, batch: int, patches: int = 0, text_tokens: int = 0, words: int | None = None
) -> Flops:
    """One pass of ``Backbone`` over [batch] images, texts or pairs.

    Args:
        config: the model's shape. With a ``capacity_factor`` some choices are dropped: the figure is then the most.
        batch: samples B.
        patches: visible patches of an image (the class token comes on top); 0 for texts alone.
        text_tokens: of a text as it is padded; 0 for images alone.
        words: tokens of it that are no padding, the only ones that visit experts; None: all.
    """
    image_tokens = patches + 1 if patches else 0
    tokens = image_tokens + text_tokens
    routed = image_tokens + (text_tokens if words is None else words)
    soft = len(config.soft_layers)
    # Padding is scored by the router, too, before it is left out.
    router = product(batch * tokens, config.dim, config.num_experts)
    experts = mlp(batch * routed * config.top_k, config.dim, config.mlp_hidden)
    hard = mlp(batch * tokens, config.dim, config.mlp_hidden)
    embedding = product(batch * patches, 3 * config.patch_size**2, config.dim, input_gradient=False)
    blocks = config.depth * attention(batch, tokens, config.dim)
    return embedding + blocks + (config.depth - soft) * hard + soft * (router + experts)


def pixel_decoder_flops(config: ModelConfig, batch: int, kept: int, dim: int, depth: int) -> Flops:
    """``PixelDecoder`` over [batch] images with ``kept`` visible patches.

    Args:
        dim: d, the decoder's width.
        depth: its blocks.
    """
    tokens = 1 + config.num_patches
    block = attention(batch, tokens, dim) + mlp(batch * tokens, dim, 4 * dim)
    embed = product(batch * (1 + kept), config.dim, dim)
    head = product(batch * (config.num_patches - kept), dim, 3 * config.patch_size**2)
    return embed + depth * block + head


def word_decoder_flops(config: ModelConfig, words: int) -> Flops:
    """``WordDecoder`` over ``words`` tokens in all."""
    return product(words, config.dim, config.dim) + product(words, config.dim, config.vocab_size)


def pretraining_flops(
    config: ModelConfig,
    pairs: int,
    text_length: int,
    masked_patches: int,
    masked_words: int,
    decoder_dim: int,
    decoder_depth: int,
    joint: bool = False,
) -> int:
    """Forward and backward of one micro-batch of masked modeling: passes, pixel decoder, word decoder.

    Args:
        config: the model's shape.
        pairs: images with a text each.
        text_length: tokens of each text, [CLS] and [SEP] included.
        masked_patches: of an image (``tasks.masking.masked_patches``).
        masked_words: of a text (``tasks.masking.masked_words``).
        decoder_dim: width of the pixel decoder.
        decoder_depth: its blocks.
        joint: one pass with patches and words masked at once, in place of two.
    """
    kept = config.num_patches - masked_patches
    passes = backbone_flops(config, pairs, kept, text_length)
    if not joint:
        passes += backbone_flops(config, pairs, config.num_patches, text_length)
    pixels = pixel_decoder_flops(config, pairs, kept, decoder_dim, decoder_depth)
    return (passes + pixels + word_decoder_flops(config, pairs * masked_words)).total
