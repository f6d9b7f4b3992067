from pathlib import Path

import pytest

from preprocessing.errors import UserError
from preprocessing.running.output_folder import locked, output_folder, recover


def test_output_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), output_folder(tmp_path / "a", ["x"], overwrite=False) as folder:
        (folder / "x").write_text("1")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with output_folder(tmp_path / "a", ["x"], overwrite=False) as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a/x").read_text() == "1"


def test_output_folder_is_replaced_only_on_request_and_if_ours(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x").write_text("old")
    with pytest.raises(UserError, match="--overwrite"), output_folder(tmp_path / "a", ["x"], overwrite=False):
        pass
    with output_folder(tmp_path / "a", ["x"], overwrite=True) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "a/x").read_text() == "new"
    (tmp_path / "a/thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"thesis\.tex"), output_folder(tmp_path / "a", ["x"], overwrite=True):
        pass
    assert (tmp_path / "a/thesis.tex").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_output_folder_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with output_folder(target, ["x"], overwrite=False) as folder:
        (folder / "x").write_text("1")
        with (
            pytest.raises(UserError, match="a: another process is writing it; wait for it to end"),
            output_folder(target, ["x"], overwrite=True),
        ):
            pass
        assert (folder / "x").exists()
    assert (target / "x").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_an_old_folder_is_put_back_by_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / ".a.old").mkdir()
    with locked(tmp_path / "a"), pytest.raises(UserError, match="another process is writing it"):
        recover(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    recover(tmp_path / "a")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_what_an_output_link_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "far/b").mkdir(parents=True)
    (tmp_path / "a").symlink_to("far/b")
    (tmp_path / "far/.b.old").symlink_to("nowhere")
    for content in ("1", "2"):
        with output_folder(tmp_path / "a", ["x"], overwrite=True) as folder:
            (folder / "x").write_text(content)
        assert (tmp_path / "a").is_symlink() and (tmp_path / "far/b/x").read_text() == content
    assert [entry.name for entry in (tmp_path / "far").iterdir()] == ["b"]


def test_the_lock_leaves_what_else_is_in_the_work_folder(tmp_path: Path) -> None:
    with locked(tmp_path / "a") as work:
        assert isinstance(work, Path)
        (work / "job.json").write_text("{}")
    assert sorted(entry.name for entry in work.iterdir()) == ["job.json", "lock"]


def test_a_lock_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / ".a.work").write_text("")
    with pytest.raises(UserError, match="a: cannot be locked"), locked(tmp_path / "a"):
        pass
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="a: cannot be locked"), locked(tmp_path / "link/a"):
        pass
