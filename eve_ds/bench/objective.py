"""EVE's objective and its rivals over one backbone and one batch, forward and backward, beside table 1 of the paper."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from torch import nn

from eve_ds.bench.benchmark import Benchmark, Column, Row, share, show_mb, show_ms, times
from eve_ds.bench.gemm import DTYPES, add_peak_options
from eve_ds.bench.machine import choose_device
from eve_ds.bench.step import RECIPE, build_task, flops_of, gradients_of, make_batch, peak_of_step
from eve_ds.bench.timing import Candidate, add_timing_options, extra_bytes, in_turn, medians
from eve_ds.config import PretrainConfig, parse
from eve_ds.engine.deepspeed_config import best_precision
from eve_ds.model.backbone import Backbone
from eve_ds.tasks.base import Batch, Task
from preprocessing.errors import UserError

PROGRAM = "python -m eve_ds.bench objective"
SEPARATE = "separate"
# The options of pre-training that make each; all other settings are the recipe's.
OBJECTIVES: dict[str, tuple[str, ...]] = {
    SEPARATE: ("--task", "pretrain", "--objective.mode", "separate"),
    "joint": ("--task", "pretrain", "--objective.mode", "joint"),
    "separate_codes": ("--task", "mlm_mim_codes", "--objective.mode", "separate"),
    "itc_itm": ("--task", "itc_itm", "--objective.mode", "separate"),
    "itc_itm_mlm": ("--task", "itc_itm_mlm", "--objective.mode", "separate"),
    "itc_itm_mlm_mim": ("--task", "itc_itm_mlm_mim", "--objective.mode", "separate"),
    "itc_mlm_mim": ("--task", "itc_mlm_mim", "--objective.mode", "separate"),
}
# Table 1 of arXiv 2308.11971, EVE-Base on 8 A100: hours an epoch, largest batch of a GPU.
PAPER = {
    SEPARATE: (2.14, 224),
    "separate_codes": (3.09, 152),
    "itc_mlm_mim": (3.26, 132),
    "itc_itm_mlm": (6.88, 80),
    "itc_itm_mlm_mim": (7.73, 64),
}


def _add_options(parser: ArgumentParser) -> None:
    add_timing_options(parser, repeats=5, warmup=1)
    add_peak_options(parser)
    add = parser.add_argument
    add("--config", default=str(RECIPE), help="pre-training recipe: model, masks, decoder, precision")
    add("--pairs", type=PositiveInt, default=16, help="pairs in the batch")
    add("--decoders", nargs="+", default=[], help="separate again with pixel decoders of DEPTHxWIDTH, as 1x256; rows")
    add("--memory", default="80GiB", help="of a device, for the forecast of the largest micro-batch")
    add("--world_size", type=PositiveInt, default=8, help="ranks of that forecast")
    add("--no_forecast", action="store_true", help="leave out the forecast of the largest micro-batch")


def _rows(options: Namespace) -> Iterator[Row]:
    device = choose_device(options.device)
    variants = {**OBJECTIVES, **_lighter(options.decoders)}
    configs = {name: _config(options, chosen) for name, chosen in variants.items()}
    for config in configs.values():
        if config.engine.precision == "auto":
            config.engine.precision = best_precision(device.type)
    largest = {name: None if options.no_forecast else largest_micro_batch(options, variants[name]) for name in variants}
    recipe = configs[SEPARATE]
    flops = {name: flops_of(config, options.pairs) for name, config in configs.items()}
    peak = peak_of_step(options, recipe, options.pairs, device)
    taken, extra, sizes = _measure(options, configs, device)
    ms = medians(taken)
    for name in configs:
        hours, batch = PAPER.get(name, (None, None))
        longer, more = ms[name] / ms[SEPARATE], flops[name] / flops[SEPARATE]
        yield {
            "objective": name,
            "config": options.config,
            "dtype": recipe.engine.precision,
            "pairs": options.pairs,
            "ms": ms[name],
            "samples_per_second": 1000 * options.pairs / ms[name],
            "flops_per_sample": flops[name] / options.pairs,
            "share_of_peak": flops[name] / (ms[name] / 1000) / peak.flops_per_second,
            "times_as_long": longer,
            "times_the_flops": more,
            "reached": longer / more,
            "peak_tflops": peak.flops_per_second / 1e12,
            "peak_product": str(peak.product),
            "parameters": sizes[name],
            "extra_bytes": extra[name],
            "largest_micro_batch_size": largest[name],
            "forecast_memory": options.memory,
            "forecast_world_size": options.world_size,
            "paper_hours": hours,
            "paper_times_as_long": hours / PAPER[SEPARATE][0] if hours is not None else None,
            "paper_largest": batch,
            "all_ms": taken[name],
        }


def _lighter(decoders: list[str]) -> dict[str, tuple[str, ...]]:
    """``separate`` with another pixel decoder, by name."""
    found = {}
    for decoder in decoders:
        depth, _, width = decoder.partition("x")
        if not (depth.isdecimal() and width.isdecimal()):
            raise UserError(f"--decoders {decoder}: expected DEPTHxWIDTH, as in 1x256")
        changes = ("--objective.decoder_depth", depth, "--objective.decoder_dim", width)
        found[f"{SEPARATE}_{decoder}"] = (*OBJECTIVES[SEPARATE], *changes)
    return found


def _config(options: Namespace, chosen: tuple[str, ...]) -> PretrainConfig:
    return parse(PretrainConfig, ["--config", options.config, *chosen], PROGRAM)


def largest_micro_batch(options: Namespace, chosen: tuple[str, ...]) -> int:
    """As ``python -m eve_ds.plan`` forecasts it for a GPU, without activation checkpointing."""
    from eve_ds.plan.__main__ import PretrainPlan  # imports deepspeed
    from eve_ds.plan.figures import forecast

    argv = ["--config", options.config, *chosen]
    argv += ["--world_size", str(options.world_size), "--device_memory", options.memory]
    return forecast(parse(PretrainPlan, argv, PROGRAM))["largest_micro_batch_size"]


def _measure(
    options: Namespace, configs: Mapping[str, PretrainConfig], device: torch.device
) -> tuple[dict[str, list[float]], dict[str, int], dict[str, int]]:
    """Milliseconds of each run, bytes beyond weights and gradients, and parameters, by objective."""
    recipe = configs[SEPARATE]
    torch.manual_seed(0)
    backbone = Backbone(recipe.model)  # one for all: their weights take most of the memory
    dtype = DTYPES[recipe.engine.precision]
    tasks = {name: build_task(config, backbone).to(device, dtype).train() for name, config in configs.items()}
    batch = make_batch(recipe, options.pairs, device)
    forget = functools.partial(_forget_gradients, tasks)
    candidates = {name: Candidate(functools.partial(_step, task, batch), forget) for name, task in tasks.items()}
    taken = in_turn(candidates, device, options.repeats, options.warmup)
    extra = {}
    for name, task in tasks.items():
        extra[name] = extra_bytes(candidates[name], functools.partial(gradients_of, task), device)
        gc.collect()
    sizes = {name: sum(parameter.numel() for parameter in task.parameters()) for name, task in tasks.items()}
    return taken, extra, sizes


def _step(task: Task, batch: Batch) -> None:
    task(batch).loss.backward()


def _forget_gradients(tasks: Mapping[str, nn.Module]) -> None:
    for task in tasks.values():
        task.zero_grad(set_to_none=True)


def document(rows: list[Row]) -> dict[str, Any]:
    """Samples per second by objective; all figures of each in "rows"."""
    return {row["objective"]: row["samples_per_second"] for row in rows} | {
        "reached": {row["objective"]: row["reached"] for row in rows},
        "share_of_peak": {row["objective"]: row["share_of_peak"] for row in rows},
        "rows": rows,
    }


BENCHMARK = Benchmark(
    "EVE's objective against its rivals: speed, memory, operations.\n\n"
    "Forward and backward of each over the same backbone and the same batch of noise, in turn. 'time' and 'FLOPs' are\n"
    "multiples of separate's; 'reached' is the former over the latter: at 0.9 separate gets 90 % of what the count\n"
    "promises. The largest micro-batch is what python -m eve_ds.plan forecasts for a GPU (ZeRO and expert\n"
    "parallelism of the recipe, no activation checkpointing). The last columns are table 1 of the paper (8 A100). The\n"
    "codes of separate_codes (8,192 different ones) are read: no tokenizer runs.",
    [
        Column("objective", "objective", width=16),
        Column("ms", "ms", show_ms),
        Column("samples_per_second", "pairs/s", lambda value: f"{value:.3g}"),
        Column("times_as_long", "time", times),
        Column("times_the_flops", "FLOPs", times),
        Column("reached", "reached", share),
        Column("flops_per_sample", "GFLOP/pair", lambda value: f"{value / 1e9:.4g}"),
        Column("share_of_peak", "of peak", share),
        Column("extra_bytes", "extra MB", show_mb),
        Column("largest_micro_batch_size", "largest"),
        Column("paper_times_as_long", "paper's time", times),
        Column("paper_largest", "paper's largest"),
    ],
    _add_options,
    _rows,
    document,
)
