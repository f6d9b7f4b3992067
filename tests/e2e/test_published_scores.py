"""``finetune --evaluate --published`` of files in EVE's naming predicts what ``load_task_model`` computes, which
tests/unit/eve_ds/tasks/test_load_task.py compares with the published code's outputs. (These are of images and token ids
that no image file and no text can give, so that the command cannot read them.)"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eve_ds.tasks import load_task_model
from preprocessing.local_files import dump_json
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.text.tokenizer import SPECIAL, Tokenizer
from tests.support import ranks
from tests.support.shards import ANSWERS, COLORS, make_caption_set, make_nlvr_set, make_vqa_set, pixels_of

ASSETS = Path("tests/assets")
VLMO = str(ASSETS / "vlmo_config.json")
ROWS = 3
RECORDED = "tests.support.recorded"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, texts and a tokenizer of the 211 entries that the files have."""
    root = tmp_path_factory.mktemp("data")
    for make, name in ((make_caption_set, "captions"), (make_vqa_set, "vqa"), (make_nlvr_set, "nlvr")):
        make(root / name, rows=ROWS, split="test")
    answers = [*ANSWERS, *(f"answer {number}" for number in range(3128 - len(ANSWERS)))]
    (root / "vqa" / ANSWER_LIST).write_bytes(dump_json(answers))
    words = "image caption shows a square is the of what color has both pictures show".split() + list(COLORS)
    words += list(map(str, range(10)))
    words += [f"word{number}" for number in range(211 - len(SPECIAL) - len(words))]
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "vocab.txt").write_text("\n".join([*SPECIAL, *words]))
    return root


def command(task: str, file: Path, data: Path, output: Path, *more: str) -> list[str]:
    return [
        f"--task={task}",
        "--evaluate",
        f"--checkpoint={file}",
        f"--vlmo_config={VLMO}",
        f"--data={data}",
        f"--data.tokenizer={data.parent / 'tokenizer'}",
        f"--output_dir={output}",
        "--bs=6",
        "--data.num_workers=0",
        *more,
    ]


def evaluated(task: str, file: Path, data: Path, output: Path, *more: str, world_size: int = 1) -> dict[str, Any]:
    """What the command predicted, rows in the order of the split."""
    ranks.run("eve_ds.finetune", command(f"{RECORDED}:{task}", file, data, output, *more), world_size)
    with np.load(output / "predictions_test.npz") as arrays:
        return dict(arrays)


def images(*indices: int) -> Tensor:
    return torch.stack([torch.from_numpy(pixels_of(i).copy()).permute(2, 0, 1) / 127.5 - 1 for i in indices])


def encoded(texts: list[str], data: Path) -> tuple[Tensor, Tensor]:
    """Ids and mask, the shorter texts padded."""
    ids = [torch.tensor(Tokenizer.load(data.parent / "tokenizer").encode(text, 40)) for text in texts]
    assert all(len(row) > 5 and 1 not in row for row in ids)
    whole = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    return whole, whole != 0


def close(found: Any, expected: Tensor) -> bool:
    return bool(np.allclose(found, expected.detach().numpy(), atol=1e-4, rtol=0))


@pytest.mark.parametrize(("world_size", "published"), [(1, True), (2, True), (1, False)])
def test_retrieval(world_size: int, published: bool, data: Path, tmp_path: Path) -> None:
    data = data / "captions"
    texts = [f"image {i} caption {c} shows a {COLORS[i % 4]} square" for i in range(ROWS) for c in range(2)]
    model: Any = load_task_model("retrieval", ASSETS / "retrieval.safetensors", VLMO, published_routing=True)
    image = model.encode_image(images(*range(ROWS)), normed=not published)
    text = model.encode_text(*encoded(texts, data), normed=not published)
    more = ["--published"] if published else ["--config=itr_coco", "--model.image_size=32"]  # of embed_dim 768
    more += [f"--engine.expert_parallel_size={world_size}"]
    file = ASSETS / "retrieval.safetensors"
    found = evaluated("RETRIEVAL", file, data, tmp_path, *more, world_size=world_size)
    assert found["image_row"].tolist() == list(range(ROWS))
    assert close(found["image_to_text"], image @ text.t())


@pytest.mark.parametrize("capacity", [None, 1.0])  # with a limit the padding that is routed pushes words out
def test_vqa(capacity: float | None, data: Path, tmp_path: Path) -> None:
    data, file = data / "vqa", ASSETS / "vqa.safetensors"
    texts = [
        t.format(i)
        for i in range(ROWS)
        for t in ("is the square of image {} red", "what color has the square of image {}")
    ]
    model: Any = load_task_model("vqa", file, VLMO, capacity_factor=capacity, published_routing=True)
    probability, answer = model.predict(images(0, 0, 1, 1, 2, 2), *encoded(texts, data)).sigmoid().max(dim=1)
    limit = [f"--model.capacity_factor={capacity}"] if capacity else []
    found = evaluated("VQA", file, data, tmp_path, "--published", *limit)
    assert close(found["probability"], probability) and found["answer"].tolist() == answer.tolist()


@pytest.mark.parametrize("head", ["plain", "biattn"])
def test_nlvr(head: str, data: Path, tmp_path: Path) -> None:
    data, file = data / "nlvr", ASSETS / f"nlvr_{head}.safetensors"
    texts = [f"both pictures show a {COLORS[(i + s) % 4]} square" for i in range(ROWS) for s in range(2)]
    model: Any = load_task_model("nlvr", file, VLMO, published_routing=True)
    both = images(0, 0, 1, 1, 2, 2), images(4, 4, 5, 5, 6, 6)
    probability = model.predict(both, *encoded(texts, data)).softmax(dim=1)[:, 1]
    found = evaluated("NLVR", file, data, tmp_path, "--published")
    assert close(found["probability"], probability)


def test_heads_of_pre_training_become_those_of_retrieval(data: Path, tmp_path: Path) -> None:
    names = {"itc_temp": "mitc_temp", "itm_head.weight": "mitm_head.weight", "itm_head.bias": "mitm_head.bias"}
    names |= {f"itc_{side}_proj_head.weight": f"mitc_{side}_proj_head.weight" for side in ("vision", "text")}
    state = {names.get(name, name): tensor for name, tensor in load_file(ASSETS / "retrieval.safetensors").items()}
    save_file(state | {"mlm_head.weight": torch.zeros(2)}, tmp_path / "pretrained.safetensors")
    found = evaluated("RETRIEVAL", tmp_path / "pretrained.safetensors", data / "captions", tmp_path / "run")
    model: Any = load_task_model("retrieval", ASSETS / "retrieval.safetensors", VLMO)
    texts = [f"image {i} caption {c} shows a {COLORS[i % 4]} square" for i in range(ROWS) for c in range(2)]
    image, text = model.encode_image(images(*range(ROWS))), model.encode_text(*encoded(texts, data / "captions"))
    assert close(found["image_to_text"], image @ text.t())


@pytest.mark.parametrize(
    ("task", "name", "changes", "words"),
    [
        ("itr_coco", "retrieval", {"--evaluate": "--published"}, "--published is EVE's evaluation"),
        (
            "itr_coco",
            "vqa",
            {},
            "vqa.safetensors: holds no whole head for task retrieval; missing: itc_vision_proj_head",
        ),
        ("itr_coco", "retrieval", {"--bs=6": "--objective.embed_dim=256"}, "objective.embed_dim=256 was given, but"),
        (
            "itr_coco",
            "retrieval",
            {f"--vlmo_config={VLMO}": "--model.vocab_size=211"},
            "--vlmo_config names EVE's JSON",
        ),
    ],
)
def test_mistakes_are_one_line(
    task: str, name: str, changes: dict[str, str], words: str, data: Path, tmp_path: Path
) -> None:
    options = command(task, ASSETS / f"{name}.safetensors", data / "captions", tmp_path)
    codes, text = ranks.finish(ranks.start("eve_ds.finetune", [changes.get(option, option) for option in options], 1))
    assert codes == [2] and "Traceback" not in text and not list(tmp_path.glob("scores*"))
    (line,) = [line for line in text.splitlines() if line.startswith("error: ")]
    assert words in line and line == text.splitlines()[-1]
