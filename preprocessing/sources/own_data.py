"""`python -m preprocessing own`: a folder of images and one file of captions, questions or statements -> shards.

The file is CSV with the names of its columns in the first line, a JSON list of objects, or JSON lines:

captions    image, caption
questions   image, question, answer
statements  image_0, image_1, statement, label (true or false)

Paths of images count from --images. An image may have several captions or questions. X-VLM's field names are taken as
well (`json` converts such files split by split). All three splits are written. A column `split` says which record goes
where; else it is drawn: by the image, or by the statement, so that none is in two splits. For `test`, the answers or
labels are written as the commands of `evaluation` read them, to DIR/test_annotations.json.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from preprocessing.errors import UserError, printable
from preprocessing.formats.annotations import find_copies
from preprocessing.formats.record_files import Record, read_records
from preprocessing.images.exclusion import ImageList
from preprocessing.images.image_refs import ImageRef, image_in
from preprocessing.local_files import dump_json
from preprocessing.running.storage import remove, storage_path, write_whole
from preprocessing.shards.schema import MANIFEST, SPLITS
from preprocessing.shards.writer import prepared_splits
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.nlvr_grouping import nlvr_source
from preprocessing.sources.source import Faults
from preprocessing.sources.split_draw import content_keys, draw_splits
from preprocessing.sources.split_names import split_named, split_of
from preprocessing.sources.vqa_grouping import RawQuestion, add_answer_arguments, answer_list_option, vqa_source
from preprocessing.sources.xvlm_json import read_nlvr, read_retrieval, read_vqa
from preprocessing.text.answers import normalize_answer
from preprocessing.text.cleaning import add_text_argument, text_cleaning

ANNOTATIONS = "test_annotations.json"
_NAMED = 3  # missing images in a message
_ANSWERS = 10  # of people to a question of VQA v2, by which the official accuracy counts
_KINDS = {"retrieval": "caption", "vqa": "vqa", "nlvr": "nlvr"}
_NEEDED = {
    "retrieval": ("image", "caption"),
    "vqa": ("image", "question", "answer"),
    "nlvr": ("image_0", "image_1", "statement", "label"),
}
_ALIASES = {"sentence": "statement", "image_rpath": "image"}  # X-VLM's names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `own`."""
    parser.add_argument(
        "--annotations", required=True, nargs="+", metavar="FILE", help="CSV, JSON or JSON lines, read as one"
    )
    parser.add_argument(
        "--task", choices=tuple(_KINDS), help="what the file is for (default: by its columns, as listed above)"
    )
    parser.add_argument("--val", type=float, default=0.1, metavar="SHARE", help="drawn for validation (default 0.1)")
    parser.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="drawn for the test (default 0.1)")
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="records with the same value here stay in one split, such as a patient or a video (default: those of an "
        "image or, with two images, of a statement)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed, another draw (default 0)")
    add_answer_arguments(parser)
    add_text_argument(parser)
    add_common_arguments(parser, split=False)
    parser.set_defaults(min_answers=1)


def run(args: argparse.Namespace) -> None:
    """Convert all splits. Raises UserError on bad input."""
    if not (args.val >= 0 and args.test >= 0 and args.val + args.test < 1):
        raise UserError(f"--val {args.val:g}, --test {args.test:g}: must be shares that leave some for training")
    if args.max_dropped is None:
        args.max_dropped = 0.0  # what is wrong with one's own files can be mended
    records = _read(args)
    named = _named_splits(records)
    settings = {split: argparse.Namespace(**vars(args), split=split) for split in SPLITS if not named or split in named}
    for one in settings.values():
        check_common_arguments(one, _KINDS[args.task])
    by_split = _by_split(records, named, args)
    out = storage_path(args.out)
    for split in {*prepared_splits(out)} & {*settings}:  # --overwrite: their answer list binds the new ones no longer
        remove(out / split / MANIFEST)
    truths = {split: _write(by_split[split], one) for split, one in settings.items() if by_split[split]}
    if truths.get("train") and truths.get("test"):
        usual, _ = Counter(truths["train"]).most_common(1)[0]
        share = 100 * truths["test"].count(usual) / len(truths["test"])
        print(printable(f"for comparison: always saying {usual!r} is right for {share:.1f} % of test"))


def _read(args: argparse.Namespace) -> list[Record]:
    """The records under X-VLM's names, complete and numbered; sets `args.task`. Raises UserError."""
    files = [storage_path(name) for name in args.annotations]
    for first, other in find_copies(files):
        raise UserError(f"{first} and {other}: are one file under two names; give it once")
    records = [
        (where, {_ALIASES.get(name, name): value for name, value in row.items()})
        for path in files
        for where, row in read_records(path)
    ]
    if not records:
        raise UserError(f"{files[0]}: has no record below the names of its columns")
    args.task = args.task or _task_of(records[0])
    for where, row in records:
        pair = row.get("images")
        if args.task == "nlvr" and isinstance(pair, list) and len(pair) == 2:
            row |= {"image_0": pair[0], "image_1": pair[1]}
        _check_record(where, row, args)
    (_identify if args.task == "nlvr" else _number)(records)
    return records


def _task_of(record: Record) -> str:
    where, row = record
    marks = {"caption": "retrieval", "question": "vqa", "statement": "nlvr"}
    found = [task for name, task in marks.items() if name in row]
    if not found:
        raise UserError(f"{where}: has {_listed(row)}, but no caption, question or statement; rename the columns")
    if len(found) > 1:
        raise UserError(f"{where}: has {_listed(row)}, which is of {' and of '.join(found)}; choose one with --task")
    return found[0]


def _check_record(where: str, row: dict[str, Any], args: argparse.Namespace) -> None:
    """Raise UserError for a column that is not there, or an image that is no name."""
    needed = _NEEDED[args.task]
    advice = f"{'statements' if args.task == 'nlvr' else 'records'} need {', '.join(needed)}"
    unanswered = split_named(str(split_of(row))) == "test"
    for name in (*needed, *filter(None, [args.group])):
        if name not in row and not (name == "answer" and unanswered):
            what = f"--group {name}: {where}" if name == args.group else where
            raise UserError(f"{what}: has no {name}, but {_listed(row)}; {advice}")
        if name.startswith("image") and not (isinstance(row[name], str) and row[name]):
            raise UserError(f"{where}: {name} names no file; {advice}")


def _listed(row: dict[str, Any]) -> str:
    return ", ".join(str(name) for name in row) or "nothing"


def _number(records: Sequence[Record]) -> None:
    """Give each question an id: its own, which CSV has as text, or its number."""
    for number, (_, row) in enumerate(records):
        given = row.setdefault("question_id", number)
        if isinstance(given, str) and given.isdecimal():
            row["question_id"] = int(given)


def _identify(records: Sequence[Record]) -> None:
    """Give each statement X-VLM's fields, and an identifier by which NLVR2's consistency knows the same sentence."""
    numbers: dict[str, int] = {}
    pairs = Counter[str]()
    for _, row in records:
        sentence = _statement_key(row)
        number = numbers.setdefault(sentence, len(numbers))
        row |= {"images": [row["image_0"], row["image_1"]], "sentence": row["statement"]}
        row.setdefault("identifier", f"own-{number}-{pairs[sentence]}-0")
        pairs[sentence] += 1


def _named_splits(records: Sequence[Record]) -> list[str]:
    """The split that each record names; empty where none does. Raises UserError."""
    if all(split_of(row) in (None, "") for _, row in records):
        return []
    found = []
    for where, row in records:
        split = split_named(str(split_of(row)))
        if split is None:
            raise UserError(
                f"{where}: split is {split_of(row)!r}; write train, val or test in every record, or in none"
            )
        found.append(split)
    return found


def _by_split(records: Sequence[Record], named: Sequence[str], args: argparse.Namespace) -> dict[str, list[Record]]:
    """The records of each split, as they name them, or as they are drawn."""
    names = [[row[name] for name in _NEEDED[args.task] if name.startswith("image")] for _, row in records]
    images: dict[str, ImageRef] = {name: image_in(args.images, name) for some in names for name in some}
    _check_images(images, args)
    keys = dict(zip(images, content_keys(list(images.values())), strict=True))
    contents = [[keys[name] or name for name in some] for some in names]
    groups = _groups(records, contents, args)
    drawn = named or draw_splits(groups, {"val": args.val, "test": args.test}, args.seed)
    _report_shared(drawn, contents)
    found: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for split, (where, row) in zip(drawn, records, strict=True):
        found[split].append((where, row))
    return found


def _check_images(images: dict[str, ImageRef], args: argparse.Namespace) -> None:
    """Raise UserError when more than `--max-dropped` of the images are missing, before anything is written."""
    missing = [name for name, image in images.items() if not image.exists()]
    if len(missing) > args.max_dropped * len(images):
        raise UserError(
            f"{args.images}: {len(missing)} of {len(images)} images are missing: {', '.join(missing[:_NAMED])}"
            f"{', …' if len(missing) > _NAMED else ''}; paths in the file count from --images; --max-dropped SHARE "
            "leaves their records out"
        )


def _groups(records: Sequence[Record], contents: Sequence[Sequence[str]], args: argparse.Namespace) -> list[str]:
    """What keeps records together: the column of --group, else the statement or the bytes of the image."""
    if args.group:
        return [str(row[args.group]) for _, row in records]
    if args.task == "nlvr":
        return [_statement_key(row) for _, row in records]
    return [image for (image,) in contents]


def _statement_key(row: dict[str, Any]) -> str:
    """Equal for statements that differ in case and spaces only."""
    return " ".join(str(row["statement"]).lower().split())


def _report_shared(drawn: Sequence[str], contents: Sequence[Sequence[str]]) -> None:
    """Print how many test images training has seen, too: under another statement, or in another group."""
    of: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split, some in zip(drawn, contents, strict=True):
        of[split].update(some)
    if shared := of["test"] & of["train"]:
        print(f"note: {len(shared)} of the {len(of['test'])} images of test are in train, too, in other records")


def _write(records: Sequence[Record], args: argparse.Namespace) -> list[str]:
    """Write one split and, of `test`, what the commands of `evaluation` score against.

    Returns the answer of each question or the label of each statement; of captions nothing.
    """
    files, cleaning, faults = [storage_path(name) for name in args.annotations], text_cleaning(args), Faults()
    none = ImageList(())
    truths: list[dict[str, Any]] = []
    if args.task == "retrieval":
        source = read_retrieval(records, files, args.images, none, cleaning, faults)
    elif args.task == "vqa":
        asked = read_vqa(records, args.images, None, none, cleaning, args.split, faults)
        source = vqa_source(asked, files, args, answer_list_option(args), args.answer_list, args.min_answers, faults)
        truths = [_vqa_truth(question) for question in asked if question.answers]
        known = sum(bool(labels) for row in source.rows for labels in row.columns["answer_labels"])
        if truths and args.split != "train" and known < len(truths):
            source.notes.append(f"{args.split}: {len(truths) - known} of {len(truths)} questions have no listed answer")
    else:
        statements = read_nlvr(records, args.images, none, cleaning, faults)
        source = nlvr_source(statements, files, faults, args.split)
        truths = [{"identifier": s.identifier, "sentence": s.sentence, "label": s.label} for s in statements]
    write_split(source, args)
    if args.split == "test" and truths:
        whole = (
            "".join(json.dumps(truth) + "\n" for truth in truths).encode()
            if args.task == "nlvr"
            else dump_json({"annotations": truths})
        )
        write_whole(storage_path(args.out) / ANNOTATIONS, whole)
    return [truth["label"] if args.task == "nlvr" else truth["answers"][0]["answer"] for truth in truths]


def _vqa_truth(question: RawQuestion) -> dict[str, Any]:
    """A question as VQA v2's annotations have it. One answer counts as that of all ten people.

    Answers are normalized: to the official accuracy unanimous answers are right to the letter only.
    """
    answers = [normalize_answer(answer) for answer in question.answers]
    first = answers[0]
    kind = "yes/no" if first in ("yes", "no") else "number" if first.isdecimal() else "other"
    return {
        "question_id": question.question_id,
        "image_id": question.image_id,
        "question_type": question.text.lower().partition(" ")[0],
        "answer_type": kind,
        "answers": [{"answer": answer} for answer in (answers * _ANSWERS if len(answers) == 1 else answers)],
    }
