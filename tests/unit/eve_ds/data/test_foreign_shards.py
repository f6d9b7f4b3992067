"""Shards by ViLT's and EVE's own scripts: what the reader makes of them, and that nothing pickled in them runs."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from eve_ds.data.shards import Split
from eve_ds.data.sources import open_split
from preprocessing.errors import UserError
from tests.support import foreign_shards
from tests.support.shards import image_of, shard_record, texts, write_manifest


def read(folder: Path, kind: str, paths: Sequence[Path], samples: Sequence[int]) -> Split:
    """Some of a folder's shards as a split, through a manifest as a converter would write it."""
    records = [
        shard_record(path, pa.ipc.open_file(str(path)).read_all().num_rows, count)
        for path, count in zip(paths, samples, strict=True)
    ]
    return Split(write_manifest(folder, kind, "train", records))


def test_vilt_captions(tmp_path: Path) -> None:
    train, restval, *_ = foreign_shards.vilt_coco(tmp_path, rows=4)
    split = read(tmp_path, "caption", [train, restval], [7, 7])
    assert (split.rows, split.samples) == (8, 14)
    assert texts(split, "caption")[6:9] == ["train 3 0 yellow", "restval 0 0 red", "restval 1 0 green"]
    assert split.row(5).value("image_id") == "COCO_restval2014_000000000001.jpg"
    assert split.row(5).blob("image") == image_of(1)


@pytest.mark.parametrize("name", ["coco", "cc3m", "sbu"])
def test_eves_shards_have_a_row_per_caption(tmp_path: Path, name: str) -> None:
    paths = foreign_shards.eve_captions(tmp_path, name)
    split = read(tmp_path, "caption", paths, [5, 5])
    assert texts(split, "caption") == [f"{name} {part} {i}" for part in range(2) for i in range(5)]
    assert split.row(7).blob("image") == image_of(2)


def test_visual_genome_with_boxes(tmp_path: Path) -> None:
    split = read(tmp_path, "caption", foreign_shards.visual_genome(tmp_path), [15])
    assert texts(split, "caption")[4:7] == ["phrase 1 1", "phrase 1 2", "phrase 2 0"]


def test_shards_in_several_slices(tmp_path: Path) -> None:
    split = read(tmp_path, "caption", foreign_shards.vilt_web(tmp_path), [5, 5])
    assert texts(split, "caption")[-1] == "web 1 4"


def test_vilt_questions_and_statements(tmp_path: Path) -> None:
    train, _, test, _ = foreign_shards.vilt_vqa(tmp_path / "vqa")
    split = read(tmp_path / "vqa", "vqa", [train], [10])
    _, row, item = split.sample(5)
    assert row.item("answers", item) == ["blue", "yes"] and row.item("answer_labels", item) == [4, 0]
    assert row.item("question_id", item) == 21
    split = read(tmp_path / "vqa", "vqa", [test], [10])
    assert texts(split, "questions")[3] == "what color has image 1?" and split.row(0).value("answers") == []
    paths = foreign_shards.vilt_nlvr(tmp_path / "nlvr")
    split = read(tmp_path / "nlvr", "nlvr", paths[1:2], [10])
    _, row, item = split.sample(3)
    assert (row.item("identifier", item), row.item("answers", item)) == ("dev-1-0-1", "False")
    assert row.blob("image_1") == image_of(5)


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Path]]:
        return Path.touch, (self._mark,)


def test_pickled_metadata_are_never_loaded(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickled = pickle.dumps(Bomb(mark))
    pickle.loads(pickled)  # noqa: S301  # the bomb works
    mark.unlink()
    (path,) = foreign_shards.visual_genome(tmp_path / "train")
    foreign_shards.with_pickle(path, pickled)
    split = read(tmp_path / "train", "caption", [path], [15])
    assert texts(split, "caption")[0] == "phrase 0 0" and split.row(2).blob("image") == image_of(2)
    assert not mark.exists()


def test_a_file_without_a_split_in_its_name_is_refused_if_its_rows_name_one(tmp_path: Path) -> None:
    train, _, _, test = foreign_shards.vilt_coco(tmp_path, rows=4)
    test.rename(tmp_path / "coco_caption_karpathy_tset.arrow")
    with pytest.raises(UserError, match=r"tset.arrow: its name has no split.*its rows are of split test; rename it to"):
        open_split(tmp_path, "train")
    train.rename(tmp_path / "vg.arrow")  # as ViLT's Visual Genome: all of it is trained on
    (tmp_path / "coco_caption_karpathy_tset.arrow").rename(tmp_path / "coco_caption_karpathy_test.arrow")
    assert {"vg.arrow"} < {shard.name for shard in tmp_path.iterdir()} and open_split(tmp_path, "train").rows == 8
