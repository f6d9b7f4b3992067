"""How often the matching head is right about a split, on pairs that are drawn as those of training are.

Three pairs for every text: with its image, with another image, and its image with another text. The texts, in random
order, form groups of up to GROUP; others come from the group, the likelier the more similar (contrast.py), and never
from the same image. All draws are the same every time.

Legend: I images, T texts, N pairs.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evaluation.bootstrap import Parts
from eve_ds.parallel import gather_with_gradient, rank, world_size
from eve_ds.tasks.contrast import hard_negatives
from eve_ds.tasks.feed import Arrays
from eve_ds.tasks.masking import NEGATIVE_IMAGES, NEGATIVE_TEXTS, random_bits

MATCHING = "matching"  # the group of these scores
GROUP = 64
SEED = 0


def drawn_pairs(image: Tensor, text: Tensor, index: NDArray[np.int64], temperature: Tensor) -> NDArray[np.int64]:
    """[N] numbers image x T + text, ascending, N at most 3 T. A collective: the ranks share the groups.

    Args:
        image, text: [I, E] and [T, E] unit vectors.
        index: [T], the image of each text.
        temperature: of the contrast.
    """
    texts, owner = len(text), torch.from_numpy(index).to(text.device)
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(texts)).to(text.device)
    groups = order.tensor_split(-(-texts // GROUP))
    found = [order[:0]]
    for rows in groups[rank() :: world_size()]:
        own = owner[rows]
        logits = image[own] @ text[rows].t() / temperature
        same = own[:, None] == own
        columns = []
        for to, use in ((logits, NEGATIVE_TEXTS), (logits.t(), NEGATIVE_IMAGES)):
            column, there = hard_negatives(to, same, random_bits(SEED, use, rows[:, None], rows))
            columns.append(column)
        other_text, other_image = rows[columns[0]], own[columns[1]]
        found += [own * texts + rows, (own * texts + other_text)[there], (other_image * texts + rows)[there]]
    return np.sort(gather_with_gradient(torch.cat(found)).cpu().numpy())


def accuracy(arrays: Arrays) -> dict[str, float]:
    """``accuracy``, and ``prior``, that of one answer to all pairs, in percent; of what ``predict`` gives."""
    share = 100.0 * float(_belong(arrays).mean())
    return {**matching_parts(arrays).scores(), "prior": max(share, 100.0 - share)}


def matching_parts(arrays: Arrays) -> Parts:
    """The accuracy in percent; a cluster is an image with its texts."""
    right = arrays["matching_judged"] == _belong(arrays)
    images, texts = arrays["image_to_text"].shape
    return Parts({"accuracy": (100.0 * right, arrays["matching_pairs"] // texts)}, images)


def _belong(arrays: Arrays) -> NDArray[np.bool_]:
    """[N], which of the pairs belong together."""
    image, text = np.divmod(arrays["matching_pairs"], arrays["image_to_text"].shape[1])
    return np.asarray(arrays["text_image_index"][text] == image)
