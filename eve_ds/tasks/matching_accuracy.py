"""How often the matching head is right about a split, on the hardest of the pairs that re-ranking asks it about.

Three pairs for every text, as in training: with its image, with the most similar other image, and its image with the
most similar text of another. Training draws the two wrong ones from the batch, the likelier the more similar; here they
are the most similar of the split, which is harder and the same every time. A pair beyond the candidates does not count.

Legend: I images, T texts, N pairs that count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluation.bootstrap import Parts
from eve_ds.tasks.feed import Arrays

MATCHING = "matching"  # the group of these scores


def accuracy(arrays: Arrays) -> dict[str, float]:
    """``accuracy``, and ``prior``, that of one answer to all pairs, in percent; of what ``predict`` gives."""
    parts, belong = matching_parts(arrays)
    share = 100.0 * float(belong.mean())
    return {**parts.scores(), "prior": max(share, 100.0 - share)}


def matching_parts(arrays: Arrays) -> tuple[Parts, NDArray[np.bool_]]:
    """The accuracy in percent, a cluster an image with its texts; and which pairs belong together, [N]."""
    index = arrays["text_image_index"]
    images, texts = arrays["image_candidates"], arrays["text_candidates"]
    other_text = index[texts] != np.arange(len(texts))[:, None]
    asked = [
        (images == index[:, None], arrays["image_judged"], True),
        (images != index[:, None], arrays["image_judged"], False),
        (other_text[index], arrays["text_judged"][index], False),
    ]
    right, belong, image = [], [], []
    for wanted, judged, label in asked:
        there = wanted.any(axis=1)
        first = wanted.argmax(axis=1)[:, None]  # the most similar one
        right.append((np.take_along_axis(judged, first, axis=1)[:, 0] == label)[there])
        belong.append(np.full(int(there.sum()), label))
        image.append(index[there])
    columns = {"accuracy": (100.0 * np.concatenate(right), np.concatenate(image))}
    return Parts(columns, len(texts)), np.concatenate(belong)
