import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from preprocessing.errors import UserError
from preprocessing.images.decoding import BadImage, read_image
from preprocessing.images.image_refs import FileImage, TarMember
from preprocessing.running import storage as places
from preprocessing.running.storage import (
    RemotePath,
    exists,
    is_remote,
    names_in,
    open_input,
    remove,
    size_of,
    storage_path,
    upload_file,
    write_whole,
)
from tests.support.s3 import BUCKET, S3, s3_server


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with s3_server() as server:
        yield server


def test_a_path_stays_a_path() -> None:
    assert storage_path("a/b") == Path("a/b") == storage_path(Path("a/b"))
    assert is_remote("s3://bucket") and not is_remote("s3") and not is_remote("gs/a")  # folders of these names
    assert storage_path("s3://bucket/a/") == RemotePath("s3://bucket/a") == storage_path(RemotePath("s3://bucket/a"))
    assert str(storage_path("s3://bucket/a") / "b") == "s3://bucket/a/b"
    assert (storage_path("s3://bucket/a/b").name, str(storage_path("s3://bucket/a/b").parent)) == ("b", "s3://bucket/a")


@pytest.mark.parametrize(("uri", "said"), [("ftp://host/a", "ftp:// is not known"), ("s3:///", "names no bucket")])
def test_addresses_that_cannot_be_are_refused(uri: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        storage_path(uri)


def test_objects_are_written_read_listed_and_removed(s3: S3, tmp_path: Path) -> None:
    folder = storage_path(f"s3://{BUCKET}/set")
    assert isinstance(folder, RemotePath) and not folder.exists() and names_in(folder) == []
    write_whole(folder / "b.json", b"one")
    write_whole(folder / "b.json", b"second")
    (tmp_path / "a").write_bytes(bytes(9_000_000))
    with open(tmp_path / "a", "rb") as file:
        file.read(7)
        upload_file(file, folder / "a")
    assert exists(f"{folder}/a") and not exists(f"{folder}/c")
    assert names_in(folder) == ["a", "b.json"] and folder.is_dir() and not (folder / "a").is_dir()
    assert (size_of(folder / "a"), (folder / "b.json").read_bytes()) == (9_000_000, b"second")
    with open_input(f"s3://{BUCKET}/set/b.json") as stream:
        stream.seek(2)
        assert stream.read() == b"cond"
    remove(folder / "a")
    assert names_in(folder) == ["b.json"]
    remove(folder)
    remove(folder)
    assert s3.names("set") == []


def test_a_missing_object_is_a_missing_file(s3: S3) -> None:
    missing = f"s3://{BUCKET}/none.jpg"
    with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
        open_input(missing)
    with pytest.raises(FileNotFoundError):
        size_of(storage_path(missing))
    with pytest.raises(BadImage, match="is missing"):
        read_image(FileImage(missing))


def test_a_part_of_an_object_is_read_alone(s3: S3) -> None:
    write_whole(storage_path(f"s3://{BUCKET}/x.tar"), b"0123456789")
    assert read_image(TarMember(f"s3://{BUCKET}/x.tar", 3, 4, "x")) == b"3456"


def test_a_server_that_is_not_there_is_no_fault_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is dropped for want of a network would be lost in silence."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    places._filesystem.cache_clear()
    try:
        with pytest.raises(UserError, match=r"^s3://bucket/a\.jpg: .*check the address") as error:
            read_image(FileImage("s3://bucket/a.jpg"))
        assert "\n" not in str(error.value)
    finally:
        places._filesystem.cache_clear()


def test_unreadable_files_are_bad_images(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "a.jpg")
    with pytest.raises(BadImage, match="is no regular file"):
        read_image(FileImage(str(tmp_path / "a.jpg")))
    with pytest.raises(BadImage, match="is missing"):
        read_image(FileImage(str(tmp_path / "b.jpg")))
    too_long = FileImage(str(tmp_path / ("n" * 300)))
    assert not exists(too_long.path) and not too_long.exists()
    for room in (None, memoryview(bytearray(9))):
        with pytest.raises(BadImage, match="is missing"):
            read_image(too_long, room)
    (tmp_path / "t").write_bytes(b"123")
    with pytest.raises(BadImage, match="is cut short"):
        read_image(TarMember(str(tmp_path / "t"), 1, 4, "x"))
