import base64
import json
import os
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from preprocessing.images.image_refs import (
    Base64Cell,
    FileImage,
    ImageRef,
    ParquetCell,
    TarMember,
    decode_base64,
    image_in,
    join,
)
from tests.unit.preprocessing.helpers import image_of


@pytest.fixture
def places(tmp_path: Path) -> list[ImageRef]:
    """One image behind each kind of reference."""
    data = image_of(1)
    (tmp_path / "a.jpg").write_bytes(data)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "a.jpg", "a.jpg")
        tar.add(tmp_path / "a.jpg", "b.jpg")
    with tarfile.open(tmp_path / "a.tar") as tar:
        member = tar.getmember("b.jpg")
    text = base64.b64encode(data).decode()
    (tmp_path / "a.tsv").write_text(f"x\t{text}\n")
    rows = [{"jpg": None}, {"jpg": data}]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([("jpg", pa.binary())])), tmp_path / "a.parquet")
    return [
        FileImage(f"{tmp_path}/a.jpg"),
        TarMember(f"{tmp_path}/a.tar", member.offset_data, member.size, "b.jpg"),
        Base64Cell(f"{tmp_path}/a.tsv", 2, len(text), "a.tsv row 0"),
        ParquetCell(f"{tmp_path}/a.parquet", 0, 1, "jpg", "one"),
    ]


def test_every_reference_reads_the_bytes_also_after_pickling(places: list[ImageRef]) -> None:
    for image in places:
        assert pickle.loads(pickle.dumps(image)) == image  # noqa: S301  # our own bytes
        assert image.read() == image_of(1)
        assert image.exists() and image.name


def test_a_file_that_comes_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a network's file system, which may give less than it is asked for."""
    (tmp_path / "a.jpg").write_bytes(image_of(1))
    readv = os.readv
    monkeypatch.setattr(os, "readv", lambda file, buffers: readv(file, [buffers[0][:100]]))
    found = FileImage(str(tmp_path / "a.jpg")).read_into(memoryview(bytearray(1 << 16)))
    assert found == image_of(1)


def test_missing_files_are_missing(tmp_path: Path) -> None:
    for image in (
        FileImage(f"{tmp_path}/b"),
        TarMember(f"{tmp_path}/b", 0, 1, "b"),
        Base64Cell(f"{tmp_path}/b", 0, 1, ""),
    ):
        assert not image.exists()
        with pytest.raises(FileNotFoundError):
            image.read()


def test_faults_have_words_that_can_be_counted(places: list[ImageRef], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^is cut short$"):
        TarMember(f"{tmp_path}/a.tar", 0, 1 << 30, "b").read()
    with pytest.raises(ValueError, match=r"^is no base64$"):
        Base64Cell(f"{tmp_path}/a.jpg", 0, 40, "").read()
    with pytest.raises(FileNotFoundError, match="row 0"):
        ParquetCell(f"{tmp_path}/a.parquet", 0, 0, "jpg", "none").read()


def test_forms_of_base64() -> None:
    data = bytes(range(248, 256)) * 3 + b"\0"  # gives both + and /
    text = base64.b64encode(data)
    forms = [
        text,
        text.rstrip(b"="),
        base64.urlsafe_b64encode(data),
        text[:5] + b"\n" + text[5:],
        text.replace(b"/", b"\\/"),
        json.dumps(text.decode()).encode()[1:-1],
    ]
    assert all(decode_base64(form) == data for form in forms)


def test_cells_of_hugging_face_tables(tmp_path: Path) -> None:
    rows = [
        {"image": {"bytes": image_of(2), "path": "2.jpg"}},
        {"image": {"bytes": image_of(3), "path": None}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=1)
    assert [ParquetCell(f"{tmp_path}/a.parquet", g, 0, "image", "").read() for g in (0, 1)] == [
        image_of(2),
        image_of(3),
    ]


def test_names_below_folders_and_addresses() -> None:
    assert join("s3://bucket/images", "a/b.jpg") == "s3://bucket/images/a/b.jpg"
    assert join("images/", "b.jpg") == "images/b.jpg"
    assert FileImage("s3://bucket/a/b.jpg").name == "b.jpg"
    for folder in ("images", "images/", "", "s3://bucket/images"):
        assert image_in(folder, "a/b.jpg") == FileImage(join(folder, "a/b.jpg"))
