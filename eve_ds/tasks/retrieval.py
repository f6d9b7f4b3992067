"""Image-text retrieval: contrast (ITC) and matching (ITM) with hard negatives, both from tasks/contrast.py."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, BinaryIO, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import retrieval
from evaluation.bootstrap import confidence, retrieval_parts
from eve_ds.data.caption_parts import CaptionTexts, ChosenImages
from eve_ds.data.samples import CaptionSamples
from eve_ds.model.backbone import Backbone
from eve_ds.model.model_config import ModelConfig
from eve_ds.parallel import rank
from eve_ds.tasks.base import Batch, Task, TaskOutput, evaluating, valid_rows
from eve_ds.tasks.contrast import CONTRAST_HEADS, MATCHING_HEAD, Contrast
from eve_ds.tasks.feed import Feed, in_order
from eve_ds.tasks.matching_accuracy import MATCHING, accuracy, matching_parts
from eve_ds.tasks.reranking import ROWS, Encoded, rerank
from eve_ds.tasks.spec import Arrays, FinetuneObjective, FinetuneSpec, Pass, Thumbnails, evenly_spaced
from eve_ds.weights.model_folder import ModelFolder
from preprocessing.local_files import Content

SHOWN = 5  # best results of an example


class Retrieval(Contrast):
    """Two unit vectors to rank by, and a matching head to re-rank by.

    Args:
        backbone: the shared Transformer.
        embed_dim: E.
        temperature: first value of the learned temperature.
        seed: of the drawing of negatives.

    Attributes:
        reranking: how scoring re-ranks; None where it does not.
    """

    heads: ClassVar[tuple[str, ...]] = (*CONTRAST_HEADS, MATCHING_HEAD)
    reranking: FinetuneObjective | None = None

    def __init__(self, backbone: Backbone, embed_dim: int = 256, temperature: float = 0.07, seed: int = 0) -> None:
        super().__init__(backbone)
        self.seed = seed
        self.add_pair_heads(embed_dim, temperature)

    def score_only(self) -> None:
        """Without re-ranking the matching head goes: weights of a contrastive model need not have it."""
        if self.reranking is None:
            del self.itm_head
            self.heads = CONTRAST_HEADS  # type: ignore[misc]  # of this object alone

    def forward(self, batch: Batch) -> TaskOutput:
        """Contrast + matching. ``image_index`` [B] tells which rows show the same image."""
        batch = valid_rows(batch)
        contrast = self.contrast(batch)
        matching = self.match_negatives(batch, contrast)
        return self.sum_losses(contrast.metrics() | matching.metrics(), [*contrast.passes, *matching.passes])


class RetrievalSpec(FinetuneSpec):
    name = "retrieval"
    title = "Retrieval"
    measures = tuple(
        (f"{query}_r{k}", f"{what} R@{k}") for query, what in (("txt", "text"), ("img", "image")) for k in (1, 5, 10)
    )
    objective = FinetuneObjective
    zeroshot = True
    head_settings = ("embed_dim",)

    def settings_of_head(self, state: Mapping[str, Tensor], objective: FinetuneObjective) -> dict[str, Any]:
        width = state["itc_vision_proj_head.weight"].shape[0]
        return {"embed_dim": width} if width != objective.embed_dim else {}

    def build(
        self, backbone: Backbone, objective: FinetuneObjective, *, mask_id: int, num_classes: int, seed: int
    ) -> Retrieval:
        task = Retrieval(backbone, objective.embed_dim, objective.temperature, seed)
        task.even_negatives, task.loss_weights = objective.even_negatives, {"itm_loss": objective.matching_weight}
        task.reranking = objective if objective.rerank else None
        return task

    def build_for_weights(self, backbone: Backbone, state: Mapping[str, Tensor], files: ModelFolder) -> Retrieval:
        return Retrieval(backbone, embed_dim=state["itc_vision_proj_head.weight"].shape[0])

    def predict(self, task: Task, dataset: CaptionSamples, feed: Feed, limit: int | None = None) -> Arrays | None:
        """Scores of all images and texts; every image and every text is encoded once, on one rank.

        ``limit`` counts texts, as samples do: the last image may lack some of its own.

        Returns:
            image_to_text [I, T] float32 cosines, text_image_index [T], image_row [I] (in the split), what
            ``reranking.rerank`` gives, if the objective says so, and what ``ranked`` makes of them.
        """
        assert isinstance(task, Retrieval)
        rows, index = np.unique(dataset.text_image_index()[:limit], return_inverse=True)
        with evaluating(task):
            encoded = encode_split(task, dataset, feed, rows, index)
            found: Arrays = {}
            if (objective := task.reranking) is not None:
                found = rerank(task, dataset, feed, encoded, objective.k_test, objective.rerank_score)
        if rank() != 0:
            return None
        return ranked({"image_to_text": cosines(encoded), "text_image_index": index, "image_row": rows, **found})

    def metrics(self, arrays: Arrays, dataset: CaptionSamples) -> dict[str, Any]:
        """The recalls; after re-ranking those as ``reranked``, and ``matching`` (matching_accuracy.py)."""
        found: dict[str, Any] = dict(retrieval.summary(*_ranks(arrays)))
        if "text_scores" in arrays:
            found["reranked"] = retrieval.summary(*_ranks(arrays, "reranked_"))
            found[MATCHING] = accuracy(arrays)
        return found

    def predictions(self, arrays: Arrays, dataset: CaptionSamples) -> tuple[str, Content]:
        scores = arrays["image_to_text"]
        return "npz", npz_content(lambda: scores, lambda: scores.T, arrays["text_image_index"])

    def more_predictions(self, arrays: Arrays, dataset: CaptionSamples) -> dict[str, Content]:
        if "text_scores" not in arrays:
            return {}
        views = partial(_reranked, arrays, "text"), partial(_reranked, arrays, "image")
        return {"reranked.npz": npz_content(*views, arrays["text_image_index"])}

    def intervals(self, arrays: Arrays, dataset: CaptionSamples) -> dict[str, Any]:
        def found(kind: str = "") -> dict[str, list[float]]:
            parts = retrieval_parts(*_ranks(arrays, kind), arrays["text_image_index"], retrieval.CUTOFFS)
            return confidence(parts)

        result: dict[str, Any] = dict(found())
        if "text_scores" in arrays:
            result |= {"reranked": found("reranked_"), MATCHING: confidence(matching_parts(arrays))}
        return result

    def details(self, arrays: Arrays, dataset: CaptionSamples) -> dict[str, Any]:
        """Texts that ask for an image, then images that ask for a text; ``sample`` and ``prediction`` are numbers in
        the split of what asks and of what is found first, ``rank`` is that of the right one, from 1. Found first is a
        wrong candidate, where it ties with the right one: so the recalls count."""
        by_image, index, row = arrays["image_to_text"], arrays["text_image_index"], arrays["image_row"]
        by_text = by_image.T
        by_text_rank, by_image_rank = arrays["image_rank"], arrays["text_rank"]
        rank = np.concatenate([by_text_rank, by_image_rank])
        texts, images = by_image.shape[1], len(by_image)
        own = np.arange(images)
        found = row[_first(by_text, by_text_rank, index, own)], _first(by_image, by_image_rank, own, index)
        return {
            "sample": np.concatenate([np.arange(texts), row]),
            "query": ["text"] * texts + ["image"] * images,
            "prediction": np.concatenate(found),
            "confidence": np.concatenate([by_text.max(axis=1), by_image.max(axis=1)]),
            "rank": rank + 1,
            "score": (rank == 0).astype(np.float32),
        }

    def counts(self, dataset: CaptionSamples) -> dict[str, int]:
        return {"images": dataset.rows, **super().counts(dataset)}

    def examples(self, arrays: Arrays, dataset: CaptionSamples, count: int, thumbnails: Thumbnails) -> dict[str, Any]:
        """The best five images for ``count`` captions and the best five captions for as many images."""
        scores, owner = arrays["image_to_text"], arrays["text_image_index"]

        def shown(image: int) -> str:
            return thumbnails.add(f"image_{image}", dataset.row_image_bytes(int(arrays["image_row"][image])))

        to_image, to_text = [], []
        for text in evenly_spaced(len(owner), count):
            row = scores[:, text]
            results = [
                {"image": shown(int(i)), "score": float(row[i]), "correct": bool(owner[text] == i)} for i in _best(row)
            ]
            to_image.append({"query": dataset.text(text), "results": results})
        for image in evenly_spaced(len(scores), count):
            row = scores[image]
            results = [
                {"text": dataset.text(int(t)), "score": float(row[t]), "correct": bool(owner[t] == image)}
                for t in _best(row)
            ]
            to_text.append({"image": shown(image), "results": results})
        return {"text_to_image": to_image, "image_to_text": to_text}

    def passes(self, model: ModelConfig, objective: FinetuneObjective, rows: int, text_length: int) -> list[Pass]:
        patches = model.num_patches
        return [Pass(rows, patches, 0), Pass(rows, 0, text_length), Pass(3 * rows, patches, text_length)]

    def gathered_values(self, model: ModelConfig, rows: int) -> dict[str, int]:
        return {"images for negatives": rows * 3 * model.image_size**2}


def encode_split(task: Contrast, dataset: CaptionSamples, feed: Feed, rows: np.ndarray, index: np.ndarray) -> Encoded:
    """Vectors of a split, in evaluation mode. Called by all ranks, which share the work.

    Args:
        task: gives the vectors.
        dataset: over the split.
        feed: of its batches.
        rows: [I], of the images.
        index: [T], of the first texts of the split: the image of each, a place among ``rows``.
    """
    vectors, places = [], []
    for batch in map(valid_rows, feed.shared(ChosenImages(dataset, rows.tolist()))):
        vectors.append(task.encode_image(batch["images"]))
        places.append(batch["sample_id"])
    image = in_order(torch.cat(vectors), torch.cat(places))
    vectors, places, words = [], [], []
    for batch in map(valid_rows, feed.shared(CaptionTexts(dataset), len(index))):
        vectors.append(task.encode_text(batch["text_ids"], batch["text_mask"]))
        places.append(batch["sample_id"])
        missing = dataset.max_text_length - batch["text_ids"].shape[1]
        words.append(F.pad(torch.stack([batch["text_ids"], batch["text_mask"].long()], dim=1), (0, missing)))
    place = torch.cat(places)
    text_ids, text_mask = in_order(torch.cat(words), place).unbind(dim=1)
    return Encoded(rows, image, in_order(torch.cat(vectors), place), text_ids, text_mask.bool(), index)


def cosines(encoded: Encoded) -> np.ndarray:
    """[I, T] float32."""
    image, text = encoded.image, encoded.text.t()
    scores = np.empty((image.shape[0], text.shape[1]), np.float32)
    for start in range(0, len(scores), ROWS):
        scores[start : start + ROWS] = (image[start : start + ROWS] @ text).cpu().numpy()
    return scores


def npz_content(
    image_to_text: Callable[[], np.ndarray], text_to_image: Callable[[], np.ndarray], text_image_index: np.ndarray
) -> Content:
    """As ``numpy.savez`` of the three, the first two of which are made one after the other."""

    def write(file: BinaryIO) -> None:
        made = {
            "image_to_text": image_to_text,
            "text_to_image": text_to_image,
            "text_image_index": lambda: text_image_index,
        }
        with zipfile.ZipFile(file, "w") as archive:
            for name, make in made.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, make(), allow_pickle=False)

    return write


def ranked(arrays: Arrays) -> Arrays:
    """The arrays and text_rank [I], image_rank [T], from 0; with re-ranking also reranked_text_rank and
    reranked_image_rank. Beside the given arrays one matrix is in memory at a time."""
    scores, index = arrays["image_to_text"], arrays["text_image_index"]
    found = {"text_rank": retrieval.text_ranks(scores, index), "image_rank": retrieval.image_ranks(scores.T, index)}
    if "text_scores" in arrays:
        found["reranked_text_rank"] = retrieval.text_ranks(_reranked(arrays, "text"), index)
        found["reranked_image_rank"] = retrieval.image_ranks(_reranked(arrays, "image"), index)
    return {**arrays, **found}


def _ranks(arrays: Arrays, kind: str = "") -> tuple[np.ndarray, np.ndarray]:
    return arrays[f"{kind}text_rank"], arrays[f"{kind}image_rank"]


def _first(scores: np.ndarray, rank: np.ndarray, query: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """[N] the candidate that is ranked first for each query, by scores [N, M] and the right one's rank [N], from 0.

    ``query`` [N] and ``candidate`` [M]: of which image each is.
    """
    first: np.ndarray = scores.argmax(axis=1)
    for number in np.flatnonzero((rank > 0) & (candidate[first] == query)):  # a wrong one has the same score
        first[number] = np.where(candidate == query[number], -np.inf, scores[number]).argmax()
    return first


def _reranked(arrays: Arrays, candidates: str) -> np.ndarray:
    """[I, T] scores of the texts, or [T, I] of the images; -inf where they are no candidates."""
    images, texts = arrays["image_to_text"].shape
    scores = np.full((images, texts) if candidates == "text" else (texts, images), -np.inf, np.float32)
    np.put_along_axis(scores, arrays[f"{candidates}_candidates"], arrays[f"{candidates}_scores"], axis=1)
    return scores


def _best(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:SHOWN]


SPEC = RetrievalSpec()
