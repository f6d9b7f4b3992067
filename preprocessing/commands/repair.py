"""Repairs a split folder: `python -m preprocessing verify DIR --repair`.

Valid shards are kept (as hard links). Of a shard with faults, the valid rows are written to a new shard. A shard whose
bytes differ from the manifest but whose rows pass every check is kept with its old record, unless `--accept-changed` is
given: a letter of a text may have changed. Lost rows are counted in the manifest's `dropped`; each action is printed
and listed in its `repairs`. The repaired folder replaces the old one by rename, so a kill leaves one or the other. The
split is locked all the time, as by converters. The content of a row is never changed.
"""

import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from preprocessing.commands.checks import (
    ShardReport,
    SplitFacts,
    answers_fault,
    check_shards,
    ids_fault,
    shard_paths,
    split_facts,
)
from preprocessing.errors import UserError
from preprocessing.local_files import sync_tree
from preprocessing.running.output_folder import check_replaceable, locked, new_folder
from preprocessing.running.storage import StoragePath, file_sha256
from preprocessing.shards.ids import keys_of_shards, numbered_columns, write_ids
from preprocessing.shards.reader import batches_of
from preprocessing.shards.schema import ANSWER_LIST_HASH, IDS, KINDS, MANIFEST, PROVENANCE, read_manifest
from preprocessing.shards.writer import DROPPED, SPLIT_FILES, ShardWriter, write_manifest


class _Repair:
    """The state of one repair. `actions`: a line for each."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], facts: SplitFacts, actions: list[str], accept_changed: bool
    ) -> None:
        self.folder, self.manifest, self.facts, self.actions = folder, manifest, facts, actions
        self.accept_changed = accept_changed
        self.shards: list[dict[str, Any]] = []
        self.dropped = Counter[str](manifest["dropped"])
        self.items: list[dict[str, str]] = list(manifest.get("dropped_items", []))

    def count_lost(self, item: str, reason: str, rows: int = 1) -> None:
        """Count lost rows."""
        if rows > 0:
            self.dropped[f"repair: {reason}"] += rows
            self.items.append({"item": item, "reason": f"repair: {reason}"})


def repair_split(folder: StoragePath, workers: int = 1, accept_changed: bool = False) -> list[str]:
    """Repair the split in `folder` (links are resolved). Returns a line for each action.

    Raises UserError when it cannot be repaired: another process writes it, no shard can be read, a VQA set has no
    answer list, the folder is remote, or it has files that are not ours.
    """
    if not isinstance(folder, Path):
        raise UserError(f"{folder}: --repair works on a local folder; copy the data set, repair it, and copy it back")
    target = Path(os.path.realpath(folder))
    with locked(target):
        return _repair_split(folder, target, workers, accept_changed)


def _repair_split(folder: Path, target: Path, workers: int, accept_changed: bool) -> list[str]:
    """`repair_split` of a locked split; `target` is `folder` with links resolved."""
    actions: list[str] = []
    manifest = _manifest_of(folder, actions)
    facts = split_facts(folder, manifest)
    if answers_fault(folder, manifest, facts):  # which no change of rows can repair
        raise UserError(answers_fault(folder, manifest, facts))
    reports = check_shards(folder, manifest["shards"], facts, workers)
    listed = {record["file"] for record in manifest["shards"]}
    for path in shard_paths(folder):
        if path.name not in listed:
            raise UserError(f"{path}: is not in the manifest; move it away, or remove {MANIFEST} to take it in")
    for report in reports:
        if report.access_denied:  # it may have valid rows
            raise UserError(f"{report.path}: {report.faults[0]}")
    checked = [report for report in reports if accept_changed or not _changed_but_valid(report)]
    lines = [
        f"{folder}: {report.path.name} is kept as it is, and so is its record: it has changed, and its rows pass every "
        "check; prepare it again, or give --accept-changed to vouch for it"
        for report in reports
        if not accept_changed and _changed_but_valid(report)
    ]
    if fault := ids_fault(folder, manifest, reports):
        actions.append(f"{IDS} is written anew: it {fault.partition(': ')[2]}")
    if not actions and _sound(manifest, checked):
        return lines
    repair = _Repair(folder, manifest, facts, actions, accept_changed)
    check_replaceable(target, SPLIT_FILES, overwrite=True)
    with new_folder(target) as new:
        for record, report in zip(manifest["shards"], reports, strict=True):
            _repair_shard(repair, new, record, report)
        if not repair.shards:
            raise UserError(f"{folder}: no row of it is sound; prepare the split again")
        _finish(repair, new)
        sync_tree(new)  # before the old shards go
    return [*(f"{folder}: {line}" for line in actions), *lines]


def _changed_but_valid(report: ShardReport) -> bool:
    """Whether the bytes of a shard differ from its record although all its rows are valid."""
    return report.changed and report.whole and bool(report.rows) and not report.row_faults


def _sound(manifest: dict[str, Any], reports: list[ShardReport]) -> bool:
    totals = all(manifest[name] == sum(shard[name] for shard in manifest["shards"]) for name in ("rows", "samples"))
    return totals and not any(report.faults or report.row_faults for report in reports)


def _manifest_of(folder: Path, actions: list[str]) -> dict[str, Any]:
    """The split's manifest; if it cannot be read, a substitute with the names of the shards only."""
    try:
        return read_manifest(folder)
    except UserError as error:
        paths = shard_paths(folder)
        for path in paths:
            found = _facts_in(path)
            if found:
                why = "was missing" if not (folder / MANIFEST).exists() else "could not be read"
                actions.append(f"{MANIFEST} {why}: made anew from {len(paths)} shards; what was dropped is not known")
                shards = [{"file": path.name} for path in paths]
                return {**found, "shards": shards, "dropped": {}, "dropped_items": []}
        raise error from None


def _facts_in(path: StoragePath) -> dict[str, str]:
    """Kind, split and, but for pairs, modality by the content of a shard; {} if it cannot be read."""
    for kind, schema in KINDS.items():
        for batch in batches_of(path, schema, []):
            if batch.num_rows:
                lacking = [
                    {"modality": modality}
                    for modality, column in (("image", "caption"), ("text", "image"))
                    if kind == "caption" and not any(batch.column(column).to_pylist())
                ]
                return {"kind": kind, "split": batch.column("split")[0].as_py(), **(lacking[0] if lacking else {})}
    return {}


def _repair_shard(repair: _Repair, new: Path, record: dict[str, Any], report: ShardReport) -> None:
    """Put the shard of `report`, or its valid rows, into the folder `new`."""
    path = repair.folder / record["file"]
    if not report.rows:
        repair.actions.append(f"{path.name} is given up: {report.faults[0] if report.faults else 'it has no rows'}")
        repair.count_lost(path.name, "its shard is lost", record.get("rows", 0))
    elif report.whole and not report.row_faults:
        _keep_shard(repair, new, record, report)
    else:
        _rewrite_shard(repair, new, record, report)


def _keep_shard(repair: _Repair, new: Path, record: dict[str, Any], report: ShardReport) -> None:
    path = repair.folder / record["file"]
    try:
        os.link(path, new / path.name)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, new / path.name)
    if report.changed and not repair.accept_changed:
        repair.shards.append(record)
        return
    size = path.stat().st_size
    known = len(record) > 1 and not report.faults
    sha256 = record["sha256"] if known else file_sha256(path)
    repair.shards.append(
        {"file": path.name, "rows": report.rows, "samples": report.samples, "bytes": size, "sha256": sha256}
    )
    if report.faults:
        why = "; ".join(report.faults)
        repair.actions.append(f"{path.name} passes row by row and is kept; its record is corrected: {why}")


def _rewrite_shard(repair: _Repair, new: Path, record: dict[str, Any], report: ShardReport) -> None:
    path = repair.folder / record["file"]
    broken = report.row_faults

    def name(number: int) -> str:
        return path.name if number == 0 else f"{path.stem}_r{number}.arrow"

    with ShardWriter(new, repair.facts.kind, repair.facts.split, name=name, grid=report.grid) as writer:
        number = 0
        for batch in batches_of(path, KINDS[repair.facts.kind], []):
            for row in batch.to_pylist():
                if number not in broken:
                    writer.add(row)
                number += 1
        written = writer.close()
    repair.shards += written
    for row, why in sorted(broken.items()):
        reason = "its id stands in an earlier row" if row in report.repeated else why[0]
        repair.count_lost(f"{path.name} row {row}", reason)
    cut = record.get("rows", report.rows) - report.rows
    repair.count_lost(path.name, "a part of its shard is lost", cut)
    kept = sum(shard["rows"] for shard in written)
    what = [f"{kept} rows are kept"]
    if broken:
        row, why = min(broken.items())
        what.append(f"{len(broken)} broken rows are taken out (row {row}: {why[0]}{', …' if len(broken) > 1 else ''})")
    what += report.faults
    repair.actions.append(f"{path.name} is written anew: {'; '.join(what)}")


def _finish(repair: _Repair, new: Path) -> None:
    """Write the manifest, and copy the other files of the folder."""
    old = repair.manifest
    for name in (PROVENANCE, DROPPED):
        if (repair.folder / name).exists():
            shutil.copyfile(repair.folder / name, new / name)
    for total in ("rows", "samples"):
        if total in old and old[total] != sum(shard.get(total, 0) for shard in old["shards"]):
            repair.actions.append(f"{MANIFEST}: its {total} were not the sum of its shards', they are now")
    kept = {name: old[name] for name in ("source", "dropped_list", ANSWER_LIST_HASH, "modality") if name in old}
    numbered = numbered_columns({"ids": old.get("ids"), "kind": repair.facts.kind})
    found = {"kind": repair.facts.kind, "shards": repair.shards, "ids": {"numbered": numbered}}
    write_manifest(
        new,
        repair.facts.kind,
        repair.facts.split,
        repair.shards,
        ids=write_ids(new, keys_of_shards(new, found), numbered),
        dropped=dict(repair.dropped),
        dropped_items=repair.items,
        repairs=[*old.get("repairs", []), *repair.actions],
        **({"source": {}} | kept),
    )
