import json
import os
from pathlib import Path

import pytest

from preprocessing.shards.schema import (
    IMAGE_COLUMNS,
    KINDS,
    MANIFEST,
    SAMPLE_COLUMN,
    DataError,
    dump_json,
    printable,
    read_manifest,
    sync_path,
    write_atomic,
)

GOOD = {
    "schema_version": 1,
    "kind": "caption",
    "split": "train",
    "rows": 1,
    "samples": 2,
    "shards": [{"file": "shard-00000.arrow", "rows": 1, "samples": 2, "bytes": 3, "sha256": "0"}],
    "dropped": {},
}


def test_every_kind_has_its_columns() -> None:
    for kind, schema in KINDS.items():
        assert {*IMAGE_COLUMNS[kind], SAMPLE_COLUMN[kind], "split"} <= set(schema.names)


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_atomic(tmp_path / MANIFEST, dump_json(GOOD))
    assert read_manifest(tmp_path) == GOOD


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{\n 3", "line 2 column 2"),
        ("[]", "schema_version None"),
        ("[" * 100_000, "invalid JSON (nested too deep"),
        (json.dumps(GOOD | {"schema_version": 9}), "schema_version 9"),
        (json.dumps(GOOD | {"kind": "sound"}), "'sound'"),
        (json.dumps(GOOD | {"rows": "1"}), "field rows"),
        (json.dumps(GOOD | {"shards": [{"file": "x"}]}), "field shards[0].rows"),
    ],
)
def test_bad_manifest_is_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(DataError) as error:
        read_manifest(tmp_path)
    assert said in str(error.value) and str(tmp_path / MANIFEST) in str(error.value) and "\n" not in str(error.value)


def test_missing_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a prepared split folder"):
        read_manifest(tmp_path / "nowhere")


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"old")
    write_atomic(tmp_path / "a", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"new"


def test_atomic_write_is_on_disk_by_its_name_when_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this order: the content, the name, the name's folder; and the names of folders that were made for it."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        events.append("content" if os.path.isfile(path) else os.path.relpath(path, tmp_path))
        fsync(handle)

    def note_replace(old: str, new: Path) -> None:
        events.append("name")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    write_atomic(tmp_path / "new" / "deep" / "a", b"new")
    assert sorted(events[:2]) == [".", "new"] and events[2:] == ["content", "name", "new/deep"]
    events.clear()
    write_atomic(tmp_path / "new" / "deep" / "a", b"newer", sync=False)
    assert events == ["name"]


def test_a_folder_that_cannot_be_asked_for_its_names_is_left_to_the_system(tmp_path: Path) -> None:
    """/proc is such a file system: it refuses with EINVAL. A file that cannot be synced is an error."""
    sync_path("/proc")
    with pytest.raises(FileNotFoundError):
        sync_path(tmp_path / "nothing")
    with pytest.raises(OSError, match="Invalid argument"):
        sync_path("/proc/self/status")


def test_atomic_write_over_what_is_no_file_is_refused(tmp_path: Path) -> None:
    """A rename over /dev/null, as root, would leave a plain file where all programs expect the device."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(DataError, match=rf"{name}: is no regular file"):
            write_atomic(tmp_path / name, b"")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink() and (tmp_path / "folder").is_dir()
    assert len(list(tmp_path.iterdir())) == 3


def test_atomic_write_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "a", b"")


def test_what_a_terminal_would_obey_is_printed_as_escapes() -> None:
    odd = "a\x1b[31mb\x00c\rd\ne\x7f\x9bf\u202eg\ud83dh"
    assert printable(odd) == "a\\x1b[31mb\\x00c\\rd\\ne\\x7f\\x9bf\\u202eg\\ud83dh"
    assert printable("a cafe\u0301, 日本語, 🙂: 100 %") == "a cafe\u0301, 日本語, 🙂: 100 %"
