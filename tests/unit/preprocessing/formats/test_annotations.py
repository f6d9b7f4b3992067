from pathlib import Path

import pytest

from preprocessing.errors import DataError
from preprocessing.formats.annotations import BadRecord, field, read_json, read_json_lines
from preprocessing.running.output_folder import locked, output_folder, recover


def test_invalid_json_is_told_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"images": [\n  {"id": 1,}\n]}')
    with pytest.raises(DataError, match=r"a\.json: invalid JSON at line 2 column \d+ "):
        read_json(path)


def test_invalid_json_line_is_told_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n\n{"a": }\n[2]')
    bad: list[BadRecord] = []
    assert list(read_json_lines(path, bad.append)) == [(1, {"a": 1}), (4, [2])]
    assert [str(error).partition(" (")[0] for error in bad] == [f"{path}: line 3: invalid JSON at column 7"]


def test_json_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": 1}\n\n"x\u2028y"\n', encoding="utf-8")
    assert list(read_json_lines(path, [].append)) == [(1, {"a": 1}), (3, "x\u2028y")]


def test_numbers_of_too_many_digits_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"id": 1}\n' + "9" * 5000)
    bad: list[BadRecord] = []
    assert len(list(read_json_lines(path, bad.append))) == 1
    assert str(bad[0]) == f"{path}: line 2: holds a number of more than 4300 digits; fetch the file again"
    path.write_text('{"id": ' + "9" * 5000 + "}")
    with pytest.raises(DataError, match=r"a\.json: holds a number of more than 4300 digits; fetch"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such file"), (b"  \n", "is empty"), (b"\xff\xd8\xff", "is not UTF-8 text")]
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.json: {said}"):
        read_json(path)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ([], "is no JSON object"),
        ({}, "has no field 'id'"),
        ({"id": "7"}, '"7", not int'),
        ({"id": True}, "true, not int"),
    ],
)
def test_bad_fields_are_named(record: object, said: str) -> None:
    with pytest.raises(DataError, match=f"^F: record 3: .*{said}"):
        field(record, "id", int, "F: record 3")


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
    with pytest.raises(DataError, match="--overwrite"), output_folder(tmp_path / "a", ["x"], overwrite=False):
        pass
    with output_folder(tmp_path / "a", ["x"], overwrite=True) as folder:
        (folder / "x").write_text("new")
    assert (tmp_path / "a/x").read_text() == "new"
    (tmp_path / "a/thesis.tex").write_text("")
    with pytest.raises(DataError, match=r"thesis\.tex"), output_folder(tmp_path / "a", ["x"], overwrite=True):
        pass
    assert (tmp_path / "a/thesis.tex").exists()
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_output_folder_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with output_folder(target, ["x"], overwrite=False) as folder:
        (folder / "x").write_text("1")
        with (
            pytest.raises(DataError, match="a: another process is writing it; wait for it to end"),
            output_folder(target, ["x"], overwrite=True),
        ):
            pass
        assert (folder / "x").exists()
    assert (target / "x").read_text() == "1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_an_old_folder_is_put_back_by_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / ".a.old").mkdir()
    with locked(tmp_path / "a"), pytest.raises(DataError, match="another process is writing it"):
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


def test_where_no_lock_can_be_made_that_is_said(tmp_path: Path) -> None:
    (tmp_path / ".a.work").write_text("")
    with pytest.raises(DataError, match="a: cannot be locked"), locked(tmp_path / "a"):
        pass
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(DataError, match="a: cannot be locked"), locked(tmp_path / "link/a"):
        pass
