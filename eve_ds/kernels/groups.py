"""Which rows of a tensor sorted by group belong to which group, and zeros where no group writes.

Shapes: R rows, E groups, N and K widths. Rows beyond the last group belong to none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from eve_ds.kernels.choices import triton_serves


def to_host(counts_E: Tensor, rows: int) -> list[int]:
    """Rows of each group as numbers: waits for the device. On meta, which has none, an even split of ``rows``."""
    if not counts_E.is_meta:
        return counts_E.tolist()
    even, rest = divmod(rows, counts_E.numel())
    return [even + (group < rest) for group in range(counts_E.numel())]


class Groups:
    """Which rows belong to which group; shared by all products of a layer.

    Args:
        counts: rows of each group, on the host; or an int64 tensor [E] on the device. With the latter nothing waits for
            the device but the loop of plain products, which reads it back once.
        device: where the rows are.
        rows: R; read on the meta device alone.
    """

    def __init__(self, counts: Sequence[int] | Tensor, device: torch.device, rows: int = 0) -> None:
        self._counts, self._device, self._rows = counts, device, rows

    def __len__(self) -> int:
        return len(self._counts)

    @property
    def on_host(self) -> bool:
        """Whether ``counts`` is known without waiting for the device."""
        return not isinstance(self._counts, Tensor) or "counts" in self.__dict__

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each group, on the host."""
        return to_host(self._counts, self._rows) if isinstance(self._counts, Tensor) else list(self._counts)

    @cached_property
    def offsets(self) -> Tensor:
        """[E] int32 on the device: where each group ends."""
        counts = torch.as_tensor(self._counts, device=self._device)
        return counts.cumsum(0, dtype=torch.int32)

    def slices(self) -> Iterator[tuple[int, slice]]:
        """(group, its rows) of every group that has rows."""
        start = 0
        for group, count in enumerate(self.counts):
            if count:
                yield group, slice(start, start + count)
            start += count

    def group_of_row(self, rows: int) -> Tensor:
        """[R] int64 on the device: the group of each row, E for those of none."""
        place = torch.arange(rows, dtype=torch.int32, device=self._device)
        return torch.searchsorted(self.offsets, place, right=True)


def zero_rest_(rows_RN: Tensor, groups: Groups) -> Tensor:
    """Set the rows of no group to zero, in place; contiguous rows are not read or written where there are none.

    Returns:
        ``rows_RN``.
    """
    if triton_serves(rows_RN) and rows_RN.is_contiguous():
        from eve_ds.kernels import triton_groups  # imports triton, which need not be installed

        return triton_groups.zero_rest_(rows_RN, groups.offsets)
    if groups.on_host:
        rows_RN[sum(groups.counts) :] = 0
        return rows_RN
    place = torch.arange(rows_RN.shape[0], device=rows_RN.device)
    return rows_RN.masked_fill_((place >= groups.offsets[-1]).unsqueeze(1), 0)


def zero_empty_groups_(x_ENK: Tensor, groups: Groups) -> Tensor:
    """Set the matrices of groups without rows to zero, in place; a Triton kernel touches no other matrix.

    Returns:
        ``x_ENK``.
    """
    if triton_serves(x_ENK) and x_ENK.is_contiguous():
        from eve_ds.kernels import triton_groups

        return triton_groups.zero_empty_groups_(x_ENK, groups.offsets)
    empty_E = groups.offsets.diff(prepend=groups.offsets.new_zeros(1)) == 0
    return x_ENK.masked_fill_(empty_E[:, None, None], 0)
