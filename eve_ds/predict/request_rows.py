"""What ``answer``, ``match`` and ``judge`` are asked, row by row, and the results as text or JSON, a row a line.

Rows of a file are read, computed and written a batch at a time, so that a file may be of any length.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from preprocessing.errors import UserError, printable
from preprocessing.local_files import check_regular, parse_json, replace_surrogates, unique_keys

if TYPE_CHECKING:
    from eve_ds.predict.eve import EVE

Row = dict[str, Any]
Result = TypeVar("Result")


class Request(NamedTuple):
    """A row, and where it stands, for messages: "FILE:3: ", or "" for the command line."""

    row: Row
    where: str = ""


def read_requests(path: str, fields: Sequence[str], one_of: bool = False) -> Iterator[Request]:
    """The rows of a JSON lines file; blank lines are left out, other keys are kept.

    Args:
        path: of the file; /dev/stdin and pipes that the shell has opened are read, too.
        fields: keys that each row must have, texts; with ``one_of`` exactly one of them.
    Raises:
        UserError: the file cannot be read, or a row is none; names its line.
    """
    check_regular(path, streams=True)
    try:
        # Bytes are decoded a buffer ahead: those that are no UTF-8 are escaped here, and refused where their row is.
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _request(line, f"{path}:{number}: ", fields, one_of)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}; give a file of JSON lines") from None


def _request(line: str, where: str, fields: Sequence[str], one_of: bool) -> Request:
    names = (" or " if one_of else ", ").join(map(repr, fields))
    if replace_surrogates(line) != line:
        raise UserError(f"{where}is not UTF-8; write the row as UTF-8")
    try:
        row = parse_json(line, unique_keys)
    except ValueError as error:
        raise UserError(f"{where}is no JSON ({error}); write an object with {names} on each line") from None
    there = [name for name in fields if isinstance(row, dict) and isinstance(row.get(name), str)]
    if len(there) != (1 if one_of else len(fields)):
        raise UserError(f"{where}is no object with {'either ' if one_of else ''}{names}, as texts; mend the row")
    try:
        json.dumps(row, allow_nan=False)  # its keys are written with the results
    except ValueError:
        raise UserError(f"{where}a number is NaN or too large, which JSON does not have; write null instead") from None
    except RecursionError:
        raise UserError(f"{where}is nested too deep; mend the row") from None
    return Request(row, where)


def in_batches(requests: Iterable[Request], size: int) -> Iterator[list[Request]]:
    """``size`` rows at a time; before an error of ``requests`` those that came before it."""
    batch: list[Request] = []
    failure = None
    try:
        for request in requests:
            batch.append(request)
            if len(batch) == size:
                yield batch
                batch = []
    except UserError as error:
        failure = error
    if batch:
        yield batch
    if failure:
        raise failure


def answers(eve: EVE, rows: Sequence[Row], top: int) -> list[Row]:
    """The rows with ``answers``, best first."""
    found = eve.answer([row["image"] for row in rows], [row["question"] for row in rows], top)
    return [row | {"answers": [one._asdict() for one in best]} for row, best in zip(rows, found, strict=True)]


def matches(eve: EVE, rows: Sequence[Row]) -> list[Row]:
    """The rows with ``similarity`` and ``probability``."""
    found = eve.match([row["image"] for row in rows], [row["text"] for row in rows])
    return [row | one._asdict() for row, one in zip(rows, found, strict=True)]


def judgements(eve: EVE, rows: Sequence[Row]) -> list[Row]:
    """The rows with ``true`` and ``probability``, that of true."""
    columns = ([row[name] for row in rows] for name in ("image_0", "image_1", "statement"))
    return [row | one._asdict() for row, one in zip(rows, eve.judge(*columns), strict=True)]


def computed(
    requests: Iterable[Request], size: int, compute: Callable[[Sequence[Row]], list[Result]]
) -> Iterator[list[Result]]:
    """The results, ``size`` rows at a time. A UserError names the row that it is about, after the results before it."""
    for batch in in_batches(requests, size):
        try:
            found: Iterable[list[Result]] = [compute([request.row for request in batch])]
        except UserError:
            found = (_named(request, compute) for request in batch)  # one by one: which of them was it?
        yield from found


def _named(request: Request, compute: Callable[[Sequence[Row]], list[Result]]) -> list[Result]:
    try:
        return compute([request.row])
    except UserError as error:
        raise UserError(f"{request.where}{error}") from error


def as_json(row: Row) -> str:
    """One line, ASCII, for any terminal and file name."""
    return json.dumps(row)


def as_text(row: Row) -> str:
    """A result for people: a line, of ``answers`` a line each."""
    if "answers" in row:
        return "\n".join(f"{one['probability']:.4f}  {printable(one['answer'])}" for one in row["answers"])
    if "similarity" in row:
        return f"similarity {row['similarity']:+.4f}  probability {row['probability']:.4f}  {printable(row['text'])}"
    return f"{'true' if row['true'] else 'false'}  (probability of true: {row['probability']:.4f})"
