"""`python -m preprocessing nlvr2`: NLVR2 JSON lines (lil-lab/nlvr: train.json, dev.json, test1.json) -> NLVR shards."""

import argparse
import re
from collections import Counter

from preprocessing.formats.annotations import BadRecord, field, read_json_lines
from preprocessing.images.exclusion import ImageList, add_exclude_argument, excluded_images
from preprocessing.images.image_refs import FileImage, escapes_folder
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.sources.converter import add_common_arguments, check_common_arguments, write_split
from preprocessing.sources.nlvr_grouping import Statement, names_in_shards, nlvr_source, parse_label
from preprocessing.sources.source import Faults
from preprocessing.text.cleaning import TextCleaning, add_text_argument, text_cleaning

_SPLITS = {"train": "train", "dev": "val", "test1": "test", "test2": "test"}  # by the first field of an identifier
_IDENTIFIER = re.compile(r"(?P<pair>(?P<split>[A-Za-z0-9_]+)-\d+-\d+)-\d+")  # split-set-PAIR-sentence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `nlvr2`."""
    parser.add_argument("--annotations", required=True, metavar="FILE", help="train.json, dev.json or test1.json")
    add_exclude_argument(parser)
    add_text_argument(parser)
    add_common_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Convert one split. Raises UserError on bad input."""
    check_common_arguments(args, "nlvr")
    annotations = storage_path(args.annotations)
    faults = Faults()
    statements = read_nlvr2(annotations, storage_path(args.images), excluded_images(args), text_cleaning(args), faults)
    source = nlvr_source(statements, [annotations], faults, args.split)
    source.notes += _notes_on_split(annotations, statements, args.split)
    write_split(source, args)


def _notes_on_split(annotations: StoragePath, statements: list[Statement], split: str) -> list[str]:
    """A line where identifiers say that the file is of another split: who trains on dev must not be scored on it."""
    said = Counter(statement.identifier.split("-")[0] for statement in statements)
    return [
        f"{annotations}: {count} of {len(statements)} statements are of NLVR2's {name} by their identifiers, and "
        f"become --split {split}; choose --split {_SPLITS[name]} unless that is intended"
        for name, count in said.items()
        if _SPLITS.get(name, split) != split
    ]


def read_nlvr2(
    annotations: StoragePath, images: StoragePath, excluded: ImageList, cleaning: TextCleaning, faults: Faults
) -> list[Statement]:
    """The statements in the order of the file, but for those at fault. Raises UserError naming the file."""
    statements = []
    folders: dict[str, StoragePath] = {}
    for line, record in read_json_lines(annotations, faults.add):
        where = f"{annotations}: line {line}"
        with faults:
            identifier = field(record, "identifier", str, where)
            match = _IDENTIFIER.fullmatch(identifier)
            if match is None:
                what = f"identifier '{identifier}' is not split-set-pair-sentence; fix the file"
                raise BadRecord(where, what, "identifier is not split-set-pair-sentence")
            directory = "" if record.get("directory") is None else str(field(record, "directory", (int, str), where))
            if escapes_folder(directory):
                raise BadRecord(where, f"directory '{directory}' leads out of --images; fix the file", "leads out")
            folder = _folder(images, match["split"], directory, match["pair"], folders)
            files = (f"{match['pair']}-img0.png", f"{match['pair']}-img1.png")
            pair = (FileImage(f"{folder / files[0]}"), FileImage(f"{folder / files[1]}"))
            label = parse_label(record.get("label"), where)
            sentence = cleaning.statement(field(record, "sentence", str, where))
            out = excluded.match(*files, match["pair"], *names_in_shards(identifier))
            statements.append(Statement(pair, match["pair"], sentence, label, identifier, where, out))
    return statements


def _folder(images: StoragePath, split: str, directory: str, pair: str, known: dict[str, StoragePath]) -> StoragePath:
    """The folder of a record's images: train/DIRECTORY/, dev/ or test1/ as in the archives, or one folder for all."""
    key = f"{split}/{directory}"
    if key not in known:
        inside = (f"{split}/{directory}", directory, split, "") if directory else (split, "")
        roots = (images, images / "images", images / "image")
        candidates = [root / below if below else root for root in roots for below in inside]
        found = next((path for path in candidates if (path / f"{pair}-img0.png").exists()), None)
        if found is None:
            return candidates[0]  # only this pair is missing; the next one may show the folder
        known[key] = found
    return known[key]
