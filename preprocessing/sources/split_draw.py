"""Draws the split of each record of a data set that has none, so that what belongs together stays together.

The draw is a hash of the group and the seed. It does not depend on the other records, so a data set that grows keeps
its test split, and data sets over the same images (captions and questions) have the same images in `test`.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from preprocessing.errors import UserError
from preprocessing.images.image_refs import ImageRef
from preprocessing.shards.schema import SPLITS

_READERS = 8  # threads that read images: hashing and waiting for a disk release the lock


def content_keys(images: Sequence[ImageRef]) -> list[str | None]:
    """SHA-256 of each image's bytes, None for one that cannot be read: an image under two names is one image."""
    with ThreadPoolExecutor(_READERS, "image-hash") as threads:
        return list(threads.map(_content_key, images))


def _content_key(image: ImageRef) -> str | None:
    try:
        return hashlib.sha256(image.read()).hexdigest()
    except (OSError, ValueError):
        return None


def draw_split(group: str, shares: dict[str, float], seed: int) -> str:
    """The split of a group: "test" or "val" with the probability in `shares`, else "train"."""
    number = int.from_bytes(hashlib.sha256(f"{seed} {group}".encode()).digest()[:8]) / 2**64
    if number < shares["test"]:
        return "test"
    return "val" if number < shares["test"] + shares["val"] else "train"


def draw_splits(groups: Sequence[str], shares: dict[str, float], seed: int) -> list[str]:
    """The split of each record, by its group. Raises UserError when a split with a share gets no record."""
    drawn = [draw_split(group, shares, seed) for group in groups]
    found = Counter(drawn)
    for split in SPLITS:
        if not found[split] and (split == "train" or shares[split]):
            raise UserError(
                f"--seed {seed}: of {len(set(groups))} groups of records that stay together none falls into {split}; "
                "give another --seed, other shares, or a column `split`"
            )
    return drawn
