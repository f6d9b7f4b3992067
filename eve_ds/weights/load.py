"""Weights from files into modules, strictly: every tensor is accounted for, or the error lists it."""

from __future__ import annotations

import argparse
import pickle
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from eve_ds.model.moe import MoE
from eve_ds.weights.errors import WeightsError, listed
from eve_ds.weights.hashes import check_hash, read_hashes

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin")
WRAPPERS = ("model", "module")  # keys under which unilm's and EVE's scripts save the weights, beside much else
# All that torch and its unpickler were seen to raise on files with changed bytes, cut off, or of another kind.
UNREADABLE = (
    OSError, EOFError, RuntimeError, MemoryError, SafetensorError, pickle.UnpicklingError, struct.error,
    ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError, OverflowError,
)  # fmt: skip


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of tensors on the CPU, whatever its naming; nothing in it is executed (``weights_only=True``).

    Args:
        path: ``.safetensors``, or ``.pt .pth .th .bin`` holding ``{"model": {...}}``, ``{"module": {...}}`` or the
            tensors themselves. What else lies beside "model" (an optimizer, the script's options) is read and dropped.
    Raises:
        WeightsError: no such file, unreadable, not a dictionary of tensors, values that are not finite, or another
            hash than ``hashes.json`` beside it has.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise WeightsError(f"{path}: weights files end in .safetensors, {', '.join(TORCH_SUFFIXES)}")
    with ThreadPoolExecutor(1) as beside:  # hashing takes no longer than reading, then
        sha256 = read_hashes(path.parent).get(path.name)
        hashed = None if sha256 is None else beside.submit(check_hash, path, sha256)
        state = _read(path)
        if hashed is not None:
            hashed.result()
    return _finite(path, state)


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # a script's options, saved beside: plain data
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's words advise to load it with all that it would run
            reason = "it is damaged, or holds other things than tensors; nothing in it was run"
        raise WeightsError(f"{path}: not a readable weights file ({reason})") from error
    if isinstance(state, dict):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(_named_tensor(*item) for item in state.items()):
        raise WeightsError(f"{path}: holds neither tensors by name nor {{'model': tensors by name}}")
    return state


def _finite(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise WeightsError(
            f"{path}: holds values that are no finite numbers ({listed(bad)}); take an earlier checkpoint"
        )
    return state


def _named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def load_state(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str | Path,
    may_lack: Sequence[str] = (),
) -> None:
    """Copy a state with EVE-DS names into a module. An expert-parallel rank takes its part of each layer's experts.

    Args:
        module: its parameters take the values, in their own dtype and place.
        state: all experts in each w1, w2, w3.
        source: named in errors.
        may_lack: prefixes of names that the state need not have (new heads keep their first values).
    Raises:
        WeightsError: other names are missing or unknown, or shapes differ; all are listed.
    """
    state = _local_experts(module, state)
    own = module.state_dict()
    check_fit(own, state, source, may_lack)
    module.load_state_dict(state, strict=False)


def check_fit(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    source: str | Path,
    may_lack: Sequence[str] = (),
) -> None:
    """Compare names and shapes of a state with those of a model (which may be on the meta device), ``own``.

    Other arguments and errors as in ``load_state``.
    """
    missing, unknown = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    faults = []
    for word, names, allowed in (("missing", missing, may_lack), ("unknown", unknown, ())):
        bad = [name for name in names if not name.startswith(tuple(allowed))]
        if bad:
            faults.append(f"{word}: {listed(bad)}")
    shapes = [
        f"{name} is {list(tensor.shape)}, the model has {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if shapes:
        faults.append(f"other sizes: {listed(shapes)}")
    kinds = [
        f"{name} ({tensor.dtype})"
        for name, tensor in state.items()
        if name in own and own[name].is_floating_point() != tensor.is_floating_point()
    ]
    if kinds:
        faults.append(f"not of floating point: {listed(kinds)}")
    if faults:
        raise WeightsError(f"{source}: the weights are not those of this model; {'; '.join(faults)}")


def _local_experts(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    local = dict(state)
    for prefix, layer in module.named_modules():
        if not isinstance(layer, MoE) or layer.ep_size == 1:
            continue
        for name in (f"{prefix}.experts.{weight}" for weight in ("w1", "w2", "w3")):
            if name in state and state[name].shape[0] == layer.num_experts:
                local[name] = state[name].chunk(layer.ep_size)[layer.ep_rank]
    return local
