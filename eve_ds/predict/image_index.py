"""An index on disk: the unit vectors of a folder's images, searched by cosine. Arrow files are mapped into memory.

INDEX/manifest.json            model, folder, the files below with their hashes, images that could not be read; written
                               last, atomically
INDEX/features-000001.arrow    path (relative to the folder), size, mtime_ns, vector; never written twice by one name
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from eve_ds.predict.eve import EVE
from eve_ds.weights.model_folder import file_hash
from preprocessing.errors import UserError
from preprocessing.local_files import check_regular, dump_json, parse_json, write_atomic

MANIFEST = "manifest.json"
FORMAT = "eve-ds image index 2"
DTYPES = ("float32", "float16")
MOST_DIM = 2**31 - 1  # Arrow's, of a list
FILE = re.compile(r"features-(\d{6,})\.arrow")


class Hit(NamedTuple):
    """An image that was found: its path relative to the indexed folder, and the cosine."""

    path: str
    score: float


class Shard(NamedTuple):
    """A file of the index."""

    file: str
    rows: int
    bytes: int
    sha256: str


class Broken(NamedTuple):
    """An image that could not be read, and why. One whose bytes cannot be decoded has the size and the time of change
    at which that was so: it is read again once they differ. Others, with None, are tried at each update."""

    path: str
    reason: str
    size: int | None = None
    mtime_ns: int | None = None


@dataclass
class IndexManifest:
    """What ``manifest.json`` holds.

    Args:
        model: see ``model_identity``.
        folder: whose images these are, absolute.
        dtype: of the vectors: float32 or float16.
    """

    model: dict[str, Any]
    folder: str
    dtype: str
    shards: list[Shard] = field(default_factory=list)
    broken: list[Broken] = field(default_factory=list)
    format: str = FORMAT

    def write(self, index: Path) -> None:
        rows = {name: [row._asdict() for row in getattr(self, name)] for name in ("shards", "broken")}
        write_atomic(index / MANIFEST, dump_json(vars(self) | rows))

    @classmethod
    def read(cls, index: Path) -> IndexManifest:
        """Raises UserError if there is none, one that cannot be read, or a damaged one."""
        path = index / MANIFEST
        check_regular(path)
        try:
            found = cls(**parse_json(path.read_bytes()))
            if found.format != FORMAT or found.dtype not in DTYPES:
                raise ValueError(f"format {found.format!r}, dtype {found.dtype!r}")
            found.shards = [Shard(**row) for row in found.shards]  # type: ignore[arg-type]
            found.broken = [Broken(**row) for row in found.broken]  # type: ignore[arg-type]
            _check_types(found)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise UserError(
                f"{index}: is no index, {MANIFEST} is missing; make one with python -m eve_ds.predict index"
            ) from None
        except OSError as error:
            raise _unreadable(path, error) from error
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}: is damaged or of another version ({error}); delete {index} and make it again"
            ) from error
        return found


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({error.strerror or error}); see that it can be read")


def _check_types(manifest: IndexManifest) -> None:
    """Raise ValueError or KeyError if something is of another type or range than it should be."""
    texts = [manifest.folder, *(text for one in manifest.broken for text in (one.path, one.reason))]
    numbers = [manifest.model["dim"], *(number for shard in manifest.shards for number in (shard.rows, shard.bytes))]
    numbers += [number for one in manifest.broken for number in (one.size, one.mtime_ns) if number is not None]
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("a text or a number is of another type")
    if not 1 <= manifest.model["dim"] <= MOST_DIM:
        raise ValueError(f"dim {manifest.model['dim']}")
    listed: set[str] = set()
    for shard in manifest.shards:
        if not FILE.fullmatch(shard.file):
            raise ValueError(f"file {shard.file!r}")
        if shard.file in listed:
            raise ValueError(f"file {shard.file!r} is listed twice")
        listed.add(shard.file)


def holds_index(folder: Path) -> bool:
    """Whether there are files of an index in a folder, sound or not."""
    try:
        names = [path.name for path in folder.iterdir()]
    except OSError:
        return False  # no folder, or one that is not read
    return MANIFEST in names and any(map(FILE.fullmatch, names))


def model_identity(eve: EVE) -> dict[str, Any]:
    """What vectors depend on: the weights, the images' size, and whether the final norm is left out."""
    return {
        "sha256": eve.weights_sha256,
        "image_size": eve.config.image_size,
        "published": not eve.normed,
        "dim": eve.feature_dim,
    }


def check_model(index: Path, manifest: IndexManifest, eve: EVE) -> None:
    """Raise UserError unless the index was made with this model."""
    own = model_identity(eve)
    for name, value in own.items():
        if manifest.model.get(name) != value:
            raise UserError(
                f"{index}: was made with another model ({name} {manifest.model.get(name)}, of {eve.files.weights} "
                f"{value}); give the checkpoint that it was made with, or make another index"
            )


class ImageIndex:
    """An open index.

    Args:
        index: its folder.
    Attributes:
        manifest: see ``IndexManifest``.
        batches: the rows, with all columns.
        batches_of_shard: how many of ``batches`` each file has.
    Raises:
        UserError: no index, or a damaged one.
    """

    def __init__(self, index: str | Path) -> None:
        self.path = Path(index)
        self.manifest = IndexManifest.read(self.path)
        while True:
            try:
                opened = [self._open(shard) for shard in self.manifest.shards]
                break
            except UserError:
                read, self.manifest = self.manifest, IndexManifest.read(self.path)
                if self.manifest == read:
                    raise
                # An update has just replaced files.
        self.batches_of_shard = [len(batches) for batches in opened]
        self.batches = [batch for batches in opened for batch in batches]
        self._vectors = [vectors_in(batch) for batch in self.batches]
        self._starts = np.cumsum([0, *(len(vectors) for vectors in self._vectors)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def folder(self) -> Path:
        """Of the images."""
        return Path(self.manifest.folder)

    def search(self, queries: np.ndarray, k: int = 10) -> list[list[Hit]]:
        """The ``k`` images with the highest cosine to each query, best first; of equal ones the earlier row.

        Args:
            queries: [Q, E] float32 unit vectors, of texts or images.
            k: at least 1; fewer are found where the index has fewer.
        """
        return [[Hit(self.path_of(row), score) for row, score in rows] for rows in self.search_rows(queries, k)]

    def search_rows(self, queries: np.ndarray, k: int) -> list[list[tuple[int, float]]]:
        """As ``search``: rows of the index, each with the cosine."""
        if k < 1:
            raise UserError(f"k={k}: must be at least 1")
        scores = np.empty((len(queries), len(self)), np.float32)
        for start, vectors in zip(self._starts, self._vectors, strict=False):
            # float16 has no fast product in NumPy; to convert a batch is cheaper.
            scores[:, start : start + len(vectors)] = queries @ vectors.astype(np.float32, copy=False).T
        return [[(int(row), float(own[row])) for row in best_rows(own, k)] for own in scores]

    def path_of(self, row: int) -> str:
        """Of a row's image, relative to ``folder``."""
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return str(self.batches[batch].column("path")[int(row - self._starts[batch])])

    def _open(self, shard: Shard) -> list[pa.RecordBatch]:
        """The rows of a file, mapped. It is hashed first: Arrow trusts what it reads, and may crash on other bytes."""
        path = self.path / shard.file
        try:
            if path.stat().st_size != shard.bytes or file_hash(path) != shard.sha256:
                raise ValueError("its bytes have changed")
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            if file.schema != index_schema(self.manifest.model["dim"], self.manifest.dtype):
                raise ValueError(f"its columns are not those that {MANIFEST} tells")
            if sum(map(len, batches)) != shard.rows:
                raise ValueError(f"{MANIFEST} lists another number of rows")
        except (OSError, ValueError, pa.ArrowException) as error:
            # Arrow raises an OSError without a number, too, for bytes that it does not know.
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise _unreadable(path, error) from error
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())
            raise UserError(f"{path}: is damaged ({reason}); delete {self.path} and make it again") from error
        return batches


def best_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """Places of the ``k`` highest of ``scores`` [N], best first, equal ones in their order: without sorting all."""
    if k < len(scores):
        least = scores[np.argpartition(scores, -k)[-k]]
        places = np.flatnonzero(scores >= least)
    else:
        places = np.arange(len(scores))
    return places[np.argsort(-scores[places], kind="stable")][:k]


def index_schema(dim: int, dtype: str) -> pa.Schema:
    """The columns of an index file."""
    value = pa.float16() if dtype == "float16" else pa.float32()
    return pa.schema(
        [("path", pa.string()), ("size", pa.int64()), ("mtime_ns", pa.int64()), ("vector", pa.list_(value, dim))]
    )


def vectors_in(batch: pa.RecordBatch) -> np.ndarray:
    """[rows, E], a view of the mapped file."""
    column = batch.column("vector")
    return column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), column.type.list_size)
