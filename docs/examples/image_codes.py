"""Codes of all images of a prepared data set, for ``python -m preprocessing codes``.

PYTHONPATH=. python docs/examples/image_codes.py DATA CODES.npz --image_size 64 --patch_size 16 --vocabulary 16

The tokenizer here is the plainest that works: the nearest of K mean colors, found by k-means over the patches of the
first images; meant for small K. In place of ``nearest_color`` put any frozen tokenizer, a function from images
[B, H, W, 3] uint8 to codes [B, P] row by row; BEiT v2's has K = 8192 and a code for each 16 x 16 pixels of 224 x 224.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from itertools import islice

import numpy as np

from eve_ds.data.transforms import build_transform
from preprocessing.running.storage import storage_path
from preprocessing.shards.reader import read_images

BATCH, FITTED, ITERATIONS = 64, 512, 20  # images at a time, images for k-means, its iterations


def mean_colors(images: np.ndarray, patch_size: int) -> np.ndarray:
    """[B, H, W, 3] uint8 -> [B, P, 3] float64, the patches row by row."""
    count, side = len(images), images.shape[1] // patch_size
    cut = images.reshape(count, side, patch_size, side, patch_size, 3)
    return cut.mean(axis=(2, 4)).reshape(count, side * side, 3)


def nearest_color(images: np.ndarray, colors: np.ndarray, patch_size: int) -> np.ndarray:
    """[B, H, W, 3] uint8, colors [K, 3] -> [B, P] codes."""
    found = mean_colors(images, patch_size)
    return np.square(found[:, :, None] - colors).sum(axis=-1).argmin(axis=-1)


def k_means(points: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """[n, 3] -> [count, 3] means of clusters (Lloyd's algorithm). An empty cluster keeps its mean."""
    means = np.random.default_rng(seed).permutation(np.unique(points, axis=0))[:count]
    for _ in range(ITERATIONS):
        nearest = np.square(points[:, None] - means).sum(axis=-1).argmin(axis=-1)
        for k in np.unique(nearest):
            means[k] = points[nearest == k].mean(axis=0)
    return means


def squares(data: str, image_size: int) -> Iterator[tuple[list[str], np.ndarray]]:
    """(image ids, images [B, H, W, 3] uint8), resized as training resizes them without crop and flip."""
    transform = build_transform(image_size, train=False)
    images = read_images(storage_path(data))
    while batch := list(islice(images, BATCH)):
        yield [name for name, _ in batch], np.stack([transform(file, 0) for _, file in batch])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a prepared data set or one split of it")
    parser.add_argument("out", help="the .npz file to write")
    for name in ("image_size", "patch_size", "vocabulary"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args(arguments)

    first = np.concatenate([images for _, images in islice(squares(args.data, args.image_size), FITTED // BATCH)])
    colors = k_means(mean_colors(first, args.patch_size).reshape(-1, 3), args.vocabulary)
    tokenizer: Callable[[np.ndarray], np.ndarray]
    tokenizer = functools.partial(nearest_color, colors=colors, patch_size=args.patch_size)

    found = [(ids, tokenizer(images).astype(np.int32)) for ids, images in squares(args.data, args.image_size)]
    ids = [one for batch, _ in found for one in batch]
    np.savez_compressed(args.out, image_id=np.array(ids), codes=np.concatenate([codes for _, codes in found]))
    print(f"{args.out}: codes of {len(ids)} images, for python -m preprocessing codes --vocabulary {args.vocabulary}")


if __name__ == "__main__":
    main()
