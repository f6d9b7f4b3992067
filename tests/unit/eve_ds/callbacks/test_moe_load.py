"""Expert load while training: two ranks with half of the experts each, against one process and a plain count."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from eve_ds.callbacks.moe_load import CELL, LABEL, MoELoad, heat_map, load_metrics
from eve_ds.model.moe import MoE
from eve_ds.tasks.base import Task
from tests.support.distributed import run_distributed_test
from tests.support.tiny import caption_batch, expert_parallel, masked_task, rows_of

ROWS, STEPS, MICRO = 6, 4, 2
EVERY = 2  # steps; the second record must not hold the first one's choices


def train(task: Task, folder: Path, first: int, last: int) -> list[dict[str, float]]:
    """Forward and backward on rows [first, last) of each micro-batch, with a held-out pass between the steps."""
    images: list[dict[str, Any]] = []
    trainer: Any = SimpleNamespace(
        task=task, output_dir=folder, is_main=first == 0, start_step=0, step=0, device=torch.device("cpu")
    )
    trainer.show_images = images.append
    callback = MoELoad(EVERY)
    callback.fit_start(trainer)
    records = []
    for step in range(STEPS):
        task.train()
        callback.step_start(trainer)
        for micro in range(MICRO):
            task(rows_of(caption_batch(ROWS, seed=step * MICRO + micro), first, last)).loss.backward()
        trainer.step += 1
        records.append({"step": float(trainer.step)})
        callback.step_end(trainer, records[-1])
        task.eval()
        with torch.no_grad():
            task(rows_of(caption_batch(ROWS, seed=99), first, last))
    callback.close(trainer)
    assert len(images) == (STEPS // EVERY if trainer.is_main else 0)
    task.train()
    task(rows_of(caption_batch(ROWS), first, last))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in task.modules())
    return records


@functools.cache
def plain_count() -> list[tuple[np.ndarray, list[float]]]:
    """(choices [S, 2, E], mean entropy of each layer in the last step) per interval: loops over tokens."""
    task = masked_task()
    seen: list[tuple[int, Any, Any, Any]] = []
    for number, layer in enumerate(task.backbone.moe_layers()):
        layer.register_forward_pre_hook(
            lambda module, inputs, number=number: seen.append((number, *inputs))  # type: ignore[misc]
        )
    found = []
    for start in range(0, STEPS, EVERY):
        choices = np.zeros((2, 2, 4))
        entropies: list[list[float]] = [[], []]
        for step in range(start, start + EVERY):
            for micro in range(MICRO):
                seen.clear()
                with torch.no_grad():
                    task.train()(caption_batch(ROWS, seed=step * MICRO + micro))
                for number, x, modality, valid in list(seen):
                    layer = task.backbone.moe_layers()[number]
                    for row in range(x.shape[0]):
                        for place in range(x.shape[1]):
                            if valid is not None and not valid[row, place]:
                                continue
                            kind = int(modality[place])
                            vector = layer.text_vector if kind else layer.image_vector
                            gates = (layer.router.weight @ (x[row, place] + vector)).softmax(0).tolist()
                            for expert in sorted(range(4), key=lambda e: -gates[e])[:2]:
                                choices[number, kind, expert] += 1
                            if step == start + EVERY - 1:
                                entropies[number].append(-sum(gate * math.log(gate) for gate in gates))
        found.append((choices, [sum(own) / len(own) for own in entropies]))
    return found


def on_a_rank(folder: str) -> None:
    rank = dist.get_rank()
    half = ROWS // 2
    records = train(masked_task(expert_parallel(MoE, 2, rank)), Path(folder), rank * half, (rank + 1) * half)
    if rank == 0:
        (Path(folder) / "records.json").write_text(json.dumps(records))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_passes_of_an_interval_count_once(tmp_path: Path, checkpointing: bool) -> None:
    """... also where the backward pass repeats them."""
    records = train(masked_task(checkpoint_activations=checkpointing), tmp_path, 0, ROWS)
    lines = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert [(line["step"], line["steps"], line["layers"]) for line in lines] == [(2, 2, [1, 2]), (4, 2, [1, 2])]
    for line, (choices, entropies) in zip(lines, plain_count(), strict=True):
        np.testing.assert_array_equal(line["counts"], choices)
        record = records[line["step"] - 1]
        for layer, load, entropy in zip([1, 2], choices, entropies, strict=True):
            both = load.sum(axis=0)
            assert record[f"moe/layer_{layer}/load_imbalance"] == pytest.approx(both.max() / both.mean())
            assert record[f"moe/layer_{layer}/load_imbalance_text"] == pytest.approx(load[1].max() / load[1].mean())
            assert record[f"moe/layer_{layer}/router_entropy"] == pytest.approx(entropy, rel=1e-5)
        assert record["moe/router_entropy_share"] == pytest.approx(sum(entropies) / 2 / math.log(4), rel=1e-5)
    assert records[0].keys() == records[2].keys() == {"step"}


def test_two_ranks_that_share_the_experts_count_what_one_process_counts(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    expected = train(masked_task(), tmp_path / "one", 0, ROWS)
    run_distributed_test(on_a_rank, 2, args=(str(tmp_path),))
    records = json.loads((tmp_path / "records.json").read_text())
    assert records == [pytest.approx(record, rel=1e-5) for record in expected]
    assert (tmp_path / "expert_load.jsonl").read_text() == (tmp_path / "one/expert_load.jsonl").read_text()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint(tmp_path: Path) -> None:
    train(masked_task(soft_layers=[2, 1]), tmp_path, 0, ROWS)
    trainer: Any = SimpleNamespace(
        task=masked_task(), output_dir=tmp_path, is_main=False, start_step=3, device=torch.device("cpu")
    )
    MoELoad(EVERY).fit_start(trainer)
    assert len((tmp_path / "expert_load.jsonl").read_text().splitlines()) == 2  # rank 0 alone writes
    trainer.is_main = True
    MoELoad(EVERY).fit_start(trainer)
    lines = [json.loads(line) for line in (tmp_path / "expert_load.jsonl").read_text().splitlines()]
    assert [(line["step"], line["layers"]) for line in lines] == [(2, [1, 2])]  # in the order of the blocks


def test_a_model_without_soft_layers_has_no_load(tmp_path: Path) -> None:
    trainer: Any = SimpleNamespace(
        task=masked_task(soft_layers=[]), output_dir=tmp_path, is_main=True, start_step=0, step=EVERY
    )
    trainer.device = torch.device("cpu")
    callback, record = MoELoad(EVERY), {"step": 2.0}
    callback.fit_start(trainer)
    callback.step_end(trainer, record)
    callback.close(trainer)
    assert record == {"step": 2.0} and list(tmp_path.iterdir()) == []


def test_dead_experts_and_a_modality_without_tokens() -> None:
    choices = np.array([[[6.0, 0, 2, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [4, 0, 0, 0]]])
    found = load_metrics(choices, np.array([[8.0, 0.0], [2.0, 2.0]]), np.array([[4.0, 0.0], [2.0, 2.0]]), [10, 11])
    assert found["moe/layer_10/load_imbalance"] == 3.0 and found["moe/layer_10/load_imbalance_text"] == 0.0
    assert found["moe/layer_11/load_imbalance_text"] == 4.0 == found["moe/load_imbalance_text"]
    assert found["moe/layer_10/dead_experts"] == 0.5 and found["moe/dead_experts"] == 0.25
    assert found["moe/layer_10/router_entropy"] == 2.0 and found["moe/router_entropy"] == 1.5
    none = load_metrics(np.zeros((1, 2, 1)), np.zeros((1, 2)), np.zeros((1, 2)), [3])
    assert none["moe/router_entropy"] == 0 and none["moe/dead_experts"] == 1 and none["moe/load_imbalance"] == 0
    assert "moe/router_entropy_share" not in none  # of a single expert


def test_the_heat_map_has_a_row_for_each_layer_and_modality() -> None:
    with np.errstate(all="raise"):  # a modality without tokens
        image = heat_map(np.array([[[6.0, 0, 2, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [4, 0, 0, 0]]]), [10, 11])
    assert image.shape == (4 * CELL, LABEL + 4 * CELL, 3) and image.dtype == np.uint8
    cells = image[CELL // 2 :: CELL, LABEL + CELL // 2 :: CELL, 0]
    assert cells.tolist() == [[255, 0, 85, 0], [85, 85, 85, 85], [0, 0, 0, 0], [255, 0, 0, 0]]
    assert image[:, :LABEL].any()  # the labels
