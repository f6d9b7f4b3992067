"""Files on a local path, or behind a URI (s3://, gs://, hdfs://) that pyarrow.fs opens.

`storage_path(text)` returns a pathlib.Path or a RemotePath; the functions here take either. The errors of a remote file
system name the URI: a missing file is FileNotFoundError, anything else (no credentials, no network) is a UserError,
since it says nothing about the file. S3 takes its credentials and its address from the environment (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL), and gs:// takes Google's default credentials. hdfs:// needs
libhdfs (HADOOP_HOME, CLASSPATH) and is not verified here. A URI with a password or a key in it is refused: it would be
visible in the provenance, in logs and in the list of processes.
"""

import glob
import hashlib
import os
import posixpath
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import unquote

import pyarrow as pa
from pyarrow import fs

from preprocessing.errors import UserError, shortened, without_secrets
from preprocessing.local_files import check_regular, replacing, write_atomic

SCHEMES = ("s3", "gs", "hdfs")


@dataclass(frozen=True)
class RemotePath:
    """A file or folder behind a URI, with the methods of pathlib.Path that are needed."""

    uri: str  # without a slash at the end

    def __str__(self) -> str:
        return self.uri

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(f"{self.uri}/{name}")

    @property
    def name(self) -> str:
        """The last part of the URI."""
        return self.uri.rsplit("/", 1)[-1]

    @property
    def parent(self) -> "RemotePath":
        """The folder that holds it."""
        return RemotePath(self.uri.rsplit("/", 1)[0])

    def exists(self) -> bool:
        """Whether there is a file or a folder."""
        return self._info().type != fs.FileType.NotFound

    def is_dir(self) -> bool:
        """Whether it is a folder; on an object store, whether a name below it exists."""
        return self._info().type == fs.FileType.Directory

    def read_bytes(self) -> bytes:
        """All of the file's bytes."""
        with _wrap_io_errors(self.uri), open_input(self) as file:
            return bytes(file.read())

    def _info(self) -> Any:
        with _wrap_io_errors(self.uri):
            system, path = _open_uri(self.uri)
            return system.get_file_info(path)


StoragePath = Path | RemotePath


def is_remote(path: str | os.PathLike[str] | RemotePath) -> bool:
    """Whether `path` is a URI of one of the known schemes."""
    if isinstance(path, RemotePath):
        return True
    scheme, mark, _ = str(path).partition("://")
    return bool(mark) and scheme in SCHEMES


def storage_path(path: str | os.PathLike[str] | RemotePath) -> StoragePath:
    """The path or URI as an object. Raises UserError for a URI with a secret, an unknown scheme, or no bucket."""
    if isinstance(path, RemotePath):
        return path
    text = os.fspath(path)
    if ":/" in text:  # names of local files may hold a key, too, after wget
        _check_secrets(text)
    scheme, colon, rest = text.partition("://")
    if not colon:
        return Path(text)
    if scheme not in SCHEMES:
        raise UserError(f"{text}: scheme {scheme}:// is not known; use a local path or {'://, '.join(SCHEMES)}://")
    if not rest.strip("/"):
        raise UserError(f"{text}: names no bucket or host; write {scheme}://NAME/FOLDER")
    return RemotePath(text.rstrip("/"))


def place_of(uri: str) -> StoragePath:
    """As `storage_path`, of a URI alone; file:///FOLDER is a path. Raises UserError, also without a scheme."""
    if uri.startswith("file:"):
        if not uri.startswith("file:///") or not uri[len("file://") :].strip("/"):
            raise UserError(f"{uri}: names no local folder; write file:///FOLDER")
        return Path(unquote(uri[len("file://") :]))
    if "://" not in uri:
        raise UserError(f"{uri}: is no URI; write file:///FOLDER, or {'://, '.join(SCHEMES)}:// and what follows")
    return storage_path(uri)


def _check_secrets(uri: str) -> None:
    """Raise UserError for a URI with a password or a key in it."""
    if (shown := without_secrets(uri)) != uri:
        raise UserError(
            f"{shown}: holds a user, a password or a key; leave them out, and give them in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS)"
        )


def exists(path: str) -> bool:
    """Whether there is a file or a folder; False for a name that is too long."""
    return storage_path(path).exists() if is_remote(path) else os.path.exists(path)


def open_input(path: str | os.PathLike[str] | RemotePath) -> IO[bytes]:
    """Open a file for reading bytes. It can seek; use it in a `with` block.

    Raises FileNotFoundError, OSError when a local file cannot be read, and UserError when it is a pipe or a device or
    when a remote file system refuses.
    """
    if not is_remote(path):
        check_regular(cast("str | os.PathLike[str]", path))
        return open(cast("str | os.PathLike[str]", path), "rb")
    with _wrap_io_errors(str(path)):
        system, inner = _open_uri(str(path))
        return cast(IO[bytes], system.open_input_file(inner))


def file_sha256(path: str | os.PathLike[str] | RemotePath) -> str:
    """Hexadecimal SHA-256 of a file's bytes. Raises as `open_input`."""
    digest = hashlib.sha256()
    with open_input(path) as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


def size_of(path: StoragePath) -> int:
    """Bytes of a file. Raises FileNotFoundError."""
    if isinstance(path, Path):
        return path.stat().st_size
    size = path._info().size
    if size is None:
        raise FileNotFoundError(f"{path}: no such file")
    return int(size)


def names_in(folder: StoragePath) -> list[str]:
    """The sorted names in a folder; empty if there is no such folder. Raises UserError when it cannot be read."""
    if isinstance(folder, Path):
        try:
            return sorted(os.listdir(folder)) if folder.is_dir() else []
        except PermissionError as error:
            raise UserError(f"{folder}: cannot be listed ({error.strerror}); see to its permissions") from None
    with _wrap_io_errors(str(folder)):
        system, path = _open_uri(str(folder))
        found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(posixpath.basename(info.path) for info in found)


def walk(folder: StoragePath, without: Collection[str] = ()) -> Iterator[tuple[str, list[str]]]:
    """(path below `folder`, sorted names of its files) of `folder` and of each folder below it, sorted by path.

    Hidden files and folders are skipped, and so is what is named in `without` and lies in `folder` itself. Links are
    followed, but no folder is visited twice. Raises UserError when a folder cannot be read.
    """
    if isinstance(folder, Path):
        yield from _walk_local(folder, "", set(), without)
        return
    with _wrap_io_errors(str(folder)):
        system, path = _open_uri(str(folder))
        found = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    names: dict[str, list[str]] = {"": []}
    for info in found:
        below = posixpath.relpath(info.path, path)
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in below.split("/")):
            names.setdefault(posixpath.dirname(below), []).append(posixpath.basename(below))
    yield from ((below, sorted(names[below])) for below in sorted(names) if below.split("/")[0] not in without)


def _walk_local(
    folder: Path, below: str, seen: set[tuple[int, int]], without: Collection[str] = ()
) -> Iterator[tuple[str, list[str]]]:
    folders: list[str] = []
    files: list[str] = []
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.name not in without:
                    (folders if entry.is_dir() else files).append(entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); see to its permissions") from None
    yield below, sorted(files)
    for name in sorted(folders):
        yield from _walk_local(folder / name, posixpath.join(below, name), seen)


def write_whole(path: StoragePath, content: bytes, sync: bool = True) -> None:
    """Write a file so that it holds either its old bytes or all of the new ones. Raises UserError.

    With `sync` this holds after a power failure, too; see `write_atomic`.
    """
    if isinstance(path, Path):
        write_atomic(path, content, sync)
    else:
        with _wrap_io_errors(str(path)):
            system, inner = _open_uri(str(path))
            with system.open_output_stream(inner) as stream:  # an object appears when the stream is closed
                stream.write(content)


def upload_file(file: IO[bytes], path: RemotePath) -> None:
    """Copy an open local file from its start to `path`. Raises UserError."""
    file.seek(0)
    with _wrap_io_errors(str(path)):
        system, inner = _open_uri(str(path))
        with system.open_output_stream(inner) as stream:
            shutil.copyfileobj(file, stream, 8 << 20)


@contextmanager
def open_output(path: StoragePath) -> Iterator[IO[bytes]]:
    """Context to write a file in pieces. Raises UserError or OSError.

    A local one has its name, and is on disk, once the context ends well; what a killed process left of it is removed
    first, so one process may write it at a time. A remote one that was interrupted may be there in part: compare its
    size. `flush` waits for what was written; without it a slow store's pieces pile up in memory.
    """
    if isinstance(path, RemotePath):
        with _wrap_io_errors(str(path)):
            system, inner = _open_uri(str(path))
            with system.open_output_stream(inner) as stream:
                yield cast(IO[bytes], stream)
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}"):
        left.unlink(missing_ok=True)
    with replacing(path) as file:
        yield file


def remove(path: StoragePath) -> None:
    """Remove a file, or a folder with all its contents, if it exists."""
    if isinstance(path, Path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        return
    with _wrap_io_errors(str(path)):
        system, inner = _open_uri(str(path))
        kind = system.get_file_info(inner).type
        if kind == fs.FileType.Directory:
            system.delete_dir(inner)
        elif kind != fs.FileType.NotFound:
            system.delete_file(inner)


@contextmanager
def _wrap_io_errors(uri: str) -> Iterator[None]:
    """Turn the errors of a remote file system's client into a UserError of one line. FileNotFoundError stays one."""
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{uri}: no such file") from None
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # from a local file
        what = shortened(
            " ".join(str(error).split()) or type(error).__name__, 300
        )  # a search for Java tells each place
        advice = "check the address, the credentials and the network"
        if "libjvm" in what or "libhdfs" in what:
            advice = "hdfs:// needs Java and libhdfs: set JAVA_HOME, HADOOP_HOME and CLASSPATH"
        raise UserError(f"{uri}: {what}; {advice}") from error


def _open_uri(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it."""
    _check_secrets(uri)
    scheme, _, rest = uri.partition("://")
    if scheme == "hdfs":
        host, slash, path = rest.partition("/")
        return _filesystem(scheme, host), slash + path
    return _filesystem(scheme, rest.partition("/")[0]), rest


@lru_cache(maxsize=64)  # one connection pool a bucket and process
def _filesystem(scheme: str, bucket: str) -> Any:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:  # which pyarrow itself ignores
        return fs.S3FileSystem(endpoint_override=endpoint)
    return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]  # asks S3 for the bucket's region
