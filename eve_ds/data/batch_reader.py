"""What a loader process does for one micro-batch: read its samples, replace corrupt ones, stack the rest."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from eve_ds.data.collate import Arrays, stack
from eve_ds.data.readahead import ReadAhead
from eve_ds.data.sampler import MicroBatchIndices
from eve_ds.data.samples import Key, Sample, Samples
from eve_ds.data.shards import RowError
from preprocessing.errors import UserError

# The number of following samples that are tried after a corrupt one; more corrupt rows than this mean a broken shard.
MAX_NEIGHBORS = 100


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
        arrays: the output of ``collate.stack``, without the images that lie in a slot.
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
