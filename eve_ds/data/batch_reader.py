"""What a loader process does for one micro-batch: read its samples, replace corrupt ones, stack the rest.

With ``data.shuffle_window`` above 0, the next thousands of samples lie in a few runs of the shards (sampler.py). A
network file system reads such runs fast from end to end, and slowly image by image in random order. So each process
asks the kernel, in file order, to read ahead the samples of the coming window; when they are read in training order,
they come from the page cache. A rank asks for its own samples only, and each of its workers for a part of them: no
machine fetches what it does not use. The page cache must hold two windows of images (16,384 of 60 kB are 1 GB).
"""

from __future__ import annotations

import logging
import mmap
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from eve_ds.data.sampler import MicroBatchIndices, TrainOrder
from eve_ds.data.samples import Key, Sample, Samples
from eve_ds.data.shards import RowError
from eve_ds.data.sources import AnySplit
from eve_ds.data.transforms import normalize
from preprocessing.errors import UserError

_SPEED = 1.25  # of reading ahead, relative to the speed at which training consumes samples
Batch = dict[str, Tensor]
Arrays = dict[str, np.ndarray]
# The number of following samples that are tried after a corrupt one; more corrupt rows than this mean a broken shard.
MAX_NEIGHBORS = 100

log = logging.getLogger(__name__)


class ReadAhead:
    """Called with the indices of each micro-batch before it is read; asks the kernel to read ahead the next window.

    Args:
        split: the shards.
        order: the order of the samples.
        window: samples per window, over all ranks.
    """

    def __init__(self, split: AnySplit, order: TrainOrder, window: int) -> None:
        self._split, self._order = split, order
        # Work is planned in chunks of this many micro-batches: a window, or an epoch if that is shorter.
        self._batches = -(-min(window, order.stream.size) // order.global_batch_size)
        self._planned: int | None = None  # all positions below it have been requested or are in the queue
        self._queue: deque[int] = deque()
        self._per_call = 0

    def __call__(self, indices: MicroBatchIndices) -> None:
        chunk = self._batches * self._order.global_batch_size
        start = indices.end - self._order.global_batch_size
        if self._planned is None:
            # Worker w begins with micro-batch w, but all workers plan the same chunks, from micro-batch 0 on.
            self._planned = start - _worker()[0] * self._order.global_batch_size
            self._plan()
            self._request(len(self._queue))  # the first window has none before it over which to spread the requests
        while self._planned < start + chunk:
            self._plan()
        self._request(self._per_call)

    def _plan(self) -> None:
        """Queue this process's part of the next chunk, in file order."""
        assert self._planned is not None
        worker, workers = _worker()
        samples = np.unique(self._order.samples_of(self._planned, self._batches))
        mine = np.array_split(samples, workers)[worker]
        self._queue.extend(mine.tolist())
        self._per_call = int(np.ceil(_SPEED * workers * len(mine) / self._batches))
        self._planned += self._batches * self._order.global_batch_size

    def _request(self, count: int) -> None:
        self._split.read_ahead([self._queue.popleft() for _ in range(min(count, len(self._queue)))])


def _worker() -> tuple[int, int]:
    """(index of this worker process, number of workers); (0, 1) in the training process."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def collate(samples: Sequence[Sample], pad_id: int, max_text_length: int, pad_to_multiple: int = 1) -> Batch:
    """Collate samples of one dataset.

    Args:
        samples: B samples of a dataset of samples.py.
        pad_id: token id of the padding.
        max_text_length: maximum padded length, tokens.
        pad_to_multiple: the padded length is a multiple of this, unless ``max_text_length`` is smaller.
    Returns:
        images* [B,3,H,W] float32; text_ids [B,L] int64 and text_mask [B,L] bool (True on tokens); other arrays stacked,
        [B, ...]; numbers [B] int64.
    """
    return to_batch(stack(samples, pad_id, max_text_length, pad_to_multiple))


def stack(samples: Sequence[Sample], pad_id: int, max_text_length: int, pad_to_multiple: int = 1) -> Arrays:
    """Like ``collate``, but without normalization: images* [B,H,W,3] uint8, a quarter of the bytes."""
    arrays: Arrays = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        if name == "text_ids":
            arrays["text_ids"], arrays["text_mask"] = _pad(values, pad_id, max_text_length, pad_to_multiple)
        elif isinstance(values[0], np.ndarray):
            arrays[name] = np.stack(values)
        else:
            arrays[name] = np.array(values, dtype=np.int64)
    return arrays


def to_batch(arrays: Arrays, raw: bool = False) -> Batch:
    """Convert the output of ``stack`` to tensors, which share its memory, and normalize the images unless ``raw``."""
    return {
        name: normalize(value) if name.startswith("images") and not raw else torch.from_numpy(value)
        for name, value in arrays.items()
    }


def _pad(texts: Sequence[np.ndarray], pad_id: int, max_length: int, multiple: int) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(text) for text in texts])
    longest = max(int(lengths.max()), 1)  # of images alone, too, one column: so every part of a model has a gradient
    width = min(-(-longest // multiple) * multiple, max(max_length, longest))
    ids = np.full((len(texts), width), pad_id, dtype=np.int64)
    mask = np.arange(width) < lengths[:, None]
    ids[mask] = np.concatenate(texts)
    return ids, mask


@dataclass(frozen=True)
class ReplacedSample:
    """A corrupt sample whose place another sample has taken.

    Args:
        where: shard and row.
        message: one line with shard, row, fault and replacement.
    """

    where: str
    message: str


@dataclass(frozen=True)
class LoadedBatch:
    """A micro-batch on its way from a worker process to the parent.

    Args:
        indices: the samples that were requested.
        arrays: the output of ``stack``, without the images that lie in a slot.
        slot: slot of ``SharedImages`` with the images; None if they are in ``arrays``.
        replaced: the corrupt samples.
        failure: message of a UserError, which takes the place of the data. It travels as text because torch would
            wrap the exception into a page of traceback.
    """

    indices: MicroBatchIndices
    arrays: Arrays
    slot: int | None = None
    replaced: tuple[ReplacedSample, ...] = ()
    failure: str | None = None


class SharedImages:
    """Memory for the images of several micro-batches, shared with worker processes that are forked afterwards.

    A worker writes the images of a micro-batch into a slot and the parent makes the tensor from there: nothing is
    allocated, sent or unpickled per batch. The memory is anonymous, so it takes no space in /dev/shm (64 MB in a
    container by default).

    Args:
        slots: number of micro-batches.
        names: names of a sample's images.
        batch_size: maximum number of samples in a micro-batch.
        image_size: side of an image, pixels.
    Raises:
        UserError: the memory cannot be allocated.
    """

    def __init__(self, slots: int, names: tuple[str, ...], batch_size: int, image_size: int) -> None:
        self.slots = slots
        shape = (slots, len(names), batch_size, image_size, image_size, 3)
        size = int(np.prod(shape))
        try:
            memory = mmap.mmap(-1, max(size, 1))
        except OSError as error:
            raise UserError(
                f"data.num_workers: no shared memory for {slots} micro-batches, {size >> 20} MiB ({error.strerror}); "
                "lower data.num_workers or engine.micro_batch_size"
            ) from None
        self._pixels = np.frombuffer(memory, dtype=np.uint8, count=size).reshape(shape)
        self._names = names

    def write(self, slot: int, index: int, sample: Sample) -> Sample:
        """Write the images of sample ``index`` of a micro-batch into a slot; returns the sample without them."""
        for number, name in enumerate(self._names):
            self._pixels[slot, number, index] = sample[name]
        return {name: value for name, value in sample.items() if name not in self._names}

    def view(self, slot: int, count: int) -> Arrays:
        """Views of the first ``count`` images of a slot, [count, H, W, 3] uint8 each; a later batch overwrites them."""
        return {name: self._pixels[slot, number, :count] for number, name in enumerate(self._names)}

    @contextmanager
    def pinned(self) -> Iterator[None]:
        """While open, the memory is pinned for CUDA: copies to a GPU are asynchronous and need no other buffer.

        Open it when the workers are forked. Where the driver refuses, the memory stays as it is, and that is logged.
        """
        cudart = torch.cuda.cudart()
        address, size = self._pixels.ctypes.data, self._pixels.nbytes
        error = int(cudart.cudaHostRegister(address, size, 0))
        if error:
            log.warning(
                "CUDA cannot pin the loader's %d MiB (error %d); each batch takes one more copy", size >> 20, error
            )
            with suppress(RuntimeError):  # CUDA keeps the error, and torch would raise it at the next launch
                torch.ones(1, device="cuda")
        try:
            yield
        finally:
            if not error:
                cudart.cudaHostUnregister(address)


@dataclass(frozen=True)
class BatchReader:
    """Map-style dataset of micro-batches for torch's DataLoader: (number, indices) -> LoadedBatch.

    Args:
        dataset: one of samples.py.
        pad_to_multiple: the padded text length is a multiple of this.
        replace: put a neighbor in the place of a corrupt sample; otherwise it is a failure.
        images: shared memory for the images; None returns them in ``LoadedBatch.arrays``.
        read_ahead: called with the indices of each micro-batch before it is read.
    """

    dataset: Samples
    pad_to_multiple: int
    replace: bool
    images: SharedImages | None = None
    read_ahead: ReadAhead | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, MicroBatchIndices]) -> LoadedBatch:
        number, indices = item
        slot = number % self.images.slots if self.images is not None else None
        replaced: list[ReplacedSample] = []
        try:
            if self.read_ahead is not None:
                self.read_ahead(indices)
            keys = list(zip(indices.samples.tolist(), indices.epochs.tolist(), strict=True))
            samples = []
            for index, described in enumerate([self._describe(key) for key in keys]):
                sample = self._complete(keys[index], described, replaced)
                if self.images is not None and slot is not None:
                    sample = self.images.write(slot, index, sample)
                samples.append(sample)
        except UserError as error:
            return LoadedBatch(indices, {}, failure=str(error))
        arrays = stack(samples, self.dataset.pad_id, self.dataset.max_text_length, self.pad_to_multiple)
        if indices.valid is not None:
            arrays["valid"] = indices.valid
        return LoadedBatch(indices, arrays, slot, tuple(replaced))

    def _describe(self, key: Key) -> Sample | RowError:
        try:
            return self.dataset.describe(key)
        except RowError as fault:
            return fault

    def _complete(self, key: Key, described: Sample | RowError, replaced: list[ReplacedSample]) -> Sample:
        """The sample. If its row is corrupt: the next sample that is not, with the same draws as in its own turn."""
        sample, epoch = key
        try:
            if isinstance(described, RowError):
                raise described
            return self.dataset.complete(described)
        except RowError as error:
            if not self.replace:
                raise
            fault = error
        for step in range(1, MAX_NEIGHBORS + 1):
            neighbor = (sample + step) % len(self.dataset)
            try:
                found = self.dataset[neighbor, epoch]
            except RowError:
                continue
            replaced.append(ReplacedSample(fault.where, f"{fault}; sample {neighbor} replaces sample {sample}"))
            return found
        raise UserError(f"{fault}; the next {MAX_NEIGHBORS} samples are corrupt, too") from fault
