"""What a prepared data set looks like on disk: columns, file names, the manifest. A leaf that anyone may import.

DIR/answer_list.json                    VQA alone: JSON list of strings, an answer's label is its index
DIR/{train,val,test}/shard-00000.arrow  Arrow IPC file format, several record batches a file
                     manifest.json      counts, sizes and hashes: the same bytes for the same input
                     ids.bin            the ids in eight bytes each, by which splits are compared
                     provenance.json    command, host, time, versions: differs from run to run
"""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
IDS = "ids.bin"  # see preprocessing/shards/ids.py
IDS_VERSION = 2  # of its keys; an older one is not read, the columns of ids are
ANSWER_LIST = "answer_list.json"
ANSWERS = "answer_list_sha256"  # the manifest's field
SPLITS = ("train", "val", "test")
# Of an image, in preparation and in training.
MAX_PIXELS = 50_000_000  # larger than any photo of the usual sets; decoding one takes 150 MB
PILLOW_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS: beyond it Pillow itself refuses to open a file


# In addresses: user:password@, though not host:port/...@, any user of an object store, and parameters that are keys.
# What is hidden already stays as it is; and a Path that is made of an address leaves one slash of two.
_IS_HIDDEN = r"\*{3}(?:[0-9a-f]{16})?"
_USERS = re.compile(
    rf"((?:s3[an]?|gs):/+)(?!{_IS_HIDDEN}@)([^\s/@:]{{0,200}}:[^\s@]{{0,400}}|[^\s/@]{{1,400}})@"
    rf"|([a-z][a-z0-9+.-]{{0,20}}:/+)(?!{_IS_HIDDEN}@)([^\s/@:]{{0,200}}:(?!\d+(?:/|$))[^\s@]{{0,400}})@"
    rf"|(https?:/+)(?!{_IS_HIDDEN}@)([^\s/@]{{1,400}})@"
    rf"|([?&]endpoint_override=)(?!{_IS_HIDDEN}@)([^\s/@:&]{{1,200}}:[^\s/@&]{{0,400}})@",
    re.IGNORECASE,
)
_PARAMETERS = re.compile(rf"([?&]([^=&?\s]{{1,64}})=)(?!{_IS_HIDDEN}(?![\w%+/=-]))([^&\s'\"]+)")
_KEYS = frozenset(
    "x_amz_signature x_amz_credential x_amz_security_token x_goog_signature x_goog_credential x_api_key signature sig "
    "awsaccesskeyid aws_access_key_id aws_secret_access_key aws_session_token access_key access_key_id secret "
    "secret_key secret_access_key client_secret private_key account_key key_pair_id session_token security_token "
    "sas_token token access_token auth_token id_token refresh_token api_key apikey key password passwd pwd credential "
    "credentials authorization".split()
)


class DataError(ValueError):
    """A user's bad input. `str(error)` is one line that names the file, row or option, and how to mend it."""


def printable(text: str) -> str:
    """`text` for a terminal: escapes for what it would obey (control characters, turns of direction), no secrets."""
    shown = without_secrets(text)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown)


# One row an image: `caption` holds all its captions. A sample is (row, caption index).
CAPTION_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),  # the image file's own bytes; re-encoded by --max-side alone
        ("caption", pa.list_(pa.string())),
        ("image_id", pa.string()),
        ("split", pa.string()),
    ]
)

# One row an image: the outer lists run over its questions. A sample is (row, question index). `answers`,
# `answer_labels` and `answer_scores` hold those answers of a question that stand in the answer list.
VQA_SCHEMA = pa.schema(
    [
        ("image", pa.binary()),
        ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.list_(pa.string()))),
        ("answer_labels", pa.list_(pa.list_(pa.int64()))),
        ("answer_scores", pa.list_(pa.list_(pa.float32()))),
        ("question_id", pa.list_(pa.int64())),
        ("image_id", pa.string()),
        ("split", pa.string()),
    ]
)

# One row a pair of images: the lists run over its statements. A sample is (row, statement index).
NLVR_SCHEMA = pa.schema(
    [
        ("image_0", pa.binary()),  # left
        ("image_1", pa.binary()),  # right
        ("questions", pa.list_(pa.string())),
        ("answers", pa.list_(pa.string())),  # "True" or "False"
        ("identifier", pa.list_(pa.string())),  # split-set-PAIR-sentence
        ("split", pa.string()),
    ]
)

KINDS: dict[str, pa.Schema] = {"caption": CAPTION_SCHEMA, "vqa": VQA_SCHEMA, "nlvr": NLVR_SCHEMA}
IMAGE_COLUMNS: dict[str, tuple[str, ...]] = {"caption": ("image",), "vqa": ("image",), "nlvr": ("image_0", "image_1")}
SAMPLE_COLUMN: dict[str, str] = {"caption": "caption", "vqa": "questions", "nlvr": "questions"}  # its length = samples
# What must stand once in a data set: no row or sample of train in val or test. Of "nlvr" images have no ids.
ID_COLUMNS: dict[str, tuple[str, ...]] = {
    "caption": ("image_id",),
    "vqa": ("image_id", "question_id"),
    "nlvr": ("identifier",),
}

_MARKED = 256  # bytes of an image

_MANIFEST_FIELDS = {"kind": str, "split": str, "rows": int, "samples": int, "shards": list, "dropped": dict}
_STREAMS = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # the shell has opened them: somebody writes there
_SHARD_FIELDS = {"file": str, "rows": int, "samples": int, "bytes": int, "sha256": str}


def id_key(value: str | int | bytes, mark: bytes = b"") -> bytes:
    """Eight bytes in the place of an id of any length; of 12 million ids two share them once in 250,000 data sets.

    `mark`: of the images that a numbered id (shards/ids.py) goes with. A numbered image's key is of that alone.
    """
    raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(raw + mark, digest_size=8).digest()


def image_mark(images: Iterable[Any]) -> bytes:
    """A few bytes that two images share if they are the same file: of each (a buffer) its length and its end."""
    return b"".join([b"\0%d:%b" % (len(image), image[-_MARKED:]) for image in images])


def is_leak(column: str, numbered: bool, both: int, fewer: int) -> bool:
    """Whether it is a fault that `both` ids stand in two splits, of which the smaller one has `fewer`.

    Images that are told by their files, as the web's are (`numbered` in both), stand in any two splits by chance: of
    these, half must.
    """
    return not (numbered and column == "image_id") or 2 * both >= fewer


def ids_of_batch(batch: pa.RecordBatch, column: str, numbered: bool = False) -> tuple[list[bytes], list[bytes]]:
    """The ids of a column, of list cells too, as text, and the key of each; none where it is null or not there."""
    if column not in batch.schema.names:
        return [], []
    cells = batch.column(column)
    listed = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
    flat = cells.flatten() if listed else cells
    texts = flat if pa.types.is_binary(flat.type) else flat.cast(pa.large_string()).cast(pa.large_binary())
    if not numbered:
        ids = texts.drop_null().to_pylist()
        return ids, list(map(id_key, ids))
    images = [batch.column(name) for name in ("image", "image_0", "image_1") if name in batch.schema.names]
    rows = pc.list_parent_indices(cells).to_pylist() if listed else range(len(cells))
    pairs = [(one, row) for one, row in zip(texts.to_pylist(), rows, strict=True) if one is not None]
    marks = {row: image_mark(image[row].as_buffer() or b"" for image in images) for row in {row for _, row in pairs}}
    by_image = column == "image_id"
    return [one for one, _ in pairs], [id_key(b"" if by_image else one, marks[row]) for one, row in pairs]


def listed_ids(manifest: Mapping[str, Any], content: bytes) -> dict[str, bytes] | None:
    """The keys of each column of ids, rising and one after the other, in a file ids.bin; None if it is not the
    manifest's.
    """
    record = manifest.get("ids")
    distinct = record.get("distinct") if isinstance(record, dict) else None
    columns = ID_COLUMNS[manifest["kind"]]
    if not isinstance(record, dict) or not isinstance(distinct, dict) or set(distinct) != set(columns):
        return None
    if (
        record.get("version") != IDS_VERSION
        or record.get("sha256") != hashlib.sha256(content).hexdigest()
        or not all(isinstance(distinct[column], int) for column in columns)
    ):
        return None
    parts, start = {}, 0
    for column in columns:
        parts[column] = content[start : start + 8 * distinct[column]]
        start += 8 * distinct[column]
    return parts if start == len(content) else None


def load_json(content: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """``json.loads`` (``pairs``: its object_pairs_hook) that raises ValueError, too, for what is nested too deep."""
    try:
        return json.loads(content, object_pairs_hook=pairs)
    except RecursionError:
        raise ValueError("nested too deep") from None


class RemoteFolder(Protocol):
    """A folder behind a URI (running.storage.RemotePath): as much of pathlib.Path as read_manifest needs."""

    def __truediv__(self, name: str, /) -> Any:
        """The file `name` in it, which has `read_bytes`."""
        ...


def read_manifest(directory: str | os.PathLike[str] | RemoteFolder) -> dict[str, Any]:
    """Read and check `directory/manifest.json`, the manifest of one split folder.

    Raises DataError when it is missing, is not valid JSON, has another schema version, lacks a field, or names a file
    that is not in the folder.
    """
    path = (Path(directory) if isinstance(directory, str | os.PathLike) else directory) / MANIFEST
    if isinstance(path, Path):
        check_regular(path)
    try:
        manifest: Any = load_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{path}: no such file; {directory} is not a prepared split folder, run a converter") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); prepare the split again") from None
    except ValueError as error:
        raise DataError(f"{path}: invalid JSON ({error}); prepare the split again") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}; prepare it again")
    _check_fields(path, "", manifest, _MANIFEST_FIELDS)
    if manifest["kind"] not in KINDS:
        raise DataError(f"{path}: kind {manifest['kind']!r} is none of {', '.join(KINDS)}; prepare the split again")
    for index, shard in enumerate(manifest["shards"]):
        _check_fields(path, f"shards[{index}].", shard, _SHARD_FIELDS)
    listed = manifest.get("dropped_list")
    for record in (*manifest["shards"], *([listed] if isinstance(listed, dict) else [])):
        _check_file_name(path, record.get("file"))
    checked: dict[str, Any] = manifest
    return checked


def _check_fields(path: Path, prefix: str, record: Any, fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise DataError(f"{path}: field {prefix}{name} is missing or no {kind.__name__}; prepare the split again")


def _check_file_name(path: Path, name: Any) -> None:
    """Raise DataError unless `name`, if it is one, is that of a file in the manifest's own folder."""
    if isinstance(name, str) and (name in ("", ".", "..") or "/" in name or not name.isprintable()):
        raise DataError(f"{path}: file {name!r} is not in the folder of the manifest; prepare the split again")


def without_secrets(text: str, mark: Callable[[str], str] = lambda secret: "***") -> str:
    """`text` with *** for users, passwords and keys in the addresses in it, and for keys in names of files that were
    fetched from such: for whatever is printed or written.
    """
    if ":/" not in text and "?" not in text:
        return text

    def user(found: re.Match[str]) -> str:
        before, secret = (part for part in found.groups() if part is not None)
        return f"{before}{mark(secret)}@"

    def parameter(found: re.Match[str]) -> str:
        return f"{found[1]}{mark(found[3])}" if found[2].lower().replace("-", "_") in _KEYS else found[0]

    return _PARAMETERS.sub(parameter, _USERS.sub(user, text))


def id_without_secrets(one: str) -> str:
    """An image's id, or what names it, without secrets; a hash of each keeps ids apart that differ by it alone."""
    if ":/" not in one:
        return one
    return without_secrets(
        one, lambda secret: f"***{hashlib.sha256(secret.encode(errors='surrogatepass')).hexdigest()[:16]}"
    )


def shortened(text: str, most: int = 60) -> str:
    """`text` for a message: secrets hidden first, as what a cut leaves of them looks like none; then cut to `most`."""
    shown = without_secrets(text)
    return shown if len(shown) <= most else f"{shown[:most]} …"


def check_regular(path: str | os.PathLike[str], streams: bool = False) -> None:
    """Raise DataError where `path` is a pipe, a socket or a device: to read one may wait, or go on, for ever.

    With `streams`, what the shell has opened, as in `<(command)`, passes: it can be read once. Nothing is said of what
    is not there.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    stream = streams and stat.S_ISFIFO(mode) and os.fspath(path).startswith(_STREAMS)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stream):
        raise DataError(f"{path}: is a pipe, a socket or a device; write its content to a file, and name that")


def write_atomic(path: str | os.PathLike[str], content: bytes, sync: bool = True) -> None:
    """Write `content` so that `path` holds either its old bytes or all the new ones, even after a crash.

    With `sync` the new ones are on disk, by their name, on return. Without it `path` is whole when this process is
    killed, but not when the machine loses its power: then `path` may hold a part. Raises DataError when the folder
    cannot be made or written, or `path` is there and no regular file: to rename over a device, such as /dev/null,
    would replace it.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is no regular file; name another one")
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        # Not mkstemp, which lets nobody else read: the umask says who may.
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
        raise DataError(f"{path}: cannot be written ({error.strerror}); choose another output folder") from error


def make_folder(path: Path) -> None:
    """Make a folder and those above it that are not there, their names on disk. Raises OSError."""
    if path.is_dir():
        return
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_path(folder.parent)


def sync_path(path: str | os.PathLike[str]) -> None:
    """Have a local file, or the names in a folder, on disk. Raises OSError.

    Names in a folder that cannot be read, or of a file system that does not take the request, are left to the system.
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
    """Have a folder and all files and folders in it on disk. Raises OSError."""
    for path in (*folder.rglob("*"), folder):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            sync_path(path)


def answers_sha256(answers: Sequence[str]) -> str:
    """Of an answer list: what a VQA split's manifest has of the one that its labels index."""
    return hashlib.sha256(json.dumps(list(answers)).encode()).hexdigest()


def dump_json(value: Any) -> bytes:
    """`value` as JSON bytes that depend on nothing but `value`: sorted keys, one trailing newline."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
