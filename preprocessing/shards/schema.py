"""What a prepared data set looks like on disk: its files, the columns and limits of its shards, the manifest, and the
keys of its ids. A leaf that anyone may import.

DIR/answer_list.json                    VQA only: JSON list of strings; an answer's label is its index
DIR/{train,val,test}/shard-00000.arrow  Arrow IPC file format, several record batches a file
                     manifest.json      counts, sizes and hashes: the same bytes for the same input
                     ids.bin            the ids as keys of eight bytes each, by which splits are compared
                     provenance.json    command, host, time, versions: differs from run to run
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocessing.errors import UserError
from preprocessing.local_files import check_regular, load_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PROVENANCE = "provenance.json"
IDS = "ids.bin"  # see preprocessing/shards/ids.py
IDS_VERSION = 2  # of the keys in it; an older file is ignored and the id columns are read instead
ANSWER_LIST = "answer_list.json"
SPLITS = ("train", "val", "test")

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
# `answer_labels` and `answer_scores` hold the answers of a question that are in the answer list.
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

CODES = "codes"  # an optional column of caption shards, see CodeGrid


@dataclass(frozen=True)
class CodeGrid:
    """What the optional column `codes` of a caption shard holds: what a visual tokenizer makes of each image.

    A cell is a list<uint16> (or list<int32>) of `side` x `side` codes, row by row, each from 0 to `vocabulary` - 1, of
    the image resized to a square. The metadata of the column hold both numbers as text.
    """

    side: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.side} x {self.side} codes below {self.vocabulary}"

    @property
    def field(self) -> pa.Field:
        """The column in a schema."""
        dtype = pa.uint16() if self.vocabulary <= 1 << 16 else pa.int32()
        return pa.field(CODES, pa.list_(dtype), metadata={name: str(value) for name, value in vars(self).items()})

    @classmethod
    def of(cls, schema: pa.Schema) -> "CodeGrid | None":
        """That of a shard; None if it has no such column. Raises ValueError when the column is another one."""
        if CODES not in schema.names:
            return None
        if schema.names.count(CODES) > 1:
            raise ValueError(f"there are several columns {CODES!r}")
        field = schema.field(CODES)
        if field.type not in (pa.list_(pa.uint16()), pa.list_(pa.int32())):
            raise ValueError(f"column {CODES!r} is {field.type}, not a list of uint16 or int32")
        try:
            grid = cls(*(int((field.metadata or {})[name]) for name in (b"side", b"vocabulary")))
        except (KeyError, ValueError):
            grid = cls(0, 0)
        if grid.side < 1 or grid.vocabulary < 1:
            raise ValueError(f"the metadata of column {CODES!r} tell no side and vocabulary of its codes")
        return grid

    def fault(self, codes: Sequence[int | None] | None) -> str:
        """What is wrong with a cell; "" for nothing."""
        if codes is None or None in codes:
            return f"{CODES} is null, or holds a null"
        if len(codes) != self.side**2:
            return f"{CODES} has {len(codes)} entries, the grid {self.side} x {self.side}"
        wrong = next((code for code in codes if not 0 <= code < self.vocabulary), None)  # type: ignore[operator]
        return "" if wrong is None else f"{CODES} holds {wrong}, which is not from 0 to {self.vocabulary - 1}"


KINDS: dict[str, pa.Schema] = {"caption": CAPTION_SCHEMA, "vqa": VQA_SCHEMA, "nlvr": NLVR_SCHEMA}
IMAGE_COLUMNS: dict[str, tuple[str, ...]] = {"caption": ("image",), "vqa": ("image",), "nlvr": ("image_0", "image_1")}
SAMPLE_COLUMN: dict[str, str] = {"caption": "caption", "vqa": "questions", "nlvr": "questions"}  # its length = samples
# Ids that are unique in a data set: no row or sample of train is in val or test. The images of "nlvr" have no ids.
ID_COLUMNS: dict[str, tuple[str, ...]] = {
    "caption": ("image_id",),
    "vqa": ("image_id", "question_id"),
    "nlvr": ("identifier",),
}


# Field "modality" of a manifest, none for pairs: of "image" the captions are empty lists, of "text" the images are b"".
MODALITIES = {"pairs": "pairs", "image": "images without captions", "text": "texts without images"}

MAX_PIXELS = 50_000_000  # larger than any photo of the usual sets; decoding one takes 150 MB
PILLOW_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS: beyond it Pillow itself refuses to open a file

# Bytes that a text or a color profile in a PNG may unpack to, for PngImagePlugin.MAX_TEXT_CHUNK. Pillow's own bound of
# 1 MiB refuses valid images of many programs. Pillow holds all texts of a file together to 64 MiB.
MAX_PNG_TEXT = 64 << 20


ANSWER_LIST_HASH = "answer_list_sha256"  # the field with the `answers_sha256` of a VQA split

_FIELDS = {"kind": str, "split": str, "rows": int, "samples": int, "shards": list, "dropped": dict}
_SHARD_FIELDS = {"file": str, "rows": int, "samples": int, "bytes": int, "sha256": str}
_MARK_BYTES = 256  # of an image, from its end


class RemoteFolder(Protocol):
    """A folder behind a URI (running.storage.RemotePath): the part of pathlib.Path that `read_manifest` needs."""

    def __truediv__(self, name: str, /) -> Any:
        """The file `name` in it, which has `read_bytes`."""
        ...


def read_manifest(directory: str | os.PathLike[str] | RemoteFolder) -> dict[str, Any]:
    """Read and check `directory/manifest.json`, the manifest of one split folder.

    Raises UserError when it is missing, is not valid JSON, has another schema version, lacks a field, or names a file
    outside the folder.
    """
    path = (Path(directory) if isinstance(directory, str | os.PathLike) else directory) / MANIFEST
    if isinstance(path, Path):
        check_regular(path)
    try:
        manifest: Any = load_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: no such file; {directory} is not a prepared split folder, run a converter") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); prepare the split again") from None
    except ValueError as error:
        raise UserError(f"{path}: invalid JSON ({error}); prepare the split again") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: schema_version {version!r}, this version reads {SCHEMA_VERSION}; prepare it again")
    _check_fields(path, "", manifest, _FIELDS)
    if manifest["kind"] not in KINDS:
        raise UserError(f"{path}: kind {manifest['kind']!r} is none of {', '.join(KINDS)}; prepare the split again")
    if manifest.get("modality", "pairs") not in tuple(MODALITIES):
        known = ", ".join(MODALITIES)
        raise UserError(f"{path}: modality {manifest['modality']!r} is none of {known}; prepare the split again")
    for index, shard in enumerate(manifest["shards"]):
        _check_fields(path, f"shards[{index}].", shard, _SHARD_FIELDS)
    dropped_list = manifest.get("dropped_list")
    for record in (*manifest["shards"], *([dropped_list] if isinstance(dropped_list, dict) else [])):
        _check_file_name(path, record.get("file"))
    checked: dict[str, Any] = manifest
    return checked


def check_modality(directory: Path, manifest: Mapping[str, Any], wanted: str) -> None:
    """Raise UserError where the split of this manifest lacks what `wanted`, one of MODALITIES, needs."""
    found = manifest.get("modality", "pairs")
    if found not in ("pairs", wanted):
        use = f"it can be pre-trained on, as a source of data.sources with modality: {found}"
        raise UserError(f"{directory}: holds {MODALITIES[found]}, {MODALITIES[wanted]} are needed; {use}")


def _check_fields(path: Path, prefix: str, record: Any, fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UserError(f"{path}: field {prefix}{name} is missing or no {kind.__name__}; prepare the split again")


def _check_file_name(path: Path, name: Any) -> None:
    """Raise UserError where `name` is a string, but not the name of a file in the manifest's own folder."""
    if isinstance(name, str) and (name in ("", ".", "..") or "/" in name or not name.isprintable()):
        raise UserError(f"{path}: file {name!r} is not in the folder of the manifest; prepare the split again")


def answers_sha256(answers: Sequence[str]) -> str:
    """The hash of an answer list. A VQA split's manifest records the hash of the list that its labels index."""
    return hashlib.sha256(json.dumps(list(answers)).encode()).hexdigest()


def id_key(value: str | int | bytes, mark: bytes = b"") -> bytes:
    """The key of an id. Among 12 million ids two share a key once in 250,000 data sets.

    `mark` is the `image_mark` of the images that a numbered id (see shards/ids.py) belongs to. The key of a numbered
    image is made of its mark alone.
    """
    raw = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(raw + mark, digest_size=8).digest()


def image_mark(images: Iterable[Any]) -> bytes:
    """A few bytes that are equal for equal image files: the length and the end of each image (a buffer)."""
    return b"".join([b"\0%d:%b" % (len(image), image[-_MARK_BYTES:]) for image in images])


def is_leak(column: str, numbered: bool, both: int, fewer: int) -> bool:
    """Whether it is a fault that two splits share `both` ids; the smaller split has `fewer`.

    Images of the web are compared by their files (`numbered` in both splits), and some files are in any two splits by
    chance: for these it is a fault when half of the smaller split is shared.
    """
    return not (numbered and column == "image_id") or 2 * both >= fewer


def distinct(keys: np.ndarray) -> np.ndarray:
    """The distinct values of `keys` [n], ascending. np.unique takes many times as long (NumPy 2.4 hashes them)."""
    ascending = np.sort(keys)
    return ascending[np.append(True, ascending[1:] != ascending[:-1])[: len(ascending)]]


def ids_of_batch(batch: pa.RecordBatch, column: str, numbered: bool = False) -> tuple[list[bytes], list[bytes]]:
    """The ids of a column as text, and the key of each. List cells are flattened; nulls are skipped.

    Both are empty where the batch lacks the column.
    """
    if column not in batch.schema.names:
        return [], []
    cells = batch.column(column)
    is_list = pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type)
    flat = cells.flatten() if is_list else cells
    texts = flat if pa.types.is_binary(flat.type) else flat.cast(pa.large_string()).cast(pa.large_binary())
    if not numbered:
        ids = texts.drop_null().to_pylist()
        return ids, list(map(id_key, ids))
    images = [batch.column(name) for name in ("image", "image_0", "image_1") if name in batch.schema.names]
    rows = pc.list_parent_indices(cells).to_pylist() if is_list else range(len(cells))
    pairs = [(one, row) for one, row in zip(texts.to_pylist(), rows, strict=True) if one is not None]
    marks = {row: image_mark(image[row].as_buffer() or b"" for image in images) for row in {row for _, row in pairs}}
    by_image = column == "image_id"
    return [one for one, _ in pairs], [id_key(b"" if by_image else one, marks[row]) for one, row in pairs]


def parse_ids(manifest: Mapping[str, Any], content: bytes) -> dict[str, bytes] | None:
    """The ascending keys of each id column in `content`, the bytes of ids.bin; None if these are not the manifest's."""
    record = manifest.get("ids")
    counts = record.get("distinct") if isinstance(record, dict) else None
    columns = ID_COLUMNS[manifest["kind"]]
    if not isinstance(record, dict) or not isinstance(counts, dict) or set(counts) != set(columns):
        return None
    if (
        record.get("version") != IDS_VERSION
        or record.get("sha256") != hashlib.sha256(content).hexdigest()
        or not all(isinstance(counts[column], int) for column in columns)
    ):
        return None
    parts, start = {}, 0
    for column in columns:
        parts[column] = content[start : start + 8 * counts[column]]
        start += 8 * counts[column]
    return parts if start == len(content) else None
