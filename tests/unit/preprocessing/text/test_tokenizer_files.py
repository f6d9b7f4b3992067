"""Tokenizers of other families, found by the names of their files, and vocabularies of an exact size."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

from preprocessing.errors import UserError
from preprocessing.text.tokenizer import SPECIAL, Tokenizer, train_tokenizer
from tests.unit.preprocessing.helpers import command

TEXTS = [
    "A red circle at the top left, two objects",
    "a blue square's edge and a red cross -- don't ask",
    "Is there a green triangle? 3.5 meters",
    "the quick brown fox jumps over the lazy dog",
    "dogs and foxes, squares and circles, tops and edges",
] * 9
ODD = ["  two   spaces ", "a [MASK] b", "<pad> [CLS] </s>", "Ünïcödé ﬁne №5", "日本語 text", "", "\ttab"]
PIECES: dict[str, Any] = {
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": 2,
    "eos_id": 3,
    "pad_piece": "<pad>",
    "bos_piece": "[CLS]",
    "eos_piece": "[SEP]",
    "control_symbols": ["[MASK]"],
}


def train_sentencepiece(file: Path, **options: Any) -> sentencepiece.SentencePieceProcessor:
    settings = {"vocab_size": 60, "model_type": "unigram", "minloglevel": 2} | PIECES | options
    with open(file, "wb") as model:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=model, **settings)
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
@pytest.mark.parametrize("byte_fallback", [False, True])
@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_models_give_the_same_ids(
    tmp_path: Path, model_type: str, byte_fallback: bool, prefix: bool
) -> None:
    """ALBERT's and XLNet's spiece.model, LLaMA's tokenizer.model: a folder that holds one, or the file itself."""
    size = 400 if byte_fallback else 120  # at most: the texts hold less
    own = train_sentencepiece(
        tmp_path / "spiece.model",
        model_type=model_type,
        byte_fallback=byte_fallback,
        add_dummy_prefix=prefix,
        vocab_size=size,
        hard_vocab_limit=False,
    )
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special_ids == (0, 1, 2, 3, 4) and loaded.vocab_size == own.get_piece_size()
    for text in [*TEXTS[:5], *ODD]:
        ids = loaded.encode(text, 1 << 20)[1:-1]
        assert not set(ids) & {0, 2, 3, 4}
        if "[" not in text:  # there the split that keeps control tokens out may cut elsewhere
            assert ids == own.encode(text), text
    assert loaded.decode(loaded.encode("a red circle, two dogs", 40)) == "a red circle, two dogs"
    saved = loaded.save(tmp_path / "saved")
    assert Tokenizer.load(saved).encode(TEXTS[1], 40) == loaded.encode(TEXTS[1], 40)


def test_tokens_added_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "spiece.model", control_symbols=[])
    with pytest.raises(UserError, match=r"spiece\.model: has neither token \[MASK\] nor <mask>"):
        Tokenizer.load(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mask>": 60}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.mask_id, loaded.vocab_size) == (60, 61)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<mask>": 500}))
    with pytest.raises(UserError, match=r"added_tokens\.json: <mask> has id 500"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("lower", [True, False])
def test_bert_vocabularies(tmp_path: Path, lower: bool) -> None:
    """bert-base-uncased and -cased: vocab.txt, with tokenizer_config.json beside it."""
    trained = BertWordPieceTokenizer(lowercase=lower, strip_accents=lower)
    trained.train_from_iterator(TEXTS, vocab_size=150, show_progress=False, special_tokens=list(SPECIAL))
    trained.save_model(str(tmp_path))
    if not lower:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    reference = BertWordPieceTokenizer(str(tmp_path / "vocab.txt"), lowercase=lower)
    for place in (tmp_path, tmp_path / "vocab.txt"):
        loaded = Tokenizer.load(place)
        assert loaded.special_ids == (0, 1, 2, 3, 4) and loaded.vocab_size == 150
        for text in [*TEXTS[:5], "Ünïcödé", "日本語 text", ""]:
            assert loaded.encode(text, 99) == reference.encode(text).ids
    assert loaded.mask_id not in loaded.encode("a [MASK] b", 99)
    assert loaded.decode(loaded.encode("a red circle", 99)) == "a red circle"


def test_byte_level_vocabularies(tmp_path: Path) -> None:
    """roberta-base: vocab.json and merges.txt."""
    trained = ByteLevelBPETokenizer(add_prefix_space=True)
    trained.train_from_iterator(
        TEXTS, vocab_size=320, show_progress=False, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    trained.save_model(str(tmp_path))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.special_ids == (1, 3, 0, 2, 4) and loaded.vocab_size == 320
    for text in (*TEXTS[:5], "Ünïcödé 日本語"):
        assert loaded.encode(text, 99)[1:-1] == trained.encode(text).ids
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"merges\.txt: no such file; it belongs to"):
        Tokenizer.load(tmp_path)


def saved(folder: Path, kind: str) -> Tokenizer:
    """A tokenizer of this kind, loaded from the files that others write."""
    if kind == "trained":
        return train_tokenizer(TEXTS, 300)
    if kind == "bert":
        word_piece = BertWordPieceTokenizer()
        word_piece.train_from_iterator(TEXTS, vocab_size=80, show_progress=False, special_tokens=list(SPECIAL))
        word_piece.save_model(str(folder))
    elif kind == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        byte_level = ByteLevelBPETokenizer(add_prefix_space=True)
        byte_level.train_from_iterator(TEXTS, vocab_size=290, show_progress=False, special_tokens=special)
        byte_level.save_model(str(folder))
    else:
        train_sentencepiece(
            folder / "spiece.model", model_type=kind, byte_fallback=True, vocab_size=400, hard_vocab_limit=False
        )
    return Tokenizer.load(folder)


@pytest.mark.parametrize("kind", ["trained", "bert", "roberta", "unigram", "bpe"])
def test_where_words_begin(tmp_path: Path, kind: str) -> None:
    """As the library itself finds, by its pre-tokenizer; punctuation begins a word in all of them."""
    tokenizer = saved(tmp_path, kind)
    continues = tokenizer.continues_word()
    assert len(continues) == tokenizer.vocab_size and not any(continues[index] for index in tokenizer.special_ids)
    for text in ("the quick brown foxes jumped over circular edges", "Ünïcödé jumps"):
        found = tokenizer._backend.encode(text, add_special_tokens=False)
        words = found.word_ids
        assert len(words) > len(set(words))  # some word has several pieces
        known = [place for place, index in enumerate(found.ids) if index != tokenizer.unk_id and place]
        assert [continues[found.ids[place]] for place in known] == [words[place] == words[place - 1] for place in known]
    ids = tokenizer.encode("a cross, two dogs", 40)
    comma = next(index for index in ids if "," in tokenizer.tokens([index])[0])
    assert not continues[comma]
    ids = tokenizer.encode("a cross ,two dogs", 40)
    after = 1 + next(place for place, index in enumerate(ids) if "," in tokenizer.tokens([index])[0])
    assert continues[ids[after]] == (kind != "bert")  # letters right after it are another word in WordPiece alone


def test_ordinary_entries_are_all_but_the_special_ones(tmp_path: Path) -> None:
    train_sentencepiece(tmp_path / "spiece.model", control_symbols=["[MASK]", "[USER]"])
    tokenizer = Tokenizer.load(tmp_path)
    special = {*tokenizer.special_ids, tokenizer._backend.token_to_id("[USER]")}
    assert len(special) == 6 and set(tokenizer.ordinary_ids()) == set(range(tokenizer.vocab_size)) - special
    assert tokenizer.ordinary_ids() == sorted(tokenizer.ordinary_ids())


def test_a_tokenizer_that_marks_the_ends_of_words_is_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(SPECIAL))
    with pytest.raises(UserError, match="no mark where words begin"):
        Tokenizer(backend).continues_word()
    words = {name: index for index, name in enumerate([*SPECIAL, "red", "circle"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    assert not any(Tokenizer(backend).continues_word())


def test_a_normalizer_may_set_the_mark_of_words() -> None:
    """LLaMA's files: it puts the mark before the text and in place of spaces, and nothing cuts the text."""
    mark = "\N{LOWER ONE EIGHTH BLOCK}"
    words = {name: index for index, name in enumerate([*SPECIAL, f"{mark}a", "b", f"{mark}b", mark])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(words, [], unk_token="[UNK]"))
    normalizers = tokenizers.normalizers
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(mark), normalizers.Replace(" ", mark)])
    backend.add_special_tokens(list(SPECIAL))
    assert Tokenizer(backend).continues_word() == [False] * 6 + [True, False, False]


def test_the_library_s_own_file_comes_first(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, "wrong"]))
    words = {name: index for index, name in enumerate([*SPECIAL, "right"])}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).tokens([5]) == ["right"]


def test_broken_and_unsuitable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"\xff\xff no protobuf")
    with pytest.raises(UserError, match=r"x\.model: is no SentencePiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "y.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"holds x\.model and y\.model; name the one"):
        Tokenizer.load(tmp_path)
    train_sentencepiece(tmp_path / "y.model", model_type="char", vocab_size=40, hard_vocab_limit=False)
    with pytest.raises(UserError, match=r"y\.model: is neither a Unigram nor a BPE model"):
        Tokenizer.load(tmp_path / "y.model")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\na\n")  # GPT-like: nothing to mask with
    with pytest.raises(UserError, match=r"vocab\.txt: has neither token \[MASK\] nor <mask>"):
        Tokenizer.load(tmp_path / "vocab.txt")
    (tmp_path / "vocab.json").write_text("[]")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"vocab\.json: is no vocab\.json"):
        Tokenizer.load(tmp_path / "vocab.json")
    (tmp_path / "vocab.json").write_text('{"image": 0, "s": 1}')  # tokenizers 0.23 panics at a merge that it lacks
    (tmp_path / "merges.txt").write_text("#version: 0.2\nimage s\n")
    with pytest.raises(UserError, match=r"vocab\.json: is no vocab\.json \(.+\); train another"):
        Tokenizer.load(tmp_path / "vocab.json")


def words_of(count: int) -> list[str]:
    """Lines over `count` different words of random letters."""
    draw = random.Random(0)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(4, 10))) for _ in range(count)]
    return [" ".join(draw.sample(words, 10)) for _ in range(count // 2)]


@pytest.mark.parametrize("size", [3000, pytest.param(64_000, marks=pytest.mark.long)])
def test_exactly_as_many_entries_as_asked_for(size: int) -> None:
    assert train_tokenizer(words_of(size), size).vocab_size == size


def test_fewer_entries_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n")
    done = command("tokenizer", "train", "--text", tmp_path / "a.txt", "--vocab-size", 64_000, "--out", tmp_path)
    assert done.returncode == 0 and "tokens of 64000: the texts hold no more" in done.stdout


def test_inspect_accepts_uris(tmp_path: Path, refuse: Callable[..., str]) -> None:
    train_sentencepiece(tmp_path / "tokenizer.model")
    done = command("tokenizer", "inspect", tmp_path, "a red circle")
    assert "60 tokens; pad 0, unk 1, cls 2, sep 3, mask 4" in done.stdout
    assert "back to text: a red circle" in done.stdout
    assert "no such file" in refuse("tokenizer", "inspect", tmp_path / "none", "a")
