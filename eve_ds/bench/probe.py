"""Linear probes of a pre-trained model's features on the shapes world, whose ground truth is known.

Legend: n images, D width of the model, p side of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor

from eve_ds.bench.benchmark import Benchmark, Column, Row
from eve_ds.bench.probe_labels import (
    Labels,
    class_numbers,
    kinds_to_ask,
    object_labels,
    presence_labels,
    top_left_labels,
)
from eve_ds.bench.probe_linear import Examples, Result, linear_probe
from eve_ds.bench.shapes_truth import add_shapes_options, model_files, scenes_of_rows
from eve_ds.data.batch_reader import collate
from eve_ds.data.samples import CaptionImages
from eve_ds.data.sources import open_split
from eve_ds.data.transforms import build_transform
from eve_ds.model.backbone import Backbone
from eve_ds.model.embeddings import patches
from eve_ds.tasks import load_task_model
from eve_ds.tasks.base import joint_first_text
from preprocessing.errors import UserError
from preprocessing.shapes.scenes import GRID, Scene
from preprocessing.text.tokenizer import Tokenizer

QUESTION = "what color is in the top left"
FITTED = "train"  # split that the probes are fitted to
TRAINED, FIRST, PIXELS = "trained", "first_values", "pixels"  # sources of features

Scenes = tuple[Sequence[Scene], Sequence[Scene]]  # (fitted, tested)


class Features(NamedTuple):
    """Outputs of a model for n images, after its final norm; float32.

    Attributes:
        patches: [n, GRID * GRID, D], from the image only.
        class_token: [n, D], from the image only.
        question: [n, D], first text token, from the image with QUESTION.
    """

    patches: Tensor
    class_token: Tensor
    question: Tensor

    def select(self, field: str, labels: Labels) -> Tensor:
        """[m, D]: the features of ``field`` for m labels."""
        values: Tensor = getattr(self, field)
        return values[labels.image, labels.cell] if field == "patches" else values[labels.image]


class Probe(NamedTuple):
    """A row of the table.

    Attributes:
        name: heading of the row.
        field: the field of Features that it classifies.
        labels: scenes -> ground truth of the fitted and of the tested images.
        balanced: all classes have equal weight in the fit and in the accuracy.
    """

    name: str
    field: str
    labels: Callable[[Scenes], tuple[Labels, Labels]]
    balanced: bool = False


def _objects(attribute: str) -> Callable[[Scenes], tuple[Labels, Labels]]:
    return lambda scenes: (object_labels(scenes[0], attribute), object_labels(scenes[1], attribute))


def _top_left(scenes: Scenes) -> tuple[Labels, Labels]:
    return top_left_labels(scenes[0]), top_left_labels(scenes[1])


def _presence(scenes: Scenes) -> tuple[Labels, Labels]:
    kinds = kinds_to_ask(*scenes)
    return presence_labels(scenes[0], kinds), presence_labels(scenes[1], kinds)


PROBES = (
    Probe("patch color", "patches", _objects("color")),
    Probe("patch shape", "patches", _objects("shape")),
    Probe("patch size", "patches", _objects("size")),
    Probe("class token: top-left color", "class_token", _top_left),
    Probe("question: top-left color", "question", _top_left),
    Probe("class token: presence of kinds", "class_token", _presence, balanced=True),
)


def _add_options(parser: ArgumentParser) -> None:
    add_shapes_options(parser)
    parser.add_argument(
        "--images", type=PositiveInt, default=2000, help="maximum number of images of the train split to fit to"
    )
    parser.add_argument(
        "--seed", type=NonNegativeInt, default=0, help="of the randomly initialized model for comparison"
    )
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="images per batch")


def _rows(options: Namespace) -> Iterator[Row]:
    if options.seed >= 2**63:
        raise UserError(f"--seed {options.seed}: must be below 2**63")
    if options.split == FITTED:
        raise UserError(f"--split {FITTED}: the probes are fitted to this split; test on val or test")
    tokenizer, trained = _model(options.checkpoint)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        first = Backbone(trained.config).eval()
    datasets = [_dataset(options.data, split, tokenizer, trained) for split in (FITTED, options.split)]
    counts = [min(options.images, len(datasets[0])), len(datasets[1])]
    fitted, tested = (
        scenes_of_rows(dataset.split, count, options.scenes, split)[1]
        for dataset, count, split in zip(datasets, counts, (FITTED, options.split), strict=True)
    )
    question = torch.tensor([tokenizer.encode(QUESTION, trained.config.max_text_length)])
    encoded = [
        _encode_all({TRAINED: trained, FIRST: first}, dataset, count, question, options.batch_size)
        for dataset, count in zip(datasets, counts, strict=True)
    ]
    for probe in PROBES:
        yield _row(probe, options, (fitted, tested), encoded)


def _model(checkpoint: str) -> tuple[Tokenizer, Backbone]:
    """Load the model. Raises UserError without tokenizer, or if its patches are not the cells of the world."""
    _, tokenizer = model_files(checkpoint)
    backbone = load_task_model("pretrain", checkpoint=checkpoint).backbone
    side = backbone.config.image_size // backbone.config.patch_size
    if side != GRID:
        raise UserError(
            f"--checkpoint {checkpoint}: its images are {side}x{side} patches, the shapes world has {GRID}x{GRID} "
            "cells; name a model with a patch for each cell, such as the demo's"
        )
    return tokenizer, backbone


def _dataset(data: str, split: str, tokenizer: Tokenizer, backbone: Backbone) -> CaptionImages:
    config = backbone.config
    transform = build_transform(config.image_size, train=False)
    source = open_split(data, split, "caption")
    return CaptionImages(source, tokenizer, transform, config.max_text_length, config.vocab_size)


@torch.no_grad()
def encode(backbone: Backbone, images: Tensor, question: Tensor) -> Features:
    """Encode images [n, 3, H, W] twice: without text, and with ``question`` [1, L] int64, the same for all."""
    image_only = backbone(images).hidden
    joint = backbone(images, question.expand(len(images), -1))
    return Features(image_only[:, 1:], image_only[:, 0], joint_first_text(joint))


def _encode_all(
    backbones: dict[str, Backbone], dataset: CaptionImages, count: int, question: Tensor, batch_size: int
) -> dict[str, Features]:
    """Features of the first ``count`` images from each backbone; PIXELS has only patches [count, 16, 3 p p]."""
    parts: dict[str, list[Features]] = {name: [] for name in (*backbones, PIXELS)}
    for start in range(0, count, batch_size):
        samples = [dataset[index, 0] for index in range(start, min(start + batch_size, count))]
        images = collate(samples, dataset.pad_id, dataset.max_text_length)["images"]
        for name, backbone in backbones.items():
            parts[name].append(encode(backbone, images, question))
        empty = images.new_empty(len(images), 0)
        size = images.shape[-1] // GRID
        parts[PIXELS].append(Features(patches(images, size), empty, empty))
    return {name: Features(*map(torch.cat, zip(*found, strict=True))) for name, found in parts.items()}


def _row(probe: Probe, options: Namespace, scenes: Scenes, encoded: Sequence[dict[str, Features]]) -> Row:
    """Fit and test one probe. Raises UserError if too few images have labels."""
    labels = probe.labels(scenes)
    images = [len(set(part.image)) if any(part.answers) else 0 for part in labels]
    if images[0] < 2 or not images[1]:
        raise UserError(
            f"--images {options.images}: {probe.name!r} can use {images[0]} of {len(scenes[0])} fitted and {images[1]} "
            f"of {len(scenes[1])} tested images, too few; take more images or another --split"
        )
    numbers = class_numbers(*labels)
    found: dict[str, Result] = {}
    for source in (TRAINED, FIRST, *([PIXELS] if probe.field == "patches" else [])):
        fitted, tested = (
            Examples(features[source].select(probe.field, part), classes, torch.tensor(part.image))
            for features, part, classes in zip(encoded, labels, numbers, strict=True)
        )
        found[source] = linear_probe(fitted, tested, probe.balanced)
    majority = numbers[1].flatten().bincount().max() / numbers[1].numel()
    return {
        "probe": probe.name,
        "accuracy": found[TRAINED].accuracy,
        "chance": 0.5 if probe.balanced else float(majority),
        FIRST: found[FIRST].accuracy,
        PIXELS: found[PIXELS].accuracy if PIXELS in found else None,
        "questions": numbers[1].shape[1],
        "classes": int(torch.cat(numbers).max()) + 1,
        "fitted": len(numbers[0]),
        "tested": len(numbers[1]),
        "fitted_images": images[0],
        "tested_images": images[1],
        "ridges": {source: result.ridge for source, result in found.items()},
        "balanced": probe.balanced,
        "checkpoint": options.checkpoint,
        "split": options.split,
        "seed": options.seed,
    }


def _show(value: Any) -> str:
    return f"{value:.3f}"


BENCHMARK = Benchmark(
    "Linear probes of a pre-trained model's frozen features on the shapes world.\n\n"
    "Ridge regression to one-hot targets is fitted to images of the train split, with the ridge chosen on a tenth of\n"
    "them, and tested on another split. The same is done with the features of a randomly initialized model and, for\n"
    "probes of a patch, with its pixels: the difference is what the model has learned. 'presence of kinds' is the\n"
    "mean balanced accuracy of 'is there one?' over up to 18 kinds (color and shape). Chance is the fraction of the\n"
    "most frequent answer. Accuracies are fractions. Runs without DeepSpeed, in fp32 on the CPU.",
    [
        Column("probe", "probe", width=max(len(probe.name) for probe in PROBES)),
        Column("accuracy", "accuracy", _show),
        Column("chance", "chance", _show),
        Column(FIRST, "untrained", _show),
        Column(PIXELS, "pixels", _show),
        Column("tested", "tested"),
    ],
    _add_options,
    _rows,
)
