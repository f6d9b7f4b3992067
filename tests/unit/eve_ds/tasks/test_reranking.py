"""Retrieval over a split: images and texts encoded once, re-ranking as the slow way finds it, files that score so."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation import bootstrap, retrieval
from eve_ds.data.samples import Samples
from eve_ds.tasks import matching_accuracy
from eve_ds.tasks.matching_accuracy import accuracy, drawn_pairs, matching_parts
from eve_ds.tasks.reranking import Encoded, PairBatches, divided
from eve_ds.tasks.retrieval import SPEC, ranked
from eve_ds.tasks.spec import Arrays, FinetuneObjective, Thumbnails
from preprocessing.errors import UserError
from preprocessing.local_files import write_atomic
from tests.support.retrieval_passes import (
    CAPTIONS,
    arrays_of,
    caption_samples,
    retrieval_task,
    slow_scores,
    uneven_split,
)
from tests.support.shards import pixels_of

TEXTS, IMAGES = sum(CAPTIONS), sum(count > 0 for count in CAPTIONS)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uneven_split(tmp_path_factory.mktemp("data"))


def written(arrays: Arrays, folder: Path) -> dict[str, Any]:
    """The arrays of the prediction files: plain ones, and re-ranked ones by names that begin so."""
    files = {
        "": SPEC.predictions(arrays, None)[1],
        "reranked_": SPEC.more_predictions(arrays, None).get("reranked.npz"),
    }
    found: dict[str, Any] = {}
    for group, content in files.items():
        if content is not None:
            write_atomic(folder / "s.npz", content)
            with np.load(folder / "s.npz") as archive:
                found |= {f"{group}{name}": archive[name] for name in archive}
    return found


def expected_accuracy(arrays: Arrays, logits: np.ndarray) -> dict[str, float]:
    image, text = np.divmod(arrays["matching_pairs"], logits.shape[1])
    belong = arrays["text_image_index"][text] == image
    right = (logits[image, text].argmax(axis=1) == 1) == belong
    share = 100 * float(belong.mean())
    return {"accuracy": 100 * float(right.mean()), "prior": max(share, 100 - share)}


def test_accuracy_counts_pairs_that_are_judged_as_they_are() -> None:
    """Two images, three texts, pairs numbered image x 3 + text: text 2 is of image 1, the others of image 0.

    First each text with its image, then with another one, then its image with another text.
    """
    arrays = {
        "image_to_text": np.zeros((2, 3)),
        "text_image_index": np.array([0, 0, 1]),
        "matching_pairs": np.array([0, 1, 5, 3, 4, 2, 2, 2, 3]),
        "matching_judged": np.array([1, 0, 1, 1, 0, 0, 0, 0, 1], dtype=bool),
    }
    told = accuracy(arrays)
    assert told == pytest.approx({"accuracy": 100 * 6 / 9, "prior": 100 * 6 / 9})  # pair 1, and pair 3 twice
    ((values, clusters),) = matching_parts(arrays).columns.values()
    assert [values[clusters == image].tolist() for image in (0, 1)] == [[100, 0, 0, 100, 100, 100], [100, 100, 0]]


def test_every_wrong_pair_can_be_drawn_and_the_draw_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text with its image, with another image, and its image with another text."""
    index = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [1, 3, 5, 2, 9]))
    numbers, wrong = np.arange(20), {(image, text) for image in range(5) for text in range(20) if index[text] != image}
    seen_images, seen_texts = set(), set()
    for seed in range(400):
        monkeypatch.setattr(matching_accuracy, "SEED", seed)
        pairs = drawn_pairs(index, 5)
        assert np.array_equal(pairs, drawn_pairs(index, 5))
        (own, images, same), (text, same_text, texts) = np.divmod(pairs.reshape(3, 20), 20)
        assert np.array_equal(own, index) and np.array_equal(same, index)
        assert np.array_equal(text, numbers) and np.array_equal(same_text, numbers)
        seen_images |= set(zip(images.tolist(), numbers.tolist(), strict=True))
        seen_texts |= set(zip(index.tolist(), texts.tolist(), strict=True))
    assert seen_images == seen_texts == wrong
    assert drawn_pairs(np.zeros(3, dtype=np.int64), 1).tolist() == [0, 1, 2]  # no other image


@pytest.mark.parametrize(
    ("k", "limit", "rule"), [(3, None, "matching"), (100, None, "sum"), (2, 9, "sum"), (4, None, "odds")]
)
def test_a_pass_gives_what_the_slow_way_gives(
    k: int, limit: int | None, rule: str, split: Path, tmp_path: Path
) -> None:
    task = retrieval_task(rerank=True, k_test=k, rerank_score=rule)
    arrays = arrays_of(task, split, batch_size=3, limit=limit, workers=2 if limit else 0)
    assert arrays is not None
    expected = slow_scores(task, split, k, limit, rule)
    found = written(arrays, tmp_path)
    owner = np.repeat(np.arange(len(CAPTIONS)), CAPTIONS)[:limit]
    assert arrays["image_row"].tolist() == sorted(set(owner.tolist()))
    index = np.searchsorted(arrays["image_row"], owner)
    for name in ("text_image_index", "reranked_text_image_index"):
        assert found[name].tolist() == index.tolist()
    for name, other in {
        "image_to_text": expected["cosine"],
        "text_to_image": expected["cosine"].T,
        "reranked_image_to_text": expected["text"],
        "reranked_text_to_image": expected["image"],
    }.items():
        np.testing.assert_allclose(found[name], other, atol=1e-4, err_msg=name)
    scores = SPEC.metrics(arrays, None)
    assert scores.pop("matching") == pytest.approx(expected_accuracy(arrays, expected["logits"]))
    assert scores.pop("reranked") == retrieval.recalls(expected["text"], expected["image"], index)
    assert scores == retrieval.recalls(expected["cosine"], expected["cosine"].T, index)


def test_without_reranking_there_is_none(split: Path) -> None:
    arrays = arrays_of(retrieval_task(), split)
    assert arrays is not None
    assert (
        not {"reranked", "matching"} & SPEC.metrics(arrays, None).keys() and SPEC.more_predictions(arrays, None) == {}
    )


def test_images_are_decoded_once_and_texts_without_any(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: Counter[int] = Counter()
    pixels = Samples._pixels
    monkeypatch.setattr(
        Samples, "_pixels", lambda self, pending: decoded.update([pending.sample_id]) or pixels(self, pending)
    )
    encoded: Counter[str] = Counter()
    task = retrieval_task(rerank=True, k_test=4)

    def counted(name: str, encode: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *inputs: encoded.update({name: len(inputs[0])}) or encode(*inputs)

    for name in ("encode_image", "encode_text", "match"):
        monkeypatch.setattr(task, name, counted(name, getattr(task, name)))
    arrays = arrays_of(task, split, batch_size=2)
    assert arrays is not None
    assert set(decoded.values()) == {2} and len(decoded) == IMAGES  # once to be encoded, once for all of its pairs
    pairs = {(image, int(text)) for image, row in enumerate(arrays["text_candidates"]) for text in row}
    pairs |= {(int(image), text) for text, row in enumerate(arrays["image_candidates"]) for image in row}
    pairs |= {divmod(int(pair), TEXTS) for pair in arrays["matching_pairs"]}
    assert encoded == {"encode_image": IMAGES, "encode_text": TEXTS, "match": len(pairs)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_take_equally_many_steps_and_every_pair_once(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    pairs = np.flatnonzero(draw.random(5 * 30) < np.repeat([0.9, 0.1, 0.0, 0.5, 0.2], 30))
    text_mask = torch.arange(6) < torch.randint(1, 7, (30, 1), generator=torch.Generator().manual_seed(0))
    encoded = Encoded(
        np.arange(5), torch.zeros(5, 2), torch.zeros(30, 2), torch.arange(180).view(30, 6), text_mask, np.zeros(30)
    )
    monkeypatch.setattr("eve_ds.tasks.reranking.world_size", lambda: ranks)
    seen: list[int] = []
    steps = set()
    for rank in range(ranks):
        monkeypatch.setattr("eve_ds.tasks.reranking.rank", lambda rank=rank: rank)
        batches = PairBatches(pairs, encoded, size=4)
        loaded = (
            {"images": torch.full((1, 3, 2, 2), 1.0) * part[:, None, None, None]}
            for part in torch.from_numpy(batches.images).split(4)
        )  # an image's pixels are its number
        found = list(batches.of(loaded, torch.device("cpu"), 2))
        steps.add(len(found))
        for batch in found:
            assert len(batch["pair"]) <= 4
            number = torch.from_numpy(pairs)[batch["pair"]]
            assert batch["images"][:, 0, 0, 0].tolist() == (number // 30).tolist()
            longest = batch["text_ids"].shape[1]
            assert torch.equal(batch["text_ids"], encoded.text_ids[number % 30, :longest])
            assert not text_mask[number % 30, longest:].any()
            seen += batch["pair"].tolist()
    assert sorted(seen) == list(range(len(pairs))) and len(steps) == 1


def test_images_with_most_pairs_are_dealt_out_first() -> None:
    counts = np.array([1, 9, 0, 4, 4, 2])
    shares = divided(counts, 2)
    assert sorted(np.concatenate(shares).tolist()) == [0, 1, 3, 4, 5]
    assert [int(counts[images].sum()) for images in shares] == [10, 10]


def test_candidates_of_bf16_weights_do_not_tie(split: Path) -> None:
    arrays = arrays_of(retrieval_task(rerank=True, k_test=100).bfloat16(), split)
    assert arrays is not None
    scores = arrays["text_scores"].ravel()
    assert scores.dtype == np.float32
    rounded = torch.from_numpy(scores).bfloat16().float().numpy()
    assert len(set(rounded.tolist())) < len(set(scores.tolist())) == scores.size


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"^objective\.k_test=0 must be a positive number"):
        FinetuneObjective(k_test=0).check()
    with pytest.raises(UserError, match=r"^objective\.even_negatives=1\.5 is a share: from 0 to 1$"):
        FinetuneObjective(even_negatives=1.5).check()


def test_examples_show_the_image_of_their_row(split: Path, tmp_path: Path) -> None:
    arrays = arrays_of(retrieval_task(), split)
    assert arrays is not None
    shown = SPEC.examples(arrays, caption_samples(split), 20, Thumbnails(tmp_path))["image_to_text"]
    rows = [row for row, count in enumerate(CAPTIONS) if count]
    for row, query in zip(rows, shown, strict=True):
        with Image.open(tmp_path / "samples" / query["image"]) as image:
            np.testing.assert_array_equal(np.asarray(image), pixels_of(row))


def test_what_ties_with_the_right_one_is_found_first() -> None:
    """As the recalls count, whatever the order: details do not show the right one as wrong."""
    scores = np.array([[0.5, 0.5, 0.1, 0.5], [0.1, 0.5, 0.2, 0.9]], np.float32)
    index = np.array([0, 0, 1, 1])
    arrays = ranked({"image_to_text": scores, "text_image_index": index, "image_row": np.array([3, 7])})
    found = SPEC.details(arrays, None)
    assert found["rank"].tolist() == [1, 2, 1, 1, 2, 1]
    assert found["prediction"].tolist() == [3, 7, 7, 7, 3, 3]
    assert found["score"].tolist() == [1, 0, 1, 1, 0, 1]


def test_one_matrix_at_a_time_is_beside_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "_CELLS", 10_000)
    draw = np.random.default_rng(0)
    index = np.arange(2000) // 5
    tracemalloc.start()
    scores = draw.random((400, 2000), np.float32)
    arrays = {"image_to_text": scores, "text_image_index": index, "image_row": np.arange(400)}
    for name, shape, most in (("text", (400, 8), 2000), ("image", (2000, 8), 400)):
        arrays[f"{name}_candidates"] = np.stack([draw.choice(most, 8, replace=False) for _ in range(shape[0])])
        arrays[f"{name}_scores"] = draw.random(shape, np.float32)
    arrays["matching_pairs"] = drawn_pairs(index, 400)
    arrays["matching_judged"] = draw.random(6000) < 0.5
    tracemalloc.reset_peak()
    arrays = ranked(arrays)
    SPEC.metrics(arrays, None)
    SPEC.details(arrays, None)
    SPEC.intervals(arrays, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * scores.nbytes
