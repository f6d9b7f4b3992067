"""The manifest of a checkpoint (``complete.json``) and the comparison with its files. No process group is needed.

DeepSpeed loads a checkpoint into another expert placement without an error, and wrongly. So the manifest records how
the files were split (world size, expert placement, ZeRO stage, DeepSpeed's version) beside their hashes, and the
contents of the files must agree with it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import AUTOEP_EXPERT_PLACEMENT, AUTOEP_LAYERS_KEY
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import nn

from eve_ds.engine.watchdog import mark_again
from eve_ds.weights.model_folder import COMPLETE
from preprocessing.errors import UserError, shortened
from preprocessing.local_files import check_regular, write_json

ABSENT = os.strerror(errno.ENOENT)
_READ_AGAIN = "nothing says that it is damaged: see to its permissions and its file system, and start again"
_OWN_FILES = "its files are not all of one save: put back those that are, or go on from an older checkpoint"
# The only classes in DeepSpeed's files that torch.load does not allow by itself.
torch.serialization.add_safe_globals([LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address])
# Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle a member of an enum by ``getattr``, which cannot be allowed.
ZeroStageEnum.__reduce_ex__ = lambda self, _: (ZeroStageEnum, (self.value,))

Sizes = dict[str, int | str]  # file below the checkpoint: bytes, or why it cannot be opened
Hashes = dict[str, tuple[int, str]]  # file below the checkpoint: bytes, SHA-256
Experts = dict[str, Any]  # module path of an MoE layer: DeepSpeed's descriptor of which rank has which expert


class DamagedError(UserError):
    """A checkpoint that was read differs from what was saved. (A read that failed is another error.)

    Args:
        path: its folder.
        what: what is damaged, for the message.
    """

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(path, what)
        self.path, self.what = path, what

    def __str__(self) -> str:
        return f"{self.path}: {self.what}; put a sound copy of it back, or go on from an older checkpoint"


@dataclass(frozen=True)
class Topology:
    """How a checkpoint's files were split. Loading into another topology goes through the universal format."""

    world_size: int
    expert_parallel_size: int
    zero_stage: int

    def differences(self, now: Topology) -> str:
        """The differences, as in "world_size 2 (now 1), expert_parallel_size 2 (now 1)"; "" if there are none."""
        changed = [key for key in vars(self) if getattr(self, key) != getattr(now, key)]
        return ", ".join(f"{key} {getattr(self, key)} (now {getattr(now, key)})" for key in changed)


@dataclass(frozen=True)
class Manifest:
    """The contents of ``complete.json``.

    Attributes:
        step: optimizer steps done.
        topology: of the run that wrote the checkpoint.
        experts: where each expert of each MoE layer was; empty for a model without experts.
        deepspeed_version: the version that wrote the files.
        state: the trainer's own state.
        files: size and hash of each file.
    """

    step: int
    topology: Topology
    experts: Experts
    deepspeed_version: str
    state: dict[str, Any]
    files: Hashes

    @property
    def skipped_steps(self) -> int:
        """Steps among ``step`` that changed no weight; Adam did not count them."""
        return int(self.state.get("skipped_steps", 0))

    def write(self, path: Path) -> None:
        """Write ``path/complete.json`` atomically. It is on disk on return."""
        record = {**vars(self), "topology": vars(self.topology)}
        write_json(path / COMPLETE, {**record, "digest": _digest(record)})

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Read ``path/complete.json``.

        Raises:
            DamagedError: it is not as it was written.
            UserError: it is missing or cannot be read, is of an older layout, or the files of another DeepSpeed.
            UserError: it is no regular file.
        """
        check_regular(path / COMPLETE)
        try:
            content = (path / COMPLETE).read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{path} is no whole checkpoint: it has no {COMPLETE}; name a folder step_NNNNNNNN"
            ) from error
        except OSError as error:
            raise _unreadable(path / COMPLETE, error) from error
        try:
            record = json.loads(content)
            sound = record.pop("digest", None) in (None, _digest(record))  # older versions wrote none
            missing = {"experts", "deepspeed_version"} - record.keys()
            if not missing:
                topology = Topology(**{key: int(value) for key, value in record["topology"].items()})
                files = {str(name): (int(size), str(digest)) for name, (size, digest) in record["files"].items()}
                experts, version = dict(record["experts"]), str(record["deepspeed_version"])
                found = cls(int(record["step"]), topology, experts, version, dict(record["state"]), files)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise DamagedError(path, f"{COMPLETE} is damaged") from error
        if not sound:
            raise DamagedError(path, f"{COMPLETE} is damaged (its digest differs)")
        if not missing and (outside := [name for name in found.files if {"", ".."} & set(name.split("/"))]):
            raise DamagedError(path, f"{COMPLETE} names a file outside of the checkpoint, {outside[0]!r}")
        if missing:
            raise UserError(
                f"{path / COMPLETE} does not record {' and '.join(sorted(missing))}, so that a load could be wrong in "
                "silence (an older EVE-DS wrote it); start in another output_dir"
            )
        if found.deepspeed_version != deepspeed.__version__:
            raise UserError(
                f"{path}: written by DeepSpeed {found.deepspeed_version}, this is {deepspeed.__version__}; "
                "install the former, since the files are private to a version"
            )
        return found

    def check_sizes(self, path: Path, found: Mapping[str, int | str]) -> None:
        """Raise DamagedError if a file is missing or not ``found`` in its recorded size, UserError if unreadable."""
        for name, (size, _) in self.files.items():
            seen = found[name]
            if seen == ABSENT:
                raise DamagedError(path, f"{name} is missing")
            if isinstance(seen, str):
                raise UserError(f"{path / name}: cannot be read ({seen}); {_READ_AGAIN}")
            if seen != size:
                raise DamagedError(path, f"{name} has {seen} bytes, not {size}")

    def differing(self, found: Hashes) -> list[str]:
        """The files whose hashes ``found`` are not the recorded ones."""
        return [name for name, entry in self.files.items() if found.get(name) != entry]

    def check_contents(self, path: Path) -> None:
        """Raise UserError unless what DeepSpeed wrote into the files agrees with the manifest."""
        topology = self.topology
        weights = load_file(model_file(path, topology.zero_stage))
        inside = {
            "world_size": weights.get("dp_world_size"),
            "zero_stage": weights.get("ds_config", {}).get("zero_optimization", {}).get("stage"),
            "experts": {
                layer["module_path"]: layer[AUTOEP_EXPERT_PLACEMENT] for layer in weights.get(AUTOEP_LAYERS_KEY) or ()
            },
            "deepspeed_version": weights.get("ds_version"),
            "expert_parallel_size": [layer["ep_size"] for layer in weights.get(AUTOEP_LAYERS_KEY) or ()],
        }
        said = {**vars(topology), "experts": self.experts, "deepspeed_version": self.deepspeed_version}
        said["expert_parallel_size"] = [topology.expert_parallel_size] * len(self.experts)
        for key, value in inside.items():
            if value != said[key]:
                raise UserError(
                    f"{path}: {COMPLETE} says {key} {said[key]} but {model_file(path, topology.zero_stage).name} was "
                    f"written with {value}; {_OWN_FILES}"
                )
        optimizer_files(path, topology.world_size)

    def check(self, path: Path) -> None:
        """Check sizes, hashes and contents, by one process. Raises UserError or DamagedError."""
        self.check_sizes(path, file_sizes(path, self.files))
        if broken := self.differing(hash_files(path, self.files)):
            raise DamagedError(path, f"{broken[0]} is damaged (its hash differs)")
        self.check_contents(path)


def experts_of(module: nn.Module) -> Experts:
    """{module path: placement descriptor} of the MoE layers of a module that DeepSpeed has initialized."""
    found = {name: getattr(layer, "expert_placement_descriptor", None) for name, layer in module.named_modules()}
    return {name: placement for name, placement in found.items() if placement is not None}


def model_file(path: Path, zero_stage: int, rank: int = 0) -> Path:
    """The file with DeepSpeed's own records and the 16-bit weights: one file, or one per rank at stage 3."""
    prefix = f"zero_pp_rank_{rank}_" if zero_stage == 3 else ""
    return path / f"{prefix}mp_rank_00_model_states.pt"


def optimizer_files(path: Path, world_size: int) -> list[Path]:
    """The files with each rank's master weights and moments, in rank order. Raises UserError if one is missing."""
    found = [
        [file for prefix in ("", "bf16_") if (file := path / f"{prefix}zero_pp_rank_{rank}_{_OPTIMIZER}").is_file()]
        for rank in range(world_size)
    ]
    surplus = len(list(path.glob(f"*zero_pp_rank_*_{_OPTIMIZER}"))) - world_size
    if surplus or any(len(files) != 1 for files in found):
        raise UserError(
            f"{path}: there is not one optimizer file for each of the {world_size} ranks that {COMPLETE} names; "
            f"{_OWN_FILES}"
        )
    return [files[0] for files in found]


_OPTIMIZER = "mp_rank_00_optim_states.pt"


def load_file(path: Path, mmap: bool = True) -> dict[str, Any]:
    """Load one of a checkpoint's files without running code from it; tensors are memory-mapped if ``mmap`` is true.

    Raises UserError if the file is unreadable.
    """
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = shortened(" ".join(str(error).split()), 200)
        raise UserError(
            f"{path}: not readable as a checkpoint file ({reason}); it needs the torch and DeepSpeed that wrote it"
        ) from error


def file_names(path: Path) -> list[str]:
    """All files below ``path`` but the manifest, sorted."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != COMPLETE)


def file_sizes(path: Path, names: Iterable[str]) -> Sizes:
    """{name: bytes of the file ``path/name``, or the system's message why it cannot be opened}."""
    found: Sizes = {}
    for name in names:
        try:
            check_regular(path / name)  # opening a pipe would wait
            with open(path / name, "rb") as stream:  # an open makes a network file system ask its server
                found[name] = os.fstat(stream.fileno()).st_size
        except UserError:
            found[name] = "it is no regular file"
        except OSError as error:
            found[name] = ABSENT if error.errno == errno.ENOTDIR else os.strerror(error.errno or 0)
    return found


def hash_files(path: Path, names: Iterable[str], threads: int = 4) -> Hashes:
    """{name: (bytes, SHA-256)} of these files below ``path``, in threads, as hashing releases the GIL.

    Raises:
        UserError: one cannot be read.
    """

    def entry(name: str) -> tuple[str, tuple[int, str]]:
        for last in (False, False, True):
            try:
                with open(path / name, "rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                    mark_again()
                    return name, (stream.tell(), digest)
            except OSError as error:
                if last or error.errno != errno.ESTALE:
                    raise _unreadable(path / name, error) from error
                time.sleep(1)  # after a restart of the server; opening the file again helps
        raise AssertionError

    with ThreadPoolExecutor(threads) as pool:
        return dict(pool.map(entry, names))


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"{file}: cannot be read ({error.strerror}); {_READ_AGAIN}")


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's values, whatever its layout in the file."""
    plain = json.loads(json.dumps(record))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
