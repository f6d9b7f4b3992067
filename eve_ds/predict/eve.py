"""A trained model in Python, from raw images and texts to answers; preprocessing is inside."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from eve_ds.data.batch_reader import stack
from eve_ds.data.transforms import build_transform, normalize
from eve_ds.predict.attention_maps import AttentionMaps, attention_maps
from eve_ds.predict.raw_inputs import ImageInput, distinct, rows_of, to_ids, to_square
from eve_ds.tasks import Task, load_task_model
from eve_ds.tasks.vqa import read_answer_list
from eve_ds.weights.load import load_weights
from eve_ds.weights.model_folder import CONFIG, ModelFolder, file_hash, read_hashes, stored_setting
from preprocessing.errors import UserError
from preprocessing.shards.schema import ANSWER_LIST, MAX_PIXELS, PILLOW_PIXELS
from preprocessing.text.tokenizer import FILE_NAME as TOKENIZER
from preprocessing.text.tokenizer import Tokenizer

BATCH_SIZE = 32
PathLike = str | Path
Shapes = Mapping[str, Sequence[int]]


class Answer(NamedTuple):
    """An entry of the answer list, and its probability: each entry has one of its own (they do not add up to 1)."""

    answer: str
    probability: float


class Match(NamedTuple):
    """How well image and text fit: cosine similarity of their vectors, and the matching head's probability."""

    similarity: float
    probability: float


class Judgement(NamedTuple):
    """Whether a statement holds, and the probability that it does."""

    true: bool
    probability: float


class EVE:
    """A trained model. ``from_pretrained`` makes one.

    Images are paths, bytes of image files, Pillow images or uint8 arrays. A list of images or texts gives a list of
    results; a single image goes with every text of a list, and a single text with every image. Results do not depend on
    what is computed together.

    Attributes:
        tasks: whose heads the weights have: of vqa, nlvr, retrieval.
        files: where weights, config and tokenizer are.
        device: that the model runs on.
        batch_size: rows that are computed together.
        transform: of images; its ``image_size`` is the model's.
        normed: False for vectors without the final norm (``published``).
    """

    def __init__(
        self,
        files: ModelFolder,
        device: torch.device,
        batch_size: int,
        tokenizer: PathLike | None,
        vlmo_config: PathLike | None,
        image_size: int | None,
        max_pixels: int | None,
        published: bool,
    ) -> None:
        """Use ``from_pretrained``."""
        self.files, self.device, self.batch_size = files, device, batch_size
        self.tasks = tasks_in(_shapes(files.weights))
        if not self.tasks:
            raise UserError(
                f"{files.weights}: has no head of vqa, nlvr or retrieval; fine-tune it first, with python -m "
                "eve_ds.finetune"
            )
        self._tokenizer_path = tokenizer
        self.normed = not published
        self._load = functools.partial(
            load_task_model,
            checkpoint=files.weights,
            vlmo_config=vlmo_config,
            image_size=image_size,
            published_routing=published,
        )
        self._models: dict[str, Task] = {}
        self.config = self.task(self.tasks[0]).config
        if max_pixels is None:
            max_pixels = stored_max_pixels(files.folder)
        self.transform = build_transform(self.config.image_size, train=False, max_pixels=max_pixels)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: PathLike,
        device: str = "auto",
        *,
        batch_size: int = BATCH_SIZE,
        tokenizer: PathLike | None = None,
        vlmo_config: PathLike | None = None,
        image_size: int | None = None,
        max_pixels: int | None = None,
        published: bool = False,
    ) -> EVE:
        """Load a model in fp32, in evaluation mode.

        Args:
            checkpoint: a run folder, a model folder or a weights file, as ``load_task_model`` takes it.
            device: auto (a GPU if there is one), cpu, cuda or cuda:N.
            batch_size: rows that are computed together.
            tokenizer: file or folder; None: beside the weights.
            vlmo_config: EVE's ``config_vlmo*.json``, for published weights; None: config.yaml beside the weights.
            image_size: images' side, pixels; positions are interpolated to it. None: the config's.
            max_pixels: larger images are refused. None: as in training.
            published: compute as the published code does: padding is routed, and vectors lack the final norm.
        Raises:
            UserError: no weights, no config, no head, no such device; names the file or the argument.
        """
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: must be at least 1")
        if image_size is not None and image_size < 1:
            raise UserError(f"image_size={image_size}: must be at least 1")
        if max_pixels is not None and not 1 <= max_pixels <= PILLOW_PIXELS:
            raise UserError(f"max_pixels={max_pixels}: must be between 1 and Pillow's limit, {PILLOW_PIXELS}")
        files, place = ModelFolder.find(checkpoint), find_device(device)
        return cls(files, place, batch_size, tokenizer, vlmo_config, image_size, max_pixels, published)

    def task(self, name: str) -> Task:
        """The task with its weights, on the device. Raises UserError if the weights do not have its head."""
        if name not in self.tasks:
            raise UserError(
                f"{self.files.weights}: has the head of {' and '.join(self.tasks)}, not of {name}; give a checkpoint "
                f"that was fine-tuned for {name}"
            )
        if name not in self._models:
            self._models[name] = self._load(name).to(self.device)
        return self._models[name]

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the model. Raises UserError if there is none, or one with more entries than the model."""
        path = self.files.tokenizer if self._tokenizer_path is None else self._tokenizer_path
        if path is None:
            raise UserError(
                f"{self.files.folder}: has no {TOKENIZER}; copy the training's there, or name it with tokenizer"
            )
        found = Tokenizer.load(path)
        if found.vocab_size > self.config.vocab_size:
            raise UserError(
                f"{found.path}: has ids up to {found.vocab_size - 1}, the model has {self.config.vocab_size} entries; "
                "give the tokenizer that it was trained with"
            )
        return found

    @functools.cached_property
    def answers(self) -> list[str]:
        """The answer list. Raises UserError if there is none, or one of another length than the head's."""
        task: Any = self.task("vqa")
        count = task.output[-1].out_features
        path = self.files.folder / ANSWER_LIST
        if not path.is_file():
            raise UserError(f"{path}: no such file; copy the {ANSWER_LIST} of the training data there")
        found = read_answer_list(path.parent)
        if len(found) != count:
            raise UserError(
                f"{path}: lists {len(found)} answers, the model's head has {count}; give the list of its data"
            )
        return found

    @functools.cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the weights' file, from hashes.json if that lists it."""
        return read_hashes(self.files.weights.parent).get(self.files.weights.name) or file_hash(self.files.weights)

    @property
    def feature_dim(self) -> int:
        """E, of the vectors. Raises UserError if the weights have no retrieval heads."""
        task: Any = self.task("retrieval")
        return int(task.itc_vision_proj_head.out_features)

    @torch.inference_mode()
    def answer(
        self, images: ImageInput | Sequence[ImageInput], questions: str | Sequence[str], top: int = 1
    ) -> list[Any]:
        """Answer questions about images.

        Args:
            images, questions: one each, or lists; see the class.
            top: answers to a question.
        Returns:
            the ``top`` most probable ``Answer`` of the question, best first; for lists, a list of such lists.
        Raises:
            UserError: the weights have no VQA head, there is no answer list, or an input is bad.
        """
        if top < 1:
            raise UserError(f"top={top}: must be at least 1")
        task: Any = self.task("vqa")
        answers = self.answers
        rows, single = rows_of(images=images, questions=questions)
        found: list[list[Answer]] = []
        for image, question in self._batches(rows):
            logits = task.predict(self.pixels(image), *self.tokens(question))
            best = logits.float().sigmoid().topk(min(top, len(answers)))
            for values, places in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                found.append([Answer(answers[i], p) for i, p in zip(places, values, strict=True)])
        return found[0] if single else found

    @torch.inference_mode()
    def match(self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str]) -> Any:
        """Compare images with texts. Returns a ``Match``; for lists, a list of them.

        Raises:
            UserError: the weights have no retrieval heads, or an input is bad.
        """
        task: Any = self.task("retrieval")
        rows, single = rows_of(images=images, texts=texts)
        found: list[Match] = []
        for image, text in self._batches(rows):
            unique, index = distinct(image)
            pixels, tokens = self.pixels(unique), self.tokens(text)
            vectors = task.encode_image(pixels, normed=self.normed)[index]
            cosine = (vectors * task.encode_text(*tokens, normed=self.normed)).sum(dim=1)
            probability = task.match(pixels[index], *tokens).float().softmax(dim=1)[:, 1]
            found += map(Match, cosine.tolist(), probability.tolist())
        return found[0] if single else found

    @torch.inference_mode()
    def judge(
        self,
        left: ImageInput | Sequence[ImageInput],
        right: ImageInput | Sequence[ImageInput],
        statements: str | Sequence[str],
    ) -> Any:
        """Whether statements are true of two images. Returns a ``Judgement``; for lists, a list of them.

        Raises:
            UserError: the weights have no NLVR head, or an input is bad.
        """
        task: Any = self.task("nlvr")
        rows, single = rows_of(left=left, right=right, statements=statements)
        found: list[Judgement] = []
        for first, second, statement in self._batches(rows):
            logits = task.predict((self.pixels(first), self.pixels(second)), *self.tokens(statement)).float()
            probability = logits.softmax(dim=1)[:, 1].tolist()
            found += map(Judgement, (logits.argmax(dim=1) == 1).tolist(), probability)
        return found[0] if single else found

    @torch.inference_mode()
    def image_features(self, images: ImageInput | Sequence[ImageInput]) -> np.ndarray:
        """Unit vectors of images: [E] float32; for a list [N, E]. Their dot products with those of texts are cosines.

        Raises:
            UserError: the weights have no retrieval heads, or an input is bad.
        """
        rows, single = rows_of(images=images)
        found = [self.vectors_of(self.pixels(image)) for (image,) in self._batches(rows)]
        return found[0][0] if single else self._joined(found)

    @torch.inference_mode()
    def text_features(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit vectors of texts, as ``image_features``."""
        task: Any = self.task("retrieval")
        rows, single = rows_of(texts=texts)
        found = []
        for (text,) in self._batches(rows):
            found.append(task.encode_text(*self.tokens(text), normed=self.normed).cpu().numpy())
        return found[0][0] if single else self._joined(found)

    @torch.inference_mode()
    def vectors_of(self, pixels: Tensor) -> np.ndarray:
        """Unit vectors [B, E] float32 of ``pixels``: [B, 3, H, W] float32, normalized."""
        task: Any = self.task("retrieval")
        vectors: np.ndarray = task.encode_image(pixels.to(self.device), normed=self.normed).cpu().numpy()
        return vectors

    def attention(self, image: ImageInput, text: str, task: str | None = None) -> AttentionMaps:
        """Where the model looks in the image, for each word of the text and for the answer: see ``AttentionMaps``.

        Args:
            image, text: one each; of NLVR one of the two images, with the statement.
            task: whose weights, where the checkpoint has the heads of several; None: the first of ``tasks``.
        Raises:
            UserError: the weights do not have the task's head, or an input is bad.
        """
        return attention_maps(self, image, text, task)

    def pixels(self, images: Sequence[ImageInput]) -> Tensor:
        """Images as the model takes them: [B, 3, image_size, image_size] float32 on the device, in [-1, 1]."""
        unique, index = distinct(images)
        squares = np.stack([to_square(image, self.transform) for image in unique])
        return normalize(squares[index]).to(self.device)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids [B, L] int64 and mask [B, L] bool of texts, on the device, padded to the longest."""
        length = self.config.max_text_length
        ids = [np.array(to_ids(text, self.tokenizer, length), dtype=np.int64) for text in texts]
        arrays = stack([{"text_ids": row} for row in ids], self.tokenizer.pad_id, length)
        text_ids, text_mask = (torch.from_numpy(arrays[name]).to(self.device) for name in ("text_ids", "text_mask"))
        return text_ids, text_mask

    def _batches(self, rows: Sequence[tuple[Any, ...]]) -> Iterator[list[list[Any]]]:
        """The columns of ``batch_size`` rows at a time."""
        for start in range(0, len(rows), self.batch_size):
            yield [list(column) for column in zip(*rows[start : start + self.batch_size], strict=True)]

    def _joined(self, parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros((0, self.feature_dim), np.float32)


def stored_max_pixels(folder: Path) -> int:
    """``data.max_pixels`` of the training, or its default. Raises UserError if config.yaml has no such number."""
    found = stored_setting(folder, "data", "max_pixels")
    if found is None:
        return MAX_PIXELS
    if type(found) is not int or not 1 <= found <= PILLOW_PIXELS:
        raise UserError(f"{folder / CONFIG}: data.max_pixels={found!r} is no number of pixels; mend it there")
    return found


def find_device(name: str) -> torch.device:
    """The device of that name: auto, cpu, cuda or cuda:N. Raises UserError if there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: is no device; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name}: choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={name}: torch sees {torch.cuda.device_count()} GPUs here; choose cpu or auto")
    return device


def tasks_in(shapes: Shapes) -> tuple[str, ...]:
    """The tasks whose heads are among tensors of these names and shapes: of vqa, nlvr, retrieval."""
    width = (shapes.get("backbone.norm.weight") or [0])[0]
    read = (shapes.get("output.0.weight") or [0, 0])[1]  # vqa's head reads one token, nlvr's plain one two
    found = {
        "vqa": "output.3.weight" in shapes and read == width,
        "nlvr": "attn1.in_proj_weight" in shapes or ("output.3.weight" in shapes and read == 2 * width),
        # EVE's pre-trained files name theirs mitc_ and mitm_.
        "retrieval": {"itc_vision_proj_head.weight", "itm_head.weight"} <= {name.removeprefix("m") for name in shapes},
    }
    return tuple(name for name, there in found.items() if there)


def _shapes(weights: Path) -> Shapes:
    if weights.suffix != ".safetensors":
        return {name: tensor.shape for name, tensor in load_weights(weights).items()}
    try:
        with safe_open(weights, framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # it is no mapping
    except (OSError, SafetensorError):
        return {name: tensor.shape for name, tensor in load_weights(weights).items()}  # says what is wrong
