"""The demo's pre-training, a model so small that it waits for the host: seconds to its first step, and a step's time.

    python -m tests.gpu.small_model --work DIR

"run": ``eve_ds.pretrain`` with the recipe tiny_shapes, plain and compiled. "passes": forward and backward of its task
alone, plain, compiled, and compiled with CUDA graphs (torch.compile's mode "reduce-overhead"), which no run uses: the
figures say whether it is worth it; ``worst`` is the largest relative difference of one parameter's gradient from the
plain pass's, ``cosine`` that of all together (in bf16 a token may choose other experts). Prints a JSON line. In the dry
run on the CPU there are no CUDA graphs, the traced graphs run by torch's own operations, and "run" is plain alone.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eve_ds.bench.gemm import DTYPES
from eve_ds.bench.step import RECIPE, build_task, make_batch
from eve_ds.config import PretrainConfig, parse
from eve_ds.engine.deepspeed_config import best_precision
from eve_ds.model import compiled
from eve_ds.model.backbone import Backbone
from tests.gpu.kit_sizes import kit_device
from tests.gpu.real_loop import failed, measured
from tests.support.shapes import shapes_world

TINY = RECIPE.with_name("tiny_shapes.yaml")
DRY = ["--engine.global_batch_size=16", "--engine.precision=fp32"]
WARM_UP, TIMED = 5, 20


def main() -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs; emptied")
    work = parser.parse_args().work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    device = kit_device() or torch.device("cpu")
    on_gpu = device.type == "cuda"
    options = [f"--config={TINY}", "--engine.expert_parallel_size=1", *([] if on_gpu else DRY)]
    # In this order: the passes leave kernels in the compiler's cache, which a run's start would find there.
    found: dict[str, Any] = {"run": runs(options, work, on_gpu)}
    print(json.dumps(found), flush=True)  # CUDA graphs may fail
    return found | {"passes": passes(options, device)}


def passes(options: list[str], device: torch.device) -> dict[str, Any]:
    config = parse(PretrainConfig, options, "small_model")
    torch.manual_seed(0)
    precision = config.engine.precision
    dtype = DTYPES[best_precision(device.type) if precision == "auto" else precision]
    task = build_task(config, Backbone(config.model)).to(device, dtype).train()
    pairs = config.engine.global_batch_size
    batches = [make_batch(config, pairs, device) for _ in range(3)]
    modes = {"plain": None, "compiled": "default"} | ({"graphs": "reduce-overhead"} if device.type == "cuda" else {})
    found: dict[str, Any] = {}
    expected: list[list[Tensor]] = []
    for name, mode in modes.items():
        seconds, gradients = one_mode(copy.deepcopy(task), batches, mode)
        expected = expected or gradients
        found[f"{name}_ms"] = seconds * 1000
        if name != "plain":
            both = list(zip(expected, gradients, strict=True))
            found[f"{name}_worst"] = max(worst(a, b) for a, b in both)
            found[f"{name}_cosine"] = min(cosine(a, b) for a, b in both)
    return found


def worst(expected: list[Tensor], found: list[Tensor]) -> float:
    return max(float((a - b).norm() / a.norm().clamp_min(1e-30)) for a, b in zip(expected, found, strict=True))


def cosine(expected: list[Tensor], found: list[Tensor]) -> float:
    return float(torch.cosine_similarity(torch.cat(expected), torch.cat(found), dim=0))


def one_mode(task: nn.Module, batches: list[Any], mode: str | None) -> tuple[float, list[list[Tensor]]]:
    """(seconds of a forward and backward pass, of the last pass over each batch the gradients by parameter)."""
    torch_compile = torch.compile
    compiled._compiled.cache_clear()
    torch._dynamo.reset()
    try:
        if mode is not None:
            on_gpu = batches[0]["images"].is_cuda
            torch.compile = functools.partial(torch_compile, mode=mode) if on_gpu else torch_compile
            compiled.compile_parts(task, "inductor" if on_gpu else "aot_eager")
        seconds, gradients = [], {}
        for turn in range(WARM_UP + TIMED):
            task.zero_grad(set_to_none=True)
            began = now()
            torch.compiler.cudagraph_mark_step_begin()
            task(batches[turn % len(batches)]).loss.backward()
            ended = now()
            if turn >= WARM_UP:
                seconds.append(ended - began)
            gradients[turn % len(batches)] = gradients_of(task)
        return statistics.median(seconds), [gradients[each] for each in sorted(gradients)]
    finally:
        torch.compile = torch_compile


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic()


def gradients_of(task: nn.Module) -> list[Tensor]:
    return [each.grad.double().flatten() for each in task.parameters() if each.grad is not None]


def runs(options: list[str], work: Path, on_gpu: bool) -> dict[str, Any]:
    world = shapes_world(work, splits=("train",))
    data = [f"--data.path={world / 'data'}", f"--data.tokenizer={world / 'tokenizer'}", "--data.val_split=null"]
    common = [*options, *data, "--deepspeed_config=ds_configs/zero1.json"]
    found = {}
    for choice in ("off", "on") if on_gpu else ("off",):
        one = measured([*common, f"--engine.compile={choice}"], work / f"run_{choice}", workers=2, on_gpu=on_gpu)
        found["compiled" if choice == "on" else "plain"] = one
    return found


if __name__ == "__main__":
    figures = main()
    print(json.dumps(figures))
    sys.exit(failed(figures))
