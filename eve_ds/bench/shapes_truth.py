"""The shapes world in benchmarks: common options, and the ground truth (scene) of every row of prepared shards."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from eve_ds.data.shards import Row
from eve_ds.data.sources import AnySplit
from eve_ds.weights.model_folder import CONFIG, ModelFolder
from preprocessing.errors import UserError, shortened
from preprocessing.shapes.captions import wordings
from preprocessing.shapes.scenes import Scene, read_scenes
from preprocessing.text.tokenizer import FILE_NAME as TOKENIZER
from preprocessing.text.tokenizer import Tokenizer


def add_shapes_options(parser: ArgumentParser) -> None:
    """Add the options for the model and the data to test it on."""
    parser.add_argument("--checkpoint", required=True, help="run folder or model folder")
    parser.add_argument("--data", required=True, help="prepared caption dataset of the shapes world")
    parser.add_argument("--scenes", required=True, help="folder of scenes_{split}2014.json, such as RAW/annotations")
    parser.add_argument("--split", default="val", help="split to test on: val or test")


def model_files(checkpoint: str) -> tuple[ModelFolder, Tokenizer]:
    """The model and its tokenizer. Raises UserError if its config or tokenizer is missing."""
    files = ModelFolder.find(checkpoint)
    for part, name in ((files.config, CONFIG), (files.tokenizer, TOKENIZER)):
        if part is None:
            raise UserError(
                f"--checkpoint {checkpoint}: no {name} beside the weights; name a run folder or a model folder "
                "(python -m eve_ds.convert makes one from a published file)"
            )
    return files, Tokenizer.load(files.tokenizer or "")


def scenes_of_rows(split: AnySplit, count: int, folder: str, name: str) -> tuple[str, list[Scene]]:
    """Scenes of the first ``count`` images of a caption split.

    Args:
        folder: folder of the scene files.
        name: name of the split.
    Returns:
        (order in which captions name objects, one of ORDERS; scenes).
    Raises:
        UserError: as ``read_scenes``; or an image has no scene in the file, or its first caption does not fit the scene
            (the file belongs to another world with the same image ids).
    """
    if Path(folder).is_file():
        raise UserError(f"--scenes {folder}: is a file; name its folder")
    path = Path(folder) / f"scenes_{name}2014.json"
    order, read = read_scenes(path)
    scenes = {str(image_id): scene for image_id, scene in read.items()}  # str, as in the shards
    found = []
    for index in range(count):
        row = split.row(index)
        scene = scenes.get(_image_id(row))
        if scene is None:
            raise UserError(
                f"{row.where}: image_id {_image_id(row)!r} is not in {path}; name the right folder with --scenes"
            )
        caption = str(row.item("caption", 0))
        if caption not in wordings(scene, order):
            raise UserError(
                f"{row.where}: its caption {shortened(repr(caption))} does not fit image {_image_id(row)} of {path}; "
                "name the scene files of the same world with --scenes"
            )
        found.append(scene)
    return order, found


def _image_id(row: Row) -> str:
    if "image_id" not in row.batch.schema.names:
        raise UserError(f"{row.where}: has no column 'image_id'; convert it with `python -m preprocessing coco`")
    return str(row.value("image_id"))
