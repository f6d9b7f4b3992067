"""Local files: written whole or not at all, known to be on disk, and never a pipe. A leaf that anyone may import."""

import errno
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from preprocessing.errors import UserError

_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # opened by the shell, so there is a writer at the other end


def check_regular(path: str | os.PathLike[str], streams: bool = False) -> None:
    """Raise UserError where `path` is a pipe, a socket or a device: reading one may block or never end.

    With `streams`, pipes that the shell has opened, as in `<(command)`, are accepted; they can be read once. A missing
    file is no error here.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    stream = streams and stat.S_ISFIFO(mode) and os.fspath(path).startswith(_STREAMS)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stream):
        raise UserError(f"{path}: is a pipe, a socket or a device; write its content to a file, and name that")


def write_atomic(path: str | os.PathLike[str], content: bytes, sync: bool = True) -> None:
    """Write `content` so that `path` holds either its old bytes or all the new ones, even after a crash.

    With `sync`, content and name are on disk on return. Without it, `path` is whole when this process is killed, but
    may hold a part when the machine loses power. Raises UserError when the folder cannot be made or written, and when
    `path` exists and is no regular file: a rename over a device such as /dev/null would replace the device.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file; name another one")
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        # Not mkstemp, whose files are private: the umask decides who may read.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        if sync:
            sync_path(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output folder") from error


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, with their names on disk. Raises OSError."""
    if path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_path(folder.parent)


def sync_path(path: str | os.PathLike[str]) -> None:
    """Flush a local file, or the names in a folder, to disk. Raises OSError.

    A folder that cannot be read, or whose file system does not support the request, is skipped.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES) or not os.path.isdir(path):
            raise OSError(error.errno, error.strerror, str(path)) from error  # fsync names no file


def sync_tree(folder: Path) -> None:
    """Flush a folder and all files and folders in it to disk. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync_path(path)


def write_text(path: Path, text: str) -> None:
    write_atomic(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """As all JSON files of EVE-DS are laid out."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
