"""A small made run folder, with real images, as the demo leaves one."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

HOSTILE = "<script>alert('x')</script> & \"quotes\""
COLORS = ["crimson", "royalblue", "seagreen", "goldenrod", "orchid"]


def image_of(path: Path, rng: random.Random, masked: bool = False) -> str:
    image = Image.new("RGB", (64, 64), "#f4f1ea")
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(2, 4)):
        x, y = 16 * rng.randrange(4), 16 * rng.randrange(4)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x + 2, y + 2, x + 13, y + 13), fill=rng.choice(COLORS))
    for place in range(16) if masked else ():
        if rng.random() < 0.75:
            x, y = 16 * (place % 4), 16 * (place // 4)
            draw.rectangle((x, y, x + 15, y + 15), fill="#808080")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path.name


def dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def curves(path: Path, steps: int, names: list[str], scores: list[str], rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        loss = 3 * math.exp(-3 * step / steps) + 1
        record: dict[str, Any] = {"step": step, "samples": step * 96, "loss": loss + rng.gauss(0, 0.15)}
        record |= {name: loss / len(names) + rng.gauss(0, 0.1) for name in names}
        record |= {"lr": 2e-3 * min(1, 10 * step / steps) * (1.05 - step / steps), "grad_norm": 1 + rng.random()}
        record |= {"samples_per_second": 350 + rng.gauss(0, 30), "step_seconds": 0.3}
        lines.append(record)
        if step % (steps // 5) == 0:
            losses = {f"val/{name}": loss / len(names) + 0.1 for name in names} | {"val/loss": loss + 0.1}
            lines.append(
                {"step": step, "split": "val", **losses, **{f"val/{name}": 90 * step / steps for name in scores}}
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def pretrain(folder: Path, rng: random.Random) -> None:
    images = [
        {
            kind: image_of(folder / "samples" / f"p{i}_{kind}.png", rng, kind == "masked")
            for kind in ("original", "masked", "rebuilt")
        }
        | {"caption": HOSTILE if i == 0 else f"an image with {i} shapes on it"}
        for i in range(6)
    ]
    words = [
        {"text_masked": ["[CLS]", "a", "[MASK]", " circle", " left", " of", "[MASK]", " square", "[SEP]"],
         "truth": [" red", " a"], "predicted": [" red", " the"]},
        {"text_masked": "two [MASK] shapes", "truth": ["<b>"], "predicted": ["small"]},
    ]  # fmt: skip
    layers = [
        {"layer": n, "counts": [[rng.randint(0, 900) for _ in range(8)], [0, *(rng.randint(0, 90) for _ in range(7))]]}
        for n in (2, 3)
    ]
    dump(folder / "samples" / "samples.json", {"images": images, "words": words, "expert_load": {"layers": layers}})
    curves(folder / "metrics.jsonl", 400, ["mim_loss", "mlm_loss", "aux_loss"], [], rng)
    (folder / "config.yaml").write_text("model:\n  dim: 96\n  note: <b>plain</b>\n")


def retrieval(folder: Path, rng: random.Random) -> None:
    names = [image_of(folder / "samples" / f"image_{i}.png", rng) for i in range(8)]
    images, texts = [], []
    for right in (0, 2, 9):
        found = [{"image": rng.choice(names), "score": 0.9 - 0.1 * r, "correct": r == right} for r in range(5)]
        images.append({"query": f"a caption about {right}", "results": found})
    for _ in range(2):
        found = [{"text": f"caption {r} {HOSTILE}", "score": 0.9 - 0.1 * r, "correct": r < 2} for r in range(5)]
        texts.append({"image": rng.choice(names), "results": found})
    dump(folder / "samples" / "samples.json", {"text_to_image": images, "image_to_text": texts})
    curves(folder / "metrics.jsonl", 60, ["itc_loss", "itm_loss"], ["txt_r1", "txt_r5", "img_r1"], rng)


def answers(folder: Path, rng: random.Random) -> None:
    examples = [
        {"image": image_of(folder / "samples" / f"q{i}.png", rng), "question": f"what color is shape {i}?",
         "predicted": rng.choice(COLORS), "answers": ["crimson", "red"], "score": score}
        for i, score in enumerate((1.0, 0.6, 0.0, 0.0))
    ]  # fmt: skip
    dump(folder / "samples" / "samples.json", {"examples": examples})
    curves(folder / "metrics.jsonl", 60, [], ["soft_accuracy"], rng)


def statements(folder: Path, rng: random.Random) -> None:
    examples = [
        {f"image_{side}": image_of(folder / "samples" / f"s{i}_{side}.png", rng) for side in (0, 1)}
        | {"statement": "both pictures have a circle", "predicted": bool(i % 2), "label": i < 2}
        for i in range(4)
    ]
    dump(folder / "samples" / "samples.json", {"examples": examples})
    curves(folder / "metrics.jsonl", 60, [], ["accuracy", "consistency"], rng)


def make_run(folder: Path) -> Path:
    rng = random.Random(0)
    for name, make in (("pretrain", pretrain), ("itr", retrieval), ("vqa", answers), ("nlvr", statements)):
        make(folder / name, rng)
    dump(folder / "metrics.json", {
        "pretrain": {"loss_first": 4.1, "loss_last": 1.2, "samples_per_second": 351.2, "words_accuracy": 0.921,
                     "words_accuracy_other_image": 0.634, "words_accuracy_oracle": 0.998},
        "retrieval": {"txt_r1": 71.5, "txt_r5": 90.0, "txt_r10": 96.0, "img_r1": 64.5, "img_r5": 88.0, "img_r10": 95.1,
                      "chance_txt_r1": 0.5, "chance_img_r1": 0.5,
                      "from_first_values": {"txt_r1": 55.0, "txt_r5": 81.2, "txt_r10": 89.9,
                                            "img_r1": 47.3, "img_r5": 79.4, "img_r10": 88.8}},
        "vqa": {"overall": 78.3, "majority_baseline": 21.0, "text_only_baseline": 41.7,
                "per_answer_type": {"yes/no": 82.2, "number": 70.1, "other <x>": 76.0},
                "from_first_values": {"overall": 60.4, "per_answer_type": {"yes/no": 66.6, "number": 58.7}}},
        "nlvr": {"accuracy": 0.742, "consistency": 0.311, "chance": 0.5,
                 "from_first_values": {"accuracy": 0.668, "consistency": 0.193}},
        "world_size": 2, "expert_parallel_size": 2, "zero_stage": 2,
    })  # fmt: skip
    dump(folder / "commands.json", [
        {"title": "Make the data set", "command": "python -m preprocessing shapes --out RAW", "seconds": 12.4},
        {"title": "Pre-train", "command": f"deepspeed --module eve_ds.pretrain --note {HOSTILE}", "seconds": 118},
    ])  # fmt: skip
    return folder
