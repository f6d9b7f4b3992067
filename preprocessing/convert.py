"""What all converters share: from rows that name image files to a finished split folder."""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preprocessing.files import output_folder
from preprocessing.images import MAX_PIXELS, PILLOW_PIXELS, BadImage, read_image
from preprocessing.schema import ANSWER_LIST, IMAGE_COLUMNS, SPLITS, DataError, dump_json, write_atomic
from preprocessing.writer import OURS, ShardWriter, check_output, write_manifest, write_provenance

_PROBED = 100  # rows looked at to tell a wrong image folder from a few lost images
_PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class Row:
    """One row to write: `images` in the order of the schema's image columns, `columns` all the rest but split."""

    name: str  # how a message calls it
    images: tuple[Path, ...]
    columns: dict[str, Any]


@dataclass
class Source:
    """A raw data set, read and checked but for its images."""

    kind: str
    rows: list[Row]
    inputs: list[Path]  # the annotation files
    counts: dict[str, int]  # what the raw files hold
    left_out: Counter[str] = field(default_factory=Counter)  # by intent, by reason: no fault of the data
    answer_list: list[str] | None = None  # VQA: what the labels index


def add_common_arguments(parser: argparse.ArgumentParser, images: bool = True) -> None:
    """Declare the options that every converter has."""
    if images:
        parser.add_argument("--images", required=True, metavar="DIR", help="folder that holds the image files")
    parser.add_argument("--split", required=True, choices=SPLITS, help="which split this becomes")
    parser.add_argument("--out", required=True, metavar="DIR", help="data set folder; the split goes to DIR/SPLIT")
    parser.add_argument(
        "--max-dropped",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="fail when more than this share of rows has a missing or broken image (default 0.01)",
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, metavar="N", help=f"drop larger images (default {MAX_PIXELS})"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR/SPLIT if it exists")


def check_common_arguments(args: argparse.Namespace, kind: str) -> None:
    """Refuse bad options and a taken output folder before anything is read. Raises DataError."""
    if not 0 <= args.max_dropped <= 1:
        raise DataError(f"--max-dropped {args.max_dropped}: must be a share between 0 and 1")
    if not 1 <= args.max_pixels <= PILLOW_PIXELS:
        raise DataError(f"--max-pixels {args.max_pixels}: must be between 1 and Pillow's own bound, {PILLOW_PIXELS}")
    if getattr(args, "images", None) is not None and not Path(args.images).is_dir():
        raise DataError(f"--images {args.images}: no such folder; name the one that holds the image files")
    check_output(Path(args.out), kind, args.split, args.overwrite)


def write_split(source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """Write `source` to `args.out/args.split` and print a summary line. Returns the manifest.

    Rows with a missing or broken image are dropped, counted and listed in the manifest. Raises DataError when there
    are no rows, when no image is there, or when more than `args.max_dropped` of the rows would be dropped.
    """
    where = ", ".join(map(str, source.inputs)) or source.kind
    if not source.rows:
        reasons = "".join(f"; {count} left out: {reason}" for reason, count in sorted(source.left_out.items()))
        raise DataError(f"{where}: empty data set, there is no row to write{reasons}")
    _check_images_there(source.rows)
    target = Path(args.out) / args.split
    with output_folder(target, OURS, args.overwrite) as folder:
        writer = ShardWriter(folder, source.kind, args.split)
        dropped_items = _write_rows(source, writer, args, where)
        dropped = Counter(item["reason"] for item in dropped_items) + source.left_out
        manifest = write_manifest(
            folder,
            source.kind,
            args.split,
            writer.close(),
            dropped=dict(dropped),
            dropped_items=dropped_items,
            source=source.counts,
        )
        write_provenance(folder, source.inputs)
        if source.answer_list is not None:
            write_atomic(Path(args.out) / ANSWER_LIST, dump_json(source.answer_list))
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    lost = "".join(f", {count} dropped: {reason}" for reason, count in sorted(dropped.items()))
    print(f"{target}: {manifest['rows']} rows, {manifest['samples']} samples, {size:.1f} MB{lost}")
    return manifest


def _write_rows(source: Source, writer: ShardWriter, args: argparse.Namespace, where: str) -> list[dict[str, str]]:
    columns = IMAGE_COLUMNS[source.kind]
    dropped: list[dict[str, str]] = []
    allowed = args.max_dropped * len(source.rows)
    for row in _with_progress(source.rows, f"{source.kind} {args.split}"):
        try:
            images = [read_image(path, args.max_pixels) for path in row.images]
        except BadImage as error:
            dropped.append({"item": row.name, "reason": f"image {error}"})
            if len(dropped) > allowed:
                raise _too_many(where, dropped, len(source.rows), args.max_dropped) from None
            continue
        writer.add({**row.columns, **dict(zip(columns, images, strict=True))})
    return dropped


def _too_many(where: str, dropped: list[dict[str, str]], rows: int, share: float) -> DataError:
    shown = ", ".join(f"{item['item']} ({item['reason']})" for item in dropped[:3])
    more = ", …" if len(dropped) > 3 else ""
    return DataError(
        f"{where}: more than --max-dropped {share:g} of {rows} rows must be dropped: {shown}{more}; "
        "mend the images or raise --max-dropped"
    )


def _check_images_there(rows: list[Row]) -> None:
    probed = [path for row in rows[:_PROBED] for path in row.images]
    if not any(path.exists() for path in probed):
        raise DataError(
            f"{probed[0].parent}: holds none of the first {len(probed)} images, such as {probed[0].name}; "
            "point --images at the folder that the annotations' paths start from"
        )


def _with_progress(rows: list[Row], what: str) -> Iterable[Row]:
    """The rows; a line on stderr every ten seconds says how far it is and how long it will take."""
    start = last = time.monotonic()
    for done, row in enumerate(rows):
        now = time.monotonic()
        if now - last >= _PROGRESS_SECONDS:
            last = now
            left = (now - start) / done * (len(rows) - done)
            print(f"{what}: {done} of {len(rows)} rows, {left:.0f} s left", file=sys.stderr, flush=True)
        yield row
