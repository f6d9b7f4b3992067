"""A cache of large CPU buffers. glibc returns blocks of 32 MiB and more to the kernel when they are freed, and a new
one costs page faults: for weight gradients of experts, as much time as a third of their matrix products.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

SMALLEST = 32 << 20  # bytes; glibc caches smaller blocks
PAGE = 4096  # bytes; NumPy's large arrays start 16 bytes after a page, and writing a product there takes up to 2 x

_arrays: dict[int, list[np.ndarray]] = {}


def reused_empty_like(tensor: Tensor) -> Tensor:
    """``torch.empty_like`` for a contiguous tensor; a large one on the CPU reuses the memory of an earlier result
    that no tensor refers to any more. The cache holds as many buffers of a size as were
    ever in use at once."""
    size = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or size < SMALLEST:
        return torch.empty_like(tensor)
    arrays = _arrays.setdefault(size, [])
    # A tensor made from an array refers to it for as long as any view of the tensor lives.
    free = (index for index in range(len(arrays)) if sys.getrefcount(arrays[index]) == _UNUSED)
    index = next(free, len(arrays))
    if index == len(arrays):
        arrays.append(np.empty(size + PAGE, dtype=np.uint8))
    start = -arrays[index].ctypes.data % PAGE
    return torch.from_numpy(arrays[index][start : start + size]).view(tensor.dtype).view(tensor.shape)


def _count_unused() -> int:
    """``sys.getrefcount`` of an array that only its list refers to (2; other Python versions may differ)."""
    arrays = [np.empty(0, dtype=np.uint8)]
    return sys.getrefcount(arrays[0])


_UNUSED = _count_unused()
