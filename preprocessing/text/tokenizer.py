"""The text tokenizer: trains byte-level BPE, and loads other kinds by file name. A leaf that anyone may import.

tokenizer.json              Hugging Face tokenizers, any kind
vocab.txt                   BERT: WordPiece; lower case unless tokenizer_config.json says `"do_lower_case": false`
vocab.json and merges.txt   GPT-2 and RoBERTa: byte-level BPE
*.model                     SentencePiece (spiece.model, tokenizer.model …): Unigram and BPE
"""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from preprocessing.errors import UserError
from preprocessing.local_files import check_regular, load_json, write_atomic

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0..4 of a trained tokenizer, in this order
FILE_NAME = "tokenizer.json"
# The names of the same five tokens in RoBERTa, BART and others.
_ALIASES = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a character that SentencePiece has no entry for
_MOST_IDS = 10_000_000
_SMALLEST_VOCABULARY = len(SPECIAL) + 256  # byte-level BPE needs every byte


class Tokenizer:
    """Text <-> token ids, with the five special tokens that masked prediction needs.

    Attributes: pad_id, unk_id, cls_id, sep_id, mask_id (int), special_ids (the five as a tuple in that order),
    vocab_size (int: one more than the greatest id), path (of the file it was read from or saved to, else None).
    """

    def __init__(self, backend: tokenizers.Tokenizer, path: Path | None = None) -> None:
        """Wrap `backend`. Raises UserError when one of the special tokens is missing."""
        self._backend = backend
        self.path = path
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # the text "[MASK]" in a caption is not the mask token
        self.special_ids = tuple(self._special_id(name) for name in SPECIAL)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        if self.vocab_size > _MOST_IDS:  # the library would allocate memory for each and be killed
            raise UserError(
                f"{path or 'the tokenizer'}: has a token of id {self.vocab_size - 1}; train another tokenizer"
            )

    def _special_id(self, name: str) -> int:
        for candidate in (name, _ALIASES[name]):
            index = self._backend.token_to_id(candidate)
            if index is not None:
                return int(index)
        where = self.path or "the tokenizer"
        raise UserError(f"{where}: has neither token {name} nor {_ALIASES[name]}; add it, or train another tokenizer")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read one of the files above, given by its path or its folder. Raises UserError naming the file."""
        file = _find_file(Path(path))
        kind = "SentencePiece model" if file.suffix == ".model" else file.name if file.name in _READERS else FILE_NAME
        reader = _READERS.get(file.name, _read_sentencepiece if file.suffix == ".model" else _read_json)
        try:
            backend = reader(file)
        except UserError:
            raise
        except BaseException as error:  # the libraries raise bare Exception for any fault of the file, or panic
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # pyo3's: of no module
                raise
            raise UserError(f"{file}: is no {kind} ({' '.join(str(error).split())}); train another") from error
        return cls(backend, file)

    def encode(self, text: str, max_length: int) -> list[int]:
        """Ids of `[CLS] text [SEP]`, at most `max_length` (>= 2) of them: long text is cut, [SEP] is kept."""
        if max_length < 2:
            raise ValueError(f"max_length {max_length}: must be at least 2, for [CLS] and [SEP]")
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.cls_id, *ids[: max_length - 2], self.sep_id]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; special tokens are left out, or with `skip_special=False` appear by name."""
        special = set(self.special_ids)
        if skip_special:
            return self._decode_text([int(i) for i in ids if int(i) not in special])
        parts: list[str] = []
        run: list[int] = []
        for i in [*map(int, ids), None]:
            if i is not None and i not in special:
                run.append(i)
                continue
            if run:
                parts.append(self._decode_text(run))
                run = []
            if i is not None:
                parts.append(str(self._backend.id_to_token(i)))
        return " ".join(parts)

    def _decode_text(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False)).strip()

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each id ("\u0120" marks a leading space in byte-level BPE)."""
        return [str(self._backend.id_to_token(int(i))) for i in ids]

    def ordinary_ids(self) -> list[int]:
        """All ids that have an entry but those of special tokens, ascending."""
        added = self._backend.get_added_tokens_decoder()
        special = {*self.special_ids, *(index for index, token in added.items() if token.special)}
        return sorted(set(self._backend.get_vocab(with_added_tokens=True).values()) - special)

    def continues_word(self) -> list[bool]:
        """[vocab_size] Whether an entry belongs to the word of the token before it; never a special token.

        Where words begin with a mark (byte-level BPE, SentencePiece), an entry continues one if it has no mark and
        begins with a letter, a digit, or a byte of a longer character. So punctuation begins a word, to which letters
        that follow without a space belong. In WordPiece the entries that continue a word have a prefix ("##"), and
        punctuation is a word of its own. In a word-level vocabulary none continues one.

        Raises:
            UserError: the tokenizer has none of these marks.
        """
        prefix = getattr(self._backend.model, "continuing_subword_prefix", None)
        mark = self._word_mark()
        if not (mark or prefix or isinstance(self._backend.model, models.WordLevel)):
            raise UserError(f"{self.path or 'the tokenizer'}: has no mark where words begin; train another tokenizer")
        found = [False] * self.vocab_size
        for index, entry in zip(ids := self.ordinary_ids(), self.tokens(ids), strict=True):
            if mark:
                found[index] = entry[0].isalnum() or _BYTE.fullmatch(entry) is not None or ord(entry[0]) >= 0x80
                found[index] &= not entry.startswith(mark)
            elif prefix:
                found[index] = entry.startswith(prefix)
        return found

    def _word_mark(self) -> str:
        """The character that begins a word after a space, "" if there is none."""
        text = "a b"
        if self._backend.normalizer is not None:
            text = self._backend.normalizer.normalize_str(text)
        if self._backend.pre_tokenizer is not None:
            text = self._backend.pre_tokenizer.pre_tokenize_str(text)[-1][0]
        return text[:-1][-1:]

    def difference(self, other: "Tokenizer") -> str | None:
        """How the ids of this tokenizer differ from those of `other`, for messages; None if they do not."""
        for name, own, theirs in zip(SPECIAL, self.special_ids, other.special_ids, strict=True):
            if own != theirs:
                return f"{name} is {own} in the one and {theirs} in the other"
        if self.vocab_size != other.vocab_size:
            return f"the one has {self.vocab_size} entries, the other {other.vocab_size}"
        vocabulary, others = (each._backend.get_vocab(with_added_tokens=True) for each in (self, other))
        odd = min((entry for _, entry in vocabulary.items() ^ others.items()), default=None)
        if odd is None:
            return None
        return f"entry {odd} is {self.tokens([odd])[0]!r} in the one and {other.tokens([odd])[0]!r} in the other"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer: equal for equal ids of all texts."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `folder/tokenizer.json` atomically; the same tokenizer gives the same bytes. Returns the file."""
        file = Path(folder) / FILE_NAME
        write_atomic(file, self._backend.to_str(pretty=True).encode())
        self.path = file
        return file


def _find_file(path: Path) -> Path:
    """The tokenizer file at `path` or in the folder `path`. Raises UserError."""
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        if len(models) > 1 and not (path / FILE_NAME).exists():
            raise UserError(f"{path}: holds {models[0].name} and {models[1].name}; name the one to use")
        names = [path / FILE_NAME, path / "vocab.txt", *models, path / "vocab.json"]
        path = next((name for name in names if name.is_file()), path / FILE_NAME)
    if not path.is_file():
        raise UserError(f"{path}: no such file; train one with `python -m preprocessing tokenizer train`")
    return path


def _read_json(file: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(file))


def _read_word_piece(file: Path) -> tokenizers.Tokenizer:
    """BERT's vocab.txt, a token a line."""
    vocabulary = models.WordPiece.read_file(str(file))
    config = file.parent / "tokenizer_config.json"
    check_regular(config)
    lower = load_json(config.read_text(encoding="utf-8")).get("do_lower_case", True) if config.exists() else True
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token=SPECIAL[1], max_input_chars_per_word=100))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return _with_special(backend, vocabulary)


def _read_byte_level(file: Path) -> tokenizers.Tokenizer:
    """GPT-2's vocab.json, with merges.txt beside it."""
    merges = file.with_name("merges.txt")
    if not merges.is_file():
        raise UserError(f"{merges}: no such file; it belongs to {file}")
    vocabulary, rules = models.BPE.read_file(str(file), str(merges))
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, rules))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    return _with_special(backend, vocabulary)


def _with_special(backend: tokenizers.Tokenizer, vocabulary: dict[str, int]) -> tokenizers.Tokenizer:
    """Mark the special tokens in the vocabulary, so that "[MASK]" in a text is not encoded as one."""
    backend.add_special_tokens([name for pair in _ALIASES.items() for name in pair if name in vocabulary])
    return backend


def _read_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """A SentencePiece model; added_tokens.json beside it may append tokens, such as a mask."""
    from sentencepiece import sentencepiece_model_pb2  # imported here, since such models are rare

    proto: Any = sentencepiece_model_pb2
    model, types = proto.ModelProto.FromString(file.read_bytes()), proto.ModelProto.SentencePiece
    pieces = [piece.piece for piece in model.pieces]
    kinds = [piece.type for piece in model.pieces]
    words = {piece for piece, kind in zip(pieces, kinds, strict=True) if kind == types.NORMAL}
    control = [piece for piece, kind in zip(pieces, kinds, strict=True) if kind not in (types.NORMAL, types.BYTE)]
    if types.UNKNOWN not in kinds or not words:
        raise UserError(f"{file}: is no SentencePiece model with an unknown token; train another")
    unknown, fallback = kinds.index(types.UNKNOWN), types.BYTE in kinds
    if model.trainer_spec.model_type == proto.TrainerSpec.UNIGRAM:
        lowest = min(piece.score for piece in model.pieces)
        scores = [(piece.piece, piece.score if piece.piece in words else lowest) for piece in model.pieces]
        backend = tokenizers.Tokenizer(models.Unigram(scores, unknown, fallback))
    elif model.trainer_spec.model_type == proto.TrainerSpec.BPE:
        vocabulary = {piece: index for index, piece in enumerate(pieces)}
        unk = pieces[unknown]
        backend = tokenizers.Tokenizer(
            models.BPE(vocabulary, _merges(words, vocabulary), unk_token=unk, fuse_unk=True, byte_fallback=fallback)
        )
    else:
        raise UserError(f"{file}: is neither a Unigram nor a BPE model; train another")
    _normalize_as(backend, model.normalizer_spec, control)
    backend.add_special_tokens(control)
    added = file.with_name("added_tokens.json")
    check_regular(added)
    if added.exists():
        for name, index in sorted(load_json(added.read_text(encoding="utf-8")).items(), key=lambda item: item[1]):
            backend.add_special_tokens([name])
            if backend.token_to_id(name) != index:
                raise UserError(f"{added}: {name} has id {index}, which does not follow {file.name}; fix the file")
    return backend


def _merges(words: set[str], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """BPE's merge rules in order: SentencePiece stores only their results, in that order."""
    rules = [
        (vocabulary[word], vocabulary[word[:cut]], vocabulary[word[cut:]], word[:cut], word[cut:])
        for word in words
        for cut in range(1, len(word))
        if word[:cut] in words and word[cut:] in words
    ]
    return [(left, right) for *_, left, right in sorted(rules)]


def _normalize_as(backend: tokenizers.Tokenizer, spec: Any, control: Sequence[str]) -> None:
    """Normalize and split as SentencePiece's normalizer_spec says, without control tokens in texts."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    backend.normalizer = normalizers.Sequence(steps)
    scheme = "always" if spec.add_dummy_prefix else "never"
    splits = [
        pre_tokenizers.Split(tokenizers.Regex(f"{re.escape(name[0])}(?={re.escape(name[1:])})"), "merged_with_previous")
        for name in control
        if len(name) > 1
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(prepend_scheme=scheme), *splits])
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])


_READERS = {
    FILE_NAME: _read_json,
    "vocab.txt": _read_word_piece,
    "vocab.json": _read_byte_level,
}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train lower-casing byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) with at most `vocab_size` tokens.

    The result depends only on the multiset of texts. Special tokens have ids 0 to 4, in the order of SPECIAL. Any text
    can be encoded, so [UNK] never occurs. Raises UserError when there is no text or no room for bytes.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise UserError(f"--vocab-size {vocab_size}: byte-level BPE needs at least {_SMALLEST_VOCABULARY}; raise it")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # so a word is one token wherever it is
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += 1
            yield text

    backend.train_from_iterator(counted(), trainer)
    if not seen:
        raise UserError("tokenizer training: there is no text at all; name data that holds captions or questions")
    # So that other programs that load the file add [CLS] and [SEP] as `encode` does.
    cls_id, sep_id = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)]
    )
    return Tokenizer(backend)
