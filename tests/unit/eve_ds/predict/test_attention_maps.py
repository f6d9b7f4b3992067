"""Attention maps: what softmax(q k' / sqrt(d)) gives by hand, cut to words and patches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from eve_ds.model.block import SoftBlock, key_bias
from eve_ds.model.moe import IMAGE, TEXT
from eve_ds.predict import EVE
from eve_ds.predict.attention_maps import attention_weights, words_of
from eve_ds.tasks import Task
from preprocessing.errors import UserError
from preprocessing.text.tokenizer import Tokenizer, train_tokenizer
from tests.support.predicting import exported, image_files

TEXT_OF = "what color is the square"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], EVE]:
    made: dict[str, EVE] = {}

    def of(task: str) -> EVE:
        if task not in made:
            made[task] = EVE.from_pretrained(exported(tmp_path_factory.mktemp(task), task))
            for name in made[task].tasks:
                with torch.no_grad():
                    for block in made[task].task(name).backbone.blocks:  # so that some tokens get much more than others
                        block.attention.qkv.weight.mul_(4)
                        block.attention.qkv.q_bias.normal_(generator=torch.Generator().manual_seed(0))
        return made[task]

    return of


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> str:
    return image_files(tmp_path_factory.mktemp("images"), 1)[0]


@torch.no_grad()
def by_hand(task: Task, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """[S, N, N], head by head from the weights; the blocks are called one by one."""
    backbone, config = task.backbone, task.config
    parts = [backbone.image_embedding(pixels), backbone.text_embedding(ids)]
    x = backbone.embedding_norm(torch.cat(parts, dim=1))
    images = parts[0].shape[1]
    valid = torch.cat([torch.ones(1, images, dtype=torch.bool), mask], dim=1)
    modality = torch.tensor([IMAGE] * images + [TEXT] * ids.shape[1])
    d = config.dim // config.num_heads
    found = []
    for block in backbone.blocks:
        qkv = block.attention.qkv
        own = block.attention_norm(x)[0]
        q = own @ qkv.weight[: config.dim].T + qkv.q_bias
        k = own @ qkv.weight[config.dim : 2 * config.dim].T
        heads = []
        for head in range(config.num_heads):
            columns = slice(head * d, (head + 1) * d)
            powers = (q[:, columns] @ k[:, columns].T / d**0.5).exp() * valid
            heads.append(powers / powers.sum(dim=1, keepdim=True))
        found.append(torch.stack(heads).mean(dim=0))
        bias = key_bias(valid, x.dtype)
        x = block(x, bias, modality, valid)[0] if isinstance(block, SoftBlock) else block(x, bias, images)
    return torch.stack(found).numpy()


@pytest.mark.parametrize("padding", [0, 3])
def test_weights_are_the_softmax_of_the_scores_and_add_up_to_one(
    model: Callable[[str], EVE], image: str, padding: int
) -> None:
    eve = model("vqa")
    pixels, (ids, mask) = eve.pixels([image]), eve.tokens([TEXT_OF])
    ids, mask = (torch.nn.functional.pad(each, (0, padding)) for each in (ids, mask))
    found = attention_weights(eve.task("vqa"), pixels, ids, mask).numpy()
    expected = by_hand(eve.task("vqa"), pixels, ids, mask)
    assert found.shape == expected.shape == (3, 17 + ids.shape[1], 17 + ids.shape[1])
    assert np.abs(found - expected).max() < 1e-5 and found.std(axis=2).max() > 0.05
    assert np.abs(found.sum(axis=2) - 1).max() < 1e-5
    assert not padding or (found[..., -padding:] == 0).all()


def test_maps_are_the_rows_of_words_and_of_the_first_text_token(model: Callable[[str], EVE], image: str) -> None:
    eve = model("vqa")
    maps = eve.attention(image, TEXT_OF)
    assert maps.words == TEXT_OF.split()
    assert maps.of_word.shape == (3, 5, 4, 4) and maps.of_answer is not None and maps.of_answer.shape == (3, 4, 4)
    weights = attention_weights(eve.task("vqa"), eve.pixels([image]), *eve.tokens([TEXT_OF])).numpy()
    assert np.array_equal(maps.of_answer.reshape(3, 16), weights[:, 17, 1:17])
    places = [(start, stop) for _, start, stop in words_of(eve.tokenizer, eve.tokens([TEXT_OF])[0][0].tolist())]
    for word, (start, stop) in enumerate(places):
        expected = weights[:, 17 + start : 17 + stop, 1:17].mean(axis=1).reshape(3, 4, 4)
        assert np.allclose(maps.of_word[:, word], expected, atol=1e-7)
    assert maps.of_word.min() >= 0 and maps.of_word.sum(axis=(2, 3)).max() < 1


def test_padding_of_published_models_gets_no_attention_and_is_no_word(image: str, tmp_path: Path) -> None:
    eve = EVE.from_pretrained(exported(tmp_path, "vqa"), published=True)
    (ids, mask), pixels = eve.tokens([TEXT_OF]), eve.pixels([image])
    found = attention_weights(eve.task("vqa"), pixels, ids, mask).numpy()
    padding = 12 - ids.shape[1]
    assert padding > 0 and found.shape == (3, 29, 29) and (found[..., -padding:] == 0).all()
    maps = eve.attention(image, TEXT_OF)
    assert maps.words == TEXT_OF.split() and maps.of_word.shape == (3, 5, 4, 4)


def test_the_pass_is_as_before_once_maps_were_made(model: Callable[[str], EVE], image: str) -> None:
    eve = model("vqa")
    before = eve.answer(image, TEXT_OF)
    eve.attention(image, TEXT_OF)
    assert eve.answer(image, TEXT_OF) == before
    assert not any(module._forward_pre_hooks for module in eve.task("vqa").modules())


@pytest.mark.parametrize("task", ["retrieval", "nlvr_plain", "nlvr_biattn"])
def test_every_task_has_maps_and_bi_attention_none_of_the_answer(
    model: Callable[[str], EVE], image: str, task: str
) -> None:
    maps = model(task).attention(image, "a red square")
    assert maps.words == ["a", "red", "square"] and (maps.of_answer is None) == (task == "nlvr_biattn")
    with pytest.raises(UserError, match="not of vqa"):
        model(task).attention(image, "a red square", "vqa")


def test_words_are_whole_and_cover_all_pieces(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sq", "##uare", "a", "?"])
    )
    tokenizer = Tokenizer.load(tmp_path)
    found = words_of(tokenizer, tokenizer.encode("A square zzz?", 12))
    assert found == [("a", 1, 2), ("square", 2, 4), ("[UNK]", 4, 5), ("?", 5, 6)]
    assert words_of(tokenizer, tokenizer.encode("A square", 3)) == [("a", 1, 2)]


def test_a_mark_of_a_word_s_beginning_is_no_word_of_its_own() -> None:
    tokenizer = train_tokenizer(["a square", "what color"] * 9, vocab_size=300)
    ids = tokenizer.encode("a <b> é", 40)
    assert tokenizer.tokens(ids).count("\u0120") > 0
    assert [word for word, _, _ in words_of(tokenizer, ids)] == ["a", "<b", ">", "é"]
