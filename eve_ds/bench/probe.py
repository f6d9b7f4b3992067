"""What a pre-trained model's features hold, read out by linear classifiers: the shapes world, whose truth is known.

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
from eve_ds.data.collate import collate
from eve_ds.data.samples import CaptionImages
from eve_ds.data.sources import open_split
from eve_ds.data.transforms import build_transform
from eve_ds.errors import UserError
from eve_ds.model.backbone import Backbone
from eve_ds.model.embeddings import patches
from eve_ds.tasks import load_task_model
from eve_ds.tasks.base import joint_first_text
from preprocessing.shapes.scenes import GRID, Scene
from preprocessing.text.tokenizer import Tokenizer

QUESTION = "what color is in the top left"
FITTED = "train"
TRAINED, FIRST, PIXELS = "trained", "first_values", "pixels"  # where features come from

Scenes = tuple[Sequence[Scene], Sequence[Scene]]  # of the fitted images and of the tested ones


class Features(NamedTuple):
    """What a model makes of n images, after its final norm; float32.

    Attributes:
        patches: [n, GRID * GRID, D] of the image alone.
        class_token: [n, D] of the image alone.
        question: [n, D] first text token of the image with QUESTION.
    """

    patches: Tensor
    class_token: Tensor
    question: Tensor

    def at(self, place: str, labels: Labels) -> Tensor:
        """[m, D]: the features that the m labels are about."""
        values: Tensor = getattr(self, place)
        return values[labels.image, labels.cell] if place == "patches" else values[labels.image]


class Probe(NamedTuple):
    """A row of the table.

    Attributes:
        name: what is read out of what.
        place: the field of Features that it reads.
        labels: the truth, of the fitted images and of the tested ones.
        balanced: classes weigh the same in the fit and in the accuracy.
    """

    name: str
    place: str
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
    parser.add_argument("--images", type=PositiveInt, default=2000, help="of the train split to fit to; all if fewer")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="of the model with first values beside it")
    parser.add_argument("--batch_size", type=PositiveInt, default=64, help="images encoded at once")


def _rows(options: Namespace) -> Iterator[Row]:
    if options.seed >= 2**63:
        raise UserError(f"--seed {options.seed}: must be below 2**63")
    if options.split == FITTED:
        raise UserError(f"--split {FITTED}: is what the probes are fitted to; test on val or test")
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
    """Raises UserError where there is no tokenizer, or where patches are not the cells of the shapes world."""
    _, tokenizer = model_files(checkpoint)
    backbone = load_task_model("pretrain", checkpoint=checkpoint).backbone
    side = backbone.config.image_size // backbone.config.patch_size
    if side != GRID:
        raise UserError(
            f"--checkpoint {checkpoint}: its images are {side}x{side} patches, the shapes world is {GRID}x{GRID} cells;"
            " name a model that has a patch for each cell, such as the demo's"
        )
    return tokenizer, backbone


def _dataset(data: str, split: str, tokenizer: Tokenizer, backbone: Backbone) -> CaptionImages:
    config = backbone.config
    transform = build_transform(config.image_size, train=False)
    source = open_split(data, split, "caption")
    return CaptionImages(source, tokenizer, transform, config.max_text_length, config.vocab_size)


@torch.no_grad()
def encode(backbone: Backbone, images: Tensor, question: Tensor) -> Features:
    """Two passes: images [n, 3, H, W] alone, and with ``question`` [1, L] int64, the same for all."""
    alone = backbone(images).hidden
    joint = backbone(images, question.expand(len(images), -1))
    return Features(alone[:, 1:], alone[:, 0], joint_first_text(joint))


def _encode_all(
    backbones: dict[str, Backbone], dataset: CaptionImages, count: int, question: Tensor, batch_size: int
) -> dict[str, Features]:
    """The features of the first ``count`` images by each backbone; PIXELS has patches [count, 16, 3 p p] alone."""
    parts: dict[str, list[Features]] = {name: [] for name in (*backbones, PIXELS)}
    for start in range(0, count, batch_size):
        samples = [dataset[index, 0] for index in range(start, min(start + batch_size, count))]
        images = collate(samples, dataset.pad_id, dataset.max_text_length)["images"]
        for name, backbone in backbones.items():
            parts[name].append(encode(backbone, images, question))
        nothing = images.new_empty(len(images), 0)
        size = images.shape[-1] // GRID
        parts[PIXELS].append(Features(patches(images, size), nothing, nothing))
    return {name: Features(*map(torch.cat, zip(*found, strict=True))) for name, found in parts.items()}


def _row(probe: Probe, options: Namespace, scenes: Scenes, encoded: Sequence[dict[str, Features]]) -> Row:
    """Raises UserError where too few images have what the probe asks for."""
    labels = probe.labels(scenes)
    images = [len(set(part.image)) if any(part.answers) else 0 for part in labels]
    if images[0] < 2 or not images[1]:
        raise UserError(
            f"--images {options.images}: {probe.name!r} can use {images[0]} of {len(scenes[0])} fitted and {images[1]} "
            f"of {len(scenes[1])} tested images, too few; take more images or another --split"
        )
    numbers = class_numbers(*labels)
    found: dict[str, Result] = {}
    for source in (TRAINED, FIRST, *([PIXELS] if probe.place == "patches" else [])):
        fitted, tested = (
            Examples(features[source].at(probe.place, part), classes, torch.tensor(part.image))
            for features, part, classes in zip(encoded, labels, numbers, strict=True)
        )
        found[source] = linear_probe(fitted, tested, probe.balanced)
    commonest = numbers[1].flatten().bincount().max() / numbers[1].numel()
    return {
        "probe": probe.name,
        "accuracy": found[TRAINED].accuracy,
        "chance": 0.5 if probe.balanced else float(commonest),
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
    "What frozen features of a pre-trained model hold, by linear probes on the shapes world.\n\n"
    "Ridge regression to one-hot targets is fitted to images of the train split, its ridge chosen on a tenth of them,\n"
    "and tested on another split. The same is done with the features of a model with first values and, where an\n"
    "object's patch is read, with its pixels: what the model has over these it has learned. 'presence of kinds' is\n"
    "the mean over up to 18 kinds (color and shape) of the balanced accuracy of 'is there one?'. Chance is the share\n"
    "of the commonest answer. Accuracies are fractions. Runs without DeepSpeed, in fp32 on the CPU.",
    [
        Column("probe", "probe", width=max(len(probe.name) for probe in PROBES)),
        Column("accuracy", "accuracy", _show),
        Column("chance", "chance", _show),
        Column(FIRST, "first values", _show),
        Column(PIXELS, "pixels", _show),
        Column("tested", "tested"),
    ],
    _add_options,
    _rows,
)
