from pathlib import Path

import pytest

from preprocessing.errors import UserError
from preprocessing.formats.annotations import BadRecord, field, read_json, read_json_lines


def test_invalid_json_is_reported_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"images": [\n  {"id": 1,}\n]}')
    with pytest.raises(UserError, match=r"a\.json: invalid JSON at line 2 column \d+ "):
        read_json(path)


def test_invalid_json_line_is_reported_by_its_number_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}\n\n{"a": }\n[2]')
    bad: list[BadRecord] = []
    assert list(read_json_lines(path, bad.append)) == [(1, {"a": 1}), (4, [2])]
    assert [str(error).partition(" (")[0] for error in bad] == [f"{path}: line 3: invalid JSON at column 7"]


def test_json_lines_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": 1}\n\n"x\u2028y"\n', encoding="utf-8")
    assert list(read_json_lines(path, [].append)) == [(1, {"a": 1}), (3, "x\u2028y")]


def test_numbers_of_too_many_digits_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"id": 1}\n' + "9" * 5000)
    bad: list[BadRecord] = []
    assert len(list(read_json_lines(path, bad.append))) == 1
    assert str(bad[0]) == f"{path}: line 2: holds a number of more than 4300 digits; fetch the file again"
    path.write_text('{"id": ' + "9" * 5000 + "}")
    with pytest.raises(UserError, match=r"a\.json: holds a number of more than 4300 digits; fetch"):
        read_json(path)


@pytest.mark.parametrize(
    ("content", "said"), [(None, "no such file"), (b"  \n", "is empty"), (b"\xff\xd8\xff", "is not UTF-8 text")]
)
def test_unreadable_files_are_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json: {said}"):
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
    with pytest.raises(UserError, match=f"^F: record 3: .*{said}"):
        field(record, "id", int, "F: record 3")
