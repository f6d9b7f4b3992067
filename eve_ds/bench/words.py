"""Accuracy on masked words of the shapes world by kind of word, compared with an oracle that knows the scene."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

from eve_ds.bench.benchmark import Benchmark, Column, Row
from eve_ds.bench.shapes_truth import add_shapes_options, model_files, scenes_of_rows
from eve_ds.data.batch_reader import collate
from eve_ds.data.samples import CaptionSamples
from eve_ds.data.sources import open_split
from eve_ds.data.transforms import build_transform
from eve_ds.tasks import load_task_model
from eve_ds.tasks.masked_modeling import MaskedModeling, another_image
from eve_ds.weights.load import load_weights
from preprocessing.errors import UserError
from preprocessing.shapes.captions import wordings
from preprocessing.shapes.oracle import best_guesses
from preprocessing.shapes.scenes import COLORS, QUADRANTS, SHAPES, Scene

ALL = "all"
KINDS = {
    "color": set(COLORS),
    "shape": {*SHAPES, *(f"{shape}s" for shape in SHAPES)},
    "place": {word for quarter in QUADRANTS for word in quarter.split()},
    "number": {"no", "nothing", "one", "two", "three", "four", "five"},
}
OTHER = "other"


class Word(NamedTuple):
    """A masked word: its kind, and whether each predictor is correct."""

    kind: str
    model: bool
    shuffled: bool | None  # None if the batch has no other image
    oracle: bool


def _add_options(parser: ArgumentParser) -> None:
    add_shapes_options(parser)
    parser.add_argument(
        "--captions", type=PositiveInt, default=1000, help="number of captions, from the start of the split"
    )
    parser.add_argument(
        "--batch_size",
        type=PositiveInt,
        default=64,
        help="captions per batch; 'other image' is taken from the same batch",
    )


def _rows(options: Namespace) -> Iterator[Row]:
    folder, tokenizer = model_files(options.checkpoint)
    if not any(name.startswith("word_decoder.") for name in load_weights(folder.weights)):
        raise UserError(f"--checkpoint {options.checkpoint}: has no word decoder; name a pre-training run")
    task = load_task_model("pretrain", checkpoint=options.checkpoint)
    assert isinstance(task, MaskedModeling)
    config = task.config
    split = open_split(options.data, options.split, "caption")
    transform = build_transform(config.image_size, train=False)
    samples = CaptionSamples(split, tokenizer, transform, config.max_text_length, config.vocab_size)
    count = min(options.captions, len(samples))
    images = int(split.sample(count - 1)[0]) + 1
    order, scenes = scenes_of_rows(split, images, options.scenes, options.split)
    words = [
        word
        for start in range(0, count, options.batch_size)
        for word in _judge(task, samples, range(start, min(start + options.batch_size, count)), scenes, order)
    ]
    for kind in (ALL, *KINDS, OTHER):
        found = [word for word in words if kind in (ALL, word.kind)]
        if found:
            yield _row(kind, found, len(words), options)


def _judge(
    task: MaskedModeling, samples: CaptionSamples, chosen: range, scenes: list[Scene], order: str
) -> Iterator[Word]:
    """Masked words of the chosen captions, masked at the rate of the run with its ``objective.seed``."""
    tokenizer, longest = samples.tokenizer, samples.max_text_length
    batch = collate([samples[number, 0] for number in chosen], samples.pad_id, longest)
    other_row, has_other = another_image(batch["image_index"])
    own = task.predict_words(batch)
    shuffled = task.predict_words(batch | {"images": batch["images"][other_row]})
    rows = zip(own, shuffled, batch["image_index"].tolist(), has_other.tolist(), strict=True)
    texts: dict[int, list[list[int]]] = {}  # {row: all wordings}: an image has several captions
    for entry, beside, row, counted in rows:
        if row not in texts:
            texts[row] = [tokenizer.encode(text, longest) for text in wordings(scenes[row], order)]
        guesses = best_guesses(texts[row], entry["text_ids"], entry["positions"])
        if guesses is None:
            raise UserError(
                f"{samples.split.row(row).where}: caption {entry['sample_id']} does not fit its scene; name "
                "the scene files of this dataset with --scenes"
            )
        for place, truth in enumerate(entry["truth"]):
            kind = next((name for name, known in KINDS.items() if tokenizer.decode([truth]).strip() in known), OTHER)
            model, other_image, oracle = (
                words[place] == truth for words in (entry["predicted"], beside["predicted"], guesses)
            )
            yield Word(kind, model, other_image if counted else None, oracle)


def _row(kind: str, words: list[Word], total: int, options: Namespace) -> Row:
    count = len(words)
    accuracy, oracle = (sum(getattr(word, name) for word in words) / count for name in ("model", "oracle"))
    shuffled = [word.shuffled for word in words if word.shuffled is not None]
    return {
        "words": kind,
        "share": count / total,
        "accuracy": accuracy,
        "shuffled": sum(shuffled) / len(shuffled) if shuffled else None,
        "oracle": oracle,
        "of_oracle": accuracy / oracle if oracle else None,
        "count": count,
        "checkpoint": options.checkpoint,
        "split": options.split,
    }


def _show(value: Any) -> str:
    return f"{value:.3f}"


BENCHMARK = Benchmark(
    "Accuracy of a pre-trained model on masked words of the shapes world, by kind of word.\n\n"
    "Compared with the same model given the image of another pair, and with an oracle that knows the scene, all\n"
    "wordings and the visible words. Words are masked at the rate of the run. Accuracies and shares are fractions.\n"
    "Runs without DeepSpeed, in fp32 on the CPU.",
    [
        Column("words", "words"),
        Column("share", "of words", _show),
        Column("accuracy", "accuracy", _show),
        Column("shuffled", "other image", _show),
        Column("oracle", "oracle", _show),
        Column("of_oracle", "of oracle", _show),
        Column("count", "masked"),
    ],
    _add_options,
    _rows,
)
