"""The loader's batches on this rank's device, their images normalized there.

On a GPU the main process touches no pixel: images lie as bytes in memory that the loader's processes write and CUDA has
pinned, and are copied from there, a quarter of the size of float32, while the device computes. (Without such processes,
or if CUDA refuses to pin their memory, each batch is copied into pinned memory first.)
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from eve_ds.data.transforms import normalize, normalize_on_device

Batch = dict[str, Tensor]


class DeviceFeed(Iterator[Batch]):
    """Batches of a raw loader on a device: images* [B, 3, H, W] float32 in [-1, 1], the rest as the loader gives it.

    Float32 in a bf16 run, too: what pre-training rebuilds are the pixels of flat patches as well, stretched to variance
    1, which bf16 would round away. The patch projection casts those patches that it gets.

    Args:
        source: raw batches of ``build_loader``; closed with the feed.
        device: where they go.
    Attributes:
        wait_seconds: total of those waits for ``source`` at whose end the device had nothing left to do: at least the
            time that it stood idle for want of data. Waiting for the device itself does not count.
    """

    def __init__(self, source: Generator[Batch, None, None], device: torch.device) -> None:
        self.wait_seconds = 0.0
        self._source = source
        self._copies = _Copies(device) if device.type == "cuda" else None
        self._ahead: Batch | Exception | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether a batch was read that ``next`` has not returned yet."""
        return self._ahead is not None

    def look_ahead(self) -> None:
        """Read the batch that ``next`` will return, and begin to copy it. An error is raised by that ``next``."""
        if self._ahead is None:
            try:
                self._ahead = self._read()
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to the batch that was read
                self._ahead = error

    def __next__(self) -> Batch:
        found, self._ahead = self._ahead, None
        if isinstance(found, Exception):
            try:
                raise found
            finally:
                del found  # or this frame and the error would keep each other, and the caller's batch, alive
        batch = self._read() if found is None else found
        return self._copies.hand_over(batch) if self._copies else batch

    def close(self) -> None:
        """Close the source, once nothing is copied from its memory. A batch read ahead is lost."""
        self._ahead = None
        try:
            if self._copies:
                self._copies.wait()
        finally:
            self._source.close()

    def _read(self) -> Batch:
        if self._copies:
            # ``next(source)`` lets a worker overwrite the slot of the batch before, so its copy must be over. It began
            # when that batch was read: with ``look_ahead`` a micro-batch ago, and the host hardly waits.
            self._copies.wait()
        work = self._copies.launched_work() if self._copies else None
        began = time.perf_counter()
        try:
            batch = next(self._source)
        finally:
            if work is None or work.query():  # else the device still computes what was launched before
                self.wait_seconds += time.perf_counter() - began
        if self._copies:
            return self._copies.begin(batch)
        return {name: normalize(value.numpy()) if _is_raw(name, value) else value for name, value in batch.items()}


def on_device(batch: Batch, device: torch.device) -> Batch:
    """A raw batch as a ``DeviceFeed`` gives it."""
    return next(DeviceFeed((each for each in (batch,)), device))


class _Copies:
    """Copies of batches to a CUDA device, on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event()

    def launched_work(self) -> torch.cuda.Event:
        """An event that is over when the device has done all that computes on it so far."""
        return torch.cuda.current_stream(self._device).record_event()

    def begin(self, batch: Batch) -> Batch:
        """The batch on the device; its values are there when ``wait`` or ``hand_over`` says so."""
        with torch.cuda.stream(self._stream):
            # Pinned already are the loader's slots. torch keeps a buffer of ``pin_memory`` until the copy is over.
            copies = {
                name: (value if value.is_pinned() else value.pin_memory()).to(self._device, non_blocking=True)
                for name, value in batch.items()
            }
            self._copied.record(self._stream)
        return copies

    def wait(self) -> None:
        """Wait, on the host, until the last batch is copied."""
        self._copied.synchronize()

    def hand_over(self, batch: Batch) -> Batch:
        """The last batch, for use on the current stream, which waits for the copy; the host does not."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._copied)
        for value in batch.values():
            value.record_stream(current)  # it is the copies' stream's memory: not to be reused before this has read it
        return {name: normalize_on_device(value) if _is_raw(name, value) else value for name, value in batch.items()}


def _is_raw(name: str, value: Tensor) -> bool:
    return name.startswith("images") and value.dtype == torch.uint8
