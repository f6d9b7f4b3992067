"""The mixture of experts, forward and backward, against DeepSpeed's layer and against dispatch masks.

Legend: T tokens, D dim, H hidden, E experts, k choices per token.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from eve_ds.bench.benchmark import Benchmark, Column, Row, share, show_mb, show_ms, times
from eve_ds.bench.gemm import AUTO, DTYPES, add_model_options, add_peak_options, expert_products, find_peak
from eve_ds.bench.machine import choose_device
from eve_ds.bench.references import DeepSpeedMoE, einsum_moe
from eve_ds.bench.timing import Candidate, add_timing_options, extra_bytes, fits, in_turn, medians
from eve_ds.engine.deepspeed_config import best_precision
from eve_ds.model.moe import IMAGE, TEXT, MoE
from preprocessing.errors import UserError

RIVALS: dict[str, Callable[[MoE], nn.Module]] = {
    "einsum": einsum_moe,
    "deepspeed": DeepSpeedMoE,
    "deepspeed_dropless": functools.partial(DeepSpeedMoE, drop_tokens=False),
}
PAIR_TOKENS, IMAGE_TOKENS = 237, 197  # of an EVE-Base pair: class token and 196 patches, then 40 of text


def _add_options(parser: ArgumentParser) -> None:
    add_timing_options(parser)
    add_peak_options(parser)
    add_model_options(parser)
    tokens = [948, 3792, 11376, 45504]
    parser.add_argument("--tokens", nargs="+", type=PositiveInt, default=tokens, help="a row each")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help=f"of weights and tokens; {AUTO}")
    parser.add_argument(
        "--rivals", nargs="*", choices=list(RIVALS), default=list(RIVALS), help="what to compare with; none to run ours"
    )
    parser.add_argument(
        "--rivals_up_to", type=NonNegativeInt, default=11376, help="most tokens that rivals are run with"
    )


def _rows(options: Namespace) -> Iterator[Row]:
    if options.top_k > options.experts:
        raise UserError(f"--top_k {options.top_k} is more than --experts {options.experts}")
    device = choose_device(options.device)
    if options.dtype == "auto":
        options.dtype = best_precision(device.type)
    dtype = DTYPES[options.dtype]
    torch.manual_seed(0)
    ours = MoE(options.dim, options.hidden, options.experts, options.top_k).to(device, dtype)
    layers: dict[str, nn.Module] = {"ours": ours}
    if any(tokens <= options.rivals_up_to for tokens in options.tokens):
        layers |= {name: RIVALS[name](copy.deepcopy(ours)) for name in options.rivals}
    for tokens in options.tokens:
        here = [name for name in layers if name == "ours" or tokens <= options.rivals_up_to]
        yield _row(options, {name: layers[name] for name in here}, tokens, dtype, device)


def _row(
    options: Namespace, layers: dict[str, nn.Module], tokens: int, dtype: torch.dtype, device: torch.device
) -> Row:
    products = expert_products(tokens, options.experts, options.top_k, options.dim, options.hidden)
    best, measured = find_peak(options, products, dtype, device)
    inputs = _inputs(tokens, options.dim, dtype, device)
    candidates = {name: _candidate(layer, *inputs) for name, layer in layers.items()}
    too_large = [name for name, candidate in candidates.items() if name != "ours" and not fits(candidate, device)]
    layers = {name: layer for name, layer in layers.items() if name not in too_large}
    candidates = {name: candidates[name] for name in layers}
    taken = in_turn(candidates, device, options.repeats, options.warmup)
    ms = medians(taken)
    extra = {
        name: extra_bytes(candidates[name], functools.partial(_gradients, layers[name], inputs[0]), device)
        for name in layers
    }
    for candidate in candidates.values():
        candidate.prepare()  # leaves no gradients behind
    flops = sum(one.flops for one in expert_products(tokens, 1, options.top_k, options.dim, options.hidden))
    reached = {name: flops / (ms[name] / 1000) for name in layers}
    row: Row = {"tokens": tokens, "dtype": options.dtype, "out_of_memory": too_large}
    for name in ("ours", *RIVALS):
        row[f"{name}_ms"] = ms.get(name)
    row |= {
        "share_of_peak": reached["ours"] / best.flops_per_second,
        "share_of_products": options.experts * sum(one.ms for one in measured) / ms["ours"],
        "peak_tflops": best.flops_per_second / 1e12,
        "peak_product": str(best.product),
        "flops": flops,
        "ours_us_per_token": 1000 * ms["ours"] / tokens,
    }
    for name in RIVALS:
        there = name in layers
        row[f"{name}_share_of_peak"] = reached[name] / best.flops_per_second if there else None
        row[f"{name}_over_ours"] = ms[name] / ms["ours"] if there else None
        row[f"ours_extra_over_{name}"] = extra["ours"] / max(extra[name], 1) if there else None
    row |= {f"{name}_extra_bytes": extra.get(name) for name in ("ours", *RIVALS)}
    row["products"] = [{"product": str(one.product), "tflops": one.flops_per_second / 1e12} for one in measured]
    row["all_ms"] = taken
    return row


def _inputs(tokens: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [B, N, D] of pairs where they come out even, else of one long sample; modality [N]; gradient of y."""
    length = PAIR_TOKENS if tokens % PAIR_TOKENS == 0 else tokens
    x = torch.randn(tokens // length, length, dim, device=device, dtype=dtype, requires_grad=True)
    modality = torch.full((length,), TEXT, device=device)
    modality[: round(length * IMAGE_TOKENS / PAIR_TOKENS)] = IMAGE
    return x, modality, torch.randn_like(x)


def _candidate(layer: nn.Module, x: Tensor, modality: Tensor, dy: Tensor) -> Candidate:
    """Forward, then backward to the tokens, all weights and the router."""
    aux_weight = torch.tensor(0.001, device=x.device)

    def prepare() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None

    def run() -> None:
        y, aux = layer(x, modality)
        torch.autograd.backward([y, aux], [dy, aux_weight])

    return Candidate(run, prepare)


def _gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    return [tensor.grad for tensor in (x, *layer.parameters()) if tensor.grad is not None]


BENCHMARK = Benchmark(
    "A mixture-of-experts layer, forward and backward, against three others.\n\n"
    "deepspeed: deepspeed.moe.layer.MoE; einsum: dispatch masks, as GShard's. Both have a capacity factor of 1 and\n"
    "drop what is beyond. deepspeed_dropless: the same layer with drop_tokens=False, which drops nothing, as ours.\n"
    "Shares are of the best matrix product measured just before; the work is what experts multiply, k rows a token.\n"
    "Memory is beyond weights, gradients and input.",
    [
        Column("tokens", "tokens"),
        Column("ours_ms", "ours ms", show_ms),
        Column("einsum_ms", "einsum ms", show_ms),
        Column("deepspeed_ms", "deepspeed ms", show_ms),
        Column("deepspeed_dropless_ms", "dropless ms", show_ms),
        Column("einsum_over_ours", "einsum/ours", times),
        Column("deepspeed_over_ours", "deepspeed/ours", times),
        Column("deepspeed_dropless_over_ours", "dropless/ours", times),
        Column("share_of_peak", "of peak", share),
        Column("peak_tflops", "peak TFLOP/s", lambda value: f"{value:.3f}"),
        Column("ours_extra_bytes", "ours MB", show_mb),
        Column("einsum_extra_bytes", "einsum MB", show_mb),
        Column("deepspeed_extra_bytes", "deepspeed MB", show_mb),
        Column("deepspeed_dropless_extra_bytes", "dropless MB", show_mb),
    ],
    _add_options,
    _rows,
)
