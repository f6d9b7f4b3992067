"""Self-attention, forward and backward, against torch's fused attention and against the formula as it stands."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from eve_ds.bench.benchmark import Benchmark, Column, Row, share, show_mb, show_ms, times
from eve_ds.bench.gemm import (
    DTYPES,
    Measured,
    Product,
    add_dtypes_option,
    add_peak_options,
    dtypes_of,
    find_peak,
    linear_products,
)
from eve_ds.bench.machine import choose_device
from eve_ds.bench.references import ReferenceAttention, plain_core, sdpa_core
from eve_ds.bench.timing import Candidate, add_timing_options, extra_bytes, in_turn, medians
from eve_ds.model.block import Attention, key_bias
from eve_ds.model.flops import count_flops
from preprocessing.errors import UserError

# Class token and the quarter of the patches that pre-training shows, alone and with a text of 40; whole images of
# 224, 384 and 480 pixels, with a text.
TOKENS = (50, 90, 197, 237, 617, 941)
SHORTEST_TEXT, LONGEST_TEXT = 8, 40


def _add_options(parser: ArgumentParser) -> None:
    add_timing_options(parser)
    add_peak_options(parser, squares=(2048,))
    parser.add_argument("--tokens", nargs="+", type=PositiveInt, default=list(TOKENS), help="of a sample; rows each")
    parser.add_argument("--batch", type=PositiveInt, default=16, help="samples")
    parser.add_argument("--dim", type=PositiveInt, default=768, help="width D of the tokens")
    parser.add_argument("--heads", type=PositiveInt, default=12, help="attention heads; divides --dim")
    add_dtypes_option(parser, "of the layer")


def _rows(options: Namespace) -> Iterator[Row]:
    if options.dim % options.heads:
        raise UserError(f"--heads {options.heads} does not divide --dim {options.dim}")
    device = choose_device(options.device)
    for dtype in options.dtypes or dtypes_of(device):
        torch.manual_seed(0)
        layer = Attention(options.dim, options.heads).to(device, DTYPES[dtype])
        for tokens in options.tokens:
            best = _peak(options, tokens, DTYPES[dtype], device)
            for masked in (False, True):
                row: Row = {"tokens": tokens, "batch": options.batch, "masked": masked, "dtype": dtype}
                yield row | _compare(options, layer, tokens, masked, best)


def _peak(options: Namespace, tokens: int, dtype: torch.dtype, device: torch.device) -> Measured:
    width, many = options.dim // options.heads, options.batch * options.heads
    products = [
        *linear_products(options.batch * tokens, options.dim, 3 * options.dim),
        Product(tokens, width, tokens, (False, True), many),
        Product(tokens, tokens, width, batch=many),
    ]
    return find_peak(options, products, dtype, device)[0]


def _compare(options: Namespace, layer: Attention, tokens: int, masked: bool, best: Measured) -> Row:
    weight = layer.proj.weight
    device, dtype = weight.device, weight.dtype
    x = torch.randn(options.batch, tokens, options.dim, device=device, dtype=dtype, requires_grad=True)
    bias = key_bias(_valid(options.batch, tokens, device), dtype) if masked else None
    layers: dict[str, nn.Module] = {
        "ours": layer,
        "sdpa": ReferenceAttention(layer, sdpa_core),
        "plain": ReferenceAttention(layer, plain_core),
    }
    dy = torch.randn_like(x)
    candidates = {name: _candidate(one, x, bias, dy) for name, one in layers.items()}
    taken = in_turn(candidates, device, options.repeats, options.warmup)
    ms = medians(taken)
    row: Row = {f"{name}_ms": ms[name] for name in layers}
    for name, one in layers.items():
        row[f"{name}_extra_bytes"] = extra_bytes(candidates[name], functools.partial(_gradients, one, x), device)
    on_meta = x.detach().to("meta").requires_grad_()
    plain = copy.deepcopy(layers["plain"]).to("meta")
    flops = count_flops(lambda: plain(on_meta, None).backward(on_meta.detach()))
    return row | {
        "sdpa_over_ours": ms["sdpa"] / ms["ours"],
        "plain_over_ours": ms["plain"] / ms["ours"],
        "share_of_peak": flops / (ms["ours"] / 1000) / best.flops_per_second,
        "peak_tflops": best.flops_per_second / 1e12,
        "peak_product": str(best.product),
        "flops": flops,
        "all_ms": taken,
    }


def _valid(batch: int, tokens: int, device: torch.device) -> Tensor:
    """[B, N] bool: texts of 8 to 40 tokens at the end of each sample, padded to the longest."""
    text = torch.linspace(SHORTEST_TEXT, LONGEST_TEXT, batch, device=device).long()
    length = (tokens - LONGEST_TEXT + text).clamp(min=1)
    return torch.arange(tokens, device=device) < length[:, None]


def _candidate(layer: nn.Module, x: Tensor, bias: Tensor | None, dy: Tensor) -> Candidate:
    def prepare() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None

    return Candidate(lambda: layer(x, bias).backward(dy), prepare)


def _gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    return [tensor.grad for tensor in (x, *layer.parameters()) if tensor.grad is not None]


BENCHMARK = Benchmark(
    "Self-attention, forward and backward, against torch's own.\n\n"
    "The layer with its projections, against the same with scaled_dot_product_attention and with softmax(q k') v as\n"
    "it stands, at EVE's numbers of tokens, with and without padding.",
    [
        Column("dtype", "dtype"),
        Column("tokens", "tokens"),
        Column("masked", "masked"),
        Column("ours_ms", "ours ms", show_ms),
        Column("sdpa_ms", "sdpa ms", show_ms),
        Column("plain_ms", "plain ms", show_ms),
        Column("sdpa_over_ours", "sdpa/ours", times),
        Column("plain_over_ours", "plain/ours", times),
        Column("share_of_peak", "of peak", share),
        Column("peak_tflops", "peak TFLOP/s", lambda value: f"{value:.3f}"),
        Column("ours_extra_bytes", "ours MB", show_mb),
        Column("sdpa_extra_bytes", "sdpa MB", show_mb),
    ],
    _add_options,
    _rows,
)
