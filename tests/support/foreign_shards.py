"""Shards as ViLT's vilt/utils/write_*.py and EVE's data_utils/dataset_*.py write them: one Arrow file, no manifest.

Both call `pa.Table.from_pandas(DataFrame)` and write the table as Arrow IPC: so the schema carries the index of the
frame as JSON under b"pandas", columns are nullable, and lists are as wide as pandas makes them. pandas itself is not
needed: `table_of` adds what it would.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from tests.support.shards import COLORS, image_of

# What an old pyarrow would have unpickled and run when it opened a file: see CVE-2023-47248.
PICKLED_EXTENSION = b"arrow.py_extension_type"


def table_of(rows: Sequence[dict[str, Any]], types: dict[str, pa.DataType] | None = None) -> pa.Table:
    """The table that from_pandas makes of a frame with these rows; `types` for columns that rows alone do not tell."""
    schema = pa.Table.from_pylist(list(rows)).schema
    for name, kind in (types or {}).items():
        schema = schema.set(schema.get_field_index(name), pa.field(name, kind))
    columns = [
        {"name": name, "field_name": name, "pandas_type": "object", "numpy_type": "object", "metadata": None}
        for name in schema.names
    ]
    index = [{"kind": "range", "name": None, "start": 0, "stop": len(rows), "step": 1}]
    described = {"index_columns": index, "column_indexes": [], "columns": columns, "pandas_version": "1.1.5"}
    return pa.Table.from_pylist(list(rows), schema.with_metadata({b"pandas": json.dumps(described).encode()}))


def write_arrow(path: Path, table: pa.Table) -> Path:
    """As `pa.RecordBatchFileWriter(sink, table.schema).write_table(table)` does: one record batch. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as sink, pa.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)
    return path


def vilt_coco(folder: Path, rows: int = 5) -> list[Path]:
    """write_coco_karpathy.py: coco_caption_karpathy_{train,restval,val,test}.arrow; image_id is the file's name."""
    return [
        write_arrow(
            folder / f"coco_caption_karpathy_{split}.arrow",
            table_of(
                [
                    {
                        "image": image_of(i),
                        "caption": [f"{split} {i} {c} {COLORS[i % 4]}" for c in range(1 + i % 3)],
                        "image_id": f"COCO_{split}2014_{i:012d}.jpg",
                        "split": split,
                    }
                    for i in range(rows)
                ]
            ),
        )
        for split in ("train", "restval", "val", "test")
    ]


def vilt_vqa(folder: Path, rows: int = 5, whole: bool = False) -> list[Path]:
    """write_vqa.py: vqav2_{train,val,test,test-dev}.arrow; without answers on test, where pandas makes list<null>.

    `whole`: trainable_val and rest_val, too, the two parts of val: its last 2 images are the rest.
    """
    parts = {"train": (0, rows), "val": (100, 100 + rows), "test": (200, 200 + rows), "test-dev": (200, 200 + rows)}
    if whole:
        parts |= {"trainable_val": (100, 98 + rows), "rest_val": (98 + rows, 100 + rows)}
    paths = []
    for split, (start, end) in parts.items():
        known = not split.startswith("test")
        table = [
            {
                "image": image_of(i),
                "questions": [f"is image {i - start} red?", f"what color has image {i - start}?"],
                "answers": [["yes"], [COLORS[i % 4], "yes"]] if known else [],
                "answer_labels": [[0], [2 + i % 4, 0]] if known else [],
                "answer_scores": [[1.0], [0.9, 0.3]] if known else [],
                "image_id": i,
                "question_id": [10 * i, 10 * i + 1],
                "split": split,
            }
            for i in range(start, end)
        ]
        types = None if known else {n: pa.list_(pa.null()) for n in ("answers", "answer_labels", "answer_scores")}
        paths.append(write_arrow(folder / f"vqav2_{split}.arrow", table_of(table, types)))
    return paths


def vilt_nlvr(folder: Path, rows: int = 5, whole: bool = False) -> list[Path]:
    """write_nlvr2.py: nlvr2_{train,dev,test1}.arrow; one row a pair of images.

    `whole`: {balanced,unbalanced}_{dev,test1}, too, which hold some of the pairs of dev and test1 again.
    """
    parts = {split: (split, range(rows)) for split in ("train", "dev", "test1")}
    if whole:
        for split in ("dev", "test1"):
            parts[f"balanced_{split}"] = (split, range(rows - 2))
            parts[f"unbalanced_{split}"] = (split, range(rows - 1))
    return [
        write_arrow(
            folder / f"nlvr2_{name}.arrow",
            table_of(
                [
                    {
                        "image_0": image_of(i),
                        "image_1": image_of(i + 4),
                        "questions": [f"both show {color}" for color in COLORS[:2]],
                        "answers": ["True", "False"],
                        "identifier": [f"{split}-{i}-0-0", f"{split}-{i}-0-1"],
                        "split": name,
                    }
                    for i in numbers
                ]
            ),
        )
        for name, (split, numbers) in parts.items()
    ]


def vilt_web(folder: Path, rows: int = 5, slices: int = 2) -> list[Path]:
    """write_conceptual_caption.py and write_sbu.py: conceptual_caption_train_0.arrow, …: slices of one set."""
    return [
        write_arrow(
            folder / f"conceptual_caption_train_{part}.arrow",
            table_of(
                [
                    {
                        "image": image_of(10 * part + i),
                        "caption": [f"web {part} {i}"],
                        "image_id": f"{part:04d}{i:03d}",
                        "split": "train",
                    }
                    for i in range(rows)
                ]
            ),
        )
        for part in range(slices)
    ]


def visual_genome(folder: Path, rows: int = 5) -> list[Path]:
    """write_vg.py of ViLT and dataset_vg.py of EVE: vg.arrow with the regions' boxes beside the phrases, no split."""
    table = [
        {
            "image": image_of(i),
            "caption": [f"phrase {i} {r}" for r in range(3)],
            "width": [10, 20, 30],
            "height": [10, 20, 30],
            "x": [0, 1, 2],
            "y": [0, 1, 2],
            "image_id": str(i),
        }
        for i in range(rows)
    ]
    return [write_arrow(folder / "vg.arrow", table_of(table))]


def eve_captions(folder: Path, name: str = "coco", rows: int = 5, slices: int = 2) -> list[Path]:
    """EVE's dataset_{coco,cc3m,cc12m,sbu}.py: NAME_0.arrow, …: one row a caption, a string; SBU has no image_id."""
    paths = []
    for part in range(slices):
        table = [
            {"image": image_of(i), "caption": f"{name} {part} {i}", "image_id": f"train2014_{i}"} for i in range(rows)
        ]
        if name == "sbu":
            table = [{key: row[key] for key in ("image", "caption")} for row in table]
        paths.append(write_arrow(folder / f"{name}_{part}.arrow", table_of(table)))
    return paths


def with_pickle(path: Path, pickled: bytes) -> Path:
    """Mark the image column of a shard as an extension type whose metadata are `pickled`; and put them beside it."""
    with pa.ipc.open_file(str(path)) as reader:
        table = reader.read_all()
    index = table.schema.get_field_index("image")
    marks = {b"ARROW:extension:name": PICKLED_EXTENSION, b"ARROW:extension:metadata": pickled}
    field = table.schema.field(index).with_metadata(marks)
    metadata = {**(table.schema.metadata or {}), b"pandas_pickle": pickled}
    return write_arrow(path, table.cast(table.schema.set(index, field)).replace_schema_metadata(metadata))
