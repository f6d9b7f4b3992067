"""`python -m preprocessing verify DIR`: checks that a prepared data set is complete and each row can be used.

With --repair, broken rows are removed, a truncated shard keeps its complete rows, and a lost manifest is rebuilt from
the shards. All actions are printed and recorded in the manifest.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from preprocessing.commands.checks import answers_fault, check_shards, grid_faults, ids_fault, shard_paths, split_facts
from preprocessing.commands.repair import repair_split
from preprocessing.errors import UserError, printable
from preprocessing.running.output_folder import recover
from preprocessing.running.pool import check_workers
from preprocessing.running.storage import StoragePath, file_sha256, storage_path
from preprocessing.shards.ids import shared_ids
from preprocessing.shards.reader import split_folders
from preprocessing.shards.schema import SPLITS, read_manifest

_SHOWN = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `verify`."""
    parser.add_argument("directory", metavar="DIR", help="a data set folder or URI, or one split of it")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--repair", action="store_true", help="rewrite what can be, say what, and verify again")
    parser.add_argument(
        "--accept-changed", action="store_true", help="with --repair: record changed shards whose rows pass every check"
    )


def run(args: argparse.Namespace) -> int:
    """Print the first twenty faults and the number of others. Returns 1 if there is any, else 0. Raises UserError."""
    check_workers(args.workers)
    if args.accept_changed and not args.repair:
        raise UserError("--accept-changed: goes with --repair")
    directory = storage_path(args.directory)
    if args.repair and isinstance(directory, Path):
        for path in (directory, *(directory / split for split in SPLITS)):
            recover(path)
    folders = split_folders(directory)
    if args.repair:
        for folder in folders:
            for line in repair_split(folder, args.workers, args.accept_changed):
                print(printable(line))
    count = 0
    for fault in chain(*(find_faults(folder, args.workers) for folder in folders), _shared_faults(folders)):
        count += 1
        if count <= _SHOWN:
            print(printable(fault), file=sys.stderr)
    if count > _SHOWN:
        print(f"and {count - _SHOWN} faults more", file=sys.stderr)
    if not count:
        names = ", ".join(folder.name for folder in folders)
        print(f"{args.directory}: no fault in {names}")
    return 1 if count else 0


def find_faults(folder: StoragePath, workers: int = 1) -> Iterator[str]:
    """Each fault of a split folder as a line that names the shard and, if it is the fault of one, the row."""
    try:
        manifest = read_manifest(folder)
        facts = split_facts(folder, manifest)
    except UserError as error:
        yield str(error)
        return
    name = os.path.basename(os.path.abspath(folder)) if isinstance(folder, Path) else folder.name
    if name in SPLITS and manifest["split"] != name:
        yield f"{folder}: is named {name}, its manifest says {manifest['split']}; rename it, or convert it again"
    listed = {shard["file"] for shard in manifest["shards"]}
    for path in shard_paths(folder):
        if path.name not in listed:
            yield f"{path}: is not in the manifest"
    for total in ("rows", "samples"):
        if manifest[total] != sum(shard[total] for shard in manifest["shards"]):
            yield f"{folder}: the manifest's {total} are not the sum of its shards' {total}"
    yield from _dropped_list_faults(folder, manifest.get("dropped_list"))
    if not manifest["shards"]:
        yield f"{folder}: holds no row; convert it again"
    reports = check_shards(folder, manifest["shards"], facts, workers)
    for report in reports:
        yield from report.lines()
    yield from grid_faults(reports)
    if fault := ids_fault(folder, manifest, reports):
        yield fault
    if fault := answers_fault(folder, manifest, facts):
        yield fault


def _shared_faults(folders: Sequence[StoragePath]) -> Iterator[str]:
    """The faults of ids that are in the training split and in another one."""
    try:
        for split, other, which, is_fault in shared_ids(folders):
            if is_fault and "train" in (split.name, other.name):
                yield f"{split} and {other}: hold the same {which}; prepare one of them with --exclude"
    except UserError:
        return  # already reported as a fault of that split


def _dropped_list_faults(folder: StoragePath, record: Any) -> Iterator[str]:
    if record is None:
        return
    if not isinstance(record, dict) or not isinstance(record.get("file"), str):
        yield f"{folder}: the manifest's dropped_list names no file"
        return
    path = folder / record["file"]
    try:
        if file_sha256(path) != record.get("sha256"):
            yield f"{path}: its SHA-256 is not the manifest's, its bytes have changed"
    except FileNotFoundError:
        yield f"{path}: is missing"
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror}); make it a file that can be"
