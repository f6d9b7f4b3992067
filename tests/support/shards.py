"""Tiny prepared data sets for tests, written by plain pyarrow: what the reader promises holds for any writer."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from eve_ds.data.sources import AnySplit
from eve_ds.data.transforms import build_transform
from preprocessing.local_files import dump_json, write_atomic
from preprocessing.shards.schema import ANSWER_LIST, KINDS, MANIFEST, SAMPLE_COLUMN, SCHEMA_VERSION, CodeGrid
from preprocessing.text.tokenizer import Tokenizer, train_tokenizer

COLORS = ("red", "green", "blue", "yellow")
ANSWERS = ("yes", "no", *COLORS)
FIRST_ID = {"train": 0, "val": 100_000, "test": 200_000}  # no id stands in two splits
_RGB = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 50)}
GRID = CodeGrid(4, 11)  # of the codes of `make_code_set`
EVAL = build_transform(32, train=False)
FLIP = build_transform(32, train=True, crop_scale=None)  # no crop: only flips


def image_of(index: int, size: int = 32, fmt: str = "PNG") -> bytes:
    """The file of image `index`: a square of color COLORS[index % 4] on speckled gray, different for each index."""
    noise = np.random.default_rng(index).integers(100, 140, (size, size, 3)).astype(np.uint8)
    noise[size // 4 : size // 2, size // 4 : size // 2] = _RGB[COLORS[index % 4]]
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, fmt)
    return buffer.getvalue()


def pixels_of(index: int) -> np.ndarray:
    """[32, 32, 3] uint8, the pixels of `image_of(index)`."""
    return np.asarray(Image.open(io.BytesIO(image_of(index))))


def tiny_tokenizer(folder: Path | None = None) -> Tokenizer:
    """Byte-level BPE with fewer than 400 entries; saved in `folder` if that is given."""
    words = [f"image {i} shows a {color} square" for i in range(10) for color in COLORS]
    tokenizer = train_tokenizer([*words, "is the square", "what color has it", "both pictures show", "left right"], 400)
    if folder is not None:
        tokenizer.save(folder)
    return tokenizer


def write_split(
    folder: Path,
    kind: str,
    rows: Sequence[dict[str, Any]],
    shard_rows: int = 8,
    batch_rows: int = 3,
    split: str | None = None,
    grid: CodeGrid | None = None,
) -> Path:
    """Write rows (column -> value) as shards with their manifest; `folder` is the split's own. Returns it.

    grid: of the codes, if the rows have some.
    """
    schema = KINDS[kind] if grid is None else KINDS[kind].append(grid.field)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Any]] = []
    for start in range(0, len(rows), shard_rows):
        part = list(rows[start : start + shard_rows])
        path = folder / f"shard-{len(shards):05d}.arrow"
        table = pa.Table.from_pylist(part, schema=schema)
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=batch_rows)
        shards.append(shard_record(path, len(part), sum(len(row[SAMPLE_COLUMN[kind]]) for row in part)))
    return write_manifest(folder, kind, split or folder.name, shards)


def shard_record(path: Path, rows: int, samples: int) -> dict[str, Any]:
    """A shard's entry in the manifest."""
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return {"file": path.name, "rows": rows, "samples": samples, "bytes": len(content), "sha256": digest}


def write_manifest(folder: Path, kind: str, split: str, shards: Sequence[dict[str, Any]]) -> Path:
    """Write the manifest of shards that are there. Returns the folder."""
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "split": split,
        "rows": sum(shard["rows"] for shard in shards),
        "samples": sum(shard["samples"] for shard in shards),
        "shards": list(shards),
        "dropped": {},
        "dropped_items": [],
        "source": {},
    }
    write_atomic(folder / MANIFEST, dump_json(manifest))
    return folder


def texts(split: AnySplit, column: str) -> list[str]:
    """The caption, question or statement of every sample of a split, in order."""
    found = []
    for index in range(split.samples):
        _, row, item = split.sample(index)
        found.append(row.item(column, item))
    return found


def make_caption_set(
    root: Path, rows: int = 10, split: str = "train", captions: int = 2, image_size: int = 32, **layout: int
) -> Path:
    """`rows` images with `captions` captions each in root/split; layout: shard_rows, batch_rows. Returns it."""
    return write_split(root / split, "caption", caption_rows(rows, split, captions, image_size), split=split, **layout)


def caption_rows(rows: int, split: str, captions: int = 2, image_size: int = 32) -> list[dict[str, Any]]:
    """The rows of `make_caption_set`."""
    return [
        {
            "image": image_of(i, image_size),
            "caption": [f"image {i} caption {c} shows a {COLORS[i % 4]} square" for c in range(captions)],
            "image_id": f"image-{FIRST_ID[split] + i}",
            "split": split,
        }
        for i in range(rows)
    ]


def code_of(index: int, places: int = 16) -> list[int]:
    """The codes of image `index`, from 0 to 10."""
    return [(7 * index + 3 * place) % 11 for place in range(places)]


def make_code_set(
    root: Path,
    rows: int = 10,
    split: str = "train",
    grid: CodeGrid = GRID,
    changed: Mapping[int, Any] | None = None,
) -> Path:
    """As `make_caption_set`, with the codes of `code_of`, but for the rows in `changed`."""
    table = [
        row | {"codes": (changed or {}).get(index, code_of(index, grid.side**2))}
        for index, row in enumerate(caption_rows(rows, split))
    ]
    return write_split(root / split, "caption", table, split=split, grid=grid)


def make_vqa_set(root: Path, rows: int = 10, split: str = "train", image_size: int = 32, **layout: int) -> Path:
    """`rows` images with two questions each in root/split, and root/answer_list.json (ANSWERS). Returns root/split.

    Question ids are 10 x row and 10 x row + 1, row counted from FIRST_ID; the first is yes/no, the
    second asks for the color (it 0.9, yes 0.3).
    """
    table = []
    for i in range(rows):
        color, yes = COLORS[i % 4], ANSWERS[i % 2]
        table.append(
            {
                "image": image_of(i, image_size),
                "questions": [f"is the square of image {i} red", f"what color has the square of image {i}"],
                "answers": [[yes], [color, "yes"]],
                "answer_labels": [[ANSWERS.index(yes)], [ANSWERS.index(color), 0]],
                "answer_scores": [[1.0], [0.9, 0.3]],
                "question_id": [10 * (FIRST_ID[split] + i), 10 * (FIRST_ID[split] + i) + 1],
                "image_id": f"image-{FIRST_ID[split] + i}",
                "split": split,
            }
        )
    write_atomic(root / ANSWER_LIST, dump_json(list(ANSWERS)))
    return write_split(root / split, "vqa", table, split=split, **layout)


def make_nlvr_set(root: Path, rows: int = 10, split: str = "train", image_size: int = 32, **layout: int) -> Path:
    """`rows` pairs of images, each with a true and a false statement, in root/split. Returns that folder."""
    table = [
        {
            "image_0": image_of(i, image_size),
            "image_1": image_of(i + 4, image_size),
            "questions": [f"both pictures show a {color} square" for color in (COLORS[i % 4], COLORS[(i + 1) % 4])],
            "answers": ["True", "False"],
            "identifier": [f"{split}-{i}-0-0", f"{split}-{i}-0-1"],
            "split": split,
        }
        for i in range(rows)
    ]
    return write_split(root / split, "nlvr", table, split=split, **layout)
