"""Splits found by name, with a manifest or without, and several of them as one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eve_ds.data.sources import JoinedSplit, open_split
from eve_ds.tasks.vqa import read_answer_list
from preprocessing.errors import UserError
from tests.support import foreign_shards
from tests.support.shards import image_of, make_caption_set, make_vqa_set, texts


def test_vilts_coco_is_read_by_its_names(tmp_path: Path) -> None:
    foreign_shards.vilt_coco(tmp_path, rows=4)
    train = open_split(tmp_path, "train")
    assert (train.kind, train.rows, train.samples) == ("caption", 8, 14)  # restval is trained on
    rows = [train.row(index).value("image_id") for index in (0, 7)]
    assert sorted(rows) == ["COCO_restval2014_000000000000.jpg", "COCO_train2014_000000000003.jpg"]
    for name in ("restval", "val", "test"):
        part = open_split(tmp_path, name)
        assert part.rows == 4 and part.row(1).value("split") == name
    assert train.row(5).blob("image") == image_of(1)


def test_vilts_questions(tmp_path: Path) -> None:
    foreign_shards.vilt_vqa(tmp_path)
    for name in ("train", "val", "test", "test-dev"):
        split = open_split(tmp_path, name)
        assert (split.kind, split.rows, split.samples) == ("vqa", 5, 10)
        assert split.row(0).value("split") == name
    assert read_answer_list(tmp_path) == ["yes", "<1>", "red", "green", "blue", "yellow"]


def test_vilts_pairs_and_slices(tmp_path: Path) -> None:
    foreign_shards.vilt_nlvr(tmp_path / "nlvr")
    for name, found in (("train", "train"), ("dev", "dev"), ("val", "dev"), ("test1", "test1"), ("test", "test1")):
        assert open_split(tmp_path / "nlvr", name).row(0).value("split") == found
    foreign_shards.vilt_web(tmp_path / "web", rows=2, slices=12)
    web = open_split(tmp_path / "web", "train")
    captions = [web.row(index).value("caption")[0] for index in range(web.rows)]
    assert captions == [f"web {part} {row}" for part in range(12) for row in range(2)]  # slice 2 before slice 10


def test_eves_files_are_trained_on(tmp_path: Path) -> None:
    foreign_shards.eve_captions(tmp_path, "sbu")
    foreign_shards.visual_genome(tmp_path)
    split = open_split(tmp_path, "train")
    assert (split.rows, split.samples) == (15, 25)
    with pytest.raises(UserError, match=r"val/manifest\.json: no such file"):
        open_split(tmp_path, "val")


def test_everything_in_one_folder(tmp_path: Path) -> None:
    foreign_shards.vilt_coco(tmp_path)
    foreign_shards.vilt_vqa(tmp_path)
    foreign_shards.vilt_nlvr(tmp_path)
    assert [open_split(tmp_path, "train", kind).rows for kind in ("caption", "vqa", "nlvr")] == [10, 5, 5]
    with pytest.raises(UserError, match=r"is a nlvr shard, .* a caption shard; keep them in separate folders"):
        open_split(tmp_path, "train")


def test_missing_splits(tmp_path: Path) -> None:
    make_caption_set(tmp_path, rows=3)
    (tmp_path / "train" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):  # our own shards, of a run that was killed
        open_split(tmp_path, "train")
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.arrow").write_bytes(b"no Arrow file")
    with pytest.raises(UserError, match=r"x\.arrow: is not a readable Arrow file"):
        open_split(other, "train")
    (other / "x.arrow").write_bytes(b"")
    with pytest.raises(UserError, match=r"x\.arrow: is not a readable Arrow file"):
        open_split(other, "train")
    with pytest.raises(UserError, match=r"manifest\.json: no such file"):
        open_split(tmp_path / "absent", "train")


def test_joined(tmp_path: Path) -> None:
    make_caption_set(tmp_path / "one", rows=4)
    foreign_shards.eve_captions(tmp_path / "two", "cc3m")
    one, two = open_split(tmp_path / "one", "train"), open_split(tmp_path / "two", "train")
    both = JoinedSplit([one, two])
    assert (both.kind, both.rows, both.samples) == ("caption", 14, one.samples + 10)
    assert [count for _, count in both.parts] == [one.samples, 10]
    assert texts(both, "caption") == texts(one, "caption") + texts(two, "caption")
    expected = np.concatenate([one.sample_rows(), 4 + two.sample_rows()])
    assert np.array_equal(both.sample_rows(), expected)
    assert [both.sample(index)[0] for index in range(both.samples)] == expected.tolist()
    assert both.row(4).value("caption") == two.row(0).value("caption")
    for index in (-1, both.samples):
        with pytest.raises(IndexError):
            both.sample(index)


def test_joined_splits_are_of_one_kind(tmp_path: Path) -> None:
    make_caption_set(tmp_path / "one", rows=2)
    make_vqa_set(tmp_path / "two", rows=2)
    with pytest.raises(UserError, match=r"two.train: holds vqa data, .*one.train caption data"):
        JoinedSplit([open_split(tmp_path / "one", "train"), open_split(tmp_path / "two", "train")])


def test_wrong_folders_get_a_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "sets" / "coco"
    for split in ("train", "val"):
        make_caption_set(home, rows=4, split=split)
    foreign_shards.vilt_coco(tmp_path / "vilt", rows=2)
    arrow = next((tmp_path / "vilt").glob("*_train.arrow"))
    (tmp_path / "notes.txt").touch()
    for given, hint in (
        (home / "train", f"{home / 'train'} is one split; give the folder of the dataset, {home}"),
        (home / "train/manifest.json", f"is a file of a split; give the folder of the dataset, {home}"),
        (home / "val/shard-00000.arrow", f"is a file of a split; give the folder of the dataset, {home}"),
        (arrow, f"{arrow} is a file; give its folder, {tmp_path / 'vilt'}"),
        (tmp_path / "notes.txt", "notes.txt is a file"),
        (tmp_path / "sets", f"{tmp_path / 'sets'} is not a dataset; did you mean {home}?"),
        (home / "trian", f"there is no folder {home / 'trian'}"),
    ):
        with pytest.raises(UserError) as error:
            open_split(given, "train")
        assert str(error.value).startswith(f"{given}/train/manifest.json: no such file; ")
        assert str(error.value).endswith(hint)
    with pytest.raises(UserError, match="no split test but train, val; name one of these, or run a converter for test"):
        open_split(home, "test")
    monkeypatch.chdir(home / "train")
    for relative in (".", "manifest.json"):
        with pytest.raises(UserError) as error:
            open_split(relative, "train")
        assert str(error.value).endswith(f"give the folder of the dataset, {home}")
