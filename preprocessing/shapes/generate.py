"""`python -m preprocessing shapes`: writes the shapes world as COCO captions, VQA v2 and NLVR2 are shipped.

RAW/images/{split}2014/COCO_{split}2014_000000000001.png        split: train, val, test
RAW/annotations/captions_{split}2014.json
RAW/annotations/scenes_{split}2014.json                         what is in each image; COCO has no such file
RAW/vqa/v2_OpenEnded_mscoco_{split}2014_questions.json
RAW/vqa/v2_mscoco_{split}2014_annotations.json
RAW/nlvr2/{train,dev,test1}.json                                JSON lines
RAW/nlvr2/images/{train,dev,test1}/{split}-{set}-{pair}-img{0,1}.png
"""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preprocessing.errors import UserError
from preprocessing.running.output_folder import output_folder
from preprocessing.shapes.captions import captions
from preprocessing.shapes.drawing import SIDE, draw, to_png
from preprocessing.shapes.questions import KINDS, Question, questions, ten_answers
from preprocessing.shapes.scenes import ORDERS, Scene, SceneSampler
from preprocessing.shapes.statements import PAIRS, STATEMENTS, pair_set

_DRAWN_AT_ONCE = 512
_OURS = ("images", "annotations", "vqa", "nlvr2")
_INFO = {"description": "EVE-DS shapes", "version": "1.0", "year": 2026, "contributor": "EVE-DS"}
_LICENSE = {"id": 1, "name": "CC0 1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `shapes`."""
    parser.add_argument("--out", required=True, help="folder to write, which must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another world (default 0)")
    parser.add_argument("--train", type=int, default=6000, help="training images (default 6000)")
    parser.add_argument("--val", type=int, default=300, help="validation images (default 300)")
    parser.add_argument("--test", type=int, default=500, help="test images (default 500)")
    parser.add_argument(
        "--asked", type=int, help="training images that questions are asked about, the first ones (default all)"
    )
    parser.add_argument("--nlvr-train", type=int, default=6400, help="training examples of NLVR2 (default 6400)")
    parser.add_argument("--nlvr-dev", type=int, default=400, help="development examples of NLVR2 (default 400)")
    parser.add_argument("--nlvr-test", type=int, default=800, help="test examples of NLVR2 (default 800)")
    parser.add_argument(
        "--order", choices=ORDERS, default=ORDERS[0], help="of the objects in a caption (default reading: row by row)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")


def run(args: argparse.Namespace) -> None:
    """Write the whole raw data set; the same bytes for the same options. Raises UserError on bad options."""
    for name in ("train", "val", "test"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: must be at least 1 image")
    asked = args.train if args.asked is None else args.asked
    if not 1 <= asked <= args.train:
        raise UserError(f"--asked {asked}: must be from 1 to the {args.train} of --train")
    group = PAIRS * STATEMENTS
    for name in ("nlvr_train", "nlvr_dev", "nlvr_test"):
        if getattr(args, name) < group or getattr(args, name) % group:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be a positive multiple of {group}")
    sampler = SceneSampler(_random(args.seed, "scenes"))
    with output_folder(Path(args.out), _OURS, args.overwrite) as folder:
        first_id = 1
        for split in ("train", "val", "test"):
            count = getattr(args, split)
            scenes = [sampler.draw() for _ in range(count)]
            _write_coco(folder, f"{split}2014", scenes, first_id, args.seed, args.order)
            _write_vqa(folder, f"{split}2014", scenes[:asked] if split == "train" else scenes, first_id, args.seed)
            first_id += count
        for split, count in (("train", args.nlvr_train), ("dev", args.nlvr_dev), ("test1", args.nlvr_test)):
            _write_nlvr2(folder, split, count // group, sampler, args.seed)
    print(f"{args.out}: {args.train} + {args.val} + {args.test} images with captions and questions, ", end="")
    print(
        f"{args.nlvr_train} + {args.nlvr_dev} + {args.nlvr_test} NLVR2 examples (train + val + test), seed {args.seed}"
    )


def _random(seed: int, *purpose: str) -> random.Random:
    """A separate generator for each purpose, so that the draws of one do not depend on the number of another's."""
    return random.Random(":".join((str(seed), *purpose)))


def _write_coco(folder: Path, subset: str, scenes: Sequence[Scene], first_id: int, seed: int, order: str) -> None:
    """Images, captions and scenes of one split; image ids continue from split to split."""
    names = [f"COCO_{subset}_{first_id + index:012d}.png" for index in range(len(scenes))]
    _write_images(folder / "images" / subset, names, scenes, _random(seed, "pictures", subset))
    words = _random(seed, "captions", subset)
    annotations = [
        {"id": (first_id + index) * 5 + number, "image_id": first_id + index, "caption": text}
        for index, scene in enumerate(scenes)
        for number, text in enumerate(captions(scene, words, order))
    ]
    images = [
        {"id": first_id + index, "file_name": name, "width": SIDE, "height": SIDE, "license": 1}
        for index, name in enumerate(names)
    ]
    _write_json(
        folder / "annotations" / f"captions_{subset}.json",
        {"info": _INFO, "licenses": [_LICENSE], "images": images, "annotations": annotations},
    )
    contents = [
        {"image_id": first_id + index, "objects": [thing._asdict() for thing in scene]}
        for index, scene in enumerate(scenes)
    ]
    _write_json(
        folder / "annotations" / f"scenes_{subset}.json",
        {"info": _INFO, "license": _LICENSE, "order": order, "scenes": contents},
    )


def _write_vqa(folder: Path, subset: str, scenes: Sequence[Scene], first_id: int, seed: int) -> None:
    """Questions about the images of one split, and their answers."""
    asked, answered = [], []
    people = _random(seed, "answers", subset)
    for number, question in _numbered(questions(scenes, _random(seed, "questions", subset)), first_id):
        image_id = first_id + question.scene
        asked.append({"image_id": image_id, "question": question.text, "question_id": number})
        answered.append(_annotation(question, image_id, number, ten_answers(question, people)))
    shared = {"info": _INFO, "license": _LICENSE, "data_type": "mscoco", "data_subtype": subset}
    _write_json(
        folder / "vqa" / f"v2_OpenEnded_mscoco_{subset}_questions.json",
        {**shared, "task_type": "Open-Ended", "questions": asked},
    )
    _write_json(folder / "vqa" / f"v2_mscoco_{subset}_annotations.json", {**shared, "annotations": answered})


def _numbered(asked: Sequence[Question], first_id: int) -> Iterator[tuple[int, Question]]:
    """Question ids as in VQA v2: the image id and three digits."""
    last, number = -1, 0
    for question in asked:
        number = number + 1 if question.scene == last else 0
        last = question.scene
        yield (first_id + question.scene) * 1000 + number, question


def _annotation(question: Question, image_id: int, number: int, answers: Sequence[str]) -> dict[str, Any]:
    people = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": place} for place, answer in enumerate(answers, 1)
    ]
    return {
        "question_type": KINDS[question.kind].question_type,
        "answer_type": KINDS[question.kind].answer_type,
        "multiple_choice_answer": question.answer,
        "answers": people,
        "image_id": image_id,
        "question_id": number,
    }


def _write_nlvr2(folder: Path, split: str, sets: int, sampler: SceneSampler, seed: int) -> None:
    """Images and examples of one split, named as lil-lab/nlvr names them."""
    rng = _random(seed, "nlvr2", split)
    names: list[str] = []
    scenes: list[Scene] = []
    lines: list[str] = []
    for number in range(sets):
        group = pair_set(number, sampler, rng)
        for pair, sides in enumerate(group.pairs):
            stems = [f"{split}-{number}-{pair}-img{side}.png" for side in (0, 1)]
            names += stems
            scenes += sides
            for statement, sentence in enumerate(group.sentences):
                example = {
                    "identifier": f"{split}-{number}-{pair}-{statement}",
                    "sentence": sentence,
                    "label": str(group.labels[statement][pair]),
                    "left_url": f"https://example.org/{stems[0]}",
                    "right_url": f"https://example.org/{stems[1]}",
                }
                lines.append(json.dumps(example))
    _write_images(folder / "nlvr2" / "images" / split, names, scenes, _random(seed, "pictures", split))
    (folder / "nlvr2" / f"{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_images(folder: Path, names: Sequence[str], scenes: Sequence[Scene], rng: random.Random) -> None:
    folder.mkdir(parents=True)
    noise = np.random.default_rng(rng.getrandbits(64))
    for start in range(0, len(scenes), _DRAWN_AT_ONCE):
        end = start + _DRAWN_AT_ONCE
        for name, image in zip(names[start:end], draw(scenes[start:end], noise), strict=True):
            (folder / name).write_bytes(to_png(image))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, separators=(",", ":")), encoding="utf-8")
