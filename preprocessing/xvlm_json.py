"""`python -m preprocessing json`: the X-VLM/ALBEF fine-tuning JSON -> shards of any kind.

retrieval  {"image", "caption": str or list, "image_id"}: rows of one image are brought together
vqa        {"image", "question", "question_id", "answer": str or list}; no answer on test splits
nlvr       {"images": [left, right], "sentence", "label", "identifier"}
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from preprocessing.convert import Row, Source, add_common_arguments, check_common_arguments, write_split
from preprocessing.files import field, read_json
from preprocessing.nlvr_rows import Statement, nlvr_source, parse_label
from preprocessing.schema import DataError
from preprocessing.vqa_rows import Asked, add_answer_arguments, given_answers, vqa_source

_KINDS = {"retrieval": "caption", "vqa": "vqa", "nlvr": "nlvr"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `json`."""
    parser.add_argument("--task", required=True, choices=tuple(_KINDS), help="which of the three forms the files have")
    parser.add_argument("--annotations", required=True, nargs="+", metavar="FILE", help="JSON files, read as one")
    add_answer_arguments(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises DataError on bad input."""
    check_common_arguments(args, _KINDS[args.task])
    files = [Path(name) for name in args.annotations]
    images = Path(args.images)
    if args.task == "retrieval":
        source = read_retrieval(files, images)
    elif args.task == "vqa":
        source = vqa_source(read_vqa(files, images), files, args, given_answers(args), args.min_answers)
    else:
        source = nlvr_source(read_nlvr(files, images), files)
    write_split(source, args)


def _records(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """(where, record) of every record of every file."""
    for path in files:
        records = read_json(path)
        if not isinstance(records, list):
            raise DataError(f"{path}: is no JSON list of records; is this the right file?")
        yield from ((f"{path}: record {index}", record) for index, record in enumerate(records))


def _strings(record: Any, name: str, where: str) -> list[str]:
    """The field's strings, be it one or a list."""
    value = field(record, name, (str, list), where)
    strings = [value] if isinstance(value, str) else value
    if not all(isinstance(text, str) for text in strings):
        raise DataError(f"{where}: field '{name}' holds something that is no string; mend the file")
    return strings


def _image_id(record: dict[str, Any], name: str, where: str) -> str:
    """The record's image id as a string; the image's path where there is none."""
    return name if "image_id" not in record else str(field(record, "image_id", (str, int), where))


def read_retrieval(files: Sequence[Path], images: Path) -> Source:
    """One row an image, in the order of first mention. Raises DataError naming the record at fault."""
    source = Source("caption", [], list(files), {})
    rows: dict[str, Row] = {}
    owner: dict[str, str] = {}
    captions = 0
    for where, record in _records(files):
        name = field(record, "image", str, where)
        image_id = _image_id(record, name, where)
        if owner.setdefault(image_id, name) != name:
            raise DataError(f"{where}: image_id {image_id} stands for {owner[image_id]} too; make ids unique")
        if name not in rows:
            rows[name] = Row(name, (images / name,), {"caption": [], "image_id": image_id})
        texts = [text.strip() for text in _strings(record, "caption", where)]
        captions += len(texts)
        rows[name].columns["caption"].extend(text for text in texts if text)
        source.left_out["caption is empty"] += texts.count("")
    source.rows = [row for row in rows.values() if row.columns["caption"]]
    source.left_out["image without caption"] = len(rows) - len(source.rows)
    source.left_out = +source.left_out  # without the zeros
    source.counts = {"images": len(rows), "captions": captions}
    return source


def read_vqa(files: Sequence[Path], images: Path) -> list[Asked]:
    """The questions in the order of the files. Raises DataError naming the record at fault."""
    asked = []
    for where, record in _records(files):
        name = field(record, "image", str, where)
        text = field(record, "question", str, where).strip()
        question_id = field(record, "question_id", int, where)
        answers = tuple(_strings(record, "answer", where)) if "answer" in record else ()
        asked.append(Asked(images / name, _image_id(record, name, where), text, question_id, answers, None, where))
    return asked


def read_nlvr(files: Sequence[Path], images: Path) -> list[Statement]:
    """The statements in the order of the files. Without an identifier, a record gets one of its own."""
    statements = []
    for number, (where, record) in enumerate(_records(files)):
        names = _strings(record, "images", where)
        if len(names) != 2:
            raise DataError(f"{where}: field 'images' names {len(names)} images, not two; mend the file")
        identifier = f"record-{number}-0-0"
        if "identifier" in record:
            identifier = field(record, "identifier", str, where)
        statements.append(
            Statement(
                images=(images / names[0], images / names[1]),
                pair=" + ".join(names),
                sentence=field(record, "sentence", str, where).strip(),
                label=parse_label(record.get("label"), where),
                identifier=identifier,
                where=where,
            )
        )
    return statements
