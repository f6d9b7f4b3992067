"""Large CPU buffers that are used again. glibc gives blocks of 32 MiB and more back to the kernel when they are freed,
and a fresh one costs page faults: for weight gradients of experts, as much as a third of their matrix products.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

SMALLEST = 32 << 20  # bytes; glibc keeps smaller blocks by itself
PAGE = 4096  # bytes; NumPy's large arrays start 16 bytes after one, where a product takes up to twice as long to write

_arrays: dict[int, list[np.ndarray]] = {}


def reused_empty_like(tensor: Tensor) -> Tensor:
    """As ``torch.empty_like`` for a contiguous tensor; a large one on the CPU lies in memory that an earlier result no
    longer uses. As many buffers of a size are kept as were ever in use at once."""
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
    """What ``sys.getrefcount`` says of an array that only its list refers to (2, but it differs among Pythons)."""
    arrays = [np.empty(0, dtype=np.uint8)]
    return sys.getrefcount(arrays[0])


_UNUSED = _count_unused()
