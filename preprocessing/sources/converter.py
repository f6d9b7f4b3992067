"""What all converters share: common options, and writing a source as a finished split folder."""

import argparse
import math
import os
import random
from typing import Any

from preprocessing.errors import UserError, printable
from preprocessing.images.exclusion import EXCLUDED
from preprocessing.images.policy import IN_OTHER_SET, NEAR_OTHER_SET, add_image_arguments, image_policy
from preprocessing.running.pipeline import build_split
from preprocessing.running.pool import check_workers
from preprocessing.running.storage import StoragePath, storage_path
from preprocessing.running.work_folder import remove_leftover
from preprocessing.shards.ids import shared_ids
from preprocessing.shards.schema import SPLITS
from preprocessing.shards.writer import check_output, prepared_splits
from preprocessing.sources.source import Row, Rows, Source

__all__ = ["Row", "Rows", "Source", "add_common_arguments", "check_common_arguments", "write_split"]

_MAX_DROPPED = 0.01
_PROBED = 100  # the least number of rows looked at to tell a wrong image folder from lost images
_CHANCE = 1e-12  # of refusing a good data set by these rows


def add_common_arguments(
    parser: argparse.ArgumentParser, images: bool | None = True, texts_only: bool = False, split: bool = True
) -> None:
    """Declare the options that every converter has; --images is required, optional (None) or not among them (False).

    With `texts_only` those for images are not among them, and have their defaults. Without `split`, `args.split` is
    the caller's to set.
    """
    if images is not False:
        what = "folder or URI that holds the image files"
        parser.add_argument("--images", required=images is True, metavar="DIR", help=what)
    if split:
        parser.add_argument("--split", required=True, choices=SPLITS, help="which split this becomes")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="data set folder or URI (s3://, gs://, hdfs://); gets DIR/SPLIT"
    )
    parser.add_argument(
        "--max-dropped",
        type=float,
        metavar="SHARE",
        help="fail when more than this share of rows has a missing or broken image or is a bad record "
        "(default 0.01; of a test split 0, for texts without a word, too)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DIR/SPLIT if it exists")
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes (default 1; under mpirun its ranks)"
    )
    parser.add_argument(
        "--shard-rows",
        type=int,
        metavar="N",
        help="the most raw rows in a shard, and in a unit of work (default: rows/64, from 256 to 4096)",
    )
    if not texts_only:
        add_image_arguments(parser)
        return
    of_images = argparse.ArgumentParser()
    add_image_arguments(of_images)
    parser.set_defaults(**vars(of_images.parse_args([])))


def check_common_arguments(args: argparse.Namespace, kind: str) -> None:
    """Check options and output folder before anything is read. Raises UserError."""
    if args.max_dropped is None:
        args.max_dropped = 0.0 if args.split == "test" else _MAX_DROPPED
    if not 0 <= args.max_dropped <= 1:
        raise UserError(f"--max-dropped {args.max_dropped}: must be a share between 0 and 1")
    if args.shard_rows is not None and args.shard_rows < 1:
        raise UserError(f"--shard-rows {args.shard_rows}: must be at least 1")
    check_workers(args.workers)
    args.policy = image_policy(args)
    if getattr(args, "images", None) is not None:
        _check_images(args.images)
    out = storage_path(args.out)
    try:
        remove_leftover(out / args.split)
        check_output(out, kind, args.split, args.overwrite)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be used ({error.strerror}); choose another folder") from None


def _check_images(folder: str) -> None:
    try:
        if not storage_path(folder).is_dir():
            raise UserError(f"--images {folder}: no such folder; name the one that holds the image files")
    except OSError as error:
        raise UserError(f"--images {folder}: cannot be read ({error.strerror}); name another folder") from None


def write_split(source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """Write `source` to `args.out/args.split` and print a summary line. Returns the manifest.

    Rows with a missing or broken image are dropped, counted and listed in the manifest, and so are bad records.
    Raises UserError when there are no rows, when no image is found, when there are more bad records than
    `args.max_dropped` allows, and as `build_split` does.
    """
    source.faults.check(len(source.rows), args.max_dropped)
    if not len(source.rows):
        reasons = "".join(f"; {count} left out: {reason}" for reason, count in sorted(source.left_out.items()))
        raise UserError(f"{source.where}: empty data set, there is no row to write{reasons}")
    if args.split == "test":
        _check_left_out(source, args.max_dropped)
    _report_excluded(args, source)
    for note in source.notes:
        print(printable(note))
    _report_repeated(source)
    if source.modality != "text":
        _check_images_exist(source.rows, args.max_dropped)
    manifest = build_split(source, args)
    size = sum(shard["bytes"] for shard in manifest["shards"]) / 1e6
    lost = "".join(f", {count} dropped: {reason}" for reason, count in sorted(manifest["dropped"].items()))
    target = storage_path(args.out) / args.split
    if args.exclude_images_of or args.near_duplicates_of:
        same, near = (manifest["dropped"].get(f"image {reason}", 0) for reason in (IN_OTHER_SET, NEAR_OTHER_SET))
        sets = " ".join([*args.exclude_images_of, *args.near_duplicates_of])
        print(printable(f"images of {sets}: {same} rows left out that have the same file, {near} that look alike"))
        if args.exclude_images_of and not same:
            why = "a set prepared with another --max-side has no file in common; --near-duplicates-of finds its images"
            print(f"warning: --exclude-images-of found no file: {why}")
    print(printable(f"{target}: {manifest['rows']} rows, {manifest['samples']} samples, {size:.1f} MB{lost}"))
    _warn_of_shared(storage_path(args.out), args.split)
    return manifest


def _report_excluded(args: argparse.Namespace, source: Source) -> None:
    """Print how many images of each `--exclude` list are in `source` and what was left out; add that to its counts.

    Raises UserError for a list of which no image was found, unless `args.allow_unmatched`.
    """
    lists = list(args.excluded.counts()) if "excluded" in args else []
    more = "--image-data, by which COCO's names are known, " if getattr(args, "image_data", "") is None else ""
    for file, names, found in lists:
        if names and not found and not args.allow_unmatched:  # `duplicates find` may have found none
            raise UserError(
                f"--exclude {file}: none of its {names} images is here: it has names like {args.excluded.example(file)}"
                f", the data set like {source.rows[0].name}; give the right list, {more}or --allow-unmatched"
            )
        print(printable(f"--exclude {file}: {found} of {names} images found"))
    if lists:
        gone = [f"{count} left out: {reason}" for reason, count in source.left_out.items() if EXCLUDED in reason]
        print(f"--exclude: {'; '.join(gone) or 'nothing left out'}")
        source.counts["images named by --exclude"] = sum(names for _, names, _ in lists)
        source.counts["images named by --exclude and found"] = sum(found for _, _, found in lists)


def _report_repeated(source: Source) -> None:
    """Print how many captions equal another one of their image: half of them in a file with all records twice."""
    if source.kind != "caption" or not isinstance(source.rows, list):
        return
    captions = [row.columns["caption"] for row in source.rows]
    repeated = sum(len(texts) - len(set(texts)) for texts in captions)
    if repeated:
        total = sum(map(len, captions))
        print(printable(f"{source.where}: {repeated} of {total} captions are the same as another one of their image"))


def _warn_of_shared(out: StoragePath, split: str) -> None:
    """Print a warning for the ids that `split` shares with the other splits of its data set, by their ids.bin."""
    for one, other, which, is_fault in shared_ids([out / name for name in prepared_splits(out)], by_shards=False):
        if split in (one.name, other.name):
            advice = "training refuses that; prepare one of them with --exclude"
            if not is_fault:
                advice = "training lets so few pass; --exclude-images-of leaves them out"
            advice = advice if "train" in (one.name, other.name) else "a model chosen on one is not tested by the other"
            print(printable(f"warning: {one} and {other}: hold the same {which}; {advice}"))


def _check_left_out(source: Source, share: float) -> None:
    """Raise UserError when more than this share of a test split is left out for its content, not on request."""
    lost = {reason: count for reason, count in source.left_out.items() if "--" not in reason}
    total = max(source.counts.values(), default=0) or sum(lost.values())
    count = min(sum(lost.values()), total)  # parts of rows are counted, too, so the sum may exceed the total
    if count > share * total:
        reasons = ", ".join(f"{count} times {reason}" for reason, count in sorted(lost.items()))
        needed = math.ceil(1000 * count / total) / 1000
        raise UserError(
            f"{source.where}: more than --max-dropped {share:g} of a test split must be left out: {reasons}; fix the "
            f"file, or give --max-dropped {needed:g}: scores then say what they lack"
        )


def _check_images_exist(rows: Rows, share: float) -> None:
    """Raise UserError when no row of a sample has an image.

    The sample is so large that a share of lost images within `share` cannot explain it.
    """
    total = len(rows)
    needed = total if share == 1 else 0 if share == 0 else math.ceil(math.log(_CHANCE) / math.log(share))
    sample = sorted(random.Random(0).sample(range(total), min(total, max(needed, _PROBED))))
    first = rows[sample[0]].images[0]
    if any(image.exists() for index in sample for image in rows[index].images):
        return
    folder = os.path.dirname(getattr(first, "path", "")) or "--images"
    raise UserError(
        f"{folder}: holds no image of {len(sample)} rows looked at, such as {first.name}; "
        "point --images at the folder that the annotations' paths start from"
    )
