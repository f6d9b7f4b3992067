"""`python -m preprocessing easy-vqa`: the PyPI package `easy-vqa` (Victor Zhou, MIT) -> VQA shards.

Its test split is the official one. It has no validation split: every tenth image of its training split, chosen by a
hash of the image, becomes `val`, and the rest is `train`.
"""

import argparse
import hashlib
import importlib.util
from pathlib import Path

from preprocessing.errors import UserError
from preprocessing.formats.annotations import read_json, read_text
from preprocessing.images.image_refs import FileImage
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.source import Faults
from preprocessing.sources.vqa_grouping import RawQuestion, vqa_source

_VAL_SHARE = 10  # one image in ten


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `easy-vqa`."""
    add_common_arguments(parser, images=False)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError when the package is not installed, and on bad options."""
    check_common_arguments(args, "vqa")
    data = _package_data()
    listed = read_text(data / "answers.txt").split()
    asked = read_easy_vqa(data, args.split)
    source = vqa_source(asked, [_questions(data, args.split)], args, listed, None, min_answers=1, faults=Faults())
    source.numbered = ("question_id",)
    write_split(source, args)


def _package_data() -> Path:
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise UserError("easy-vqa: the package is not installed; run `pip install easy-vqa`")
    return Path(spec.origin).parent / "data"


def _questions(data: Path, split: str) -> Path:
    return data / ("test" if split == "test" else "train") / "questions.json"


def read_easy_vqa(data: Path, split: str) -> list[RawQuestion]:
    """The questions of `split` in the order of the file. Their ids are positions in it."""
    path = _questions(data, split)
    asked = []
    wanted: dict[Path, bool] = {}
    for index, (text, answer, image) in enumerate(read_json(path)):
        file = path.parent / "images" / f"{image}.png"
        if file not in wanted:
            wanted[file] = split == "test" or _is_val(file) == (split == "val")
        if wanted[file]:
            asked.append(
                RawQuestion(
                    FileImage(f"{file}"),
                    f"{path.parent.name}-{image}",
                    text,
                    index,
                    (answer,),
                    answer,
                    f"{path}: {index}",
                )
            )
    return asked


def _is_val(file: Path) -> bool:
    """By content, so that two files with the same image are in the same split."""
    return int.from_bytes(hashlib.sha256(file.read_bytes()).digest()[:4]) % _VAL_SHARE == 0
