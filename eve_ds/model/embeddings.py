"""Pixels and word pieces to token vectors.

Shapes: B samples, P patches of an image, K of them kept, p patch side, L text tokens, D dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve_ds.kernels.layer_norm import LayerNorm


def patches(images: Tensor, patch_size: int) -> Tensor:
    """Cut images [B, 3, H, W] into [B, P, 3 p p], row by row; within a patch, by channel, row, column.

    Raises:
        ValueError: a side is not a multiple of the patch.
    """
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"images of {height} x {width} pixels do not divide into patches of {patch_size}")
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


class PatchProjection(nn.Conv2d):
    """A convolution's weights [D, 3, p, p] applied to patches [B, P, 3 p p]; dropped patches are not computed."""

    def forward(self, pixels: Tensor) -> Tensor:
        return F.linear(pixels.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class ImageEmbedding(nn.Module):
    """Class token and linearly projected patches, each with its learned position, and the image type vector.

    Args:
        dim: D.
        patch_size: p, pixels.
        num_patches: P.
    """

    without_weight_decay = ("positions",)

    def __init__(self, dim: int, patch_size: int, num_patches: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.projection = PatchProjection(3, dim, patch_size, stride=patch_size)
        self.class_token = nn.Parameter(torch.empty(dim))
        self.positions = nn.Parameter(torch.empty(1 + num_patches, dim))
        self.type_vector = nn.Parameter(torch.empty(dim))
        for parameter in (self.class_token, self.positions, self.type_vector):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Embed images.

        Args:
            images: [B, 3, H, W] float; cast to the weights' dtype.
            keep: [B, K] int64, the patches to embed, in this order, each with its own position. None: all.
        Returns:
            [B, 1 + K, D].
        Raises:
            ValueError: the images have another number of patches than there are positions.
        """
        pixels = patches(images, self.patch_size)
        if pixels.shape[1] + 1 != self.positions.shape[0]:
            raise ValueError(
                f"images of {images.shape[2]} x {images.shape[3]} pixels have {pixels.shape[1]} patches,"
                f" the model has positions for {self.positions.shape[0] - 1}; set model.image_size"
            )
        positions = self.positions[1:]
        if keep is not None:
            pixels = pixels.gather(1, keep.unsqueeze(2).expand(-1, -1, pixels.shape[2]))
            positions = F.embedding(keep, positions)
        tokens = self.projection(pixels) + positions
        class_token = (self.class_token + self.positions[0]).expand(tokens.shape[0], 1, -1)
        return torch.cat([class_token, tokens], dim=1) + self.type_vector


class TextEmbedding(nn.Module):
    """Normalized word vectors, to which learned positions and the text type vector are added.

    Args:
        dim: D.
        vocab_size: word pieces.
        num_positions: longest text, tokens.
        norm_eps: epsilon of the LayerNorm.
    """

    without_weight_decay = ("positions",)

    def __init__(self, dim: int, vocab_size: int, num_positions: int, norm_eps: float) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab_size, dim)
        self.positions = nn.Parameter(torch.empty(num_positions, dim))
        self.type_vector = nn.Parameter(torch.empty(dim))
        self.norm = LayerNorm(dim, eps=norm_eps)
        for parameter in (self.positions, self.type_vector):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [B, L] int64 -> [B, L, D].

        Raises:
            ValueError: L is beyond the position table.
        """
        if ids.shape[1] > self.positions.shape[0]:
            raise ValueError(f"texts of {ids.shape[1]} tokens, the model has positions for {self.positions.shape[0]}")
        return self.norm(self.words(ids)) + self.positions[: ids.shape[1]] + self.type_vector
