"""What gets a name has its content on disk before, and its name after: shards, repaired splits, models, scores.

System calls are noted and done: a power loss is imitated in tests/e2e/test_power_loss.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation import common as evaluation_files
from eve_ds.weights.save import replacing, write_weights
from preprocessing.commands.repair import repair_split
from preprocessing.local_files import sync_tree
from tests.unit.preprocessing.helpers import convert, image_of

Events = list[tuple[str, ...]]
UNSYNCED = ("records", "job.json")  # a converter's notes: half of one is none, and its part is done again


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    """("synced", path) and ("named", old, new), in the order of time."""
    found: Events = []
    fsync, calls = os.fsync, {name: getattr(os, name) for name in ("rename", "replace")}

    def note_fsync(handle: int) -> None:
        fsync(handle)
        found.append(("synced", os.readlink(f"/proc/self/fd/{handle}")))

    def note_name(call: Any) -> Any:
        def run(old: Any, new: Any) -> None:
            found.append(("named", str(old), str(new), *(str(p.relative_to(old)) for p in Path(old).rglob("*"))))
            call(old, new)

        return run

    monkeypatch.setattr(os, "fsync", note_fsync)
    for name, call in calls.items():
        monkeypatch.setattr(os, name, note_name(call))
    return found


def check(events: Events, *names: Path) -> None:
    """All that got a name was on disk, its name is, and the ``names`` are among those."""
    given = {}
    for place, (event, *details) in enumerate(events):
        if event != "named" or any(part in UNSYNCED for part in Path(details[1]).parts):
            continue
        old, new, *inside = details
        given[new] = old
        if Path(new).name in ("old", "replaced") or new.endswith(".old"):
            continue  # put aside, to be removed
        for path in (old, *(f"{old}/{name}" for name in inside)):
            assert ("synced", path) in events[:place], f"{path} was not on disk when it became {new}"
        parent = str(Path(new).parent)
        assert ("synced", parent) in events[place:], f"the name {new} is not on disk"
    assert {str(name) for name in names} <= given.keys()


def test_a_tree_is_synced_with_all_files_and_folders(tmp_path: Path, events: Events) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "a" / "pipe")  # to open it would wait for a writer
    sync_tree(tmp_path / "a")
    assert {event[1] for event in events} == {str(tmp_path / name) for name in ("a", "a/b", "a/b/file")}
    assert events[-1] == ("synced", str(tmp_path / "a"))


def test_shards_and_repaired_ones(tmp_path: Path, events: Events) -> None:
    images, out = tmp_path / "images", tmp_path / "new" / "out"
    images.mkdir()
    for index in range(4):
        (images / f"{index}.jpg").write_bytes(image_of(index))
    (tmp_path / "list.json").write_text(json.dumps([{"image": f"{i}.jpg", "caption": "a cat"} for i in range(4)]))
    convert("json", "--task", "retrieval", "--annotations", tmp_path / "list.json", "--images", images,
            "--split", "train", "--out", out)  # fmt: skip
    check(events, out / "train")
    assert ("synced", str(tmp_path)) in events and ("synced", str(tmp_path / "new")) in events
    events.clear()
    (out / "train" / "manifest.json").unlink()
    assert repair_split(out / "train", workers=1, accept_changed=False)
    check(events, out / "train")


def test_models_and_scores(tmp_path: Path, events: Events) -> None:
    model, file, scores = tmp_path / "model", tmp_path / "model.th", tmp_path / "scores.json"
    for _ in range(2):  # new, and in the place of another one
        with replacing(model) as new:
            new.mkdir()
            write_weights(new / "model.safetensors", {"a": torch.ones(2)}, {})
        check(events, model)
        events.clear()
        with replacing(file) as new:
            write_weights(new, {"a": torch.ones(2)}, {})
        check(events, file)
        events.clear()
        evaluation_files.write_json(scores, {"r1": 1.0})
        check(events, scores)
        events.clear()
