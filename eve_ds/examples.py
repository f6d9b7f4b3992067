"""A few predictions with their images, stored in a run for the report (``samples/samples.json`` and PNG files)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eve_ds.data.samples import CaptionSamples, NlvrSamples, VqaSamples
from eve_ds.files import write_json

THUMBNAIL = 160  # pixels
TOP = 5


class _Thumbnails:
    """Images shrunk into ``samples/``, each once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "samples"
        self.folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, data: bytes) -> str:
        file = self.folder / f"{name}.png"
        if not file.exists():
            with Image.open(io.BytesIO(data)) as full_size:
                small = full_size.convert("RGB")
            small.thumbnail((THUMBNAIL, THUMBNAIL))
            small.save(file)
        return file.name

    def finish(self, value: dict[str, Any]) -> None:
        write_json(self.folder / "samples.json", value)


def write_retrieval(folder: Path, samples: CaptionSamples, scores: dict[str, np.ndarray], count: int) -> None:
    """The best five images for ``count`` captions and the best five captions for as many images.

    Args:
        scores: as ``evaluation.retrieval`` reads them.
    """
    thumbnails = _Thumbnails(folder)
    owner = scores["text_image_index"]
    to_image, to_text = [], []
    for text in _spread(len(owner), count):
        row = scores["text_to_image"][text]
        results = [
            {
                "image": thumbnails.add(f"image_{i}", samples.row_image_bytes(int(i))),
                "score": float(row[i]),
                "correct": bool(owner[text] == i),
            }
            for i in np.argsort(-row, kind="stable")[:TOP]
        ]
        to_image.append({"query": samples.text(text), "results": results})
    for image in _spread(len(scores["image_to_text"]), count):
        row = scores["image_to_text"][image]
        results = [
            {"text": samples.text(int(t)), "score": float(row[t]), "correct": bool(owner[t] == image)}
            for t in np.argsort(-row, kind="stable")[:TOP]
        ]
        to_text.append({"image": thumbnails.add(f"image_{image}", samples.row_image_bytes(image)), "results": results})
    thumbnails.finish({"text_to_image": to_image, "image_to_text": to_text})


def write_vqa(folder: Path, samples: VqaSamples, rows: list[dict[str, Any]], count: int) -> None:
    """Half of them right, half wrong, as far as there are such.

    Args:
        rows: VQA v2 result rows of the split.
    """
    thumbnails = _Thumbnails(folder)
    answer_of = {row["question_id"]: row["answer"] for row in rows}
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for sample in _spread(len(samples), 20 * count):
        answers, predicted = samples.answers(sample), answer_of[samples.question_id(sample)]
        score = float(answers.get(predicted, 0.0))
        examples = found[score > 0]
        if len(examples) < (count + 1) // 2:
            name = thumbnails.add(f"sample_{sample}", samples.image_bytes(sample))
            examples.append(
                {
                    "image": name,
                    "question": samples.text(sample),
                    "predicted": predicted,
                    "answers": list(answers),
                    "score": score,
                }
            )
    thumbnails.finish({"examples": found[True] + found[False]})


def write_nlvr(folder: Path, samples: NlvrSamples, arrays: dict[str, np.ndarray], count: int) -> None:
    """Half of them right, half wrong, as far as there are such.

    Args:
        arrays: what ``NLVR.predict_batch`` gives for the split.
    """
    thumbnails = _Thumbnails(folder)
    right = arrays["prediction"] == arrays["label"]
    examples = []
    for wanted in (True, False):
        places = np.flatnonzero(right == wanted)
        for place in places[_spread(len(places), (count + 1) // 2)]:
            sample = int(arrays["question_index"][place])
            images = [thumbnails.add(f"sample_{sample}_{side}", samples.image_bytes(sample, side)) for side in (0, 1)]
            examples.append(
                {
                    "image_0": images[0],
                    "image_1": images[1],
                    "statement": samples.text(sample),
                    "predicted": bool(arrays["prediction"][place]),
                    "label": bool(arrays["label"][place]),
                }
            )
    thumbnails.finish({"examples": examples})


def _spread(total: int, count: int) -> list[int]:
    """At most ``count`` indices below ``total``, evenly spread."""
    return [i * total // count for i in range(count)] if total > count else list(range(total))
