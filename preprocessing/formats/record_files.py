"""Reads a file of records that a person or a spreadsheet wrote: CSV, a JSON list, or JSON lines, told by its content.

A mistake in such a file is its author's to mend, so the first one ends the reading: no record is left out in silence.
"""

import csv
import io
from collections import Counter
from typing import Any

from preprocessing.errors import UserError, shortened
from preprocessing.formats.annotations import BadRecord, read_json, read_json_lines, read_text
from preprocessing.running.storage import StoragePath

Record = tuple[str, dict[str, Any]]  # (where: file and line, field -> value)
_SEPARATORS = ",;\t"  # of CSV; spreadsheets write ";" where a comma is the decimal point


def read_records(path: StoragePath) -> list[Record]:
    """The records of a file; of CSV, its first line names the columns, and values are texts without outer spaces.

    Names of columns are in lower case. Raises UserError naming the file, and the line or record at fault.
    """
    text = read_text(path)
    first = text.lstrip()[0]
    if first == "[":
        records = [(f"{path}: record {index}", record) for index, record in enumerate(read_json(path))]
    elif first == "{":
        records = [(f"{path}: line {number}", record) for number, record in read_json_lines(path, _refuse)]
    else:
        return _read_csv(path, text)
    for where, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: is no JSON object; write one for each record, in a list or one a line")
    return records


def _refuse(error: BadRecord) -> None:
    raise error


def _read_csv(path: StoragePath, text: str) -> list[Record]:
    header = text.lstrip().splitlines()[0]
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=max(_SEPARATORS, key=header.count), strict=True)
    names: list[str] = []
    records: list[Record] = []
    try:
        for cells in rows:
            values = [cell.strip() for cell in cells]
            if not any(values):
                continue
            if not names:
                names = _column_names(path, values)
            elif len(values) != len(names):
                raise UserError(
                    f"{path}: line {rows.line_num}: has {len(values)} columns, the first line has {len(names)}; put "
                    f'a text with a {rows.dialect.delimiter!r} in it between quotation marks, "..."'
                )
            else:
                records.append((f"{path}: line {rows.line_num}", dict(zip(names, values, strict=True))))
    except csv.Error as error:
        raise UserError(
            f"{path}: line {rows.line_num}: is no CSV ({error}); write a quotation mark within a quoted text twice"
        ) from None
    return records


def _column_names(path: StoragePath, cells: list[str]) -> list[str]:
    names = [cell.lower() for cell in cells]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path}: two columns are called {shortened(repr(twice[0]))}; rename one in the first line")
    return names
