"""Sources of images alone and of texts alone: what a sample holds, what is not read, and that the order stays exact."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eve_ds.data.batch_reader import collate
from eve_ds.data.data_config import DataConfig, DataSource
from eve_ds.data.loader import build_loader
from eve_ds.data.mapping import MappedFile
from eve_ds.data.modalities import SPLITS, ImageSplit, MixedSamples, TextSplit, modalities_of
from eve_ds.data.sources import JoinedSplit, open_split
from eve_ds.data.transforms import build_transform
from preprocessing.errors import UserError
from tests.support.shards import COLORS, EVAL, FLIP, image_of, make_caption_set, pixels_of, tiny_tokenizer, write_split

TOKENIZER = tiny_tokenizer()
TEXTS = ["a red square on the left", "a blue square", "two squares", "image 7 shows a square", "green"]


def write_images(root: Path, captions: list[str], rows: int = 3, modality: str | None = None) -> Path:
    """Images 20, 21 …, each with these captions. Returns the data set's folder."""
    table = [
        {"image": image_of(20 + i), "caption": captions, "image_id": f"{i}", "split": "train"} for i in range(rows)
    ]
    return declared(write_split(root / "train", "caption", table, shard_rows=2), modality)


def write_texts(root: Path, image: bytes, modality: str | None = None) -> Path:
    """TEXTS, two and three a row, each row with this image. Returns the data set's folder."""
    table = [
        {"image": image, "caption": part, "image_id": f"{i}", "split": "train"}
        for i, part in enumerate([TEXTS[:2], TEXTS[2:]])
    ]
    return declared(write_split(root / "train", "caption", table), modality)


def declared(folder: Path, modality: str | None) -> Path:
    """The manifest says that the split lacks a modality. Returns the data set's folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    if modality is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest | {"modality": modality}))
    return folder.parent


def mixed_samples(root: Path, transform: Any = EVAL, captions: tuple[str, ...] = ("x",)) -> MixedSamples:
    """Samples 0 to 7 are pairs, 8 to 10 images, 11 to 15 texts. The texts' images cannot be decoded."""
    pairs = make_caption_set(root / "pairs", rows=4).parent
    images, texts = write_images(root / "images", list(captions)), write_texts(root / "texts", b"no image")
    roots = {"pairs": pairs, "image": images, "text": texts}
    splits = [open_split(where, "train", made_as=SPLITS[modality]) for modality, where in roots.items()]
    return MixedSamples(JoinedSplit(splits), TOKENIZER, transform, 16)


def test_samples_by_the_modality_of_their_source(tmp_path: Path) -> None:
    data = mixed_samples(tmp_path, captions=("x", "y", "z"))
    assert (len(data), data.rows) == (8 + 3 + 5, 4 + 3 + 2)  # an image is one sample, whatever its captions
    assert modalities_of(data.split) == ["pairs", "image", "text"]
    for index in range(16):
        sample, kind = data[index, 2], "pit"[(index >= 8) + (index >= 11)]
        assert sample["sample_id"] == 2 * 16 + index
        assert (sample["has_image"], sample["has_text"]) == (kind != "t", kind != "i")
        if kind == "p":
            text = f"image {index // 2} caption {index % 2} shows a {COLORS[index // 2]} square"
            assert sample["image_index"] == index // 2 and np.array_equal(sample["images"], pixels_of(index // 2))
            assert sample["text_ids"].tolist() == TOKENIZER.encode(text, 16)
        elif kind == "i":
            assert sample["image_index"] == index - 4 and sample["text_ids"].tolist() == []
            assert np.array_equal(sample["images"], pixels_of(20 + index - 8))
        else:
            assert sample["image_index"] == 7 + (index >= 13) and not sample["images"].any()
            assert sample["text_ids"].tolist() == TOKENIZER.encode(TEXTS[index - 11], 16)


def test_captions_of_images_alone_change_nothing(tmp_path: Path) -> None:
    """Not even whether an image is mirrored, which left and right in its caption forbid."""
    one, other = (
        mixed_samples(tmp_path / name, FLIP, captions) for name, captions in (("a", ("left",)), ("b", ("x",)))
    )
    keys = [(index, epoch) for index in (8, 9, 10) for epoch in range(6)]
    samples = [(one[key], other[key]) for key in keys]
    assert all(np.array_equal(a[name], b[name]) for a, b in samples for name in a)
    assert len({a["images"].tobytes() for a, _ in samples}) > 3  # some are mirrored


@pytest.mark.parametrize(
    ("kinds", "columns"),
    [
        (["pairs", "image"], {"has_text"}),
        (["pairs", "text"], {"has_image"}),
        (["image"], {"has_text"}),
        (["image", "text"], {"has_image", "has_text"}),
    ],
)
def test_columns_follow_from_the_sources(tmp_path: Path, kinds: list[str], columns: set[str]) -> None:
    roots = [make_caption_set(tmp_path / kind, rows=3).parent for kind in kinds]
    splits = [open_split(root, "train", made_as=SPLITS[kind]) for root, kind in zip(roots, kinds, strict=True)]
    data = MixedSamples(JoinedSplit(splits) if len(splits) > 1 else splits[0], TOKENIZER, EVAL, 16)
    plain = {"images", "text_ids", "sample_id", "image_index"}
    assert all(data[index, 0].keys() == plain | columns for index in range(len(data)))


def test_a_batch_of_images_has_a_column_of_padding(tmp_path: Path) -> None:
    data = mixed_samples(tmp_path)
    batch = collate([data[8, 0], data[9, 0]], 0, 16, pad_to_multiple=1)
    assert batch["text_ids"].tolist() == [[0], [0]] and not batch["text_mask"].any()
    assert batch["has_image"].tolist() == [1, 1] and batch["has_text"].tolist() == [0, 0]


@pytest.mark.parametrize(("world", "workers", "window"), [(1, 1, 0), (2, 0, 0), (2, 1, 16)])
def test_any_world_and_a_resume_see_the_same_samples(tmp_path: Path, world: int, workers: int, window: int) -> None:
    data = mixed_samples(tmp_path, build_transform(32, train=True, augmentation="color"))
    options: dict[str, Any] = {"seed": 3, "weights": (2.0, 1.0, 1.0), "window": window}
    whole = list(itertools.islice(build_loader(data, 8, **options), 9))
    kinds = torch.cat([2 * batch["has_image"] + batch["has_text"] for batch in whole])
    assert torch.bincount(kinds, minlength=4).tolist()[0] == 0 and len(kinds.unique()) == 3
    for start in (0, 4):
        ranks = [
            build_loader(
                data, 8 // world, world_size=world, rank=rank, start_sample=8 * start, num_workers=workers, **options
            )
            for rank in range(world)
        ]
        for expected, *parts in zip(whole[start:], *(itertools.islice(rank, 9 - start) for rank in ranks), strict=True):
            for name in ("images", "sample_id", "has_image", "has_text"):
                assert torch.equal(torch.cat([part[name] for part in parts]), expected[name])
        assert sum(rank.drawn for rank in ranks).sum() == 8 * (9 - start)


def test_a_quarter_of_the_samples_by_weight(tmp_path: Path) -> None:
    loader = build_loader(mixed_samples(tmp_path), 100, weights=(2.0, 1.0, 1.0))
    next(iter(loader))
    list(itertools.islice(loader, 9))
    assert loader.drawn.tolist() == [500, 250, 250]


def test_shards_that_lack_a_modality(tmp_path: Path) -> None:
    images, texts = (
        write_images(tmp_path / "images", [], modality="image"),
        write_texts(tmp_path / "texts", b"", "text"),
    )
    assert open_split(images, "train", made_as=ImageSplit).samples == 3
    assert open_split(texts, "train", made_as=TextSplit).samples == 5
    for root, kind, message in (
        (images, "pairs", "holds images without captions, pairs are needed; .*data.sources with modality: image"),
        (images, "text", "holds images without captions, texts without images are needed"),
        (texts, "pairs", "holds texts without images, pairs are needed; .*data.sources with modality: text"),
        (texts, "image", "holds texts without images, images without captions are needed"),
    ):
        with pytest.raises(UserError, match=rf"{root}/train: {message}"):
            open_split(root, "train", made_as=SPLITS[kind])
    declared(images / "train", "sound")
    with pytest.raises(UserError, match=r"manifest\.json: modality 'sound' is none of pairs, image, text"):
        open_split(images, "train", made_as=ImageSplit)


def test_a_corrupt_image_alone_is_named_and_replaced(tmp_path: Path) -> None:
    table = [
        {"image": image_of(i) if i else b"broken", "caption": [], "image_id": f"{i}", "split": "train"}
        for i in range(3)
    ]
    split = open_split(write_split(tmp_path / "train", "caption", table).parent, "train", made_as=ImageSplit)
    data = MixedSamples(split, TOKENIZER, EVAL, 16)
    with pytest.raises(UserError, match=r"shard-00000\.arrow: row 0: "):
        data[0, 0]
    loader = build_loader(data, 3, max_corrupt=0.5)
    batch = next(iter(loader))
    assert sorted(batch["image_index"].tolist()) == [1, 1, 2] and loader.replaced == 1


def test_no_image_of_a_text_is_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the kernel the length 0 of an empty image means all the rest of the file."""
    data, asked = mixed_samples(tmp_path), set()
    monkeypatch.setattr(MappedFile, "will_need", lambda file, start, end: asked.add(file.path.parent.parent.name))
    data.split.read_ahead(range(len(data)))
    assert asked == {"pairs", "images"}


def test_the_first_pairs_are_home() -> None:
    sources = [DataSource("i", modality="image"), DataSource("p"), DataSource("q")]
    assert DataConfig(sources=sources).home == "p" and DataConfig(path="x", sources=sources).home == "x"
    assert DataConfig(sources=sources[:1]).home == "i" and DataConfig().home == ""
