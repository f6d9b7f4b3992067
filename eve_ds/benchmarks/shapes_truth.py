"""The shapes world as benchmarks read it: their common options, and the scene of every row of prepared shards."""

from __future__ import annotations

import re
from pathlib import Path

from jsonargparse import ArgumentParser

from eve_ds.data.shards import Row
from eve_ds.data.sources import AnySplit
from preprocessing.schema import DataError
from preprocessing.shapes.scenes import COLORS, Scene, read_scenes


def add_shapes_options(parser: ArgumentParser) -> None:
    """Which model is tested, on what."""
    parser.add_argument("--checkpoint", required=True, help="run folder or model folder")
    parser.add_argument("--data", required=True, help="prepared caption data of the shapes world")
    parser.add_argument("--scenes", required=True, help="folder of scenes_{split}2014.json: RAW/annotations")
    parser.add_argument("--split", default="val", help="tested: val or test")


def scene_file(folder: str, split: str) -> Path:
    """What `preprocessing shapes` calls the scenes of a split."""
    return Path(folder) / f"scenes_{split}2014.json"


def scenes_of_rows(split: AnySplit, count: int, path: Path) -> list[Scene]:
    """What is in the first ``count`` images of a caption split.

    Args:
        path: the scene file of that split.
    Raises:
        DataError: as ``read_scenes``; or an image has no scene there, or another one than its caption tells: the
            file is of another world, whose images have the same ids.
    """
    scenes = {str(image_id): scene for image_id, scene in read_scenes(path).items()}  # text as in the shards
    found = []
    for index in range(count):
        row = split.row(index)
        scene = scenes.get(_image_id(row))
        if scene is None:
            raise DataError(f"{row.where}: image_id {_image_id(row)!r} is not in {path}; name its own with --scenes")
        told = set(COLORS) & set(re.findall(r"\w+", str(row.item("caption", 0)).lower()))
        if not told <= {item.color for item in scene}:
            raise DataError(
                f"{row.where}: its caption tells of {' and '.join(sorted(told))}, {path} of another scene; name the "
                "scene files of the same world with --scenes"
            )
        found.append(scene)
    return found


def _image_id(row: Row) -> str:
    if "image_id" not in row.batch.schema.names:
        raise DataError(f"{row.where}: has no column 'image_id'; convert it with `python -m preprocessing coco`")
    return str(row.value("image_id"))
