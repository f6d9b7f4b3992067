"""Groups statements over pairs of images into NLVR rows: what the NLVR converters share."""

from collections.abc import Sequence
from dataclasses import dataclass

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord
from preprocessing.images.exclusion import EXCLUDED
from preprocessing.images.image_refs import ImageRef
from preprocessing.local_files import json_excerpt
from preprocessing.running.storage import StoragePath
from preprocessing.sources.source import Faults, Row, Source
from preprocessing.text.cleaning import text_fault


@dataclass(frozen=True)
class Statement:
    """One example of a raw data set."""

    images: tuple[ImageRef, ImageRef]  # left, right
    pair: str  # name of the pair in messages
    sentence: str
    label: str  # "True" or "False"
    identifier: str
    where: str  # file and record, for messages
    excluded: bool = False  # whether --exclude names one of its images
    numbered: bool = False  # whether we made up its identifier


def parse_label(label: object, where: str) -> str:
    """ "True" or "False", from the official strings in any case or a JSON truth value. Raises BadRecord."""
    text = str(label).capitalize() if isinstance(label, str | bool) else ""
    if text not in ("True", "False"):
        what = f"label {json_excerpt(label)} is neither True nor False; fix the file"
        raise BadRecord(where, what, "label is neither True nor False")
    return text


def names_in_shards(identifier: str) -> tuple[str, ...]:
    """The names that `duplicates find` gives the images of the pair whose first statement has this identifier."""
    return identifier, f"{identifier}:left", f"{identifier}:right"


def nlvr_source(statements: Sequence[Statement], inputs: Sequence[StoragePath], faults: Faults, split: str) -> Source:
    """Group statements by pair of images, in the order of first mention.

    Statements without a word are left out, and in the training split those with a `text_fault`. If one statement of a
    pair is excluded, the whole pair is. Raises UserError for a duplicate identifier.
    """
    counts = {"statements": len(statements), "pairs": len({statement.images for statement in statements})}
    source = Source("nlvr", [], inputs, counts, faults=faults)
    rows: dict[tuple[ImageRef, ImageRef], Row] = {}
    identifiers: set[str] = set()
    excluded = {statement.images for statement in statements if statement.excluded}
    for statement in statements:
        if statement.identifier in identifiers:
            raise UserError(f"{statement.where}: identifier {statement.identifier} occurs twice; make them unique")
        identifiers.add(statement.identifier)
        if statement.images in excluded:
            source.left_out[f"statement: {EXCLUDED}"] += 1
            continue
        fault = text_fault(statement.sentence) if split == "train" else ""
        if fault or not statement.sentence.strip():
            source.left_out[f"statement {fault or 'without a word'}"] += 1
            continue
        if statement.images not in rows:
            columns: dict[str, list[str]] = {"questions": [], "answers": [], "identifier": []}
            rows[statement.images] = Row(statement.pair, statement.images, columns)
        columns = rows[statement.images].columns
        columns["questions"].append(statement.sentence)
        columns["answers"].append(statement.label)
        columns["identifier"].append(statement.identifier)
    source.rows = list(rows.values())
    source.numbered = ("identifier",) if any(statement.numbered for statement in statements) else ()
    return source
