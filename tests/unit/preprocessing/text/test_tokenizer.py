import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from preprocessing.errors import UserError
from preprocessing.text.tokenizer import SPECIAL, Tokenizer, train_tokenizer
from tests.unit.preprocessing.helpers import command, convert

TEXTS = ["A red circle at the top left", "two objects: a blue square and a red cross", "Is there a green triangle?"] * 9


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def test_special_tokens_come_first(tokenizer: Tokenizer) -> None:
    assert tokenizer.special_ids == (0, 1, 2, 3, 4)
    assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert tokenizer.vocab_size <= 400
    assert tokenizer.tokens([0, 1, 2, 3, 4]) == list(SPECIAL)


def test_frequent_words_are_one_token_wherever_they_stand(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("red circle", 9)) == len(tokenizer.encode("Circle RED", 9)) == 4


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, 1 << 20)
    assert ids[0] == tokenizer.cls_id and ids[-1] == tokenizer.sep_id
    assert not set(ids[1:-1]) & set(tokenizer.special_ids)
    normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()])
    assert tokenizer.decode(ids) == normalizer.normalize_str(text).strip()


def test_truncation_keeps_the_end_mark(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode(TEXTS[0], 99)
    assert tokenizer.encode(TEXTS[0], 4) == [*whole[:3], tokenizer.sep_id]
    with pytest.raises(ValueError, match="max_length 1"):
        tokenizer.encode("a", 1)


def test_special_tokens_in_a_text_are_mere_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.mask_id not in tokenizer.encode("a [MASK]", 40)


def test_decode_shows_special_tokens_when_asked(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a red circle", 9)
    ids[2] = tokenizer.mask_id
    assert tokenizer.decode(ids, skip_special=False) == "[CLS] a [MASK] circle [SEP]"
    assert tokenizer.decode(ids) == "a circle"


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path)
    for place in (tmp_path, file):
        loaded = Tokenizer.load(place)
        assert loaded.path == file
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.encode(TEXTS[1], 30) == tokenizer.encode(TEXTS[1], 30)
    assert loaded.save(tmp_path / "again").read_bytes() == file.read_bytes()


def test_training_depends_on_the_texts_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("\n".join(reversed(TEXTS)))
    for name, source in (("one", "a.txt"), ("two", "b.txt.gz")):  # processes of their own: hash seeds differ
        options = ("--text", tmp_path / source, "--vocab-size", 300, "--out", tmp_path / name)
        assert command("tokenizer", "train", *options).returncode == 0
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()


def test_trains_on_prepared_data(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = raw / "annotations/captions_train2014.json"
    convert("coco", "--annotations", annotations, "--images", raw / "images", "--split", "train", "--out", tmp_path)
    train = ("tokenizer", "train", "--data", tmp_path, "--vocab-size", 300)
    convert(*train, "--out", tmp_path / "tok")
    convert("tokenizer", "inspect", tmp_path / "tok", "a red circle")
    assert "back to text: a red circle" in capsys.readouterr().out


def test_other_families_names_are_understood(tmp_path: Path) -> None:
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 9, "red": 5}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("red", 5) == [0, 5, 2]
    assert (loaded.mask_id, loaded.vocab_size) == (9, 10)


def test_bad_tokenizer_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: is no tokenizer"):
        Tokenizer.load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0}, unk_token="x")).save(str(tmp_path / "t.json"))
    with pytest.raises(UserError, match=r"t\.json: has neither token \[UNK\] nor <unk>"):
        Tokenizer.load(tmp_path / "t.json")


def test_bad_training_input_is_refused(tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    end = ("--vocab-size", 300, "--out", tmp_path / "tok")
    assert "no text at all" in refuse("tokenizer", "train", "--text", tmp_path / "empty.txt", *end)
    assert "no such file" in refuse("tokenizer", "train", "--text", tmp_path / "none.txt", *end)
    assert "bad.gz: cannot be read" in refuse("tokenizer", "train", "--text", tmp_path / "bad.gz", *end)
    assert "--data or --text" in refuse("tokenizer", "train", *end)
    assert "at least 261" in refuse("tokenizer", "train", "--text", tmp_path / "empty.txt", "--vocab-size", 9, *end[2:])


def test_difference(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tokenizer.save(tmp_path)
    assert tokenizer.difference(Tokenizer.load(file)) is None
    other = train_tokenizer(["quite another text, with words of its own"], 300)
    assert tokenizer.difference(other) == f"the one has {tokenizer.vocab_size} entries, the other {other.vocab_size}"
    stored = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = stored["model"]["vocab"]
    a, b = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(stored), encoding="utf-8")
    assert tokenizer.difference(Tokenizer.load(file)) == f"entry 10 is {a!r} in the one and {b!r} in the other"
    for entry in stored["added_tokens"]:
        entry["id"] = {0: 1, 1: 0}.get(entry["id"], entry["id"])
    vocabulary["[PAD]"], vocabulary["[UNK]"] = 1, 0
    file.write_text(json.dumps(stored), encoding="utf-8")
    assert tokenizer.difference(Tokenizer.load(file)) == "[PAD] is 0 in the one and 1 in the other"
