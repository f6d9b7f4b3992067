"""Benchmarks, their tables, and how figures are printed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, Namespace

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the printed table; the JSON file holds complete rows.

    Args:
        key: of the row.
        heading: of the column.
        show: value -> text; None (not measured) is printed as a dash.
        width: minimum width, characters.
    """

    key: str
    heading: str
    show: Callable[[Any], str] = str
    width: int = 7


@dataclass(frozen=True)
class Benchmark:
    """A sub-command of ``python -m eve_ds.bench``.

    Args:
        description: what it measures, for ``--help``.
        columns: of its table.
        add_options: adds its options to the sub-command's parser.
        rows: run the benchmark; yields each row when it is measured.
        document: rows -> content of the JSON file; by default the list of rows.
    """

    description: str
    columns: Sequence[Column]
    add_options: Callable[[ArgumentParser], None]
    rows: Callable[[Namespace], Iterator[Row]]
    document: Callable[[list[Row]], Any] = list


def show_ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def show_mb(value: float) -> str:
    return f"{value / 1e6:.0f}"


def show_gb(value: float) -> str:
    return f"{value / 1e9:.1f}"


def share(value: float) -> str:
    return f"{value:.2f}"


def times(value: float) -> str:
    return f"{value:.2f} x"


def print_table(columns: Sequence[Column], rows: Iterator[Row]) -> list[Row]:
    """Print the headings, then each row as it arrives; return all rows."""
    texts, done = [column.heading for column in columns], []
    widths = [max(len(column.heading), column.width) for column in columns]
    print(_line(texts, widths), flush=True)
    for row in rows:
        texts = [column.show(row[column.key]) if row[column.key] is not None else "-" for column in columns]
        print(_line(texts, widths), flush=True)
        done.append(row)
    return done


def _line(texts: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(text.rjust(width) for text, width in zip(texts, widths, strict=True))
