"""`python -m preprocessing codes`: adds the codes of a visual tokenizer to caption shards (`--task mlm_mim_codes`).

FILE holds the codes of each image, which a tokenizer of yours has made of the image resized to a square:
  .npz      arrays `image_id` [n], text or whole numbers, and `codes` [n, side * side] or [n, side, side], whole numbers
  .parquet  the columns `image_id`, and `codes`: lists of side * side whole numbers
Codes run row by row, from 0 to K - 1. They are matched by `image_id`; all other columns, and the image files, stay as
they are. Where ids are line numbers, which begin anew in each split, give one split at a time. All codes are held in
memory. docs/examples/image_codes.py makes such a file.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from preprocessing.errors import UserError, id_without_secrets
from preprocessing.images.fingerprints import NPZ_DAMAGE
from preprocessing.running.output_folder import output_folder
from preprocessing.running.progress import Progress
from preprocessing.running.storage import StoragePath, file_sha256, open_input, storage_path, write_whole
from preprocessing.shards.hashed_file import HashedFile
from preprocessing.shards.reader import sound_batches, split_folders
from preprocessing.shards.schema import CODES, IDS, KINDS, MANIFEST, CodeGrid, id_key, ids_of_batch, read_manifest
from preprocessing.shards.writer import DROPPED, SPLIT_FILES, check_output, write_manifest, write_provenance

_COUNTED = ("schema_version", "kind", "split", "rows", "samples", "shards")  # of a manifest, written anew
_SHOWN = 3  # ids in a message


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `codes`."""
    parser.add_argument("--data", required=True, metavar="DIR", help="a caption data set folder or URI, or one split")
    parser.add_argument("--codes", required=True, metavar="FILE", help="codes by image_id: .npz or .parquet")
    parser.add_argument("--vocabulary", required=True, type=int, metavar="K", help="codes of the tokenizer, as 8192")
    parser.add_argument("--out", required=True, metavar="DIR", help="local folder to write the new data set to")
    parser.add_argument("--overwrite", action="store_true", help="replace splits that are in --out")


def run(args: argparse.Namespace) -> None:
    """Write each split of --data with codes. Raises UserError on bad input, before anything is written."""
    out = storage_path(args.out)
    if not isinstance(out, Path):
        raise UserError(f"--out {args.out}: must be a local folder; copy it where it shall be")
    if not 1 <= args.vocabulary <= 1 << 31:
        raise UserError(f"--vocabulary {args.vocabulary}: must be from 1 to 2**31")
    folders = split_folders(storage_path(args.data))
    manifests = [read_manifest(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        if manifest["kind"] != "caption":
            raise UserError(f"{folder}: holds {manifest['kind']} data; only caption shards have codes")
        if isinstance(folder, Path) and os.path.realpath(folder) == os.path.realpath(out / manifest["split"]):
            raise UserError(f"--out {out}: is where --data lies; name another folder")
        check_output(out, "caption", manifest["split"], args.overwrite)
    table = CodeTable.load(storage_path(args.codes), args.vocabulary)
    used = np.zeros(len(table.keys), dtype=bool)
    for folder, manifest in zip(folders, manifests, strict=True):
        _check_ids(folder, manifest, table, used)
    for folder, manifest in zip(folders, manifests, strict=True):
        target = out / manifest["split"]
        _write_split(folder, manifest, table, target, args.overwrite)
        print(f"{target}: {manifest['rows']} images with {table.grid}")
    if not used.all():
        print(f"{args.codes}: has codes of {np.count_nonzero(~used)} other images, which are left out")


@dataclass(frozen=True)
class CodeTable:
    """Codes by image.

    Attributes:
        place: the file, for messages.
        grid: of the codes.
        keys: [n] uint64, ascending: the `id_key` of each image id.
        rows: [n] int64: the row of each key in `codes`.
        codes: [n, side * side].
    """

    place: StoragePath
    grid: CodeGrid
    keys: np.ndarray
    rows: np.ndarray
    codes: np.ndarray

    @classmethod
    def load(cls, path: StoragePath, vocabulary: int) -> "CodeTable":
        """Read and check a file. Raises UserError naming the file, and the image that is at fault."""
        if not path.name.endswith((".npz", ".parquet")):
            raise UserError(f"--codes {path}: must end in .npz or .parquet; see --help for what is in it")
        try:
            with open_input(path) as file:
                ids, codes = (_read_npz if path.name.endswith(".npz") else _read_parquet)(file)
        except FileNotFoundError:
            raise UserError(f"--codes {path}: no such file; compute the codes first (docs/objectives.md)") from None
        except (*NPZ_DAMAGE, pa.ArrowException) as error:
            raise UserError(f"--codes {path}: {' '.join(str(error).split())}; see --help for what is in it") from None
        side = int(codes.shape[1] ** 0.5 + 0.5)
        if not len(codes) or side < 1 or side**2 != codes.shape[1]:
            what = f"{len(codes)} images with {codes.shape[1]} codes each"
            raise UserError(f"--codes {path}: holds {what}; a grid has side x side of them")
        keys = np.frombuffer(b"".join(map(id_key, ids)), "<u8")
        rows = np.argsort(keys, kind="stable")
        keys = keys[rows]
        if (twice := np.flatnonzero(keys[1:] == keys[:-1])).size:
            again = ids[rows[twice[0] + 1]]
            raise UserError(f"--codes {path}: image_id {again} occurs twice; keep one of them")
        if codes.min() < 0 or codes.max() >= vocabulary:
            row, place = np.argwhere((codes < 0) | (codes >= vocabulary))[0].tolist()
            where = f"image_id {ids[row]} has code {codes[row, place]} at place {place}"
            mend = f"codes must be from 0 to {vocabulary - 1}, so raise --vocabulary or make them again"
            raise UserError(f"--codes {path}: {where}; {mend}")
        return cls(path, CodeGrid(side, vocabulary), keys, rows, codes)

    def find(self, keys: Sequence[bytes]) -> np.ndarray:
        """[m] int64: the place in `self.keys` of each key, -1 where it is missing."""
        wanted = np.frombuffer(b"".join(keys), "<u8")
        places = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[places] == wanted, places, -1)

    def column(self, keys: Sequence[bytes]) -> pa.Array:
        """The column of a record batch whose images have these keys."""
        found = self.codes[self.rows[self.find(keys)]]
        list_type = self.grid.field.type
        ends = np.arange(len(found) + 1, dtype=np.int32) * found.shape[1]
        return pa.ListArray.from_arrays(pa.array(ends), pa.array(found.ravel(), list_type.value_type), type=list_type)


def _read_npz(file: Any) -> tuple[list[str], np.ndarray]:
    """(ids, codes [n, side * side]). Raises what is in NPZ_DAMAGE."""
    with np.load(file, allow_pickle=False) as arrays:
        ids, codes = (arrays[name] if name in arrays else _lacking(name) for name in ("image_id", CODES))
    if ids.ndim != 1 or ids.dtype.kind not in "Uiu":
        raise ValueError(f"image_id is {ids.dtype} of shape {ids.shape}, not a list of texts or whole numbers")
    square = codes.ndim == 2 or (codes.ndim == 3 and codes.shape[1] == codes.shape[2])
    if not square or codes.dtype.kind not in "iu" or len(codes) != len(ids):
        raise ValueError(f"codes are {codes.dtype} of shape {codes.shape}, not whole numbers [{len(ids)}, side * side]")
    return list(map(str, ids.tolist())), codes.reshape(len(codes), -1 if codes.size else 0)


def _read_parquet(file: Any) -> tuple[list[str], np.ndarray]:
    """As `_read_npz`; also raises pyarrow.ArrowException."""
    table = pq.ParquetFile(file)
    for name in ("image_id", CODES):
        if name not in table.schema_arrow.names:
            _lacking(name)
    data = table.read(columns=["image_id", CODES])
    ids = data.column("image_id").to_pylist()
    codes = data.column(CODES).combine_chunks()
    if None in ids or not all(isinstance(one, str | int) for one in ids):
        raise ValueError("image_id holds a null, or something that is no text and no whole number")
    lists = pa.types.is_list(codes.type) or pa.types.is_large_list(codes.type)
    if not lists or not pa.types.is_integer(codes.type.value_type):
        raise ValueError(f"codes are {codes.type}, not lists of whole numbers")
    lengths = codes.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    for one, length in zip(ids, lengths.tolist(), strict=True):
        if length != lengths[0]:
            raise ValueError(f"image_id {one} has {length} codes, image_id {ids[0]} has {lengths[0]}")
    flat = codes.flatten()
    if flat.null_count:
        raise ValueError("codes hold a null")
    return list(map(str, ids)), flat.to_numpy().reshape(len(ids), -1 if len(flat) else 0)


def _lacking(name: str) -> Any:
    raise ValueError(f"holds no {name}")


def _batches(folder: StoragePath, shard: dict[str, Any]) -> Iterator[tuple[pa.RecordBatch, list[str], list[bytes]]]:
    """(record batch, image ids, their keys) of a shard. Raises UserError when it is damaged."""
    path = folder / shard["file"]
    for first, batch in sound_batches(path, "caption"):
        ids, keys = ids_of_batch(batch, "image_id")
        if len(ids) < batch.num_rows:
            where = f"{path} rows {first} to {first + batch.num_rows - 1}"
            raise UserError(f"{where}: an image_id is null; see `python -m preprocessing verify {folder}`")
        yield batch, [id_without_secrets(one.decode("utf-8", "replace")) for one in ids], keys


def _check_ids(folder: StoragePath, manifest: dict[str, Any], table: CodeTable, used: np.ndarray) -> None:
    """Mark the codes that the split has use for in `used`. Raises UserError when an image has none."""
    missing: list[str] = []
    for shard in manifest["shards"]:
        for _, ids, keys in _batches(folder, shard):
            places = table.find(keys)
            used[places[places >= 0]] = True
            missing += [ids[row] for row in np.flatnonzero(places < 0)]
    if missing:
        shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
        what = f"of {len(missing)} of the {manifest['rows']} images of {folder}: image_id {shown}"
        raise UserError(f"--codes {table.place}: has no codes {what}; compute them, too")


def _write_split(
    folder: StoragePath, manifest: dict[str, Any], table: CodeTable, target: Path, overwrite: bool
) -> None:
    """Write a split anew, whole or not at all."""
    with output_folder(target, SPLIT_FILES, overwrite) as new:
        shards = []
        with Progress(f"codes {folder.name}", len(manifest["shards"]), "shard") as progress:
            for shard in manifest["shards"]:
                shards.append(_write_shard(folder, shard, table, new))
                progress.add(1)
        for name in (IDS, DROPPED):
            if (folder / name).exists():
                write_whole(new / name, (folder / name).read_bytes())
        write_provenance(new, [table.place, folder / MANIFEST])
        kept = {name: value for name, value in manifest.items() if name not in _COUNTED}
        write_manifest(new, "caption", manifest["split"], shards, **kept)


def _write_shard(folder: StoragePath, shard: dict[str, Any], table: CodeTable, new: Path) -> dict[str, Any]:
    """Write one shard with codes, of the same rows. Returns its record."""
    path = folder / shard["file"]
    if file_sha256(path) != shard["sha256"]:
        raise UserError(f"{path}: has changed since it was made; see `python -m preprocessing verify {folder}`")
    columns = KINDS["caption"]
    schema = columns.append(table.grid.field)
    with HashedFile(new / shard["file"]) as file:
        with pa.ipc.new_file(file, schema) as arrow:
            for batch, _, keys in _batches(folder, shard):
                plain = [batch.column(name) for name in columns.names]
                arrow.write_batch(pa.record_batch([*plain, table.column(keys)], schema=schema))
        sha256, size = file.finish()
    return shard | {"bytes": size, "sha256": sha256}
