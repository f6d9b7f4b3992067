"""Images below a folder that cannot be read now stay in an index; those that are gone do not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from eve_ds.predict import EVE, search_command
from eve_ds.predict.image_files import find_images
from eve_ds.predict.image_index import ImageIndex
from eve_ds.predict.index_command import IndexReport, update_index
from eve_ds.predict.request_rows import Request
from preprocessing.errors import UserError
from tests.support.limits import permissions_hold
from tests.support.predicting import exported, image_files


@pytest.fixture(scope="module")
def eve(tmp_path_factory: pytest.TempPathFactory) -> EVE:
    return EVE.from_pretrained(exported(tmp_path_factory.mktemp("model"), "retrieval"), batch_size=4)


@contextmanager
def closed(folder: Path, mode: int = 0) -> Iterator[None]:
    """The folder has no permissions, or those of ``mode``."""
    folder.chmod(mode)
    try:
        with permissions_hold():
            yield
    finally:
        folder.chmod(0o755)


def counts(done: IndexReport) -> tuple[int, ...]:
    return (done.images, done.new, done.kept, done.removed, done.broken)


@pytest.mark.parametrize("mode", [0, 0o444])
def test_rows_below_a_folder_that_cannot_be_read_are_kept(
    eve: EVE, tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture
) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    paths = image_files(photos, 4)
    image_files(photos / "own", 2, first=4)
    image_files(photos / "own/deep", 2, first=6)
    assert counts(update_index(eve, photos, index, 0)) == (8, 8, 0, 0, 0)
    Path(paths[0]).unlink()
    with closed(photos / "own", mode), caplog.at_level(logging.WARNING, "eve_ds"):
        assert counts(update_index(eve, photos, index, 0)) == (7, 0, 7, 1, 0)
    told = {record.getMessage() for record in caplog.records}
    reason = "cannot be read (Permission denied); images that the index keeps of it"
    if mode:  # the names are known
        assert told == {f"{photos}/own/{name}: {reason}: {number}" for name, number in
                        {"image_0004.png": 1, "image_0005.png": 1, "deep": 2}.items()}  # fmt: skip
    else:
        assert told == {f"{photos}/own: {reason}: 4"}
    (photos / "own/image_0004.png").unlink()
    assert counts(update_index(eve, photos, index, 0)) == (6, 0, 6, 1, 0) and len(ImageIndex(index)) == 6


def test_rows_behind_a_link_are_kept_while_its_end_cannot_be_seen(eve: EVE, tmp_path: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    image_files(photos, 1)
    image_files(tmp_path / "disk/images", 2, first=1)
    (photos / "linked").symlink_to(tmp_path / "disk/images")
    update_index(eve, photos, index, 0)
    with closed(tmp_path / "disk"):
        assert counts(update_index(eve, photos, index, 0)) == (3, 0, 3, 0, 0)
    (photos / "linked").unlink()
    assert counts(update_index(eve, photos, index, 0)) == (1, 0, 1, 2, 0)


def test_a_new_image_that_cannot_be_looked_at_is_counted_as_such(eve: EVE, tmp_path: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    image_files(photos / "own", 2)
    image_files(photos, 1, first=5)
    update_index(eve, photos, index, 0)
    image_files(photos / "own", 1, first=2)
    with closed(photos / "own", 0o444):
        assert counts(update_index(eve, photos, index, 0)) == (3, 0, 3, 0, 1)
    assert [one.path for one in ImageIndex(index).manifest.broken] == ["own/image_0002.png"]


def test_what_could_not_be_decoded_is_remembered_below_a_closed_folder(eve: EVE, tmp_path: Path) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    image_files(photos, 1)
    image_files(photos / "own", 1, first=1)
    (photos / "own/junk.png").write_bytes(b"no image")
    assert counts(update_index(eve, photos, index, 0)) == (2, 2, 0, 0, 1)
    remembered = ImageIndex(index).manifest.broken
    with closed(photos / "own"):
        assert counts(update_index(eve, photos, index, 0)) == (2, 0, 2, 0, 1)
    assert ImageIndex(index).manifest.broken == remembered


def test_a_search_needs_none_of_the_images(eve: EVE, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = image_files(tmp_path / "disk/photos", 1)
    update_index(eve, tmp_path / "disk/photos", tmp_path / "index", 0)
    with closed(tmp_path / "disk"):
        search_command.search_images(lambda: eve, str(tmp_path / "index"), [Request({"text": "a"})], 1, False, None)
    assert capsys.readouterr().out.endswith(f"{path}\n")


@pytest.mark.parametrize("name", ["", "/own"])
def test_a_folder_of_which_nothing_can_be_read_is_not_called_empty(tmp_path: Path, name: str) -> None:
    image_files(tmp_path / "own", 1)
    with closed(Path(f"{tmp_path}{name}")), pytest.raises(UserError, match=f"^{tmp_path}{name}: cannot be read"):
        find_images(tmp_path)
