"""`python -m preprocessing visual-genome-qa`: Visual Genome's question_answers.json -> VQA shards.

[{"id": image, "qas": [{"qa_id", "image_id", "question", "answer", "a_objects", "q_objects"}]}]. A question has one
answer, which scores 1. To train on VQA v2 and these together, see `vqav2 --visual-genome`.
"""

import argparse
from typing import Any

from preprocessing.errors import UserError
from preprocessing.formats.annotations import field, read_json
from preprocessing.images.exclusion import ImageList, add_exclude_argument, excluded_images
from preprocessing.images.image_folder import ImageFolder
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.sources import visual_genome
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.source import Faults
from preprocessing.sources.visual_genome import (
    FOLDERS,
    add_image_data_argument,
    image_names,
    image_number,
    read_coco_numbers,
)
from preprocessing.sources.vqa_grouping import RawQuestion, add_answer_arguments, answer_list_option, vqa_source
from preprocessing.text.cleaning import TextCleaning, add_text_argument, text_cleaning

QUESTION_ID_OFFSET = 10**9  # VQA v2's ids are 1,000 times an image's number, so below 6 x 10^8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `visual-genome-qa`."""
    parser.add_argument("--questions", required=True, metavar="FILE", help="question_answers.json")
    add_image_data_argument(parser)
    add_answer_arguments(parser)
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "vqa")
    path, coco = storage_path(args.questions), read_coco_numbers(args.image_data)
    images, faults = ImageFolder(args.images, FOLDERS), Faults()
    asked = read_questions(path, images, coco, excluded_images(args), text_cleaning(args), args.split, faults)
    write_split(
        vqa_source(asked, [path], args, answer_list_option(args), args.answer_list, args.min_answers, faults), args
    )


def read_questions(
    path: StoragePath,
    images: ImageFolder,
    coco: dict[int, int],
    excluded: ImageList,
    cleaning: TextCleaning,
    split: str,
    faults: Faults,
    beside_vqav2: bool = False,
) -> list[RawQuestion]:
    """The questions in the order of the file, but for those at fault. Raises UserError naming the file.

    With `beside_vqav2`, images and questions get ids that differ from all of COCO's and VQA v2's, and the answers do
    not count for the answer list.
    """
    records = read_json(path)
    if not isinstance(records, list):
        raise UserError(f"{path}: is no JSON list of images with questions; give question_answers.json")
    asked = []
    for index, record in enumerate(records):
        pairs: list[Any] = []
        with faults:
            pairs = field(record, "qas", list, f"{path}: record {index}")
        for number, qa in enumerate(pairs):
            where = f"{path}: record {index}: qas[{number}]"
            with faults:
                image_id = image_number(qa if isinstance(qa, dict) and "image_id" in qa else record, where)
                asked.append(
                    RawQuestion(
                        image=images.find(f"{image_id}.jpg"),
                        image_id=visual_genome.prefixed_image_id(image_id) if beside_vqav2 else str(image_id),
                        text=cleaning.question(field(qa, "question", str, where), split),
                        question_id=field(qa, "qa_id", int, where) + (QUESTION_ID_OFFSET if beside_vqav2 else 0),
                        answers=(field(qa, "answer", str, where),),
                        main_answer=None,
                        where=where,
                        counts=not beside_vqav2,
                        excluded=excluded.match(*image_names(image_id, coco)),
                    )
                )
    return asked
