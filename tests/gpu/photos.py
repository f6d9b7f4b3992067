"""JPEGs with the spectrum of photos, and captions of random words, in the form of X-VLM's JSON files.

No torch: the images are made in many processes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, QUALITY = 256, 90
WORDS = (
    "red green blue black white small large old new wooden metal wet dry bright dark dog cat car tree house river bird "
    "man woman child ball boat horse street table window flower bridge train plane stands lies under over beside behind"
).split()


def make_photos(folder: Path, count: int, words: int) -> Path:
    """Write folder/images and folder/captions.json; returns the latter. Captions have ``words`` words."""
    (folder / "images").mkdir(parents=True)
    tasks = [(folder, index, words) for index in range(count)]
    with multiprocessing.Pool(len(os.sched_getaffinity(0))) as pool:
        rows = pool.starmap(_photo, tasks, chunksize=16)
    file = folder / "captions.json"
    file.write_text(json.dumps(rows), encoding="utf-8")
    return file


def _photo(folder: Path, index: int, words: int) -> dict[str, object]:
    noise = np.random.default_rng(index)
    frequency = np.fft.fftfreq(SIDE)
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = 1 / SIDE
    parts = noise.standard_normal((2, SIDE, SIDE, 3))
    image = np.fft.ifft2((parts[0] + 1j * parts[1]) / radius[..., None] ** 1.5, axes=(0, 1)).real
    image = (image - image.mean()) / image.std() * 55 + 120
    name = f"{index:06d}.jpg"
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / "images" / name, quality=QUALITY)
    return {"image": name, "caption": [" ".join(random.Random(index).choices(WORDS, k=words))], "image_id": index}
