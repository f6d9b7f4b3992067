"""Load weights from files into modules, strictly: an error lists every tensor that does not fit. Image positions are
interpolated to another image size."""

from __future__ import annotations

import argparse
import math
import pickle
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from eve_ds.model.model_config import ModelConfig
from eve_ds.model.moe import MoE
from eve_ds.weights.model_folder import check_hash, read_hashes
from preprocessing.errors import UserError, listed

TORCH_SUFFIXES = (".pt", ".pth", ".th", ".bin")
WRAPPERS = ("model", "module")  # keys of the weights in the checkpoints of unilm's and EVE's scripts
# All exceptions that torch and its unpickler have raised on corrupted, truncated or foreign files.
UNREADABLE = (
    OSError, EOFError, RuntimeError, MemoryError, SafetensorError, pickle.UnpicklingError, struct.error,
    ValueError, KeyError, IndexError, AttributeError, TypeError, AssertionError, OverflowError,
)  # fmt: skip
POSITIONS = "backbone.image_embedding.positions"


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a file of tensors to the CPU, in any naming scheme; no code in it is executed (``weights_only=True``).

    Args:
        path: ``.safetensors``, or ``.pt .pth .th .bin`` holding ``{"model": {...}}``, ``{"module": {...}}`` or the
            tensors themselves. Other entries beside "model" (optimizer, options of the script) are ignored.
    Raises:
        UserError: the file does not exist, cannot be read, is not a dictionary of tensors, has values that are not
            finite, or its hash differs from ``hashes.json`` beside it.
    """
    path = _weights_file(path)
    with ThreadPoolExecutor(1) as pool:  # hash while reading
        sha256 = read_hashes(path.parent).get(path.name)
        hashed = None if sha256 is None else pool.submit(check_hash, path, sha256)
        state = _read(path)
        if hashed is not None:
            hashed.result()
    return _finite(path, state)


def read_shapes(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, without values, on the meta device.

    Of ``.safetensors`` only the header is read, and ``.pt`` files are mapped. Args and errors as in ``load_weights``,
    but values and hashes are not checked.
    """
    state = _read(_weights_file(path), values=False)
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}


def _weights_file(path: str | Path) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if path.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UserError(f"{path}: weights files end in .safetensors, {', '.join(TORCH_SUFFIXES)}")
    return path


def _read(path: Path, values: bool = True) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            if values:
                return load_file(path)
            with safe_open(path, framework="pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}
                return {name: torch.empty(part.get_shape(), device="meta") for name, part in slices.items()}
        mapped = not values and zipfile.is_zipfile(path)  # torch's older format cannot be mapped
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):  # a script's options
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # which is read, or refused below
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own message advises weights_only=False
            reason = "it is damaged, or holds other objects than tensors; nothing in it was executed"
        raise UserError(f"{path}: not a readable weights file ({reason})") from error
    if isinstance(state, dict):
        state = next((state[key] for key in WRAPPERS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not state or not all(_named_tensor(*item) for item in state.items()):
        raise UserError(f"{path}: holds neither tensors by name nor {{'model': tensors by name}}")
    return state


def _finite(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    bad = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if bad:
        raise UserError(f"{path}: holds values that are not finite ({listed(bad)}); take an earlier checkpoint")
    return state


def _named_tensor(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, Tensor)


def load_state(
    module: nn.Module,
    state: dict[str, Tensor],
    source: str | Path,
    may_lack: Sequence[str] = (),
) -> None:
    """Copy a state with EVE-DS names into a module. An expert-parallel rank takes its part of the experts.

    Args:
        module: its parameters keep their dtype and device.
        state: with all experts in each w1, w2, w3.
        source: file name for error messages.
        may_lack: prefixes of names that the state may lack (new heads keep their initial values).
    Raises:
        UserError: other names are missing or unknown, or shapes differ; all are listed.
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
    """Compare names and shapes of a state with those of a model, ``own`` (which may be on the meta device).

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
    dtypes = [
        f"{name} ({tensor.dtype})"
        for name, tensor in state.items()
        if name in own and own[name].is_floating_point() != tensor.is_floating_point()
    ]
    if dtypes:
        faults.append(f"not of floating point: {listed(dtypes)}")
    if faults:
        raise UserError(f"{source}: the weights are not those of this model; {'; '.join(faults)}")


def _local_experts(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    local = dict(state)
    for prefix, layer in module.named_modules():
        if not isinstance(layer, MoE) or layer.ep_size == 1:
            continue
        for name in (f"{prefix}.experts.{weight}" for weight in ("w1", "w2", "w3")):
            if name in state and state[name].shape[0] == layer.num_experts:
                local[name] = state[name].chunk(layer.ep_size)[layer.ep_rank]
    return local


def interpolate_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Interpolate a square grid of positions bicubically, as the published code does. The class token's is copied.

    Args:
        positions: [1 + P, D], class token first, then patches row by row; P a square.
        num_patches: P', a square.
    Returns:
        [1 + P', D] in the same dtype (computed in float32); the input itself if P' = P.
    Raises:
        UserError: P or P' is not a square.
    """
    old, new = math.isqrt(positions.shape[0] - 1), math.isqrt(num_patches)
    if old**2 != positions.shape[0] - 1 or new**2 != num_patches:
        raise UserError(
            f"positions of {positions.shape[0] - 1} patches cannot be interpolated to {num_patches}: not square grids"
        )
    if old == new:
        return positions
    grid = positions[1:].float().T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.reshape(-1, num_patches).T.to(positions.dtype)])


def resize_positions(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state (EVE-DS names) with image positions for ``config.image_size``."""
    if POSITIONS not in state:
        return state
    return state | {POSITIONS: interpolate_positions(state[POSITIONS], config.num_patches)}
