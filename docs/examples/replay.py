"""Replay a step of ``suspects.jsonl`` on one process, and say where the first value that is not finite comes from.

python docs/examples/replay.py RUN LINE        (LINE of RUN/suspects.jsonl, from 1 on; pre-training)

Takes the newest checkpoint before the step, in fp32, and the step's own batches: the same samples, crops and masks.
Contrast and matching (--task itc_...) see the negatives of one rank's micro-batch alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eve_ds.config import PretrainConfig, parse
from eve_ds.engine import setup
from eve_ds.engine.batches import TrainingBatches
from eve_ds.engine.whole_weights import consolidated_state
from eve_ds.weights.model_folder import complete_checkpoints, step_of


def finite(value: Any) -> bool:
    """Whether all floating-point tensors in ``value`` are finite."""
    if isinstance(value, tuple | list):
        return all(map(finite, value))
    return not (isinstance(value, Tensor) and value.is_floating_point()) or bool(value.isfinite().all())


def watch(task: nn.Module) -> list[str]:
    """The list that the names of modules go into whose output is not finite though what they were given was."""
    found: list[str] = []
    for name, module in task.named_modules():

        def hook(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if finite(inputs) and not finite(output):
                found.append(name)

        module.register_forward_hook(hook)
    return found


def main(run: Path, line: int) -> None:
    lines = (run / "suspects.jsonl").read_text().splitlines()
    if not 1 <= line <= len(lines):
        sys.exit(f"{run}/suspects.jsonl: has no line {line}; it has {len(lines)}")
    suspect = json.loads(lines[line - 1])
    before = [path for path in complete_checkpoints(run / "checkpoints") if step_of(path) < suspect["step"]]
    if not before:
        sys.exit(f"{run}/checkpoints: holds none of a step before {suspect['step']}; see checkpoint.every and .keep")
    checkpoint = before[-1]
    config = parse(PretrainConfig, ["--config", str(run / "config.yaml"), "--engine.expert_parallel_size=1"], "replay")
    tokenizer = setup.build_tokenizer(config)
    samples = setup.build_dataset(config, config.data.train_split, tokenizer, train=True)
    task = setup.build_task(config, tokenizer, samples.num_classes)
    task.load_state_dict(consolidated_state(checkpoint))
    found = watch(task)
    batches = TrainingBatches(config, samples, suspect["step"] - 1)
    assert batches.samples_of(suspect["step"]) == suspect["samples"], "the data have changed"
    accumulated = config.engine.global_batch_size // (config.engine.micro_batch_size or config.engine.global_batch_size)
    for _ in range(accumulated):
        batch = next(batches)
        loss = task(batch).loss
        loss.backward()
        wrong = [name for name, value in task.named_parameters() if value.grad is not None and not finite(value.grad)]
        ids = batch["sample_id"].tolist()
        print(f"samples {ids}: loss {loss.item():g}; first module: {found[:1]}; {len(wrong)} gradients not finite")
        task.zero_grad()
        found.clear()
    batches.close()
    print(f"replayed {accumulated} micro-batches of step {suspect['step']} with {checkpoint.name}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), int(sys.argv[2]))
