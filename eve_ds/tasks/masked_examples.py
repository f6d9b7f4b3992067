"""Masked modeling's part of the report: images rebuilt and words predicted.

Legend: B samples, P patches, M masked, p side of a patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eve_ds.model.decoders import unpatchify
from eve_ds.model.embeddings import patches
from eve_ds.tasks.base import Batch, to_numpy
from eve_ds.tasks.masked_parts import EPSILON, PixelOutput, PixelTarget, WordOutput, patches_at
from preprocessing.text.tokenizer import Tokenizer


def rebuilt_images(images: Tensor, output: PixelOutput, patch_size: int, target: PixelTarget) -> dict[str, np.ndarray]:
    """``original``, ``masked`` (gray where masked) and ``rebuilt`` images: uint8 [B, H, W, 3].

    With normalized targets rebuilt patches have the mean and the contrast of the true ones, since those are not
    predicted.
    """
    images = images.float()
    pixels = patches(images, patch_size)
    place = patches_at(output.masked)
    masked, rebuilt = pixels.clone(), pixels.clone()
    masked[place] = 0
    rebuilt[place] = output.predicted
    if target == "normalized":
        variance, mean = torch.var_mean(pixels[place], dim=-1, correction=0, keepdim=True)
        rebuilt[place] = output.predicted * (variance + EPSILON).sqrt() + mean
    values = {"original": images, "masked": unpatchify(masked, patch_size), "rebuilt": unpatchify(rebuilt, patch_size)}
    return to_numpy({name: _to_pixels(value) for name, value in values.items()})


def predicted_words(batch: Batch, output: WordOutput) -> list[dict[str, Any]]:
    """One dict a sample.

    ``sample_id``; ``text_ids``, the true text without padding; ``positions`` of the masked places in it; ``truth`` and
    ``predicted`` ids there.
    """
    predicted = torch.zeros_like(batch["text_ids"])
    predicted[output.mask] = output.scores.argmax(dim=1)
    found = []
    for row, mask in enumerate(output.mask):
        found.append(
            {
                "sample_id": int(batch["sample_id"][row]),
                "text_ids": batch["text_ids"][row][batch["text_mask"][row].bool()].tolist(),
                "positions": mask.nonzero()[:, 0].tolist(),
                "truth": batch["text_ids"][row][mask].tolist(),
                "predicted": predicted[row][mask].tolist(),
            }
        )
    return found


def spelled(entry: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, list[str]]:
    """What ``predicted_words`` gives for a text, in words; masked places read [MASK]."""
    masked = list(entry["text_ids"])
    for position in entry["positions"]:
        masked[position] = tokenizer.mask_id
    ids = {"text_masked": masked, "truth": entry["truth"], "predicted": entry["predicted"]}
    return {name: [tokenizer.decode([token], skip_special=False) for token in found] for name, found in ids.items()}


def _to_pixels(images: Tensor) -> Tensor:
    """[B, 3, H, W] with mean = std = 0.5 -> uint8 [B, H, W, 3]."""
    return ((images * 0.5 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
