"""`python -m preprocessing vqav2`: VQA v2 questions and annotations JSON -> VQA shards with soft labels."""

import argparse
import os
from pathlib import Path
from typing import Any

from preprocessing.convert import add_common_arguments, check_common_arguments, write_split
from preprocessing.files import field, read_json
from preprocessing.schema import DataError
from preprocessing.vqa_rows import Asked, add_answer_arguments, given_answers, vqa_source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vqav2`."""
    parser.add_argument("--questions", required=True, metavar="FILE", help="v2_OpenEnded_mscoco_*_questions.json")
    parser.add_argument(
        "--annotations", metavar="FILE", help="v2_mscoco_*_annotations.json; leave out where unpublished"
    )
    add_answer_arguments(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises DataError on bad input."""
    check_common_arguments(args, "vqa")
    if args.annotations is None and args.split != "test":
        raise DataError(f"--annotations: is needed for --split {args.split}; give v2_mscoco_*_annotations.json")
    annotations = None if args.annotations is None else Path(args.annotations)
    asked = read_vqav2(Path(args.questions), annotations, Path(args.images))
    inputs = [Path(args.questions)] + ([annotations] if annotations else [])
    write_split(vqa_source(asked, inputs, args, given_answers(args), args.min_answers), args)


def read_vqav2(questions: Path, annotations: Path | None, images: Path) -> list[Asked]:
    """Questions in the order of their file, with the ten answers each. Raises DataError naming the record at fault."""
    answered = {} if annotations is None else _read_annotations(annotations)
    content = read_json(questions)
    records = field(content, "questions", list, f"{questions}")
    locate = _ImageIndex(images, str(content.get("data_subtype", "")))
    asked = []
    for index, record in enumerate(records):
        where = f"{questions}: questions[{index}]"
        question_id = field(record, "question_id", int, where)
        if annotations is not None and question_id not in answered:
            raise DataError(f"{where}: question_id {question_id} is not in {annotations}; give the file of this split")
        main, people = answered.get(question_id, (None, ()))
        image_id = field(record, "image_id", int, where)
        text = field(record, "question", str, where).strip()
        asked.append(Asked(locate(image_id), str(image_id), text, question_id, people, main, where))
    return asked


def _read_annotations(path: Path) -> dict[int, tuple[str, tuple[str, ...]]]:
    """question id -> (multiple choice answer, the ten answers)."""
    result: dict[int, tuple[str, tuple[str, ...]]] = {}
    records: list[Any] = field(read_json(path), "annotations", list, f"{path}")
    for index, record in enumerate(records):
        where = f"{path}: annotations[{index}]"
        try:
            answers = tuple([answer["answer"].strip() for answer in field(record, "answers", list, where)])
        except (TypeError, KeyError, AttributeError):
            raise DataError(f"{where}: field 'answers' is no list of objects with an 'answer' string") from None
        main = field(record, "multiple_choice_answer", str, where)
        result[field(record, "question_id", int, where)] = (main, answers)
    return result


class _ImageIndex:
    """Finds a COCO image by its number. The questions name no file: its name follows from subset and number.

    Looks in `folder` and in `folder/subset`, for COCO_{subset}_{number:012d} (2014, 2015) and {number:012d} (2017),
    with any extension.
    """

    def __init__(self, folder: Path, subset: str) -> None:
        self._subset = subset
        self._first = folder / subset if (folder / subset).is_dir() else folder
        self._paths: dict[str, Path] = {}
        for place in {folder, self._first}:
            with os.scandir(place) as entries:
                self._paths.update((os.path.splitext(entry.name)[0], place / entry.name) for entry in entries)

    def __call__(self, number: int) -> Path:
        """The image's path; where it would be, if there is none."""
        stem = f"COCO_{self._subset}_{number:012d}"
        found = self._paths.get(stem) or self._paths.get(f"{number:012d}")
        return found or self._first / f"{stem}.jpg"
