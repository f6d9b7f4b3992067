"""Write weights to files and folders atomically."""

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
from preprocessing.errors import UserError, shortened
from preprocessing.local_files import make_folder, sync_path, sync_tree


def check_out(out: Path, overwrite: bool, folder: bool) -> None:
    """Refuse to overwrite ``out``, unless ``overwrite``; and never overwrite anything that EVE-DS does not write.

    Args:
        out: the output, a model folder if ``folder``, otherwise a weights file.
    Raises:
        UserError: naming ``--out``.
    """
    if not folder and out.suffix not in (".safetensors", *TORCH_SUFFIXES):
        raise UserError(f"--out {out}: name a file that ends in .safetensors or {', '.join(TORCH_SUFFIXES)}")
    if not (out.exists() or out.is_symlink()):
        return
    if folder != out.is_dir() or out.is_symlink():
        raise UserError(f"--out {out}: is not a {'folder' if folder else 'file'}; choose another place")
    others = sorted({path.name for path in out.iterdir()} - set(FILES)) if folder else []
    if others:
        raise UserError(f"--out {out}: holds other files than a model's ({others[0]}); choose another folder")
    if not overwrite:
        raise UserError(f"--out {out}: already exists; choose another place, or add --overwrite")


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``out`` for a file or folder, which replaces ``out`` when the block succeeds.

    A file is replaced atomically; an existing folder is first moved aside, then deleted.

    Raises:
        UserError: no space, or no permission to write there.
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
        raise UserError(
            f"--out {out}: cannot be written ({error.strerror}); make room or choose another place"
        ) from error


def write_weights(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors by name, by the file's suffix: safetensors, or ``{"model": tensors}`` with torch.save.

    Args:
        path: a new file.
        metadata: of a safetensors file.
    Raises:
        UserError: the file cannot be written.
    """
    # torch.save would write the whole storage of a view, and safetensors refuses views.
    own = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    own = {name: t if t.untyped_storage().nbytes() == t.nbytes else t.clone() for name, t in own.items()}
    path.touch()
    permissions = stat.S_IMODE(path.stat().st_mode)  # by the umask
    try:
        if path.suffix == ".safetensors":
            save_file(own, path, metadata=metadata)
        else:
            torch.save({"model": own}, path)
    except (SafetensorError, RuntimeError) as error:
        reason = shortened(" ".join(str(error).split()), 200)
        raise UserError(f"{path.name}: cannot be written ({reason}); make room or choose another place") from error
    path.chmod(permissions)  # safetensors writes files that only their owner may read
