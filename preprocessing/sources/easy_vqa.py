"""`python -m preprocessing easy-vqa`: the PyPI package `easy-vqa` (Victor Zhou, MIT) -> VQA shards, or caption shards.

Its test split is the official one. It has no validation split: every tenth image of its training split, chosen by a
hash of the image, becomes `val`, and the rest is `train`.
With `--captions` each image gets one caption for pre-training, such as "a teal circle": what the answered questions of
its split say of it.
"""

import argparse
import hashlib
import importlib.util
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from preprocessing.errors import UserError
from preprocessing.formats.annotations import read_json, read_text
from preprocessing.images.image_refs import FileImage
from preprocessing.running.storage import storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.source import Faults, Row, Source
from preprocessing.sources.vqa_grouping import RawQuestion, vqa_source

_VAL_SHARE = 10  # one image in ten
_SHAPES = ("circle", "rectangle", "triangle")
_YES, _NO = "yes", "no"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `easy-vqa`."""
    parser.add_argument(
        "--captions", action="store_true", help="caption shards for pre-training, made of the answered questions"
    )
    add_common_arguments(parser, images=False)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError when the package is not installed, and on bad options."""
    check_common_arguments(args, "caption" if args.captions else "vqa")
    data = _package_data()
    listed = read_text(data / "answers.txt").split()
    asked = read_easy_vqa(data, args.split)
    if args.captions:
        write_split(captions_of(asked, [_questions(data, args.split)], listed), args)
        return
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


def captions_of(asked: Sequence[RawQuestion], inputs: Sequence[Path], listed: Sequence[str]) -> Source:
    """A row for each image whose questions tell its color or its shape, with that as its caption."""
    of_image: dict[str, list[RawQuestion]] = {}
    for question in asked:
        of_image.setdefault(question.image_id, []).append(question)
    counts = {"questions": len(asked), "images": len(of_image)}
    source = Source("caption", [], [storage_path(f"{path}") for path in inputs], counts)
    colors = sorted(set(listed) - {*_SHAPES, _YES, _NO})
    rows = []
    for image_id, questions in of_image.items():
        facts = set[str]().union(*(told(question.text, question.answers[0]) for question in questions))
        color, shape = _first(colors, facts), _first(_SHAPES, facts)
        if color or shape:
            caption = " ".join(filter(None, ("a", color, shape or "shape")))
            rows.append(Row(image_id, (questions[0].image,), {"caption": [caption], "image_id": image_id}))
        else:
            source.left_out["image of which nothing is told"] += 1
    source.rows = rows
    return source


def told(question: str, answer: str) -> set[str]:
    """Words that are true of the image: the answer and those of the question, unless question and answer deny them."""
    words = set(re.findall(r"\w+", question))
    negated = bool(words & {"no", "not"})
    if answer not in (_YES, _NO):
        return words | {answer}
    return words if negated == (answer == _NO) else set()


def _first(of: Iterable[str], among: set[str]) -> str:
    return next((word for word in of if word in among), "")


def _is_val(file: Path) -> bool:
    """By content, so that two files with the same image are in the same split."""
    return int.from_bytes(hashlib.sha256(file.read_bytes()).digest()[:4]) % _VAL_SHARE == 0
