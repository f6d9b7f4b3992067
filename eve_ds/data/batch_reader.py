"""What a loader's process does: the samples of a block read, a corrupt one replaced, all put together."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import numpy as np

from eve_ds.data.collate import Arrays, stack
from eve_ds.data.readahead import ReadAhead
from eve_ds.data.sampler import Block
from eve_ds.data.samples import Key, Sample, Samples
from eve_ds.data.shards import RowError
from preprocessing.errors import DataError

# So many samples that follow a corrupt one are tried; a run of more is a broken shard, not a broken row.
NEIGHBORS = 100


@dataclass(frozen=True)
class Replaced:
    """A corrupt sample that another one stands in for.

    Args:
        where: shard and row.
        message: the line that names the fault, too.
    """

    where: str
    message: str


@dataclass(frozen=True)
class Reading:
    """A block that was read, as it goes from a worker process to its parent.

    Args:
        block: what was to be read.
        arrays: as collate.stack gives them, but for the images that lie in a slot.
        slot: of SharedImages; None where the images are among the arrays.
        replaced: samples that were corrupt.
        failure: a user's mistake, in one line, in place of all these; torch would wrap the exception itself into a page
            of traceback.
    """

    block: Block
    arrays: Arrays
    slot: int | None = None
    replaced: tuple[Replaced, ...] = ()
    failure: str | None = None


class SharedImages:
    """Room for the images of some micro-batches, shared with worker processes that are forked off afterwards.

    A worker writes a micro-batch's images into a slot, and the parent makes its tensor out of them: nothing is
    allotted, sent or unpacked per batch. The memory is anonymous, so that /dev/shm (64 MB in a container by default)
    need not hold it.

    Args:
        slots: micro-batches.
        names: of a sample's images.
        batch_size: samples of a micro-batch, at most.
        image_size: side of an image, pixels.
    Raises:
        DataError: there is no such memory.
    """

    def __init__(self, slots: int, names: tuple[str, ...], batch_size: int, image_size: int) -> None:
        self.slots = slots
        shape = (slots, len(names), batch_size, image_size, image_size, 3)
        size = int(np.prod(shape))
        try:
            memory = mmap.mmap(-1, max(size, 1))
        except OSError as error:
            raise DataError(
                f"data.num_workers: no shared memory for {slots} micro-batches, {size >> 20} MiB ({error.strerror}); "
                "lower data.num_workers or engine.micro_batch_size"
            ) from None
        self._pixels = np.frombuffer(memory, dtype=np.uint8, count=size).reshape(shape)
        self._names = names

    def take_in(self, slot: int, place: int, sample: Sample) -> Sample:
        """Move a sample's images to its place in a slot; returns the rest of the sample."""
        for number, name in enumerate(self._names):
            self._pixels[slot, number, place] = sample[name]
        return {name: value for name, value in sample.items() if name not in self._names}

    def look_at(self, slot: int, count: int) -> Arrays:
        """The images of a slot, [count, H, W, 3] uint8 each, not copied: they are written over later."""
        return {name: self._pixels[slot, number, :count] for number, name in enumerate(self._names)}


@dataclass(frozen=True)
class Reader:
    """(number, block) -> Reading, in the shape of a map-style data set, as torch's DataLoader wants it.

    Args:
        dataset: of samples.py.
        pad_to_multiple: of the text length.
        replace: put a neighbor in a corrupt sample's place; else it is a failure.
        images: where to leave the images; None leaves them among the arrays.
        read_ahead: told of each block first.
    """

    dataset: Samples
    pad_to_multiple: int
    replace: bool
    images: SharedImages | None = None
    read_ahead: ReadAhead | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: tuple[int, Block]) -> Reading:
        number, block = item
        slot = number % self.images.slots if self.images is not None else None
        replaced: list[Replaced] = []
        try:
            if self.read_ahead is not None:
                self.read_ahead(block)
            keys = list(zip(block.samples.tolist(), block.epochs.tolist(), strict=True))
            samples = []
            for place, described in enumerate([self._describe(key) for key in keys]):
                sample = self._complete(keys[place], described, replaced)
                if self.images is not None and slot is not None:
                    sample = self.images.take_in(slot, place, sample)
                samples.append(sample)
        except DataError as error:
            return Reading(block, {}, failure=str(error))
        arrays = stack(samples, self.dataset.pad_id, self.dataset.max_text_length, self.pad_to_multiple)
        if block.valid is not None:
            arrays["valid"] = block.valid
        return Reading(block, arrays, slot, tuple(replaced))

    def _describe(self, key: Key) -> Sample | RowError:
        try:
            return self.dataset.describe(key)
        except RowError as fault:
            return fault

    def _complete(self, key: Key, described: Sample | RowError, replaced: list[Replaced]) -> Sample:
        """The sample; or, if its row is corrupt, the next one that is not, just as it is when its own turn comes."""
        sample, epoch = key
        try:
            if isinstance(described, RowError):
                raise described
            return self.dataset.complete(described)
        except RowError as error:
            if not self.replace:
                raise
            fault = error
        for step in range(1, NEIGHBORS + 1):
            neighbor = (sample + step) % len(self.dataset)
            try:
                found = self.dataset[neighbor, epoch]
            except RowError:
                continue
            replaced.append(Replaced(fault.where, f"{fault}; sample {neighbor} stands in for sample {sample}"))
            return found
        raise DataError(f"{fault}; and the {NEIGHBORS} samples after it are no better") from fault
