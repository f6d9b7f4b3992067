"""Local files: written whole or not at all, known to be on disk, and never a pipe; and JSON: read, written, quoted in
messages. A leaf that anyone may import.

Captions that were cut in the middle of an emoji leave half of a UTF-16 surrogate pair behind, which no UTF-8 file can
hold. `parse_json` replaces such halves.
"""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from preprocessing.errors import UserError, shortened

_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_ESCAPED_BYTES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # json accepts the latter, which is no UTF-8
_HALF = re.compile("[\ud800-\udfff]")
_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # opened by the shell, so there is a writer at the other end

Content = bytes | Callable[[BinaryIO], None]  # of a file: its bytes, or what writes them


def load_json(content: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """``json.loads`` (``pairs``: its object_pairs_hook) that raises ValueError also for JSON nested too deep."""
    try:
        return json.loads(content, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deep") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a duplicate key, of which json would silently take the last."""
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"{key!r} stands twice in one object; put all of it in one place")
        tree[key] = value
    return tree


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of `text`, with U+FFFD for each half of a surrogate pair (``pairs``: json's object_pairs_hook).

    Raises ValueError (json.JSONDecodeError, UnicodeDecodeError), also for JSON nested too deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=pairs)
        found = _ESCAPED.search(text) if isinstance(text, str) else _ESCAPED_BYTES.search(text)
        return _replace_halves(value) if found else value
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", "", 0) from None


def dump_json(value: Any) -> bytes:
    """`value` as JSON bytes that depend on nothing but `value`: sorted keys, one trailing newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()


def json_excerpt(value: Any) -> str:
    """The first forty characters of `value` as JSON, for messages, without secrets."""
    try:
        return shortened(json.dumps(value), 40)
    except RecursionError:  # a value that could just be read may be too deep to be written
        return "nested too deep"


def replace_surrogates(text: str) -> str:
    """`text` with U+FFFD for each half of a surrogate pair, and for each byte of a file name that is no UTF-8."""
    return _HALF.sub("\ufffd", text)


def _replace_halves(value: Any) -> Any:
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [_replace_halves(item) for item in value]
    if isinstance(value, dict):
        return {_replace_halves(name): _replace_halves(item) for name, item in value.items()}
    return value


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


def write_atomic(path: str | os.PathLike[str], content: Content, sync: bool = True) -> None:
    """Write `content` so that `path` holds either its old bytes or all the new ones, even after a crash.

    With `sync`, content and name are on disk on return. Without it, `path` is whole when this process is killed, but
    may hold a part when the machine loses power. Raises UserError when the folder cannot be made or written, when
    `path` ends in a slash, and when it exists and is no regular file: a rename over a device such as /dev/null would
    replace the device. A symbolic link is replaced, too: a prepared data set may hold links to files of another one.
    """
    if os.fspath(path).endswith(os.sep):  # which Path drops
        raise UserError(f"{path}: is a folder; name a file")
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is no regular file; name another one")
        with replacing(path, sync) as file:
            if callable(content):
                content(file)
            else:
                file.write(content)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another output folder") from error


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[BinaryIO]:
    """Context to write a file that has the name `path` once the context ends well; see `write_atomic`.

    Raises OSError. The temporary file of a process that is killed, `.NAME.` and eight hexadecimal digits, stays.
    """
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    # Not mkstemp, whose files are private: the umask decides who may read.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if sync:
        sync_path(path.parent)


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
