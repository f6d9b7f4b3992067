"""Samples to batches: images normalized, texts padded to the longest one, numbers stacked."""

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
    """Stack samples of one kind.

    Args:
        samples: B of them, as the data sets of samples.py give them.
        pad_id: token id of the padding.
        max_text_length: no text is padded beyond this.
        pad_to_multiple: the padded length is a multiple of this, as far as `max_text_length` allows.
    Returns:
        images* [B,3,H,W] float32; text_ids [B,L] int64 with text_mask [B,L] bool (True on tokens); arrays as they are,
        [B, ...]; numbers [B] int64.
    """
    return to_batch(stack(samples, pad_id, max_text_length, pad_to_multiple))


def stack(samples: Sequence[Sample], pad_id: int, max_text_length: int, pad_to_multiple: int = 1) -> Arrays:
    """What `collate` does short of normalizing: images* [B,H,W,3] uint8, a quarter of the bytes of a batch's."""
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
    """Tensors of what `stack` gives, images normalized."""
    return {
        name: normalize(value) if name.startswith("images") else torch.from_numpy(value)
        for name, value in arrays.items()
    }


def _pad(texts: Sequence[np.ndarray], pad_id: int, longest: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(text) for text in texts])
    width = min(-(-int(lengths.max()) // multiple) * multiple, max(longest, int(lengths.max())))
    ids = np.full((len(texts), width), pad_id, dtype=np.int64)
    mask = np.arange(width) < lengths[:, None]
    ids[mask] = np.concatenate(texts)
    return ids, mask
