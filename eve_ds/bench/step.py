"""EVE pre-training, forward and backward, against the same model in plain ways; and the optimizer's step beside it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from eve_ds.bench.benchmark import Benchmark, Column, Row, share, show_gb, show_mb, show_ms, times
from eve_ds.bench.gemm import (
    DTYPES,
    Measured,
    Product,
    add_peak_options,
    expert_products,
    find_peak,
    linear_products,
)
from eve_ds.bench.machine import choose_device, copy_candidate
from eve_ds.bench.references import DeepSpeedMoE, ReferenceAttention, einsum_moe, plain_core, replace
from eve_ds.bench.timing import Candidate, add_timing_options, extra_bytes, fits, in_turn, medians
from eve_ds.config import PretrainConfig, parse
from eve_ds.engine.deepspeed_config import best_precision
from eve_ds.model.backbone import Backbone
from eve_ds.model.block import Attention
from eve_ds.model.compiled import compile_parts
from eve_ds.model.flops import count_flops
from eve_ds.model.moe import MoE
from eve_ds.plan.live_bytes import WithoutValues
from eve_ds.tasks.base import Batch, Task
from eve_ds.tasks.masked_modeling import WORD_ROW_MULTIPLE, MaskedModeling
from eve_ds.tasks.masking import masked_words
from eve_ds.tasks.mlm_mim_codes import BEIT_V2_CODES

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "pretrain_base.yaml"
MASK_ID, FIRST_WORD = 4, 5  # any ids do
# AdamW's traffic for one value of the fp32 master copy that ZeRO keeps: weight, first and second moment are read and
# written, the gradient is read.
ADAMW_ACCESSES = 7
OPTIMIZER_KEYS = (
    "optimizer",
    "optimizer_ms",
    "optimizer_bytes",
    "optimizer_bytes_per_second",
    "copy_bytes_per_second",
    "optimizer_share_of_bandwidth",
)


def _add_options(parser: ArgumentParser) -> None:
    add_timing_options(parser, repeats=5, warmup=1)
    add_peak_options(parser)
    parser.add_argument("--config", default=str(RECIPE), help="pre-training recipe: model, objective, precision")
    parser.add_argument("--pairs", nargs="+", type=PositiveInt, default=[16], help="pairs in a batch; a row each")
    parser.add_argument("--no_plain", action="store_true", help="leave out the model with plain attention and experts")
    parser.add_argument("--no_deepspeed", action="store_true", help="leave out the model with DeepSpeed's experts")
    parser.add_argument("--compile", action="store_true", help="also the model with compiled blocks (a minute more)")
    parser.add_argument("--copy_bytes", type=PositiveInt, default=2**28, help="of each array copied for the bandwidth")
    parser.add_argument("--no_optimizer", action="store_true", help="leave out the optimizer (16 bytes a parameter)")


def _rows(options: Namespace) -> Iterator[Row]:
    device = choose_device(options.device)
    config = parse(PretrainConfig, ["--config", options.config], "python -m eve_ds.bench step")
    if config.engine.precision == "auto":
        config.engine.precision = best_precision(device.type)
    torch.manual_seed(0)
    task = MaskedModeling(Backbone(config.model), config.objective, MASK_ID)
    task = task.to(device, DTYPES[config.engine.precision]).train()
    tasks = {"ours": task}
    if not options.no_plain:
        tasks["plain"] = plain_version(task)
    if not options.no_deepspeed:
        tasks["deepspeed"] = deepspeed_version(task)
    if options.compile:
        tasks["compiled"] = copy.deepcopy(task)
        compile_parts(tasks["compiled"])
    rows = (_forward_backward(options, config, tasks, pairs, device) for pairs in options.pairs)
    rows = (row | dict.fromkeys(OPTIMIZER_KEYS) for row in rows)
    if options.no_optimizer:
        yield from rows
        return
    found = list(rows)
    tasks.clear()  # the memory of the others
    gc.collect()
    optimizer = _optimizer(options, config, task, device)
    for row in found:
        yield row | optimizer


def plain_version(task: MaskedModeling, capacity_factor: float = 1.0) -> MaskedModeling:
    """A copy with the same weights; its attention is the formula as it stands, dispatch masks feed its experts."""
    plain = copy.deepcopy(task)
    replace(plain, Attention, functools.partial(ReferenceAttention, core=plain_core))
    replace(plain, MoE, functools.partial(einsum_moe, capacity_factor=capacity_factor))
    return plain


def deepspeed_version(task: MaskedModeling) -> MaskedModeling:
    """A copy with the same weights, whose experts are DeepSpeed's layer, which drops no token either."""
    other = copy.deepcopy(task)
    replace(other, MoE, functools.partial(DeepSpeedMoE, drop_tokens=False))
    return other


def _forward_backward(
    options: Namespace, config: PretrainConfig, tasks: dict[str, MaskedModeling], pairs: int, device: torch.device
) -> Row:
    best = peak_of_step(options, config, pairs, device)
    batch = make_batch(config, pairs, device)
    candidates = {name: _candidate(task, batch) for name, task in tasks.items()}
    too_large = [name for name, candidate in candidates.items() if name != "ours" and not fits(candidate, device)]
    tasks = {name: task for name, task in tasks.items() if name not in too_large}
    candidates = {name: candidates[name] for name in tasks}
    taken = in_turn(candidates, device, options.repeats, options.warmup)
    ms = medians(taken)
    extra = {
        name: extra_bytes(candidates[name], functools.partial(gradients_of, task), device)
        for name, task in tasks.items()
    }
    for candidate in candidates.values():
        candidate.prepare()  # leaves no gradients behind
    flops = flops_of(config, pairs)
    plain, deepspeed, compiled = ms.get("plain"), ms.get("deepspeed"), ms.get("compiled")
    return {
        "pairs": pairs,
        "config": options.config,
        "dtype": config.engine.precision,
        "out_of_memory": too_large,
        "ours_ms": ms["ours"],
        "plain_ms": plain,
        "plain_over_ours": plain / ms["ours"] if plain is not None else None,
        "deepspeed_ms": deepspeed,
        "deepspeed_over_ours": deepspeed / ms["ours"] if deepspeed is not None else None,
        "compiled_ms": compiled,
        "ours_over_compiled": ms["ours"] / compiled if compiled is not None else None,
        "share_of_peak": flops / (ms["ours"] / 1000) / best.flops_per_second,
        "plain_share_of_peak": flops / (plain / 1000) / best.flops_per_second if plain is not None else None,
        "peak_tflops": best.flops_per_second / 1e12,
        "peak_product": str(best.product),
        "flops": flops,
        "parameters": sum(parameter.numel() for parameter in tasks["ours"].parameters()),
        "ours_extra_bytes": extra["ours"],
        "plain_extra_bytes": extra.get("plain"),
        "deepspeed_extra_bytes": extra.get("deepspeed"),
        "compiled_extra_bytes": extra.get("compiled"),
        "all_ms": taken,
    }


def build_task(config: PretrainConfig, backbone: Backbone) -> Task:
    """The task of a recipe over a backbone."""
    return config.spec.build(backbone, config.objective, mask_id=MASK_ID, num_classes=0, seed=0)


def flops_of(config: PretrainConfig, pairs: int) -> float:
    """Of the matrix products of one batch of ``make_batch``, forward and backward, without the padding of rows."""
    rows = WORD_ROW_MULTIPLE * config.model.num_experts
    selected = config.spec.selected_rows(config.objective, rows, config.model.max_text_length)
    model = dataclasses.replace(config.model, checkpoint_activations=False)
    meta = torch.device("meta")

    with meta:
        task = build_task(config, Backbone(model))
    batch = make_batch(config, rows, meta)
    with meta, WithoutValues(selected, scalar=0):
        return count_flops(lambda: task(batch).loss.backward()) / rows * pairs


def make_batch(config: PretrainConfig, pairs: int, device: torch.device) -> Batch:
    """Pairs as a loader gives them, of noise, with texts of full length."""
    model, length = config.model, config.model.max_text_length
    return {
        "images": torch.randn(pairs, 3, model.image_size, model.image_size, device=device),
        "text_ids": torch.randint(FIRST_WORD, model.vocab_size, (pairs, length), device=device),
        "text_mask": torch.ones(pairs, length, dtype=torch.bool, device=device),
        "sample_id": torch.arange(pairs, device=device),
        "image_index": torch.arange(pairs, device=device),
        "codes": torch.randint(BEIT_V2_CODES, (pairs, model.num_patches), device=device),
    }


def peak_of_step(options: Namespace, config: PretrainConfig, pairs: int, device: torch.device) -> Measured:
    """The best of the products that the step consists of, and of square ones."""
    model = config.model
    tokens = pairs * (1 + model.num_patches + model.max_text_length)
    words = pairs * masked_words(model.max_text_length, config.objective.text_mask_ratio)
    products = [
        *linear_products(tokens, model.dim, 3 * model.dim),
        *linear_products(tokens, model.dim, model.mlp_hidden),
        Product(words, model.dim, model.vocab_size, (False, True)),
        *expert_products(tokens, model.num_experts, model.top_k, model.dim, model.mlp_hidden),
    ]
    return find_peak(options, products, DTYPES[config.engine.precision], device)[0]


def _candidate(task: Task, batch: Batch) -> Candidate:
    return Candidate(lambda: task(batch).loss.backward(), lambda: task.zero_grad(set_to_none=True))


def gradients_of(task: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in task.parameters() if parameter.grad is not None]


def _optimizer(options: Namespace, config: PretrainConfig, task: nn.Module, device: torch.device) -> dict[str, Any]:
    """The engine's optimizer over what ZeRO gives it on one rank: a flat fp32 tensor for each of its groups."""
    from eve_ds.engine.optim import build_optimizer  # imports deepspeed

    optimizer = build_optimizer(task, config.optimizer)
    values = 0
    for group in optimizer.param_groups:
        size = sum(parameter.numel() for parameter in group["params"])
        flat = nn.Parameter(torch.zeros(size, device=device))
        flat.grad = torch.full_like(flat, 1e-3)
        group["params"] = [flat]
        values += size
    size = ADAMW_ACCESSES * torch.float32.itemsize * values
    copy_one, copied = copy_candidate(device, options.copy_bytes)
    taken = in_turn(
        {"optimizer": Candidate(optimizer.step), "copy": copy_one}, device, options.repeats, options.warmup + 1
    )
    ms = medians(taken)
    reached, bandwidth = size / ms["optimizer"] * 1000, copied / ms["copy"] * 1000
    found = (type(optimizer).__name__, ms["optimizer"], size, reached, bandwidth, reached / bandwidth)
    return dict(zip(OPTIMIZER_KEYS, found, strict=True))


BENCHMARK = Benchmark(
    "A step of EVE pre-training: both passes, decoders, loss, optimizer.\n\n"
    "Forward and backward are timed against the same model with attention as the formula stands and einsum dispatch\n"
    "masks (plain), against it with DeepSpeed's expert layer in ours' place, which drops no token either, and with\n"
    "--compile against it with its blocks compiled as engine.compile has them; PyTorch\n"
    "counts the operations for the share of the matrix-product peak. The optimizer's step stands beside it as a share\n"
    "of the bandwidth of a memory copy that is timed in turn with it.",
    [
        Column("pairs", "pairs"),
        Column("ours_ms", "ours ms", show_ms),
        Column("plain_ms", "plain ms", show_ms),
        Column("deepspeed_ms", "deepspeed ms", show_ms),
        Column("compiled_ms", "compiled ms", show_ms),
        Column("plain_over_ours", "plain/ours", times),
        Column("deepspeed_over_ours", "deepspeed/ours", times),
        Column("share_of_peak", "of peak", share),
        Column("peak_tflops", "peak TFLOP/s", lambda value: f"{value:.3f}"),
        Column("ours_extra_bytes", "ours MB", show_mb),
        Column("plain_extra_bytes", "plain MB", show_mb),
        Column("deepspeed_extra_bytes", "deepspeed MB", show_mb),
        Column("compiled_extra_bytes", "compiled MB", show_mb),
        Column("optimizer_ms", "optimizer ms", show_ms),
        Column("copy_bytes_per_second", "copy GB/s", show_gb),
        Column("optimizer_share_of_bandwidth", "of bandwidth", share),
    ],
    _add_options,
    _rows,
)
