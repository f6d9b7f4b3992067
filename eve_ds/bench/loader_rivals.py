"""The contestants of `bench loader` that need nothing of ours but the transform: three libraries, and no loader at all.

All decode the same JPEGs with the same Transform (Pillow; RandomResizedCrop 0.5-1 to 224, mirror), and normalize whole
batches as our loader does, in the same number of processes that read equally far ahead. Each shuffles as its own
documentation has it. They run in .venv-bench, where our loader need not be installable.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import tarfile
import time
from collections.abc import Iterable, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from eve_ds.bench.loader_images import ABOUT, made_once, read_files, write_images
from eve_ds.bench.loader_process import Settings
from eve_ds.data.transforms import Transform, build_transform, normalize

RATE = "images_per_second"
_TARS = 8  # of the webdataset; each process needs one
_MDS_BYTES = 1 << 24
_SHUFFLE_BUFFER = 100


def train_transform(settings: Settings) -> Transform:
    """RandomResizedCrop 0.5-1 and mirror image: the pre-training's."""
    return build_transform(settings.image_size, train=True)


def batch_of(images: Sequence[np.ndarray]) -> Tensor:
    """[H, W, 3] uint8 each -> [B, 3, H, W] float32, normalized as `eve_ds.data.collate` does."""
    return normalize(np.stack(images))


def window_rate(batches: Iterable[Tensor], settings: Settings) -> dict[str, float]:
    """Images a second from the arrival of batch `lead` to that of batch `lead + window`.

    Inside the window every process decodes all the time: the start of the processes lies before it, and work goes on
    behind it, so that none has run dry.
    """
    images, began, ended = 0, 0.0, 0.0
    for number, batch in enumerate(batches, 1):
        if settings.lead < number <= settings.lead + settings.window:
            images += len(batch)
        if number == settings.lead:
            began = time.perf_counter()
        elif number == settings.lead + settings.window:
            ended = time.perf_counter()
    if not ended:
        raise RuntimeError(f"the batches ended before number {settings.lead + settings.window}")
    return {RATE: images / (ended - began)}


class Images:
    """Makes the JPEGs; measures nothing."""

    def __init__(self, settings: Settings) -> None:
        folder = made_once(Path(settings.image_folder), lambda path: write_images(path, settings.images))
        self.about = folder / ABOUT

    def round(self) -> dict[str, float]:
        return {}


class Bare:
    """No loader: each process loops over its share of the files' bytes, in memory, and throws the batches away."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._files = read_files(Path(settings.image_folder))
        self._transform = train_transform(settings)

    def round(self) -> dict[str, float]:
        context = multiprocessing.get_context("fork")
        barrier = context.Barrier(self._settings.processes)
        rates = context.SimpleQueue()
        processes = [
            context.Process(target=self._loop, args=(number, barrier, rates))
            for number in range(self._settings.processes)
        ]
        for process in processes:
            process.start()
        found = [rates.get() for _ in processes]
        for process in processes:
            process.join()
        return {RATE: sum(found)}

    def _loop(self, number: int, barrier: Barrier, rates: Any) -> None:
        torch.set_num_threads(1)  # as in a DataLoader's worker
        settings = self._settings
        share = range(number, len(self._files), settings.processes)
        size = settings.batch_size
        batches = [share[start : start + size] for start in range(0, len(share) - size + 1, size)]
        batches, warm = batches[settings.prefetch :], batches[: settings.prefetch]
        for batch in warm:
            self._batch(batch)
        barrier.wait()
        began = time.perf_counter()
        for batch in batches:
            self._batch(batch)
        rates.put(len(batches) * size / (time.perf_counter() - began))

    def _batch(self, indices: Sequence[int]) -> Tensor:
        return batch_of([self._transform(self._files[index], index) for index in indices])


class WebDataset:
    """webdataset: tar files in random order, a buffer shuffles, batches are made in the processes (its README)."""

    def __init__(self, settings: Settings) -> None:
        import webdataset

        self._webdataset = webdataset
        self._settings = settings
        self._transform = train_transform(settings)
        tars = max(_TARS, settings.processes)
        folder = Path(settings.work) / f"webdataset-{Path(settings.image_folder).name}-{tars}"
        made_once(folder, lambda path: self._write(path, tars))
        self._tars = [str(path) for path in sorted(folder.glob("*.tar"))]

    def _write(self, folder: Path, tars: int) -> None:
        files = read_files(Path(self._settings.image_folder))
        for number in range(tars):
            with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
                for index in range(number, len(files), tars):
                    member = tarfile.TarInfo(f"{index:06d}.jpg")
                    member.size = len(files[index])
                    tar.addfile(member, io.BytesIO(files[index]))

    def round(self) -> dict[str, float]:
        dataset = (
            self._webdataset.WebDataset(self._tars, shardshuffle=len(self._tars))
            .shuffle(_SHUFFLE_BUFFER)
            .to_tuple("__key__", "jpg")
            .map(self._decode)
            .batched(self._settings.batch_size, collation_fn=batch_of)
        )
        workers, prefetch = self._settings.processes, self._settings.prefetch
        loader = self._webdataset.WebLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=prefetch)
        return window_rate(loader, self._settings)

    def _decode(self, sample: tuple[str, bytes]) -> np.ndarray:
        return self._transform(sample[1], int(sample[0]))


class Streaming:
    """MosaicML streaming: MDS shards, local, shuffled by its default algorithm, through its StreamingDataLoader."""

    def __init__(self, settings: Settings) -> None:
        import streaming
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()  # of a run that was killed
        transform = train_transform(settings)

        class Dataset(streaming.StreamingDataset):  # type: ignore[misc, unused-ignore]
            def __getitem__(self, at: Any) -> Any:
                sample = super().__getitem__(at)
                return transform(sample["image"], sample["id"])

        self._streaming = streaming
        self._settings = settings
        folder = made_once(Path(settings.work) / f"streaming-{Path(settings.image_folder).name}", self._write)
        self._dataset = Dataset(local=str(folder), shuffle=True, batch_size=settings.batch_size)

    def _write(self, folder: Path) -> None:
        columns = {"image": "bytes", "id": "int"}
        with self._streaming.MDSWriter(out=str(folder), columns=columns, size_limit=_MDS_BYTES) as writer:
            for index, data in enumerate(read_files(Path(self._settings.image_folder))):
                writer.write({"image": data, "id": index})

    def round(self) -> dict[str, float]:
        loader = self._streaming.StreamingDataLoader(
            self._dataset,
            batch_size=self._settings.batch_size,
            num_workers=self._settings.processes,
            prefetch_factor=self._settings.prefetch,
            collate_fn=batch_of,
        )
        return window_rate(loader, self._settings)


class Datasets:
    """Hugging Face datasets: memory-mapped Arrow, `with_transform`, torch's DataLoader with a random order."""

    def __init__(self, settings: Settings) -> None:
        os.environ["HF_HOME"] = str(Path(settings.work) / "huggingface")  # read on import
        import datasets

        self._datasets = datasets
        self._settings = settings
        self._transform = train_transform(settings)
        folder = made_once(Path(settings.work) / f"datasets-{Path(settings.image_folder).name}", self._write)
        self._dataset = datasets.load_from_disk(str(folder)).with_transform(self._decode)

    def _write(self, folder: Path) -> None:
        features = self._datasets.Features(
            {"image": self._datasets.Value("binary"), "id": self._datasets.Value("int64")}
        )
        files = read_files(Path(self._settings.image_folder))
        columns = {"image": files, "id": list(range(len(files)))}
        self._datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(folder))

    def _decode(self, batch: dict[str, list[Any]]) -> dict[str, list[np.ndarray]]:
        return {"image": [self._transform(*sample) for sample in zip(batch["image"], batch["id"], strict=True)]}

    def round(self) -> dict[str, float]:
        loader: Any = DataLoader(
            self._dataset,
            batch_size=self._settings.batch_size,
            shuffle=True,
            num_workers=self._settings.processes,
            prefetch_factor=self._settings.prefetch,
            collate_fn=_collate,
        )
        return window_rate(loader, self._settings)


def _collate(samples: Sequence[dict[str, np.ndarray]]) -> Tensor:
    return batch_of([sample["image"] for sample in samples])
