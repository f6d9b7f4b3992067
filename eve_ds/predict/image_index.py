"""An index on disk: the unit vectors of a folder's images, searched by cosine. Arrow files are mapped into memory.

INDEX/manifest.json            model, folder, the files below, images that could not be read; written last, atomically
INDEX/features-000001.arrow    path (relative to the folder), size, mtime_ns, vector; never written twice by one name
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from eve_ds.predict.eve import EVE
from preprocessing.errors import UserError
from preprocessing.local_files import check_regular, dump_json, load_json, write_atomic

MANIFEST = "manifest.json"
FORMAT = "eve-ds image index 1"
DTYPES = ("float32", "float16")


class Hit(NamedTuple):
    """An image that was found: its path relative to the indexed folder, and the cosine."""

    path: str
    score: float


@dataclass
class IndexManifest:
    """What ``manifest.json`` holds.

    Args:
        model: see ``model_identity``.
        folder: whose images these are, absolute.
        dtype: of the vectors: float32 or float16.
        shards: [{"file", "rows", "bytes"}].
        broken: [{"path", "size", "mtime_ns", "reason"}] of images that could not be read.
    """

    model: dict[str, Any]
    folder: str
    dtype: str
    shards: list[dict[str, Any]] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)
    format: str = FORMAT

    def write(self, index: Path) -> None:
        write_atomic(index / MANIFEST, dump_json(asdict(self)))

    @classmethod
    def read(cls, index: Path) -> IndexManifest:
        """Raises UserError if there is none, or a damaged one."""
        path = index / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{index}: is no index, {MANIFEST} is missing; make one with python -m eve_ds.predict index"
            )
        check_regular(path)
        try:
            tree = load_json(path.read_bytes())
            found = cls(**tree)
            if found.format != FORMAT or found.dtype not in DTYPES:
                raise ValueError(f"format {found.format!r}, dtype {found.dtype!r}")
            for shard in found.shards:
                Path(shard["file"]), int(shard["rows"]), int(shard["bytes"])
            _ = found.model["dim"], [one["path"] for one in found.broken]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: is damaged or of another version ({error}); make the index again") from error
        return found


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
        batches_of_shard: how many of ``batches`` each file has.
    Raises:
        UserError: no index, or a damaged one.
    """

    def __init__(self, index: str | Path) -> None:
        self.path = Path(index)
        self.manifest = IndexManifest.read(self.path)
        opened = [self._open(shard) for shard in self.manifest.shards]
        self.batches_of_shard = [len(batches) for batches in opened]
        self._batches = [batch for batches in opened for batch in batches]
        self._vectors = [vectors_in(batch) for batch in self._batches]
        self._starts = np.cumsum([0, *(len(vectors) for vectors in self._vectors)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def folder(self) -> Path:
        """Of the images."""
        return Path(self.manifest.folder)

    def batches(self) -> list[pa.RecordBatch]:
        """The rows, with all columns."""
        return self._batches

    def search(self, queries: np.ndarray, k: int = 10) -> list[list[Hit]]:
        """The ``k`` images with the highest cosine to each query, best first; of equal ones the earlier row.

        Args:
            queries: [Q, E] float32 unit vectors, of texts or images.
            k: at least 1; fewer are found where the index has fewer.
        """
        if k < 1:
            raise UserError(f"k={k}: must be at least 1")
        scores = np.empty((len(queries), len(self)), np.float32)
        for start, vectors in zip(self._starts, self._vectors, strict=False):
            # float16 has no fast product in NumPy; to convert a batch is cheaper.
            scores[:, start : start + len(vectors)] = queries @ vectors.astype(np.float32, copy=False).T
        return [[Hit(self._path(row), float(own[row])) for row in best_rows(own, k)] for own in scores]

    def _path(self, row: int) -> str:
        batch = int(np.searchsorted(self._starts, row, side="right")) - 1
        return str(self._batches[batch].column("path")[int(row - self._starts[batch])])

    def _open(self, shard: dict[str, Any]) -> list[pa.RecordBatch]:
        path = self.path / shard["file"]
        try:
            file = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [file.get_batch(i) for i in range(file.num_record_batches)]
            sound = path.stat().st_size == shard["bytes"] and file.schema == index_schema(
                self.manifest.model["dim"], self.manifest.dtype
            )
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())}); make the index again") from error
        if not sound or sum(map(len, batches)) != shard["rows"]:
            raise UserError(f"{path}: is not the file that {MANIFEST} lists; make the index again")
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
