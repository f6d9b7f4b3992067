"""The recalls of 5,000 images x 25,000 texts beside the published row-by-row sort: time and memory, in one run.

python -m tests.support.published_recalls [IMAGES]
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from evaluation import retrieval

TEXTS = 5  # of an image


def sorted_ranks(image_to_text: np.ndarray, text_to_image: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ranks [I], [T] as ALBEF, X-VLM and EVE find them: sort each row, then look where the right answers stand."""
    texts: list[list[int]] = [[] for _ in image_to_text]
    for number, image in enumerate(index):
        texts[image].append(number)
    text_ranks = np.zeros(len(image_to_text))
    for number, row in enumerate(image_to_text):
        order = np.argsort(row)[::-1]
        text_ranks[number] = min(np.where(order == right)[0][0] for right in texts[number])
    image_ranks = np.zeros(len(text_to_image))
    for number, row in enumerate(text_to_image):
        order = np.argsort(row)[::-1]
        image_ranks[number] = np.where(order == index[number])[0][0]
    return text_ranks, image_ranks


def made_scores(images: int) -> dict[str, np.ndarray]:
    """Cosines of unit vectors, float32: a text lies nearer to its own image."""
    draw = np.random.default_rng(0)
    index = np.repeat(np.arange(images), TEXTS)
    image = draw.standard_normal((images, 64), dtype=np.float32)
    text = image[index] + 2 * draw.standard_normal((len(index), 64), dtype=np.float32)
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    return {"image_to_text": image @ text.T, "text_to_image": text @ image.T, "text_image_index": index}


def _memory(field: str) -> float:
    """A field of this process's status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def main(images: int) -> None:
    """Score the file as the command does, with its peak of memory; then time both ways on the arrays."""
    scores = made_scores(images)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scores.npz"
        np.savez(path, allow_pickle=False, **scores)
        del scores
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, began = _memory("VmRSS"), time.perf_counter()
        retrieval.file_ranks(str(path))
        seconds, peak = time.perf_counter() - began, _memory("VmHWM") - before
        print(f"file of {path.stat().st_size / 1e6:.0f} MB: {seconds:.2f} s, peak {peak:.0f} MiB above the baseline")
        with np.load(path) as archive:
            scores = dict(archive)
    began = time.perf_counter()
    found = retrieval.text_ranks(scores["image_to_text"], scores["text_image_index"])
    found_images = retrieval.image_ranks(scores["text_to_image"], scores["text_image_index"])
    ours, began = time.perf_counter() - began, time.perf_counter()
    assert np.array_equal(found_images, retrieval.image_ranks(scores["image_to_text"].T, scores["text_image_index"]))
    transposed, began = time.perf_counter() - began, time.perf_counter()
    expected = sorted_ranks(*scores.values())
    published = time.perf_counter() - began
    assert np.array_equal(found, expected[0]) and np.array_equal(found_images, expected[1])
    print(f"recalls {ours:.2f} s, the published sort {published:.2f} s: {published / ours:.1f} x; the ranks are equal")
    print(f"image ranks of the transposed [I, T] array, which need no second one: {transposed:.2f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
