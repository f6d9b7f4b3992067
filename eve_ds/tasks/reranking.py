"""Re-ranking: the matching head scores the most similar candidates of every query, each image decoded once.

As in EVE's published evaluation (its Retrieval.py), the candidates of an image are the k texts of the highest cosine,
those of a text the k images; what is no candidate ranks below. There the score of a candidate is the matching head's
logit of index 1 ("they match") alone, neither its softmax nor a sum: ``rerank_score: matching``. ``sum`` adds the
cosine (not divided by the temperature), as BLIP's evaluation does. ``odds`` adds the cosine / temperature, the logit of
the contrast, to the difference of both logits: each of the two is a logarithm of odds, so neither drowns the other.

Legend: I images, T texts, k candidates, P pairs of the union of both directions' candidates.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eve_ds.data.caption_parts import ChosenImages
from eve_ds.data.samples import CaptionSamples
from eve_ds.parallel import gather_with_gradient, rank, world_size
from eve_ds.tasks.base import Batch, valid_rows
from eve_ds.tasks.contrast import Contrast
from eve_ds.tasks.feed import Arrays, Feed, in_order
from eve_ds.tasks.matching_accuracy import drawn_pairs

ROWS = 256  # queries compared with all candidates at a time


@dataclass
class Encoded:
    """A split's images and texts, the same on every rank.

    Attributes:
        rows: [I] int64, of the images in the split.
        image, text: [I, E] and [T, E] float32 unit vectors.
        text_ids, text_mask: [T, L], padded to the model's longest text.
        text_image: [T] int64, the image of each text, a place among ``rows``.
    """

    rows: np.ndarray
    image: Tensor
    text: Tensor
    text_ids: Tensor
    text_mask: Tensor
    text_image: np.ndarray


def most_similar(queries: Tensor, others: Tensor, count: int) -> np.ndarray:
    """[N, k] int64: the columns of the k = min(count, M) highest cosines of each query. A collective.

    Args:
        queries: [N, E]; the ranks share them.
        others: [M, E].
        count: candidates.
    """
    starts = torch.arange(0, len(queries), ROWS).tensor_split(world_size())[rank()].tolist()
    count = min(count, len(others))
    found = [torch.empty(0, count, dtype=torch.int64, device=queries.device)]
    found += [(queries[at : at + ROWS] @ others.t()).topk(count).indices for at in starts]
    return gather_with_gradient(torch.cat(found)).cpu().numpy()


def divided(counts: np.ndarray, ranks: int) -> list[np.ndarray]:
    """The images of each rank, ascending: those with most pairs first, each to the rank that has fewest pairs so far.

    Args:
        counts: [I] pairs of each image; an image without any goes to no rank.
        ranks: how many.
    """
    images: list[list[int]] = [[] for _ in range(ranks)]
    load = [(0, number) for number in range(ranks)]
    for image in np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]:
        pairs, number = heapq.heappop(load)
        images[number].append(int(image))
        heapq.heappush(load, (pairs + int(counts[image]), number))
    return [np.sort(np.array(own, dtype=np.int64)) for own in images]


class PairBatches:
    """Batches of pairs for the matching head, every image read by one rank, once.

    Args:
        pairs: [P] int64, image x T + text, ascending.
        encoded: the split.
        size: pairs of a batch, at most, and images that are kept at a time.
    """

    def __init__(self, pairs: np.ndarray, encoded: Encoded, size: int) -> None:
        self.encoded, self.size = encoded, size
        image, self._text = np.divmod(pairs, len(encoded.text))
        self._counts = np.bincount(image, minlength=len(encoded.rows))
        self._starts = np.cumsum(self._counts) - self._counts
        shares = divided(self._counts, world_size())
        self.images = shares[rank()]
        self.steps = max(sum(self._steps(part) for part in self._parts(share)) for share in shares)

    def _parts(self, images: np.ndarray) -> list[np.ndarray]:
        """The images of each batch of the loader."""
        return [images[start : start + self.size] for start in range(0, len(images), self.size)]

    def _steps(self, images: np.ndarray) -> int:
        return -(-int(self._counts[images].sum()) // self.size)

    def of(self, loaded: Iterator[Batch], device: torch.device, image_size: int) -> Iterator[Batch]:
        """images [b, 3, H, W], text_ids, text_mask [b, l] and pair [b], its number; ``self.steps`` times on every rank,
        in the end with b = 0.

        Args:
            loaded: ``self.images`` in their order, up to ``size`` at a time.
            device: where they are.
            image_size: H = W.
        """
        done = 0
        for part, batch in zip(self._parts(self.images), loaded, strict=False):
            images = valid_rows(batch)["images"]
            pairs = np.concatenate([self._starts[one] + np.arange(self._counts[one]) for one in part])
            places = np.repeat(np.arange(len(part)), self._counts[part])
            for start in range(0, len(pairs), self.size):
                some = slice(start, start + self.size)
                yield self._batch(images[torch.from_numpy(places[some]).to(device)], pairs[some])
                done += 1
        nothing = torch.empty(0, 3, image_size, image_size, device=device)
        for _ in range(self.steps - done):
            yield self._batch(nothing, np.empty(0, dtype=np.int64))

    def _batch(self, images: Tensor, pairs: np.ndarray) -> Batch:
        device = self.encoded.text_ids.device
        text = torch.from_numpy(self._text[pairs]).to(device)
        mask = self.encoded.text_mask[text]
        longest = max(int(mask.any(dim=0).sum()), 1)
        ids = self.encoded.text_ids[text][:, :longest]
        pair = torch.from_numpy(pairs).to(device)
        return {"images": images, "text_ids": ids, "text_mask": mask[:, :longest], "pair": pair}


def rerank(task: Contrast, dataset: CaptionSamples, feed: Feed, encoded: Encoded, k: int, rule: str) -> Arrays:
    """The candidates of every query with their scores, by ``rule``, and the pairs of matching_accuracy.py with what the
    matching head holds of them. Called by all ranks, in evaluation mode.

    Returns:
        text_candidates [I, k], image_candidates [T, k] int64, of the texts of an image and the images of a text;
        text_scores, image_scores float32 of the same shapes; matching_pairs [N] int64, image x T + text, and
        matching_judged [N] bool, True where the matching head holds that they match.
    """
    texts = most_similar(encoded.image, encoded.text, k)
    images = most_similar(encoded.text, encoded.image, k)
    of_images = np.arange(len(encoded.image))[:, None] * len(encoded.text) + texts
    of_texts = images * len(encoded.text) + np.arange(len(encoded.text))[:, None]
    drawn = drawn_pairs(encoded.text_image, len(encoded.image))
    pairs = np.unique(np.concatenate([of_images.ravel(), of_texts.ravel(), drawn]))
    batches = PairBatches(pairs, encoded, feed.batch_size)
    loaded = feed.own(ChosenImages(dataset, encoded.rows[batches.images].tolist()))
    numbers = torch.from_numpy(pairs).to(feed.device)
    scores, judged, places = [], [], []
    for batch in feed.together(batches.of(loaded, feed.device, task.config.image_size)):
        no, yes = task.match(batch["images"], batch["text_ids"], batch["text_mask"]).unbind(dim=1)
        judged.append(yes > no)
        score = yes
        if rule != "matching":
            number, texts_each = numbers[batch["pair"]], len(encoded.text)
            cosine = (encoded.image[number // texts_each] * encoded.text[number % texts_each]).sum(dim=1)
            score = yes + cosine if rule == "sum" else yes - no + cosine / task.temperature()
        scores.append(score)
        places.append(batch["pair"])
    both = torch.stack([torch.cat(scores), torch.cat(judged).float()], dim=1)
    score, match = in_order(both, torch.cat(places)).cpu().unbind(dim=1)
    judged_of = match.bool().numpy()[np.searchsorted(pairs, drawn)]
    found: Arrays = {"matching_pairs": drawn, "matching_judged": judged_of}
    for name, of, candidates in (("text", of_images, texts), ("image", of_texts, images)):
        place = np.searchsorted(pairs, of)
        found |= {f"{name}_candidates": candidates, f"{name}_scores": score.numpy()[place]}
    return found
