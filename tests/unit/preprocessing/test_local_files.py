import os
from pathlib import Path

import pytest

from preprocessing.errors import UserError
from preprocessing.local_files import sync_path, write_atomic


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


def test_a_folder_that_cannot_be_synced_is_skipped(tmp_path: Path) -> None:
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
        with pytest.raises(UserError, match=rf"{name}: is no regular file"):
            write_atomic(tmp_path / name, b"")
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink() and (tmp_path / "folder").is_dir()
    assert len(list(tmp_path.iterdir())) == 3


def test_a_name_that_ends_in_a_slash_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="new/: is a folder; name a file"):
        write_atomic(f"{tmp_path}/new/", b"")
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_replaces_a_link_and_keeps_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("old")
    write_atomic(tmp_path / "link", b"new")
    assert ((tmp_path / "old").read_bytes(), (tmp_path / "link").read_bytes()) == (b"old", b"new")


def test_atomic_write_into_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "a", b"")
