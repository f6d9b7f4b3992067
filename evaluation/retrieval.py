"""Image-text retrieval: the share of queries with a correct answer among the first 1, 5 and 10.

Text retrieval (``txt_*``): the query is an image, a hit is *any* of its texts. Image retrieval (``img_*``): the query
is a text, a hit is its image. As in Karpathy & Fei-Fei (CVPR 2015) and the evaluation code of ALBEF, X-VLM and EVE.

Ties count against the model: a wrong candidate with the same score as the right one is ranked before it. A model that
gives each pair the same score gets 0; with sorting, its score would depend on the order of the file.

I images, T texts. Ranks are counts of better candidates, a block of queries at a time: no sorted copy of the scores is
made.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from evaluation import bootstrap
from evaluation.common import NO_MEMORY, InputError, Parser, check_regular, first_few, run, write_scores

CUTOFFS = (1, 5, 10)
BLOCK = 1 << 16  # scores compared at a time: they stay in a processor's cache
ARRAYS = ("image_to_text", "text_to_image", "text_image_index")

# Ranks from 0 of the right text of each image [I], of the right image of each text [T]; and the image of each text [T].
Ranks = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.integer]]


def recalls(
    image_to_text: NDArray[np.generic], text_to_image: NDArray[np.generic], text_image_index: NDArray[np.integer]
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions, their means, and the mean of those.

    Args:
        image_to_text: scores [I, T], any real dtype; row i ranks the texts for image i, higher is better. ``-inf``
            marks candidates that were never scored.
        text_to_image: scores [T, I]; row t ranks the images for text t.
        text_image_index: [T] integers, the image of each text. Every image needs at least one text.
    Returns:
        ``txt_r1 txt_r5 txt_r10 txt_r_mean img_r1 img_r5 img_r10 img_r_mean r_mean`` in percent.
    Raises:
        InputError: shapes that do not fit, an index out of range, an image without text, NaN or +inf among the scores.
    """
    return summary(text_ranks(image_to_text, text_image_index), image_ranks(text_to_image, text_image_index))


def text_ranks(image_to_text: NDArray[np.generic], text_image_index: NDArray[np.integer]) -> NDArray[np.int64]:
    """The rank, from 0, of the first right text of each image: [I, T] scores -> [I]. Raises as ``recalls``."""
    images = _check(image_to_text, text_image_index, "image_to_text", image_axis=0)
    texts = np.argsort(text_image_index, kind="stable")  # image by image
    owner = text_image_index[texts]
    right = image_to_text[owner, texts]
    starts = np.searchsorted(owner, np.arange(images))
    best = np.maximum.reduceat(right, starts)
    as_good = np.add.reduceat(np.greater_equal(right, best[owner]), starts, dtype=np.int64)
    return _at_least(image_to_text, best, "image_to_text") - as_good  # wrong ones at least as good


def image_ranks(text_to_image: NDArray[np.generic], text_image_index: NDArray[np.integer]) -> NDArray[np.int64]:
    """The rank, from 0, of the right image of each text: [T, I] scores -> [T]. Raises as ``recalls``."""
    _check(text_to_image, text_image_index, "text_to_image", image_axis=1)
    right = text_to_image[np.arange(len(text_image_index)), text_image_index]
    return _at_least(text_to_image, right, "text_to_image") - 1


def _at_least(scores: NDArray[np.generic], bounds: NDArray[np.generic], name: str) -> NDArray[np.int64]:
    """How many scores [N, M] of each row are at least the row's bound [N]. Raises InputError for NaN and +inf."""
    counts = np.zeros(len(scores), np.int64)
    if scores.flags.f_contiguous and not scores.flags.c_contiguous:  # a transposed array: as it lies in memory
        top = np.full(len(scores), -np.inf)
        columns = max(1, BLOCK // len(scores))
        for start in range(0, scores.shape[1], columns):
            block = scores.T[start : start + columns]
            np.maximum(top, block.max(axis=0), out=top)
            for as_good in np.greater_equal(block, bounds):
                counts += as_good
        _check_rows(scores, top, name, 0)
        return counts
    rows = max(1, BLOCK // scores.shape[1])
    for start in range(0, len(scores), rows):
        block = scores[start : start + rows]
        _check_rows(block, block.max(axis=1), name, start)
        compared = np.greater_equal(block, bounds[start : start + rows, None])
        counts[start : start + rows] = [np.count_nonzero(row) for row in compared]  # five times as fast as with an axis
    return counts


def _check_rows(block: NDArray[np.generic], largest: NDArray[np.generic], name: str, first: int) -> None:
    """Raise InputError for NaN and +inf in rows whose largest scores are known; ``first``: number of the first one."""
    fine = np.less(largest, np.inf)  # a row with NaN has NaN as its largest, which compares false
    if not fine.all():
        row = int(np.argmin(fine))
        column = int(np.argmin(np.less(block[row], np.inf)))
        raise InputError(
            f"{name}[{first + row}, {column}] is {block[row, column]}: scores must be real numbers (or -inf: not "
            "scored)"
        )


def summary(text: NDArray[np.int64], image: NDArray[np.int64]) -> dict[str, float]:
    """Ranks from 0 of the text queries' and image queries' right answers, [I] and [T] -> the keys of ``recalls``."""
    scores: dict[str, float] = {}
    for name, ranks in (("txt", text), ("img", image)):
        at = [100.0 * int(np.count_nonzero(ranks < k)) / len(ranks) for k in CUTOFFS]
        scores |= {f"{name}_r{k}": value for k, value in zip(CUTOFFS, at, strict=True)}
        scores[f"{name}_r_mean"] = sum(at) / len(at)
    scores["r_mean"] = (scores["txt_r_mean"] + scores["img_r_mean"]) / 2
    return scores


def _check(scores: NDArray[np.generic], index: NDArray[np.integer], name: str, image_axis: int) -> int:
    """Check shapes and dtypes; returns the number of images."""
    if index.ndim != 1 or index.dtype.kind not in "iu":  # to issubdtype, spans of time are whole numbers
        raise InputError(f"text_image_index must be whole numbers of shape [T], got {index.dtype} {list(index.shape)}")
    if scores.ndim != 2 or scores.dtype.kind not in "fiu":
        want = "[I, T]" if image_axis == 0 else "[T, I]"
        raise InputError(f"{name} must be real numbers of shape {want}, got {scores.dtype} {list(scores.shape)}")
    images, texts = int(scores.shape[image_axis]), scores.shape[1 - image_axis]
    if not images or not texts or texts != len(index):
        shape = list(scores.shape)
        raise InputError(
            f"{name} {shape} has {images} images and {texts} texts, but text_image_index has {len(index)} texts"
        )
    if index.min() < 0 or index.max() >= images:
        t = int(np.argmax((index < 0) | (index >= images)))
        raise InputError(
            f"text_image_index[{t}] = {index[t]}, but {name} {list(scores.shape)} has images 0 to {images - 1}"
        )
    counts = np.bincount(index, minlength=images)
    if not counts.all():
        raise InputError(
            f"text_image_index: image {int(np.argmin(counts))} has no text, so its text recall is undefined"
        )
    return images


def _load(archive: Mapping[str, NDArray[np.generic]], name: str) -> NDArray[np.generic]:
    try:
        found = archive[name]
    except KeyError:
        raise InputError(
            f"array {name!r} is missing, found {first_few(sorted(archive))}; needed: {', '.join(ARRAYS)}"
        ) from None
    except MemoryError as error:
        raise InputError(f"array {name!r} cannot be read: if the file is not damaged, {NO_MEMORY}") from error
    except Exception as error:  # zipfile and NumPy raise errors of all kinds on damaged files
        raise InputError(f"array {name!r} cannot be read: the file is damaged or holds no plain numbers") from error
    if not isinstance(found, np.ndarray):  # another kind of file in the archive
        raise InputError(f"array {name!r} is no NumPy array; save it with numpy.savez")
    return found


def file_ranks(path: str) -> Ranks:
    """``text_ranks`` and ``image_ranks`` of an .npz file, and its ``text_image_index``.

    Holds one of its two score arrays in memory at a time.

    Raises:
        InputError: the file is missing or no .npz, and as ``recalls``.
    """
    check_regular(path, streams=False)  # its parts are read out of order
    try:
        archive = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except Exception as error:  # as above
        raise InputError(f"{path}: not a NumPy .npz file") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: one bare array; save the three of them with numpy.savez: {', '.join(ARRAYS)}")
    with archive:
        try:
            index = _load(archive, "text_image_index")
            texts = text_ranks(_load(archive, "image_to_text"), index)  # type: ignore[arg-type]  # checked in there
            images = image_ranks(_load(archive, "text_to_image"), index)  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    return texts, images, index  # type: ignore[return-value]


def main(arguments: list[str] | None = None) -> None:
    """The command ``python -m evaluation.retrieval``."""
    parser = Parser(prog="python -m evaluation.retrieval", description=__doc__)
    parser.add_argument("--scores", required=True, metavar="S.npz", help=f"arrays {', '.join(ARRAYS)}")
    parser.add_argument("--out", required=True, metavar="M.json", help="where the recalls go, in percent")
    bootstrap.add_option(parser)
    options = parser.parse_args(arguments)
    texts, images, index = file_ranks(options.scores)
    scores = summary(texts, images)
    found = bootstrap.confidence(bootstrap.retrieval_parts(texts, images, index, CUTOFFS)) if options.intervals else {}
    line = " ".join(f"{name} {bootstrap.shown(value, found.get(name), '.2f')}" for name, value in scores.items())
    write_scores(options.out, bootstrap.beside(scores, found), line)


if __name__ == "__main__":
    sys.exit(run(main))
