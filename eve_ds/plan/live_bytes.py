"""Bytes that tensors hold at once while real code runs on the meta device, where tensors have shapes and no values."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

aten = torch.ops.aten


class _Form(NamedTuple):
    """All of a tensor without values that an operation's results depend on."""

    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    device: torch.device

    def empty(self) -> Tensor:
        made: Tensor = aten.empty_strided.default(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return made


def _form(value: Any) -> Any:
    """Of an argument, hashable."""
    if isinstance(value, Tensor):
        return _Form(value.dtype, value.shape, value.stride(), value.device)
    if isinstance(value, (tuple, list)):
        return tuple(map(_form, value))
    return type(value), value  # 1 and 1.0 are equal, and the results' dtypes are not


def _storages(values: Any) -> set[int]:
    if isinstance(values, (tuple, list)):
        return set().union(*map(_storages, values))
    return {values.untyped_storage()._cdata} if isinstance(values, Tensor) else set()


# What operations made of arguments of a form: a tensor, several, or the argument at a place, which they wrote into.
_results: dict[Any, _Form | tuple[_Form, ...] | int] = {}


class WithoutValues(TorchDispatchMode):
    """Within it, operations that need values run on the meta device.

    Args:
        selected: how many elements a boolean mask selects.
        scalar: what a tensor read as a Python number gives.
    """

    def __init__(self, selected: int, scalar: int) -> None:
        super().__init__()
        self.selected, self.scalar = selected, scalar

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return self.scalar
        if packet is aten.nonzero:
            return args[0].new_empty(self.selected, args[0].ndim, dtype=torch.int64)
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_):
            mask = args[1][0]
            if mask is not None and mask.dtype == torch.bool:
                if packet is aten.index:
                    return args[0].new_empty(self.selected, *args[0].shape[mask.ndim :])
                return torch.empty_like(args[0]) if packet is aten.index_put else args[0]
        return self._run(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call ``func``, or make anew what it made for arguments of the same form, in whichever rehearsal.

        A model repeats its layers, and torch works out most shapes in Python, in 0.1 ms an operation. A mode outside
        of this one, which may count operations, is shown each.
        """
        if _get_current_dispatch_mode() is not None:
            return func(*args, **kwargs)
        key = func, _form(args), _form(tuple(kwargs.items()))
        known, given = _results.get(key), (*args, *kwargs.values())
        if isinstance(known, int):
            return given[known]
        if known is not None:
            return known.empty() if isinstance(known, _Form) else tuple(form.empty() for form in known)
        out = func(*args, **kwargs)
        made = (out,) if isinstance(out, Tensor) else out
        if isinstance(made, tuple) and all(isinstance(each, Tensor) and each.is_meta for each in made):
            if not func._schema.is_mutable:
                if len(_storages(made) - _storages(given)) == len(made):  # no view, and without values
                    _results[key] = _form(out)
            elif key == (func, _form(args), _form(tuple(kwargs.items()))):  # nothing grew to take a result
                place = next((place for place, each in enumerate(given) if each is out), None)
                if place is not None:
                    _results[key] = place
        return out


class LiveBytes(WithoutValues):
    """Within it, every storage that an operation makes counts from its first tensor to its last.

    Args:
        known: tensors that do not count: weights, inputs.
        selected: as in ``WithoutValues``.
        scalar: as in ``WithoutValues``.

    Attributes:
        live: bytes held now, ``hold`` included.
        peak: the most that was held at once.
        held_at_peak: what of it came by ``hold``, by kind.
    """

    def __init__(self, known: Iterable[Tensor], selected: int, scalar: int) -> None:
        super().__init__(selected, scalar)
        self.live = self.peak = 0
        self._held: dict[str, int] = {}
        self.held_at_peak: dict[str, int] = {}
        self._storages: set[int] = set()
        self._known = [tensor.untyped_storage() for tensor in known]  # kept, so that no new storage takes their place
        self._storages.update(storage._cdata for storage in self._known)

    def hold(self, size: int, kind: str) -> None:
        """Count ``size`` bytes more that no operation makes here."""
        self._held[kind] = self._held.get(kind, 0) + size
        self._add(size)

    def spike(self, size: int) -> None:
        """Count ``size`` bytes that come and go."""
        self._add(size)
        self.live -= size

    def _add(self, size: int) -> None:
        self.live += size
        if self.live > self.peak:
            self.peak, self.held_at_peak = self.live, dict(self._held)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self._count(each)
        return out

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return
        self._storages.add(key)
        self._add(size)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size
