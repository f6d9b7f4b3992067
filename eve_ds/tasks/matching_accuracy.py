"""How often the matching head is right about a split, on pairs that no model chooses.

Three pairs for every text:
- the text and its image;
- the text and another image;
- its image and a text of another image.
The other image and the other text are drawn with equal chances. The draw depends on the split alone, so accuracies of
different weights can be compared. In training they are similar ones (contrast.py), which are harder to tell.

Legend: I images, T texts, N pairs, 3 T (T for a single image).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from evaluation.bootstrap import Parts
from eve_ds.tasks.feed import Arrays

MATCHING = "matching"  # the group of these scores
SEED = 0


def drawn_pairs(index: NDArray[np.int64], images: int) -> NDArray[np.int64]:
    """[N] pairs, each as the number image x T + text: all true pairs, then those with another image, then with another
    text.

    Args:
        index: [T], the image of each text, 0 to I - 1.
        images: I.
    """
    texts = len(index)
    numbers = np.arange(texts)
    own = index * texts + numbers
    if images < 2:
        return own
    draw = np.random.default_rng(SEED)
    other_image = (index + draw.integers(1, images, texts)) % images
    by_image = np.argsort(index, kind="stable")  # texts in the order of their images
    counts = np.bincount(index, minlength=images)
    starts = np.cumsum(counts) - counts
    place = draw.integers(0, texts - counts[index])  # in that order, without the texts of this image
    place += np.where(place >= starts[index], counts[index], 0)  # steps over these
    return np.concatenate([own, other_image * texts + numbers, index * texts + by_image[place]])


def accuracy(arrays: Arrays) -> dict[str, float]:
    """``accuracy``, and ``prior``, that of one answer to all pairs, in percent.

    Args:
        arrays: what the retrieval task's `predict` returns.
    """
    share = 100.0 * float(_true_pairs(arrays).mean())
    return {**matching_parts(arrays).scores(), "prior": max(share, 100.0 - share)}


def matching_parts(arrays: Arrays) -> Parts:
    """The accuracy in percent; a cluster is an image with its texts and all pairs drawn for them."""
    right = arrays["matching_judged"] == _true_pairs(arrays)
    index = arrays["text_image_index"]
    clusters = np.tile(index, len(right) // len(index))
    return Parts({"accuracy": (100.0 * right, clusters)}, len(arrays["image_to_text"]))


def _true_pairs(arrays: Arrays) -> NDArray[np.bool_]:
    """[N], whether a pair is of an image and a text of its own."""
    image, text = np.divmod(arrays["matching_pairs"], arrays["image_to_text"].shape[1])
    return np.asarray(arrays["text_image_index"][text] == image)
