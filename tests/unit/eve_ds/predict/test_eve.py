"""A trained model in Python: what ``load_task_model`` computes on the same pixels, one by one as in batches."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from eve_ds.data.batch_reader import collate
from eve_ds.predict import EVE
from eve_ds.tasks import load_task_model
from preprocessing.errors import UserError
from preprocessing.shards.schema import ANSWER_LIST
from preprocessing.text.tokenizer import FILE_NAME, Tokenizer, train_tokenizer
from tests.support.predicting import ANSWERS, exported, image_files
from tests.support.shards import EVAL, tiny_tokenizer

QUESTIONS = ["is the square red", "what color has it", "both", "left or right of image 3 shows it"]
TASK_OF = {"vqa": "vqa", "retrieval": "retrieval", "nlvr_plain": "nlvr", "nlvr_biattn": "nlvr"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model folder of a task, made once."""
    made: dict[str, Path] = {}

    def of(task: str) -> Path:
        if task not in made:
            made[task] = exported(tmp_path_factory.mktemp(task), task)
        return made[task]

    return of


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return image_files(tmp_path_factory.mktemp("images"), 4)


def reference_batch(images: list[str], texts: list[str], folder: Path) -> Any:
    tokenizer = Tokenizer.load(folder)
    rows = [
        {"images": EVAL(Path(image).read_bytes(), 0), "text_ids": np.array(tokenizer.encode(text, 12))}
        for image, text in zip(images, texts, strict=True)
    ]
    return collate(rows, tokenizer.pad_id, 12)


def test_answers_are_those_of_the_model(folder: Callable[[str], Path], images: list[str]) -> None:
    path = folder("vqa")
    batch = reference_batch(images, QUESTIONS, path)
    with torch.no_grad():
        expected = (
            load_task_model("vqa", path).predict(batch["images"], batch["text_ids"], batch["text_mask"]).sigmoid()
        )
    found = EVE.from_pretrained(path, batch_size=3).answer(images, QUESTIONS, top=len(ANSWERS))
    for row, best in zip(expected, found, strict=True):
        assert [one.answer for one in best] == [ANSWERS[i] for i in row.argsort(descending=True)]
        assert [one.probability for one in best] == pytest.approx(row.sort(descending=True).values.tolist(), abs=1e-5)


def test_matches_and_features_are_those_of_the_model(folder: Callable[[str], Path], images: list[str]) -> None:
    path = folder("retrieval")
    batch = reference_batch(images, QUESTIONS, path)
    model = load_task_model("retrieval", path)
    with torch.no_grad():
        image, text = model.encode_image(batch["images"]), model.encode_text(batch["text_ids"], batch["text_mask"])
        fits = model.match(batch["images"], batch["text_ids"], batch["text_mask"]).softmax(dim=1)[:, 1]
    eve = EVE.from_pretrained(path, batch_size=3)
    np.testing.assert_allclose(eve.image_features(images), image.numpy(), atol=1e-5)
    np.testing.assert_allclose(eve.text_features(QUESTIONS), text.numpy(), atol=1e-5)
    found = eve.match(images, QUESTIONS)
    assert [one.probability for one in found] == pytest.approx(fits.tolist(), abs=1e-5)
    assert [one.similarity for one in found] == pytest.approx((image * text).sum(dim=1).tolist(), abs=1e-5)


@pytest.mark.parametrize("task", ["nlvr_plain", "nlvr_biattn"])
def test_judgements_are_those_of_the_model(folder: Callable[[str], Path], images: list[str], task: str) -> None:
    path = folder(task)
    left, right = (reference_batch(side, QUESTIONS, path) for side in (images, images[::-1]))
    pair = (left["images"], right["images"])
    with torch.no_grad():
        logits = load_task_model("nlvr", path).predict(pair, left["text_ids"], left["text_mask"])
    found = EVE.from_pretrained(path).judge(images, images[::-1], QUESTIONS)
    assert [one.probability for one in found] == pytest.approx(logits.softmax(dim=1)[:, 1].tolist(), abs=1e-5)
    assert [one.true for one in found] == (logits[:, 1] > logits[:, 0]).tolist()


def test_one_by_one_equals_a_batch(folder: Callable[[str], Path], images: list[str]) -> None:
    vqa, itr, nlvr = (EVE.from_pretrained(folder(task)) for task in ("vqa", "retrieval", "nlvr_biattn"))
    together = vqa.answer(images, QUESTIONS)
    alone = [vqa.answer(*pair) for pair in zip(images, QUESTIONS, strict=True)]
    assert [one.answer for (one,) in together] == [one.answer for (one,) in alone]
    assert [one.probability for (one,) in together] == pytest.approx([one.probability for (one,) in alone], abs=1e-5)
    single = [itr.match(images[0], text) for text in QUESTIONS]
    np.testing.assert_allclose(itr.match(images[0], QUESTIONS), single, atol=1e-5)
    np.testing.assert_allclose(itr.image_features(images)[2], itr.image_features(images[2]), atol=1e-5)
    np.testing.assert_allclose(itr.text_features(QUESTIONS)[1], itr.text_features(QUESTIONS[1]), atol=1e-5)
    assert itr.image_features([]).shape == (0, 16)
    judged = nlvr.judge(images[0], images[1], QUESTIONS)
    alone_judged = [nlvr.judge(images[0], images[1], text) for text in QUESTIONS]
    np.testing.assert_allclose(judged, alone_judged, atol=1e-5)


def test_an_image_may_be_a_path_bytes_a_pillow_image_or_an_array(
    folder: Callable[[str], Path], images: list[str]
) -> None:
    eve = EVE.from_pretrained(folder("retrieval"))
    content = Path(images[0]).read_bytes()
    opened = Image.open(io.BytesIO(content))
    array = np.asarray(Image.open(io.BytesIO(content)))
    vectors = eve.image_features([images[0], Path(images[0]), content, opened, array])
    assert (vectors == vectors[0]).all()


def test_a_pillow_image_is_turned_upright_like_its_file(folder: Callable[[str], Path], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (20, 40, 4), dtype=np.uint8), "RGBA")
    noise.save(tmp_path / "turned.png", exif=exif)
    eve = EVE.from_pretrained(folder("retrieval"))
    turned = Image.open(tmp_path / "turned.png")
    assert (eve.pixels([turned]) == eve.pixels([tmp_path / "turned.png"])).all()


def test_a_long_text_is_cut_with_a_warning(
    folder: Callable[[str], Path], images: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    eve = EVE.from_pretrained(folder("retrieval"))
    with caplog.at_level(logging.WARNING, "eve_ds"):
        eve.text_features("a square")
        assert not caplog.records
        eve.text_features("a very long text " * 20)
    assert "longer than the model's 12 tokens" in caplog.text


BAD_INPUT = {
    "no such image": (lambda eve, image: eve.answer("gone.png", "what"), "gone.png: No such file"),
    "not an image": (lambda eve, image: eve.answer(__file__, "what"), "its format is unknown"),
    "a folder": (lambda eve, image: eve.answer(Path(image).parent, "what"), "Is a directory"),
    "an array of floats": (lambda eve, image: eve.answer(np.zeros((8, 8, 3)), "what"), "of float64, not"),
    "another object": (lambda eve, image: eve.answer(7, "what"), "is of type int"),
    "an empty question": (lambda eve, image: eve.answer(image, "  "), "is empty"),
    "lists of two lengths": (lambda eve, image: eve.answer([image], ["a", "b"]), "1 images and 2 questions"),
    "no answer at all": (lambda eve, image: eve.answer(image, "what", top=0), "top=0"),
    "another task": (lambda eve, image: eve.match(image, "a square"), "has the head of vqa, not of retrieval"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named(folder: Callable[[str], Path], images: list[str], case: str) -> None:
    call, message = BAD_INPUT[case]
    eve = EVE.from_pretrained(folder("vqa"))
    with pytest.raises(UserError) as caught:
        call(eve, images[0])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_large_image_is_refused_unless_allowed(folder: Callable[[str], Path], images: list[str]) -> None:
    for image in (images[0], Image.open(images[0])):
        with pytest.raises(UserError, match=r"32 x 32 pixels, max_pixels=1000.*raise max_pixels"):
            EVE.from_pretrained(folder("vqa"), max_pixels=1000).answer(image, "what")


def test_the_limits_of_the_training_hold(tmp_path: Path, images: list[str]) -> None:
    path = exported(tmp_path, "vqa")
    (path / "hashes.json").unlink()
    config = yaml.safe_load((path / "config.yaml").read_text())
    (path / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"max_pixels": 900}}))
    with pytest.raises(UserError, match=r"32 x 32 pixels, max_pixels=900"):
        EVE.from_pretrained(path).answer(images[0], "what")
    for number in ("900", True, 0):
        (path / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"max_pixels": number}}))
        with pytest.raises(UserError, match=rf"config.yaml: data.max_pixels={number!r} is no number of pixels"):
            EVE.from_pretrained(path)
    words = [f"{letter}{other} word" for letter in "abcdefghijklmnopqrst" for other in "abcdefghijklmnopqrst"]
    train_tokenizer(words, 600).save(path)
    with pytest.raises(UserError, match=r"has ids up to \d+, the model has 400 entries"):
        EVE.from_pretrained(path, max_pixels=10_000).answer(images[0], "what")


def test_a_model_without_what_it_needs_is_named(tmp_path: Path, images: list[str]) -> None:
    pretrained = exported(tmp_path / "pretrained", "pretrain")
    with pytest.raises(UserError, match="has no head of vqa, nlvr or retrieval; fine-tune it"):
        EVE.from_pretrained(pretrained)
    path = exported(tmp_path / "vqa", "vqa")
    (path / "hashes.json").unlink()
    (path / ANSWER_LIST).write_text(json.dumps(["yes"]))
    with pytest.raises(UserError, match=r"lists 1 answers, the model's head has 7"):
        EVE.from_pretrained(path).answer(images[0], "what")
    (path / ANSWER_LIST).unlink()
    with pytest.raises(UserError, match=rf"{ANSWER_LIST}: no such file"):
        EVE.from_pretrained(path).answer(images[0], "what")
    (path / FILE_NAME).unlink()
    (path / ANSWER_LIST).write_text(json.dumps(ANSWERS))
    with pytest.raises(UserError, match=rf"has no {FILE_NAME}"):
        EVE.from_pretrained(path).answer(images[0], "what")
    tiny_tokenizer(tmp_path)
    assert EVE.from_pretrained(path, tokenizer=tmp_path).answer(images[0], "what")
    for options, message in (({"device": "tpu"}, "device=tpu"), ({"batch_size": 0}, "batch_size=0")):
        with pytest.raises(UserError, match=message):
            EVE.from_pretrained(path, **options)


def test_pretraining_with_contrast_and_matching_gives_a_retrieval_model(tmp_path: Path, images: list[str]) -> None:
    eve = EVE.from_pretrained(exported(tmp_path, "itc_itm"))
    assert eve.tasks == ("retrieval",)
    assert np.linalg.norm(eve.image_features(images), axis=1) == pytest.approx(np.ones(4))


ASSETS = Path(__file__).resolve().parents[3] / "assets"


@pytest.mark.parametrize(("published", "output"), [(True, "itc_image"), (False, "itc_image_normed")])
def test_published_weights_give_the_vectors_of_the_published_code(published: bool, output: str) -> None:
    options = {"vlmo_config": ASSETS / "vlmo_config.json", "image_size": 32, "published": published}
    eve = EVE.from_pretrained(ASSETS / "retrieval.safetensors", "cpu", **options)
    with np.load(ASSETS / "outputs.npz") as golden:
        np.testing.assert_allclose(eve.vectors_of(torch.from_numpy(golden["image"])), golden[output], atol=1e-4)


@pytest.mark.parametrize("name", ["vqa", "nlvr_plain", "nlvr_biattn", "retrieval"])
def test_the_task_of_published_weights_is_read_from_their_tensors(name: str) -> None:
    path = ASSETS / f"{name}.safetensors"
    eve = EVE.from_pretrained(path, vlmo_config=ASSETS / "vlmo_config.json", image_size=32)
    assert eve.tasks == (TASK_OF[name],)


WITHOUT_DEEPSPEED = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "deepspeed":
            raise ImportError("DeepSpeed is not installed")
sys.meta_path.insert(0, Refuse())
from eve_ds.predict.__main__ import main
main(["answer", sys.argv[2], "what color", "--checkpoint", sys.argv[1], "--json"])
slow = {"torch._dynamo", "torch._inductor", "deepspeed", "jsonargparse", "wandb", "matplotlib", "flask", "waitress"}
print(sorted(slow & set(sys.modules)))
"""


def test_it_runs_without_deepspeed_and_imports_nothing_slow(folder: Callable[[str], Path], images: list[str]) -> None:
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, str(folder("vqa")), images[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers, imported = done.stdout.splitlines()
    assert [one["answer"] for one in json.loads(answers)["answers"]]
    assert imported == "[]"
