"""Pixels and words to tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from eve_ds.model.embeddings import ImageEmbedding, TextEmbedding, patches


def test_projected_patches_are_a_convolution() -> None:
    torch.manual_seed(0)
    embedding, images = ImageEmbedding(8, 4, 6), torch.randn(2, 3, 8, 12)
    weight = embedding.projection.weight
    expected = F.conv2d(images, weight, embedding.projection.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding.projection(patches(images, 4)), expected)


def test_kept_patches_have_their_own_positions_in_the_given_order() -> None:
    embedding, images = ImageEmbedding(8, 4, 4), torch.randn(2, 3, 8, 8)
    whole, keep = embedding(images), torch.tensor([[3, 0], [1, 2]])
    kept = embedding(images, keep)
    torch.testing.assert_close(kept[:, 0], whole[:, 0])
    for sample in range(2):
        torch.testing.assert_close(kept[sample, 1:], whole[sample, 1 + keep[sample]])


def test_text_is_normalized_before_positions_and_type() -> None:
    embedding, ids = TextEmbedding(8, 11, 5, 1e-6), torch.tensor([[1, 2, 3]])
    words = F.layer_norm(embedding.words.weight[ids], (8,), eps=1e-6)
    torch.testing.assert_close(embedding(ids), words + embedding.positions[:3] + embedding.type_vector)


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"9 x 8 pixels .* patches of 4"):
        patches(torch.zeros(1, 3, 9, 8), 4)
    with pytest.raises(ValueError, match=r"model\.image_size"):
        ImageEmbedding(8, 4, 4)(torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match="texts of 6 tokens"):
        TextEmbedding(8, 11, 5, 1e-6)(torch.zeros(1, 6, dtype=torch.int64))
