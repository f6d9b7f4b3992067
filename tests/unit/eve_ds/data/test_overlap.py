"""Splits of one data set that share images, questions or statements are refused with the names of files and ids."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from eve_ds.config import FinetuneConfig, PretrainConfig
from eve_ds.data import overlap
from eve_ds.data.data_config import DataSource
from eve_ds.data.overlap import SplitIds, _common, _pairs_in_common
from eve_ds.data.samples import Samples
from eve_ds.data.shards import Split
from eve_ds.data.sources import open_split
from eve_ds.engine import setup
from preprocessing.errors import UserError
from preprocessing.shards.schema import IDS
from preprocessing.text.tokenizer import Tokenizer
from tests.support import foreign_shards
from tests.support.foreign_shards import table_of
from tests.support.shards import (
    FIRST_ID,
    image_of,
    make_caption_set,
    make_nlvr_set,
    make_vqa_set,
    texts,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def config(root: Path, task: str = "pretrain", **data: object) -> PretrainConfig | FinetuneConfig:
    chosen: PretrainConfig | FinetuneConfig = PretrainConfig()
    if task != "pretrain":
        chosen = FinetuneConfig()
        chosen.task = task
    chosen.data.path = str(root)
    chosen.model.image_size = 32
    for name, value in data.items():
        setattr(chosen.data, name, value)
    return chosen


def check(
    chosen: PretrainConfig | FinetuneConfig, tokenizer: Tokenizer, *held_out: str, train: bool = True
) -> tuple[Samples | None, dict[str, Samples]]:
    training = setup.build_dataset(chosen, "train", tokenizer, train=True) if train else None
    scored = {split: setup.build_dataset(chosen, split, tokenizer, train=False) for split in held_out}
    setup.check_apart(chosen, training, scored)
    return training, scored


def test_vilts_questions_are_split_as_vilt_splits_them(tmp_path: Path, tokenizer: Tokenizer) -> None:
    foreign_shards.vilt_vqa(tmp_path, rows=12, whole=True)
    training, scored = check(config(tmp_path, "vqa"), tokenizer, "val", "test")
    assert training is not None and (training.rows, scored["val"].rows, scored["test"].rows) == (22, 2, 12)
    ids = [
        {samples.split.row(row).value("image_id") for row in range(samples.rows)}
        for samples in (training, scored["val"], scored["test"])
    ]
    assert ids[1] == {110, 111} and not (ids[0] & ids[1]) and not (ids[0] & ids[2])
    rows = {name: open_split(tmp_path, name).rows for name in ("rest_val", "trainable_val", "vqav2_val", "test-dev")}
    assert rows == {"rest_val": 2, "trainable_val": 10, "vqav2_val": 12, "test-dev": 12}


def test_vilts_val_without_its_rest_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    foreign_shards.vilt_vqa(tmp_path, rows=12, whole=True)
    (tmp_path / "vqav2_rest_val.arrow").unlink()
    words = (
        r"vqav2_trainable_val\.arrow and \S*vqav2_val\.arrow: 10 images stand in both, such as image_id 100, 101, 102"
    )
    with pytest.raises(UserError, match=words):
        check(config(tmp_path, "vqa"), tokenizer, "val")
    check(config(tmp_path, "vqa", allow_overlap=True), tokenizer, "val")
    (tmp_path / "vqav2_trainable_val.arrow").unlink()
    training, scored = check(config(tmp_path, "vqa"), tokenizer, "val")
    assert training is not None and (training.rows, scored["val"].rows) == (12, 12)


def test_vilts_pairs_are_read_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    foreign_shards.vilt_nlvr(tmp_path, rows=6, whole=True)
    training, scored = check(config(tmp_path, "nlvr"), tokenizer, "val", "test", "unbalanced_dev")
    assert training is not None and training.rows == 6
    assert {name: samples.rows for name, samples in scored.items()} == {"val": 6, "test": 6, "unbalanced_dev": 5}
    assert scored["test"].split.row(0).value("split") == "test1"
    (tmp_path / "nlvr2_dev.arrow").unlink()
    with pytest.raises(
        UserError, match=r"no Arrow file in \S+ belongs to split val: it holds nlvr2_balanced_dev\.arrow, "
    ):
        open_split(tmp_path, "val", "nlvr")


def test_duplicate_pairs_in_a_split_are_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    foreign_shards.vilt_nlvr(tmp_path, rows=6, whole=True)
    (tmp_path / "val").mkdir()
    for name in ("dev", "balanced_dev"):
        shutil.copy(tmp_path / f"nlvr2_{name}.arrow", tmp_path / "val")
    words = r"nlvr2_balanced_dev\.arrow and \S*nlvr2_dev\.arrow: 8 statements stand twice .* identifier dev-0-0-0, "
    with pytest.raises(UserError, match=words):
        check(config(tmp_path, "nlvr"), tokenizer, "val")


@pytest.mark.parametrize(
    ("make", "task", "words"),
    [
        (make_caption_set, "pretrain", "3 images stand in both, such as image_id image-0, image-1, image-2;"),
        (make_vqa_set, "vqa", "3 images stand in both, such as image_id image-0, image-1, image-2;"),
        (
            make_nlvr_set,
            "nlvr",
            "6 statements stand in both, such as identifier train-0-0-0, train-0-0-1, train-1-0-0;",
        ),
    ],
)
def test_prepared_splits_that_overlap_are_refused(
    make: object, task: str, words: str, tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    assert callable(make)
    for split in ("train", "val", "test"):
        make(tmp_path, rows=10, split=split)
    check(config(tmp_path, task), tokenizer, "val", "test")
    make(tmp_path / "other", rows=3, split="train")
    shutil.rmtree(tmp_path / "test")
    shutil.move(tmp_path / "other" / "train", tmp_path / "test")
    for train in (True, False):  # a model that is scored alone was trained here, as far as anyone knows
        with pytest.raises(UserError) as told:
            check(config(tmp_path, task), tokenizer, "val", "test", train=train)
        assert f"train/shard-00000.arrow and {tmp_path}/test/shard-00000.arrow: {words}" in str(told.value)
    assert not caplog.messages
    check(config(tmp_path, task, allow_overlap=True), tokenizer, "test")
    assert len(caplog.messages) == 1 and words[:-1] in caplog.messages[0]


def test_overlapping_questions_with_different_images(tmp_path: Path) -> None:
    make_vqa_set(tmp_path, rows=3)
    FIRST_ID["shifted"] = 2
    try:
        held_out = open_split(make_vqa_set(tmp_path / "b", rows=3, split="shifted").parent, "shifted")
    finally:
        del FIRST_ID["shifted"]
    found, _ = SplitIds(open_split(tmp_path, "train")).shared(SplitIds(held_out))
    assert ": 1 images stand in both, such as image_id image-2" in found
    SplitIds(held_out).check_once()


def test_allowed_overlap(tmp_path: Path, tokenizer: Tokenizer) -> None:
    make_caption_set(tmp_path / "a", rows=4)
    make_caption_set(tmp_path / "a", rows=4, split="val")
    make_caption_set(tmp_path / "b", rows=4)
    both = [DataSource(str(tmp_path / name)) for name in "ab"]
    check(config(tmp_path / "a", sources=both), tokenizer, "val")
    check(config(tmp_path / "b", sources=both), tokenizer, "train")  # said by the user in so many words
    shutil.copytree(tmp_path / "a" / "train", tmp_path / "b" / "val")
    check(config(tmp_path / "b", sources=both[:1]), tokenizer, "val")  # another data set: its ids are its own
    with pytest.raises(UserError, match=r"b/train/shard-00000\.arrow and \S*b/val/shard-00000\.arrow: 4 images stand"):
        check(config(tmp_path / "b", sources=both), tokenizer, "val")


def test_eves_files_repeat_an_images_id(tmp_path: Path, tokenizer: Tokenizer) -> None:
    foreign_shards.eve_captions(tmp_path, "sbu")  # without ids
    foreign_shards.eve_captions(tmp_path, "coco")
    _, scored = check(config(tmp_path), tokenizer, "train")
    assert len(texts(scored["train"].split, "caption")) == 20


@pytest.mark.parametrize(
    ("make", "task", "original", "copy", "words"),
    [
        (
            foreign_shards.vilt_vqa,
            "vqa",
            "vqav2_train",
            "vqav2_train_copy",
            "10 questions stand in both, such as question_id ",
        ),
        (
            foreign_shards.vilt_nlvr,
            "nlvr",
            "nlvr2_train",
            "nlvr2_more",
            "10 statements stand in both, such as identifier ",
        ),
        (
            foreign_shards.vilt_coco,
            "pretrain",
            "coco_caption_karpathy_restval",
            "coco",
            "5 images stand in both, such as image_id COCO_restval2014_",
        ),
        (foreign_shards.vilt_coco, "pretrain", "coco_caption_karpathy_val", "old_val", "5 images stand in both"),
    ],
)
def test_a_copy_of_a_file_under_another_name_is_refused(
    make: object, task: str, original: str, copy: str, words: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    assert callable(make)
    make(tmp_path)
    check(config(tmp_path, task), tokenizer, "val")
    shutil.copy(tmp_path / f"{original}.arrow", tmp_path / f"{copy}.arrow")
    with pytest.raises(UserError) as told:
        check(config(tmp_path, task), tokenizer, *([] if "train" in original else ["val"]))
    message = str(told.value)
    assert f"{tmp_path / copy}.arrow" in message and f"{tmp_path / original}.arrow" in message
    assert words in message and "; move one of these files away, or say that it is meant: --data.allow" in message
    if "val" not in copy:
        training, _ = check(config(tmp_path, task, allow_overlap=True), tokenizer)
        assert training is not None and training.rows == (15 if task == "pretrain" else 10)
        assert SplitIds(training.split).doubled()[1]  # type: ignore[arg-type]


def test_files_of_two_data_sets_may_share_ids(tmp_path: Path) -> None:
    """The same number of another image, and an image whose captions go on in the next file, are no copies."""
    rows = foreign_shards.vilt_vqa(tmp_path / "vqa")
    shutil.copy(rows[0], tmp_path / "vqav2_train.arrow")
    table = pa.ipc.open_file(rows[0]).read_all()
    images = table.column("image").to_pylist()
    foreign_shards.write_arrow(
        tmp_path / "vgqa_train.arrow", table.set_column(0, "image", pa.array(images[1:] + images[:1]))
    )
    split = open_split(tmp_path, "train")
    assert split.rows == 10 and SplitIds(split).doubled() == ("", False)
    captions = table_of(
        [{"image": image_of(1), "caption": f"caption {i}", "image_id": "1", "split": "train"} for i in range(4)]
    )
    for number in range(2):
        foreign_shards.write_arrow(tmp_path / "eve" / f"coco_{number}.arrow", captions.slice(2 * number, 2))
    assert SplitIds(open_split(tmp_path / "eve", "train")).doubled() == ("", False)
    foreign_shards.write_arrow(tmp_path / "eve" / "coco_2.arrow", captions.slice(3, 1))
    found, mostly = SplitIds(open_split(tmp_path / "eve", "train")).doubled()
    assert "coco_1.arrow and " in found and mostly


def test_a_copy_is_found_past_files_that_share_its_ids(tmp_path: Path) -> None:
    rows = [{"image": image_of(i), "caption": f"caption {i}", "image_id": f"{i}", "split": "train"} for i in range(20)]
    foreign_shards.write_arrow(tmp_path / "coco_0.arrow", table_of(rows))
    for number in range(1, 4):
        others = [row | {"caption": f"{number} of {row['caption']}"} for row in rows]
        foreign_shards.write_arrow(tmp_path / f"coco_{number}.arrow", table_of(others))
    assert SplitIds(open_split(tmp_path, "train")).doubled() == ("", False)
    foreign_shards.write_arrow(tmp_path / "coco_4.arrow", table_of(rows))
    found, mostly = SplitIds(open_split(tmp_path, "train")).doubled()
    assert f"{tmp_path / 'coco_0.arrow'} and {tmp_path / 'coco_4.arrow'}: about 20 images stand in both" in found
    assert mostly


def test_pairs_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for _ in range(50):
        sizes = draw.integers(0, 6, size=int(draw.integers(1, 7)))
        parts = [np.unique(draw.integers(0, 12, size=size)).astype(np.uint64) for size in sizes]
        every = combinations(range(len(parts)), 2)
        assert _pairs_in_common(parts) == [(a, b) for a, b in every if set(parts[a]) & set(parts[b])]
    monkeypatch.setattr(overlap, "_MAX_PAIRS", 2)
    assert len(_pairs_in_common([np.zeros(1, np.uint64)] * 5)) == 2


def test_chance_overlap_of_images_does_not_hide_shared_questions(tmp_path: Path) -> None:
    splits = [SplitIds(make_and_open(tmp_path, split)) for split in ("train", "val")]
    for one, questions in zip(splits, ([1, 2], [2, 3]), strict=True):
        one._numbered = ["image_id"]
        listed = {"image_id": [7, *(100 * questions[0] + n for n in range(9))], "question_id": questions}
        one.__dict__["_listed"] = {column: np.array(keys, "<u8") for column, keys in listed.items()}
    found, is_fault = splits[0].shared(splits[1])
    assert is_fault and "1 questions stand in both" in found
    splits[1].__dict__["_listed"]["question_id"] = np.array([3], "<u8")
    found, is_fault = splits[0].shared(splits[1])
    assert not is_fault and "1 images stand in both" in found


def make_and_open(root: Path, split: str) -> Split:
    make_vqa_set(root, rows=4, split=split)
    found = open_split(root, split)
    assert isinstance(found, Split)
    return found


def test_ids_missing_in_the_shards_are_reported_from_the_lists(tmp_path: Path) -> None:
    splits = []
    for split in ("train", "val"):
        make_caption_set(tmp_path, rows=4, split=split)
        splits.append(SplitIds(open_split(tmp_path, split)))
    for one in splits:
        one.__dict__["_listed"] = {"image_id": np.array([7], "<u8")}
    found, _ = splits[0].shared(splits[1])
    assert f"train/{IDS} and {tmp_path / 'val' / IDS}: 1 images stand in both, and a shard lacks what its" in found


def test_few_duplicates_and_equal_ids(tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """One image in two files is told and trained on; a column of ids that says nothing is no fault, and not read."""
    rows = [{"image": image_of(i), "caption": f"caption {i}", "image_id": f"{i}", "split": "train"} for i in range(20)]
    for name, some in (("coco_0", rows[:11]), ("coco_1", rows[10:])):
        foreign_shards.write_arrow(tmp_path / "few" / f"{name}.arrow", table_of(some))
    check(config(tmp_path / "few", "pretrain"), tokenizer)
    assert "coco_1.arrow: 1 images stand in both, such as image_id 10; so few are let pass" in caplog.text
    others = [row | {"caption": f"another {row['caption']}"} for row in rows]
    for name, some in (
        ("coco_0", rows),
        ("coco_1", [rows[0] | {"caption": "edited"}, *rows[1:]]),
        ("coco_2", [rows[0], *others[1:]]),
    ):
        foreign_shards.write_arrow(tmp_path / name / "coco_9.arrow", table_of(some))
        foreign_shards.write_arrow(tmp_path / name / "coco_0.arrow", table_of(rows))
    assert [SplitIds(open_split(tmp_path / f"coco_{i}", "train")).doubled()[1] for i in range(3)] == [True, True, False]
    for number in range(2):
        table = table_of([row | {"image_id": ""} for row in rows[10 * number : 10 * number + 10]])
        foreign_shards.write_arrow(tmp_path / "equal" / f"coco_{number}.arrow", table)
    ids = SplitIds(open_split(tmp_path / "equal", "train"))
    assert ids.doubled() == ("", False)
    assert len(list(ids._first_rows("image_id", {ids._read["image_id"][0].tobytes()}))) == 16


def test_common() -> None:
    for some, others in (([1, 3, 5], [3]), ([], [3]), ([], []), ([2, 9], [1, 2, 3, 9]), ([10], [1, 2])):
        arrays = [np.array(values, dtype=np.uint64) for values in (some, others)]
        assert _common(*arrays).tolist() == _common(*arrays[::-1]).tolist() == sorted(set(some) & set(others))
