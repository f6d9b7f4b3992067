"""Decoders for masked modeling: tokens to pixels and to words; and patches to images.

Legend: B samples, P patches, K visible, M masked, p side of a patch, D width of the backbone, d of the decoder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.kernels.layer_norm import LayerNorm
from eve_ds.kernels.linear_cross_entropy import linear_cross_entropy
from eve_ds.model.block import MLP, Attention
from eve_ds.model.compiled import compilable


def unpatchify(patches: Tensor, patch_size: int) -> Tensor:
    """The inverse of ``embeddings.patches`` for square images: [B, P, 3 p p] -> [B, 3, H, W]."""
    batch, count, values = patches.shape
    side, channels = int(count**0.5), values // patch_size**2
    grid = patches.reshape(batch, side, side, channels, patch_size, patch_size)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, side * patch_size, side * patch_size)


def grid_positions(dim: int, side: int) -> Tensor:
    """Fixed sine-cosine positions of a square grid, zeros for the class token (MAE, arXiv 2111.06377).

    Args:
        dim: a multiple of 4: a quarter each for sine and cosine of row and column.
        side: patches in a row.
    Returns:
        [1 + side * side, dim] float32, class token first, then row by row.
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    one_axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = one_axis[:, None].expand(side, side, -1)
    columns = one_axis[None].expand(side, side, -1)
    grid = torch.cat([rows, columns], dim=2).reshape(side * side, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), grid]).float()


class DecoderBlock(nn.Module):
    """Pre-norm attention and feed-forward over all tokens, without mask.

    Args:
        dim: d.
        heads: divides ``dim``.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(dim, eps=1e-6)
        self.attention = Attention(dim, heads)
        self.mlp_norm = LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim, "gelu")

    @compilable
    def forward(self, x: Tensor) -> Tensor:
        """[B, N, d] -> [B, N, d]."""
        x = x + self.attention(self.attention_norm(x), None)
        return x + self.mlp(self.mlp_norm(x))


class PixelDecoder(nn.Module):
    """Pixels of the masked patches from the encoded visible ones (MAE's decoder, arXiv 2111.06377).

    Args:
        dim: D.
        num_patches: P of the whole image.
        patch_size: p.
        decoder_dim: d, a multiple of 4 and of ``heads``.
        depth: blocks.
        heads: attention heads.
        values: what is predicted of each patch; None: its pixels, 3 p p.
    """

    def __init__(
        self,
        dim: int,
        num_patches: int,
        patch_size: int,
        decoder_dim: int,
        depth: int,
        heads: int,
        values: int | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(decoder_dim))
        positions = grid_positions(decoder_dim, int(num_patches**0.5))
        self.register_buffer("positions", positions, persistent=False)
        self.positions: Tensor
        self.blocks = nn.ModuleList(DecoderBlock(decoder_dim, heads) for _ in range(depth))
        self.norm = LayerNorm(decoder_dim, eps=1e-6)
        self.head = nn.Linear(decoder_dim, values or 3 * patch_size**2)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, encoded: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """Predict masked patches.

        Args:
            encoded: [B, 1 + K, D] class token and visible patches from the backbone.
            kept: [B, K] int64, their places.
            masked: [B, M] int64, the places to predict.
        Returns:
            [B, M, values], in the order of ``masked``.
        """
        positions = self.positions.to(encoded.dtype)
        place = F.pad(kept + 1, (1, 0))
        visible = self.embed(encoded) + positions[place]
        x = torch.cat([visible, self.mask_token + positions[masked + 1]], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, visible.shape[1] :]))


class WordDecoder(nn.Module):
    """Word scores from tokens: dense, GELU, norm, then the word embedding as projection (BERT's head).

    Args:
        dim: D.
        vocab_size: V.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def forward(self, tokens: Tensor, word_embedding: Tensor, truth: Tensor | None = None) -> Any:
        """Score each token's words, or compare them with the truth.

        Args:
            tokens: [n, D].
            word_embedding: [V, D], the backbone's own table.
            truth: [m] int64, m <= n. None: the scores are asked for.
        Returns:
            scores [n, V]; with a truth what ``linear_cross_entropy`` returns for the first m tokens.
        """
        return _projected(self.norm(F.gelu(self.dense(tokens))), word_embedding, self.bias, truth)


class WordMLP(nn.Module):
    """Word scores from tokens: the paper's "two-layer MLP with a softmax layer" (arXiv 2308.11971), GELU between.

    The last layer is its own: V (D + 1) parameters, where ``WordDecoder`` has V + 2 D beside the word embedding.

    Args:
        dim: D.
        vocab_size: V.
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.projection = nn.Linear(dim, vocab_size)
        for layer in (self.dense, self.projection):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, truth: Tensor | None = None) -> Any:
        """As ``WordDecoder.forward``."""
        return _projected(F.gelu(self.dense(tokens)), self.projection.weight, self.projection.bias, truth)


def _projected(states: Tensor, weight: Tensor, bias: Tensor, truth: Tensor | None) -> Any:
    if truth is None:
        return F.linear(states, weight, bias)
    return linear_cross_entropy(states, weight, bias, truth)
