"""`python -m preprocessing vqav2`: VQA v2 questions and annotations JSON -> VQA shards with soft labels.

Several pairs of files become one split, such as train2014 + val2014, with Visual Genome's questions on request.
"""

import argparse
from collections import Counter
from itertools import zip_longest
from typing import Any

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord, field, find_copies, read_json
from preprocessing.images.exclusion import ImageList, add_exclude_argument, excluded_images
from preprocessing.images.image_folder import ImageFolder, coco_key
from preprocessing.images.image_refs import ImageRef
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.source import Faults
from preprocessing.sources.visual_genome import FOLDERS, add_image_data_argument, read_coco_numbers
from preprocessing.sources.visual_genome_qa import read_questions
from preprocessing.sources.vqa_grouping import RawQuestion, add_answer_arguments, answer_list_option, vqa_source
from preprocessing.text.answers import normalize_answer
from preprocessing.text.cleaning import TextCleaning, add_text_argument, text_cleaning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `vqav2`."""
    add = parser.add_argument
    add("--questions", required=True, nargs="+", metavar="FILE", help="v2_OpenEnded_mscoco_*_questions.json")
    add(
        "--annotations",
        nargs="+",
        metavar="FILE",
        help="v2_mscoco_*_annotations.json, one for each file of questions; leave out where unpublished",
    )
    add("--visual-genome", metavar="FILE", help="question_answers.json of Visual Genome, to train on as well")
    add("--visual-genome-images", metavar="DIR", help="folder that holds its images")
    add_image_data_argument(parser)
    add_answer_arguments(parser)
    add(
        "--answer-annotations",
        nargs="+",
        metavar="FILE",
        help="annotations whose answers count for a built list, too: with those of val2014 it is the usual list of "
        "train + val",
    )
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "vqa")
    _check_options(args)
    questions = [storage_path(name) for name in args.questions]
    annotations = [storage_path(name) for name in args.annotations or ()]
    excluded, cleaning = excluded_images(args), text_cleaning(args)
    images = ImageFolder(args.images)
    asked, faults = [], Faults()
    for path, answers in zip_longest(questions, annotations):
        asked += read_vqav2(path, answers, images, excluded, cleaning, args.split, faults)
    inputs = [*questions, *annotations]
    if args.visual_genome is not None:
        inputs.append(storage_path(args.visual_genome))
        coco = read_coco_numbers(args.image_data)
        folder = ImageFolder(args.visual_genome_images, FOLDERS)
        asked += read_questions(inputs[-1], folder, coco, excluded, cleaning, args.split, faults, beside_vqav2=True)
    beside = Counter[str]()
    for path in map(storage_path, args.answer_annotations or ()):
        inputs.append(path)
        beside.update(normalize_answer(main) for main, _, _ in _read_annotations(path, faults).values())
    write_split(
        vqa_source(asked, inputs, args, answer_list_option(args), args.answer_list, args.min_answers, faults, beside),
        args,
    )


def _check_options(args: argparse.Namespace) -> None:
    if args.annotations is None and args.split != "test":
        raise UserError(f"--annotations: is needed for --split {args.split}; give v2_mscoco_*_annotations.json")
    if args.annotations is not None and len(args.annotations) != len(args.questions):
        raise UserError(
            f"--annotations: {len(args.annotations)} files for {len(args.questions)} of --questions; give one for each"
        )
    if (args.visual_genome is None) != (args.visual_genome_images is None):
        raise UserError("--visual-genome and --visual-genome-images: give both or neither")
    if args.answer_annotations and (args.split != "train" or args.answer_list is not None):
        raise UserError("--answer-annotations: is for a list that is built; give it with --split train, without a list")
    for first, other in find_copies([*(args.annotations or ()), *(args.answer_annotations or ())]):
        raise UserError(
            f"{other}: is the same file as {first}, so its answers would count twice; leave one of them out"
        )


def read_vqav2(
    questions: StoragePath,
    annotations: StoragePath | None,
    images: ImageFolder,
    excluded: ImageList,
    cleaning: TextCleaning,
    split: str,
    faults: Faults,
) -> list[RawQuestion]:
    """The valid questions in the order of their file, with ten answers each. Raises UserError."""
    answered = {} if annotations is None else _read_annotations(annotations, faults)
    content = read_json(questions)
    records = field(content, "questions", list, f"{questions}")
    subset = "" if "data_subtype" not in content else field(content, "data_subtype", str, f"{questions}")
    subset = subset.replace("test-dev", "test")
    asked = []
    for index, record in enumerate(records):
        where = f"{questions}: questions[{index}]"
        with faults:
            question_id = field(record, "question_id", int, where)
            if annotations is not None and question_id not in answered:
                what = f"question_id {question_id} is not in {annotations}; give the file of this split"
                raise BadRecord(where, what, "question has no annotation")
            image_id = field(record, "image_id", int, where)
            main, people, of = answered.get(question_id, (None, (), None))
            if of not in (None, image_id):
                what = f"asks of image {image_id}, its annotation in {annotations} answers of image {of}"
                raise BadRecord(where, what, "question and annotation are of two images")
            text = cleaning.question(field(record, "question", str, where), split)
            image = _find(images, subset, image_id)
            out = excluded.match(coco_key(image_id), str(image_id))
            asked.append(RawQuestion(image, str(image_id), text, question_id, people, main, where, excluded=out))
    return asked


def _find(images: ImageFolder, subset: str, number: int) -> ImageRef:
    """The image of that number. The questions name no file; COCO's file names follow from subset and number."""
    name = f"COCO_{subset}_{number:012d}.jpg"
    return images.find(f"{subset}/{name}" if images.contains(subset) else name, coco_key(number))


def _read_annotations(path: StoragePath, faults: Faults) -> dict[int, tuple[str, tuple[str, ...], int | None]]:
    """question id -> (multiple choice answer, the ten answers, image id or None)."""
    result: dict[int, tuple[str, tuple[str, ...], int | None]] = {}
    records: list[Any] = field(read_json(path), "annotations", list, f"{path}")
    for index, record in enumerate(records):
        where = f"{path}: annotations[{index}]"
        with faults:
            try:
                answers = tuple([answer["answer"].strip() for answer in field(record, "answers", list, where)])
            except (TypeError, KeyError, AttributeError):
                what = "field 'answers' is no list of objects with an 'answer' string"
                raise BadRecord(where, f"{what}; fix the file", what) from None
            main = field(record, "multiple_choice_answer", str, where)
            question_id = field(record, "question_id", int, where)
            if question_id in result:
                raise UserError(f"{where}: question_id {question_id} occurs twice; fix the file")
            image_id = field(record, "image_id", int, where) if "image_id" in record else None
            result[question_id] = (main, answers, image_id)
    return result
