"""`python -m preprocessing json`: the X-VLM/ALBEF fine-tuning JSON -> shards of any kind.

retrieval  {"image", "caption": str or list, "image_id"}: records of one image become one row; the lines of X-VLM's
           pre-training, {"image_rpath", "caption": list}, are read as well
vqa        {"image", "question", "question_id", "dataset", "answer": str or list}; no answer on test splits. A string is
           the right answer; a list in "dataset": "vqa" has the answers of people, even if it has only one
nlvr       {"images": [left, right], "sentence", "label", "identifier"}
"""

import argparse
import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord, field, find_copies, read_json, read_json_lines
from preprocessing.images.exclusion import EXCLUDED, ImageList, add_exclude_argument, excluded_images, names_in_record
from preprocessing.images.image_refs import image_in
from preprocessing.running.storage import StoragePath, open_input, storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.nlvr_grouping import Statement, names_in_shards, nlvr_source, parse_label
from preprocessing.sources.source import Faults, Row, Source
from preprocessing.sources.split_names import RecordSplits, split_of
from preprocessing.sources.visual_genome import prefixed_image_id
from preprocessing.sources.visual_genome_qa import QUESTION_ID_OFFSET
from preprocessing.sources.vqa_grouping import RawQuestion, add_answer_arguments, answer_list_option, vqa_source
from preprocessing.text.cleaning import TextCleaning, add_text_argument, text_cleaning

_FIRST = 1 << 16  # bytes of the first line by which its kind is known
_KINDS = {"retrieval": "caption", "vqa": "vqa", "nlvr": "nlvr"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `json`."""
    parser.add_argument("--task", required=True, choices=tuple(_KINDS), help="which of the three forms the files have")
    parser.add_argument("--annotations", required=True, nargs="+", metavar="FILE", help="JSON files, read as one")
    parser.add_argument(
        "--visual-genome-images", metavar="DIR", help='of VQA, where the images of `"dataset": "vg"` lie, if elsewhere'
    )
    add_answer_arguments(parser)
    add_exclude_argument(parser)
    add_text_argument(parser, default="xvlm")
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, _KINDS[args.task])
    files = [storage_path(name) for name in args.annotations]
    for first, other in find_copies(files):
        raise UserError(f"{first} and {other}: are one file under two names; give it once")
    excluded, cleaning, faults, splits = excluded_images(args), text_cleaning(args), Faults(), RecordSplits(args.split)
    records = _records(files, excluded, splits, faults)
    if args.task == "retrieval":
        source = read_retrieval(records, files, args.images, excluded, cleaning, faults)
    elif args.task == "vqa":
        asked = read_vqa(records, args.images, args.visual_genome_images, excluded, cleaning, args.split, faults)
        source = vqa_source(asked, files, args, answer_list_option(args), args.answer_list, args.min_answers, faults)
    else:
        source = nlvr_source(read_nlvr(records, args.images, excluded, cleaning, faults), files, faults, args.split)
    splits.report(source)
    write_split(source, args)


Records = Iterable[tuple[str, Any]]  # (where, record)


def _records(files: Sequence[StoragePath], excluded: ImageList, splits: RecordSplits, faults: Faults) -> Records:
    """The records of all files, except those that name another split."""
    for where, record in _all_records(files, faults):
        skipped = True
        with faults:
            skipped = isinstance(record, dict) and splits.is_other_split(where, split_of(record))
            if skipped:
                excluded.match(*names_in_record(record))  # counts the match: a list of another split is no mistake
        if not skipped:
            yield where, record


def _all_records(files: Sequence[StoragePath], faults: Faults) -> Iterator[tuple[str, Any]]:
    for path in files:
        if _is_lines(path):
            yield from ((f"{path}: line {number}", record) for number, record in read_json_lines(path, faults.add))
            continue
        records = read_json(path)
        if not isinstance(records, list):
            raise UserError(f"{path}: is no JSON list of records; is this the right file?")
        yield from ((f"{path}: record {index}", record) for index, record in enumerate(records))


def _is_lines(path: StoragePath) -> bool:
    """Whether each line of the file is a record (else it is one JSON list). False for a file that cannot be read."""
    try:
        with open_input(path) as file:
            first = bytes(file.read(_FIRST)).removeprefix(codecs.BOM_UTF8).lstrip().partition(b"\n")[0]
    except OSError:
        return False
    return first.startswith(b"{") and any(name in first for name in (b'"image_rpath"', b'"image"', b'"sentence"'))


def _strings(record: Any, name: str, where: str) -> list[str]:
    """The strings of a field that is a string or a list of strings."""
    value = field(record, name, (str, list), where)
    strings = [value] if isinstance(value, str) else value
    if not all(isinstance(text, str) for text in strings):
        what = f"field '{name}' holds something that is no string; fix the file"
        raise BadRecord(where, what, f"field '{name}' holds something that is no string")
    return strings


def _image_id(record: dict[str, Any], name: str, where: str) -> str:
    """The record's image id as a string; the image's path where there is none."""
    return name if "image_id" not in record else str(field(record, "image_id", (str, int), where))


def read_retrieval(
    records: Records,
    files: Sequence[StoragePath],
    images: str,
    excluded: ImageList,
    cleaning: TextCleaning,
    faults: Faults,
) -> Source:
    """One row an image, in the order of first mention. Raises UserError naming the record at fault."""
    source = Source("caption", [], list(files), {}, faults=faults)
    rows: dict[str, Row] = {}
    owner: dict[str, str] = {}
    captions = 0
    for where, record in records:
        with faults:
            named = "image_rpath" if isinstance(record, dict) and "image_rpath" in record else "image"
            name = field(record, named, str, where)
            image_id = _image_id(record, name, where)
            if owner.setdefault(image_id, name) != name:
                raise UserError(f"{where}: image_id {image_id} stands for {owner[image_id]} too; make ids unique")
            if name not in rows:
                rows[name] = Row(name, (image_in(images, name),), {"caption": [], "image_id": image_id})
            texts = _strings(record, "caption", where)
            captions += len(texts)
            rows[name].columns["caption"].extend(cleaning.captions(texts, source.left_out))
    kept = [row for row in rows.values() if not excluded.match(row.name, row.columns["image_id"])]
    source.rows = [row for row in kept if row.columns["caption"]]
    source.left_out[EXCLUDED] = len(rows) - len(kept)
    source.left_out["image without caption"] = len(kept) - len(source.rows)
    source.left_out = +source.left_out  # without the zeros
    source.counts = {"images": len(rows), "captions": captions}
    return source


def read_vqa(
    records: Records,
    images: str,
    visual_genome: str | None,
    excluded: ImageList,
    cleaning: TextCleaning,
    split: str,
    faults: Faults,
) -> list[RawQuestion]:
    """The questions in the order of the files, but for those at fault. Raises UserError naming the file.

    The images of records with `"dataset": "vg"` are in `visual_genome`, if given. If one of their ids is also an id of
    other records, all of them get new ids, as with `vqav2 --visual-genome`.
    """
    asked: list[RawQuestion] = []
    of_visual_genome: list[bool] = []
    for where, record in records:
        with faults:
            name = field(record, "image", str, where)
            text = cleaning.question(field(record, "question", str, where), split)
            question_id = field(record, "question_id", int, where)
            answers = tuple(_strings(record, "answer", where)) if "answer" in record else ()
            dataset = record.get("dataset")
            folder = visual_genome if visual_genome is not None and dataset == "vg" else images
            image_id = _image_id(record, name, where)
            out = excluded.match(name, image_id)
            votes = dataset == "vqa" and isinstance(record.get("answer"), list)
            image = image_in(folder, name)
            asked.append(
                RawQuestion(image, image_id, text, question_id, answers, None, where, excluded=out, votes=votes)
            )
            of_visual_genome.append(dataset == "vg")
    return _with_distinct_ids(asked, of_visual_genome)


def _with_distinct_ids(asked: list[RawQuestion], of_visual_genome: Sequence[bool]) -> list[RawQuestion]:
    """The questions, those of Visual Genome with new ids if any of their ids is also one of the others'."""
    others = [question for question, own in zip(asked, of_visual_genome, strict=True) if not own]
    questions = {question.question_id for question in others}
    images = {question.image_id: question.image for question in others}
    if not any(
        question.question_id in questions or images.get(question.image_id, question.image) != question.image
        for question, own in zip(asked, of_visual_genome, strict=True)
        if own
    ):
        return asked
    return [
        replace(
            question,
            question_id=question.question_id + QUESTION_ID_OFFSET,
            image_id=prefixed_image_id(question.image_id),
        )
        if own
        else question
        for question, own in zip(asked, of_visual_genome, strict=True)
    ]


def read_nlvr(
    records: Records, images: str, excluded: ImageList, cleaning: TextCleaning, faults: Faults
) -> list[Statement]:
    """The statements in the order of the files. A record without an identifier gets one."""
    statements = []
    for number, (where, record) in enumerate(records):
        with faults:
            names = _strings(record, "images", where)
            if len(names) != 2:
                what = f"field 'images' names {len(names)} images, not two; fix the file"
                raise BadRecord(where, what, "field 'images' does not name two images")
            identifier = f"record-{number}-0-0"
            if "identifier" in record:
                identifier = field(record, "identifier", str, where)
            statements.append(
                Statement(
                    images=(image_in(images, names[0]), image_in(images, names[1])),
                    pair=" + ".join(names),
                    sentence=cleaning.statement(field(record, "sentence", str, where)),
                    label=parse_label(record.get("label"), where),
                    identifier=identifier,
                    where=where,
                    excluded=excluded.match(*names, *names_in_shards(identifier)),
                    numbered="identifier" not in record,
                )
            )
    return statements
