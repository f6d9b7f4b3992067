"""The baselines of ``bench loader``: three other libraries, and a bare loop without a loader.

All decode the same JPEGs with the same Transform (Pillow; RandomResizedCrop 0.5-1 to 224, flip) and normalize whole
batches as our loader does, with the same number of processes and the same prefetch. Each shuffles as its documentation
recommends. They need only the transform of EVE-DS, and run in .venv-bench.
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

from eve_ds.bench.loader_images import ABOUT, create_once, read_files, write_images
from eve_ds.bench.loader_process import Settings
from eve_ds.data.transforms import Transform, build_transform

RATE = "images_per_second"
_TARS = 8  # minimum number of tar files; each process needs one
_MDS_BYTES = 1 << 24
_SHUFFLE_BUFFER = 100


def train_transform(settings: Settings) -> Transform:
    """The transform of pre-training: RandomResizedCrop 0.5-1 and flip."""
    return build_transform(settings.image_size, train=True)


def batch_of(images: Sequence[np.ndarray]) -> Tensor:
    """B arrays [H, W, 3] uint8 -> [B, H, W, 3] uint8, as they cross to a GPU, which normalizes them."""
    return torch.from_numpy(np.stack(images))


def window_rate(batches: Iterable[Tensor], settings: Settings) -> dict[str, float]:
    """Images per second between the arrivals of batch ``lead`` and batch ``lead + window``.

    In this window all processes decode continuously: they start before it, and still have work after it.
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
    """Create the JPEGs; measures nothing."""

    def __init__(self, settings: Settings) -> None:
        folder = create_once(Path(settings.image_folder), lambda path: write_images(path, settings.images))
        self.about = folder / ABOUT

    def round(self) -> dict[str, float]:
        return {}


class Bare:
    """No loader: each process decodes its share of the files from memory and discards the batches."""

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
    """webdataset: tar files in random order, a shuffle buffer, batches built in the workers (as in its README)."""

    def __init__(self, settings: Settings) -> None:
        import webdataset

        self._webdataset = webdataset
        self._settings = settings
        self._transform = train_transform(settings)
        tars = max(_TARS, settings.processes)
        folder = Path(settings.work) / f"webdataset-{Path(settings.image_folder).name}-{tars}"
        create_once(folder, lambda path: self._write(path, tars))
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
    """MosaicML streaming: local MDS shards, its default shuffling, and its StreamingDataLoader."""

    def __init__(self, settings: Settings) -> None:
        import streaming
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()  # left over from a killed run
        transform = train_transform(settings)

        class Dataset(streaming.StreamingDataset):  # type: ignore[misc, unused-ignore]
            def __getitem__(self, index: Any) -> Any:
                sample = super().__getitem__(index)
                return transform(sample["image"], sample["id"])

        self._streaming = streaming
        self._settings = settings
        folder = create_once(Path(settings.work) / f"streaming-{Path(settings.image_folder).name}", self._write)
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
    """Hugging Face datasets: memory-mapped Arrow, ``with_transform``, and a shuffling torch DataLoader."""

    def __init__(self, settings: Settings) -> None:
        os.environ["HF_HOME"] = str(Path(settings.work) / "huggingface")  # read on import
        import datasets

        self._datasets = datasets
        self._settings = settings
        self._transform = train_transform(settings)
        folder = create_once(Path(settings.work) / f"datasets-{Path(settings.image_folder).name}", self._write)
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
