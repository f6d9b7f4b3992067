"""Pictures and expert load of a run, of a made split and objective: which samples, folders and steps."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from eve_ds.callbacks import pretrain_examples
from eve_ds.callbacks.pretrain_examples import KEPT, PretrainExamples
from eve_ds.tasks.spec import HeldOutExamples
from tests.support.tiny import masked_task

IMAGES = [5, 5, 7, 7, 7, 9]  # of the samples


class HeldOut:
    pad_id, max_text_length = 0, 12
    split = SimpleNamespace(sample=lambda sample: (IMAGES[sample], 0))

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, place: tuple[int, int]) -> int:
        return place[0]


def made(folder: Path, pictures: bool = True, is_main: bool = True, images_every: int = 0) -> tuple[Any, Any]:
    """(callback, trainer); two samples of the split are asked for."""
    task = masked_task(soft_layers=[2, 1])
    for number, layer in enumerate(task.backbone.moe_layers()):
        layer.last_load = torch.full((2, 4), 10.0 * (number + 1), dtype=torch.float64)
    shown: list[list[str]] = []
    trainer: Any = SimpleNamespace(
        task=task, output_dir=folder, is_main=is_main, start_step=0, step=0, total_steps=20, device=torch.device("cpu")
    )
    trainer.config, trainer.whole_weights = SimpleNamespace(model=task.config), contextlib.nullcontext
    trainer.shown, trainer.show_images = shown, lambda images: shown.append(sorted(images))

    def examples(task: Any, batch: Any, held_out: Any, chosen: list[int]) -> HeldOutExamples:
        assert batch["samples"].tolist() == chosen == [0, 2]  # the first captions of the first two images
        image = np.zeros((2, 2, 3), dtype=np.uint8)
        return HeldOutExamples({"of": trainer.step}, {"a.png": image, "b.png": image} if pictures else {})

    spec: Any = SimpleNamespace(held_out_examples=examples)
    split: Any = HeldOut()
    return PretrainExamples(spec, split, 2, images_every), trainer


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_examples, "stack", lambda samples, *_: {"samples": np.array(samples)})
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda load: load.mul_(2))  # two ranks alike


def train(callback: PretrainExamples, trainer: Any, steps: int) -> None:
    for trainer.step in range(1, steps + 1):
        callback.step_end(trainer, {})


def test_the_newest_pictures_are_kept_and_all_are_shown(tmp_path: Path) -> None:
    callback, trainer = made(tmp_path, images_every=2)
    train(callback, trainer, 15)
    expected = [f"step_{step:08d}" for step in range(4, 15, 2)][-KEPT:]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == expected
    assert {path.name for path in (tmp_path / "samples" / expected[-1]).iterdir()} == {"a.png", "b.png"}
    assert trainer.shown == [["samples/a", "samples/b"]] * 7


@pytest.mark.parametrize("changes", [{"is_main": False}, {"pictures": False}, {"images_every": 0}])
def test_other_ranks_and_objectives_without_pictures_write_none(
    tmp_path: Path, changes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    callback, trainer = made(tmp_path, **{"images_every": 2} | changes)
    train(callback, trainer, 5)
    assert list(tmp_path.iterdir()) == [] and trainer.shown == []
    told = ["logging.images_every=2 shows nothing: no patches are masked"] if "pictures" in changes else []
    assert caplog.messages == told  # once


def test_the_load_at_the_end_is_of_the_last_tenth_in_order_of_the_blocks(tmp_path: Path) -> None:
    callback, trainer = made(tmp_path)
    train(callback, trainer, 20)
    callback.fit_end(trainer)
    written = tmp_path / "samples" / "samples.json"
    assert json.loads(written.read_text()) == {
        "of": 20,  # steps 19 and 20, of two ranks
        "expert_load": {
            "layers": [{"layer": 1, "counts": [[40.0] * 4] * 2}, {"layer": 2, "counts": [[80.0] * 4] * 2}],
        },
    }
    assert (tmp_path / "samples" / "a.png").exists()
    before = written.stat().st_mtime_ns
    trainer.start_step = 20  # whole when it began
    callback.fit_end(trainer)
    assert written.stat().st_mtime_ns == before
    written.unlink()
    anew, _ = made(tmp_path)
    anew.fit_end(trainer)
    assert json.loads(written.read_text())["expert_load"]["layers"][0]["counts"] == [[20.0] * 4] * 2
