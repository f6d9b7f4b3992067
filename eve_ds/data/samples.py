"""Map-style data sets over prepared shards: dataset[sample, epoch] -> what one sample adds to a batch.

A sample is (row, caption index), for VQA (row, question index), for NLVR (row, statement index). Its `sample_id`, which
all random choices made for it depend on, is epoch x n + sample: unique in a run, the same on any rank and in any batch.
The look-ups (text, question_id, identifier ...) are for evaluation and reports.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from eve_ds.data.shards import Row, RowError, Split
from eve_ds.data.sources import AnySplit, JoinedSplit, answers_in_shards
from eve_ds.data.transforms import Transform, may_mirror
from preprocessing.errors import DataError
from preprocessing.json_text import load_json
from preprocessing.local_files import check_regular
from preprocessing.shards.schema import ANSWER_LIST, IMAGE_COLUMNS, SAMPLE_COLUMN
from preprocessing.text.tokenizer import Tokenizer

DECODED_BYTES = 128 << 20  # of decoded images kept by a process; filled once, since all rows come equally often
Sample = dict[str, Any]
Key = tuple[int, int]  # (sample index, epoch)


class Pending(NamedTuple):
    """An image that is yet to be read and decoded: number `image` of the row's."""

    row: Row
    sample_id: int
    mirror: bool
    image_number: int = 0


class Samples(ABC):
    """What the kinds of data set have in common.

    Args:
        directory: a prepared split folder of this kind, or a split that is open already.
        tokenizer: of the text.
        transform: of the images.
        max_text_length: longest text, tokens, [CLS] and [SEP] included.
        vocab_size: of the model; None if there is none to check against.
    Raises:
        DataError: the split is broken or of another kind, or the tokenizer has ids beyond the model's vocabulary.
    """

    kind = ""
    images: tuple[str, ...] = ("images",)  # what a sample calls them

    def __init__(
        self,
        directory: str | os.PathLike[str] | AnySplit,
        tokenizer: Tokenizer,
        transform: Transform,
        max_text_length: int,
        vocab_size: int | None = None,
    ) -> None:
        self.split: AnySplit = directory if isinstance(directory, Split | JoinedSplit) else Split(directory)
        self.tokenizer = tokenizer
        self.transform = transform
        self.max_text_length = max_text_length
        self._decoded: dict[tuple[Path, int, str], np.ndarray] = {}  # images that will come out the same again
        if self.split.kind != self.kind:
            raise DataError(
                f"{self.split.name}: holds {self.split.kind} data, {self.kind} data is needed; prepare it with "
                "another converter or choose the task that it is for"
            )
        if vocab_size is not None and tokenizer.vocab_size > vocab_size:
            raise DataError(
                f"{tokenizer.path or 'tokenizer'}: its token ids go up to {tokenizer.vocab_size - 1}, beyond the "
                f"model's vocabulary; set model.vocab_size to {tokenizer.vocab_size}, or train a tokenizer of at most "
                f"{vocab_size} entries"
            )

    def __len__(self) -> int:
        return self.split.samples

    @property
    def rows(self) -> int:
        return self.split.rows

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_id

    def __getitem__(self, key: Key) -> Sample:
        return self.complete(self.describe(key))

    @abstractmethod
    def describe(self, key: Key) -> Sample:
        """A sample but for its pixels: where its images are (`Pending`) stands in their place.

        The loader describes all samples of a batch, then completes them: it takes a third less time than by turns with
        the decoders, which leave nothing else in the processor's caches.
        """

    def complete(self, described: Sample) -> Sample:
        """The sample with its pixels. Raises RowError naming shard and row where an image cannot be decoded."""
        return {name: self._pixels(item) if isinstance(item, Pending) else item for name, item in described.items()}

    def text(self, sample: int) -> str:
        """The sample's caption, question or statement."""
        _, row, item = self.split.sample(sample)
        return _text(row, SAMPLE_COLUMN[self.kind], item)

    def image_bytes(self, sample: int, image_number: int = 0) -> bytes:
        """The file of one of the sample's images, as it was prepared."""
        _, row, _ = self.split.sample(sample)
        return row.blob(IMAGE_COLUMNS[self.kind][image_number])

    def _sample_id(self, key: Key) -> int:
        sample, epoch = key
        return int(epoch) * len(self) + int(sample)

    def _tokens(self, text: str) -> np.ndarray:
        """[l] int64 token ids, l at most `max_text_length`."""
        return np.array(self.tokenizer.encode(text, self.max_text_length), dtype=np.int64)

    def _pixels(self, pending: Pending) -> np.ndarray:
        """[H, W, 3] uint8."""
        row, sample_id, mirror, image_number = pending
        column = IMAGE_COLUMNS[self.kind][image_number]
        key = (row.path, row.number, column)
        if key in self._decoded:
            return self._decoded[key]
        data = row.blob(column)
        try:
            pixels = self.transform(data, sample_id, mirror, image_number)
        except DataError as error:
            raise RowError(row.where, f"{error}; prepare the split again to drop such images") from error
        if not self.transform.is_random and len(self._decoded) * pixels.nbytes < DECODED_BYTES:
            self._decoded[key] = pixels
        return pixels


class CaptionSamples(Samples):
    """Images with captions; a sample is one caption with its image.

    dataset[sample, epoch] -> images [H,W,3] uint8, text_ids [l] int64, sample_id, image_index (the row)
    """

    kind = "caption"

    def describe(self, key: Key) -> Sample:
        image_index, row, item = self.split.sample(int(key[0]))
        sample_id = self._sample_id(key)
        text = _text(row, "caption", item)
        return {
            "images": Pending(row, sample_id, may_mirror([text])),
            "text_ids": self._tokens(text),
            "sample_id": sample_id,
            "image_index": image_index,
        }

    def row_image_bytes(self, image_index: int) -> bytes:
        """The file of image `image_index`."""
        return self.split.row(image_index).blob("image")

    def row_captions(self, image_index: int) -> list[str]:
        """All captions of image `image_index`."""
        captions = self.split.row(image_index).value("caption")
        return captions if isinstance(captions, list) else [captions]

    def text_image_index(self) -> np.ndarray:
        """[samples] int64: the image of every caption."""
        return self.split.sample_rows()


class CaptionImages(CaptionSamples):
    """Every image of a caption split once, without text.

    dataset[image_index, epoch] -> images, sample_id (in evaluation the image_index), image_index
    """

    def __len__(self) -> int:
        return self.split.rows

    def describe(self, key: Key) -> Sample:
        sample_id, image_index = self._sample_id(key), int(key[0])
        image = Pending(self.split.row(image_index), sample_id, True)
        return {"images": image, "sample_id": sample_id, "image_index": image_index}


class CaptionTexts(CaptionSamples):
    """Every caption of a caption split once; no image is decoded.

    dataset[sample, epoch] -> text_ids, sample_id, image_index
    """

    images = ()

    def describe(self, key: Key) -> Sample:
        image_index, row, item = self.split.sample(int(key[0]))
        tokens = self._tokens(_text(row, "caption", item))
        return {"text_ids": tokens, "sample_id": self._sample_id(key), "image_index": image_index}


class VqaSamples(Samples):
    """Images with questions; a sample is one question with its image.

    Args:
        num_answers: length A of the answer list; the model's classes.

    dataset[sample, epoch] -> images, text_ids, sample_id, question_id, answer_targets [A] float32 soft scores (zeros
    where the answers are unknown or none is in the list)
    """

    kind = "vqa"

    def __init__(
        self,
        directory: str | os.PathLike[str] | AnySplit,
        tokenizer: Tokenizer,
        transform: Transform,
        max_text_length: int,
        vocab_size: int | None = None,
        *,
        num_answers: int,
    ) -> None:
        super().__init__(directory, tokenizer, transform, max_text_length, vocab_size)
        self.num_answers = num_answers

    def describe(self, key: Key) -> Sample:
        _, row, item = self.split.sample(int(key[0]))
        sample_id = self._sample_id(key)
        question = _text(row, "questions", item)
        mirror = may_mirror([question, *_known(row, "answers", item)])
        return {
            "images": Pending(row, sample_id, mirror),
            "text_ids": self._tokens(question),
            "sample_id": sample_id,
            "question_id": int(row.item("question_id", item)),
            "answer_targets": self._targets(row, item),
        }

    def _targets(self, row: Row, item: int) -> np.ndarray:
        targets = np.zeros(self.num_answers, dtype=np.float32)
        labels = _known(row, "answer_labels", item)
        if labels and not 0 <= min(labels) <= max(labels) < self.num_answers:
            raise DataError(
                f"{row.where}: answer label {max(labels)} is not in the answer list of {self.num_answers}; use the "
                f"{ANSWER_LIST} that the split was prepared with"
            )
        targets[labels] = _known(row, "answer_scores", item)
        return targets

    def question_id(self, sample: int) -> int:
        """The official id of a question."""
        _, row, item = self.split.sample(sample)
        return int(row.item("question_id", item))

    def answers(self, sample: int) -> dict[str, float]:
        """Those answers to a question that are in the answer list, with their soft scores."""
        _, row, item = self.split.sample(sample)
        return dict(zip(_known(row, "answers", item), _known(row, "answer_scores", item), strict=True))


class NlvrSamples(Samples):
    """Pairs of images with statements; a sample is one statement with its pair.

    dataset[sample, epoch] -> images_0 (left), images_1 (right), text_ids, sample_id, label (1 true, 0 false, -1
    unknown), question_index (the sample)
    """

    kind = "nlvr"
    images = ("images_0", "images_1")

    def describe(self, key: Key) -> Sample:
        _, row, item = self.split.sample(int(key[0]))
        sample_id = self._sample_id(key)
        text = _text(row, "questions", item)
        mirror = may_mirror([text])
        return {
            "images_0": Pending(row, sample_id, mirror, 0),
            "images_1": Pending(row, sample_id, mirror, 1),
            "text_ids": self._tokens(text),
            "sample_id": sample_id,
            "label": _label(row, item),
            "question_index": int(key[0]),
        }

    def identifier(self, sample: int) -> str:
        """The official identifier of a statement, `split-set-PAIR-sentence`."""
        _, row, item = self.split.sample(sample)
        return str(row.item("identifier", item))

    def label(self, sample: int) -> int:
        """1 true, 0 false, -1 unknown."""
        _, row, item = self.split.sample(sample)
        return _label(row, item)


def read_answer_list(directory: str | os.PathLike[str]) -> list[str]:
    """The answers of a prepared VQA data set, in the order of their labels. Raises DataError naming the file.

    ViLT's and EVE's scripts write no list: there it is put together from what the shards say.
    """
    path = Path(directory) / ANSWER_LIST
    check_regular(path)
    try:
        answers = load_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and (found := answers_in_shards(Path(directory))):
            return found
        raise DataError(f"{path}: {error.strerror}; prepare the data set with a VQA converter") from None
    except ValueError as error:
        raise DataError(f"{path}: invalid JSON ({error}); prepare the data set again") from None
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{path}: is no list of answers; prepare the data set again")
    return answers


def _text(row: Row, column: str, item: int) -> str:
    value = row.item(column, item)
    if not isinstance(value, str):
        raise RowError(row.where, f"column {column!r} entry {item} is {value!r}, not text; prepare the split again")
    return value


def _known(row: Row, column: str, item: int) -> list[Any]:
    """A question's answers, labels or scores; none where the cell is empty, as ViLT's scripts leave it on test."""
    return row.item(column, item) or [] if row.entries(column) else []


def _label(row: Row, item: int) -> int:
    answer = row.item("answers", item) if row.entries("answers") else None
    return {"true": 1, "false": 0}.get(str(answer).lower(), -1)
