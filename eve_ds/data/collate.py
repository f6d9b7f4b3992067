"""Samples to batches: normalize images, pad texts to the longest one, stack numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eve_ds.data.samples import Sample
from eve_ds.data.transforms import normalize

Batch = dict[str, Tensor]
Arrays = dict[str, np.ndarray]


def collate(samples: Sequence[Sample], pad_id: int, max_text_length: int, pad_to_multiple: int = 1) -> Batch:
    """Collate samples of one dataset.

    Args:
        samples: B samples of a dataset of samples.py.
        pad_id: token id of the padding.
        max_text_length: maximum padded length, tokens.
        pad_to_multiple: the padded length is a multiple of this, unless ``max_text_length`` is smaller.
    Returns:
        images* [B,3,H,W] float32; text_ids [B,L] int64 and text_mask [B,L] bool (True on tokens); other arrays stacked,
        [B, ...]; numbers [B] int64.
    """
    return to_batch(stack(samples, pad_id, max_text_length, pad_to_multiple))


def stack(samples: Sequence[Sample], pad_id: int, max_text_length: int, pad_to_multiple: int = 1) -> Arrays:
    """Like ``collate``, but without normalization: images* [B,H,W,3] uint8, a quarter of the bytes."""
    arrays: Arrays = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name == "text_ids":
            arrays["text_ids"], arrays["text_mask"] = _pad(values, pad_id, max_text_length, pad_to_multiple)
        elif isinstance(values[0], np.ndarray):
            arrays[name] = np.stack(values)
        else:
            arrays[name] = np.array(values, dtype=np.int64)
    return arrays


def to_batch(arrays: Arrays) -> Batch:
    """Convert the output of ``stack`` to tensors and normalize the images."""
    return {
        name: normalize(value) if name.startswith("images") else torch.from_numpy(value)
        for name, value in arrays.items()
    }


def _pad(texts: Sequence[np.ndarray], pad_id: int, max_length: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(text) for text in texts])
    width = min(-(-int(lengths.max()) // multiple) * multiple, max(max_length, int(lengths.max())))
    ids = np.full((len(texts), width), pad_id, dtype=np.int64)
    mask = np.arange(width) < lengths[:, None]
    ids[mask] = np.concatenate(texts)
    return ids, mask
