"""The text tokenizer: trains byte-level BPE, loads any `tokenizer.json`. A leaf that anyone may import."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from preprocessing.schema import DataError, write_atomic

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0..4 of a trained tokenizer, in this order
FILE_NAME = "tokenizer.json"
# The names that other families of tokenizers (RoBERTa's, BART's) give to the same five roles.
_ALIASES = {"[PAD]": "<pad>", "[UNK]": "<unk>", "[CLS]": "<s>", "[SEP]": "</s>", "[MASK]": "<mask>"}
_SMALLEST_VOCABULARY = len(SPECIAL) + 256  # byte-level BPE needs every byte


class Tokenizer:
    """Text <-> token ids, with the five special tokens that masked prediction needs.

    Attributes: pad_id, unk_id, cls_id, sep_id, mask_id (int), special_ids (the five as a tuple in that order),
    vocab_size (int: one more than the greatest id), path (of the file it was read from or saved to, else None).
    """

    def __init__(self, backend: tokenizers.Tokenizer, path: Path | None = None) -> None:
        """Wrap `backend`. Raises DataError when one of the special tokens is missing."""
        self._backend = backend
        self.path = path
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # a caption that says "[MASK]" holds that word, not the mask
        self.special_ids = tuple(self._special_id(name) for name in SPECIAL)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())

    def _special_id(self, name: str) -> int:
        for candidate in (name, _ALIASES[name]):
            index = self._backend.token_to_id(candidate)
            if index is not None:
                return int(index)
        where = self.path or "the tokenizer"
        raise DataError(f"{where}: has neither token {name} nor {_ALIASES[name]}; add it, or train another tokenizer")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a `tokenizer.json`, given itself or the folder that holds it. Raises DataError naming the file."""
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if not file.is_file():
            raise DataError(f"{file}: no such file; train one with `python -m preprocessing tokenizer train`")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception, whatever is wrong with the file
            raise DataError(f"{file}: is no tokenizer.json ({' '.join(str(error).split())}); train another") from error
        return cls(backend, file)

    def encode(self, text: str, max_length: int) -> list[int]:
        """Ids of `[CLS] text [SEP]`, at most `max_length` (2 or more) of them: surplus text is cut, [SEP] stays."""
        if max_length < 2:
            raise ValueError(f"max_length {max_length}: must be at least 2, for [CLS] and [SEP]")
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.cls_id, *ids[: max_length - 2], self.sep_id]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`; the special tokens are left out, or with `skip_special=False` stand by name."""
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
        """The vocabulary's own spelling of each id ("\u0120" marks a leading space in byte-level BPE)."""
        return [str(self._backend.id_to_token(int(i))) for i in ids]

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `folder/tokenizer.json` atomically; the same tokenizer gives the same bytes. Returns the file."""
        file = Path(folder) / FILE_NAME
        write_atomic(file, self._backend.to_str(pretty=True).encode())
        self.path = file
        return file


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train lower-casing byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2) with at most `vocab_size` tokens.

    The result depends on the multiset of texts and on nothing else. Special tokens get ids 0 to 4, as SPECIAL names
    them; any text can be encoded, so [UNK] never occurs. Raises DataError when there is no text or no room for bytes.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise DataError(f"--vocab-size {vocab_size}: byte-level BPE needs at least {_SMALLEST_VOCABULARY}; raise it")
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
        raise DataError("tokenizer training: there is no text at all; name data that holds captions or questions")
    # Other programs that open the file get the same [CLS] text [SEP] as `encode` gives.
    cls_id, sep_id = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=None, special_tokens=[("[CLS]", cls_id), ("[SEP]", sep_id)]
    )
    return Tokenizer(backend)
