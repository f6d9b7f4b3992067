"""Weights to files that are whole or not there."""

from __future__ import annotations

import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from eve_ds.weights.load import TORCH_SUFFIXES
from eve_ds.weights.model_folder import FILES
from preprocessing.errors import DataError
from preprocessing.local_files import make_folder, sync_path, sync_tree
from preprocessing.redaction import shortened


def check_out(out: Path, overwrite: bool, folder: bool) -> None:
    """Refuse to write over what is there, unless asked to, and then over nothing but what this program writes.

    Args:
        out: what will be written, a model folder if ``folder``, else a file of weights.
    Raises:
        DataError: naming ``--out``.
    """
    if not folder and out.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise DataError(f"--out {out}: name a file that ends in .safetensors or {', '.join(TORCH_SUFFIXES)}")
    if not (out.exists() or out.is_symlink()):
        return
    if folder != out.is_dir() or out.is_symlink():
        raise DataError(f"--out {out}: is no {'folder' if folder else 'file'}; choose another place")
    others = sorted({path.name for path in out.iterdir()} - set(FILES)) if folder else []
    if others:
        raise DataError(f"--out {out}: holds other things than a model ({others[0]}); choose another folder")
    if not overwrite:
        raise DataError(f"--out {out}: is there already; choose another place, or add --overwrite")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A place beside ``out`` to build a file or a folder of files in, which becomes ``out`` when the block ends well.

    Where ``out`` is there it is replaced: a file in one step; a folder is first moved aside, then deleted.

    Raises:
        DataError: no room, or not allowed to write there.
    """
    try:
        make_folder(out.parent)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
            new = Path(scratch) / out.name
            yield new
            sync_tree(new) if new.is_dir() else sync_path(new)
            if out.is_dir():
                out.rename(Path(scratch) / "replaced")
            new.replace(out)
            sync_path(out.parent)
    except OSError as error:
        raise DataError(
            f"--out {out}: cannot be written ({error.strerror}); make room or choose another place"
        ) from error


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors by name: safetensors, or ``{"model": tensors}`` as torch.save writes it, by the file's suffix.

    Args:
        path: a new file.
        metadata: of a safetensors file.
    Raises:
        DataError: cannot be written.
    """
    # A view would drag its whole storage into a torch file, and safetensors refuses it.
    own = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    own = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in own.items()}
    path.touch()
    permissions = stat.S_IMODE(path.stat().st_mode)  # the umask's
    try:
        if path.suffix == ".safetensors":
            save_file(own, path, metadata=metadata)
        else:
            torch.save({"model": own}, path)
    except (SafetensorError, RuntimeError) as error:
        reason = shortened(" ".join(str(error).split()), 200)
        raise DataError(f"{path.name}: cannot be written ({reason}); make room or choose another place") from error
    path.chmod(permissions)  # safetensors makes files that nobody else may read
