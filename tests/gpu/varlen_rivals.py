"""Attention over texts of unequal length: ours, which masks the padding, beside torch's variable-length attention,
which leaves it out.

    python -m tests.gpu.varlen_rivals

Milliseconds of the device alone for one attention layer of EVE-Base, forward and backward, both passes of a pair
together, with texts as long as COCO's captions; the mean over ``LAYERS`` of them with their residuals.

- ours, and "same layout": ours with q, k and v taken apart as the rivals do it, which may save a copy of gradients.
- apart: no row moves. The padding of each sample is a sequence of its own, which nobody reads.
- packed: in each layer real tokens are gathered before qkv, and put back after proj.
- packed once: gathered before the first layer, put back after the last. It is no more than a bound: in a block, image
  and text have networks of their own, and the number of rows, new in each batch, would be compiled anew each time.

``kernels_ms`` is the time of the attention kernels alone, ``wins_by`` each rival's over the better of the first two.
``verdict`` is "adopt" and the fastest rival but the bound if that wins by 1.1, else "reject": of each size, and first
that of the recipe. ``error`` is how far one layer is off ours; the exit code is 1 where it is not below ``CLOSE``.
Prints a JSON line. In the dry run on the CPU, of one layer, a loop over the sequences stands in for torch's kernel.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from eve_ds.engine.compilation import TEXT_MULTIPLE
from eve_ds.kernels.attention import attention, plain_attention, tolerance
from eve_ds.model.block import Attention, key_bias
from tests.gpu.device_trace import trace
from tests.gpu.kit_sizes import kit_device, sizes_of

LEAST, REPEATS, WARMUP, LAYERS = 1.1, 3, 1, 12
CLOSE = tolerance(torch.bfloat16)
IMAGE_TOKENS = 1 + 49, 1 + 196  # of the pass with masked patches and of that with masked words
LONGEST_TEXT = 40
# How many of COCO's 25,014 captions of val2017 have 9, 10 ... tokens, by byte-level BPE of 64,000, up to 99.9 %.
COCO = [108, 1206, 4215, 5200, 4776, 3561, 2300, 1422, 819, 490, 307, 185, 125, 79, 49, 40, 28, 21, 24, 21, 10]
SHORTEST_TEXT = 9
DENSE = "ours", "same layout"
BOUND = "packed once"
Function = Callable[[Tensor], Tensor]


class Padding(NamedTuple):
    """Which tokens of B samples of N tokens are real, R in all.

    Args:
        valid: [B, N] bool.
        bias: [B, 1, 1, N], for attention with a mask.
        rows: [R] int64, the real ones among all B N rows.
        packed: [B + 1] int32, where samples begin among the R rows.
        apart: [2 B + 1] int32, where samples and their paddings begin, in turn, among all rows.
    """

    valid: Tensor
    bias: Tensor
    rows: Tensor
    packed: Tensor
    apart: Tensor


def main() -> dict[str, Any]:
    device = kit_device() or torch.device("cpu")
    found: dict[str, dict[str, Any]] = {}
    for pairs in (256, 32) if device.type == "cuda" else (sizes_of(device).pairs,):
        texts = text_lengths(pairs)
        multiple = -(-int(texts.max()) // TEXT_MULTIPLE) * TEXT_MULTIPLE
        for width in (min(multiple, LONGEST_TEXT), LONGEST_TEXT):
            found[f"{pairs} pairs, texts of {width}"] = compare(texts, width, device)
    rows = list(found.values())
    first = rows[0]["verdict"] if device.type == "cuda" else "none: a dry run"
    return {"verdict": first, "error": max(row["error"] for row in rows), **found}


def text_lengths(pairs: int) -> Tensor:
    """[B] int64, drawn from ``COCO``."""
    drawn = torch.multinomial(torch.tensor(COCO).float(), pairs, True, generator=torch.Generator().manual_seed(0))
    return drawn + SHORTEST_TEXT


def compare(texts: Tensor, width: int, device: torch.device) -> dict[str, Any]:
    """Figures of both passes together, with texts padded to ``width``."""
    sizes, dtype = sizes_of(device), torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    layer = Attention(sizes.dim, sizes.heads).to(device, dtype)
    layers, error = LAYERS if device.type == "cuda" else 1, 0.0
    ms: dict[str, float] = {}
    kernels_ms: dict[str, float] = {}
    for image_tokens in IMAGE_TOKENS:
        padding = padding_of(image_tokens + texts, image_tokens + width, dtype, device)
        x = torch.randn(*padding.valid.shape, sizes.dim, device=device, dtype=dtype, requires_grad=True)
        dy = torch.randn_like(x) * padding.valid[:, :, None]
        error = max(error, relative_error(layer, padding, x, dy))
        for name, run in whole(layer, padding, layers).items():
            one = device_ms(functools.partial(gradients, run, layer, x, dy), device)
            for total, value in zip((ms, kernels_ms), one, strict=True):
                total[name] = total.get(name, 0.0) + value / layers
    tokens = len(IMAGE_TOKENS) * width + sum(IMAGE_TOKENS)
    share = float(width - texts.double().mean()) * len(IMAGE_TOKENS) / tokens
    return {"padding": share, "error": error, **verdict(ms), "ms": ms, "kernels_ms": kernels_ms}


def verdict(ms: dict[str, float]) -> dict[str, Any]:
    """By how much each rival wins, and whether that of the fastest is enough."""
    ours = min(ms[name] for name in DENSE)
    wins_by = {name: ours / value for name, value in ms.items() if name not in DENSE}
    best = max(wins_by.keys() - {BOUND}, key=wins_by.__getitem__)
    return {"verdict": f"adopt {best}" if wins_by[best] >= LEAST else "reject", "wins_by": wins_by}


def device_ms(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Of one run, in all and of the attention kernels."""
    for _ in range(WARMUP):
        run()
    found = trace(lambda: [run() for _ in range(REPEATS)], device)
    return found["busy_ms"] / REPEATS, found["ms_by_kind"].get("attention", 0.0) / REPEATS


def padding_of(lengths: Tensor, tokens: int, dtype: torch.dtype, device: torch.device) -> Padding:
    """For samples of ``lengths`` [B] tokens, image and text, padded to ``tokens``."""

    def offsets(of: Tensor) -> Tensor:
        return F.pad(of.cumsum(0), (1, 0)).to(device, torch.int32)

    valid = (torch.arange(tokens) < lengths[:, None]).to(device)
    both = torch.stack([lengths, tokens - lengths], dim=1).flatten()
    rows = valid.flatten().nonzero()[:, 0]
    return Padding(valid, key_bias(valid, dtype), rows, offsets(lengths), offsets(both))


class Pack(torch.autograd.Function):
    """x [B N, D] -> its rows [R, D]; backward a plain copy, since no row is taken twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return unpacked(gradients[0], *ctx.saved_tensors, ctx.total), None


def unpacked(packed: Tensor, rows: Tensor, total: int) -> Tensor:
    """[R, D] -> [B N, D] with zeros in padding."""
    return packed.new_zeros(total, packed.shape[1]).index_copy_(0, rows, packed)


def varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int) -> Tensor:
    """Attention within each sequence.

    Args:
        q, k, v: [R, h, d], on a GPU in bf16 or fp16.
        offsets: [S + 1] int32 on their device, where sequences begin; some may be empty.
        longest: no sequence is longer.
    Returns:
        [R, h, d].
    """
    if not q.is_cpu:
        from torch.nn.attention.varlen import varlen_attn  # it has no kernel for CPUs

        out: Tensor = varlen_attn(q, k, v, offsets, offsets, longest, longest)
        return out
    sizes = offsets.diff().tolist()
    parts = zip(*(each.transpose(0, 1)[None].split(sizes, dim=2) for each in (q, k, v)), strict=True)
    return torch.cat([plain_attention(*part, None)[0].transpose(0, 1) for part in parts if part[0].shape[2]])


def on_rows(layer: Attention, offsets: Tensor, longest: int, x: Tensor) -> Tensor:
    """The layer for x [R, D], the tokens of all sequences."""
    q, k, v = layer.qkv(x).view(len(x), 3, layer.num_heads, -1).unbind(1)
    return layer.proj(varlen(q, k, v, offsets, longest).flatten(1))


def branches(layer: Attention, padding: Padding) -> dict[str, Function]:
    """The layer done in each way, [B, N, D] -> [B, N, D]; what it says of padding has no meaning."""
    batch, tokens = padding.valid.shape

    def same_layout(x: Tensor) -> Tensor:
        qkv = layer.qkv(x).view(batch, tokens, 3, layer.num_heads, -1).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in qkv)
        return layer.proj(attention(q, k, v, padding.bias).transpose(1, 2).flatten(2))

    def packed(x: Tensor) -> Tensor:
        rows = on_rows(layer, padding.packed, tokens, Pack.apply(x.flatten(0, 1), padding.rows))
        return unpacked(rows, padding.rows, batch * tokens).view_as(x)

    return {
        "ours": lambda x: layer(x, padding.bias),
        "same layout": same_layout,
        "apart": lambda x: on_rows(layer, padding.apart, tokens, x.flatten(0, 1)).view_as(x),
        "packed": packed,
    }


def whole(layer: Attention, padding: Padding, layers: int) -> dict[str, Function]:
    """So many layers, one after the other, with their residuals, [B, N, D] -> [B, N, D]."""
    batch, tokens = padding.valid.shape

    def repeated(branch: Function, x: Tensor) -> Tensor:
        for _ in range(layers):
            x = x + branch(x)
        return x

    def packed_once(x: Tensor) -> Tensor:
        rows = Pack.apply(x.flatten(0, 1), padding.rows)
        rows = repeated(functools.partial(on_rows, layer, padding.packed, tokens), rows)
        return unpacked(rows, padding.rows, batch * tokens).view_as(x)

    each = {name: functools.partial(repeated, branch) for name, branch in branches(layer, padding).items()}
    return {**each, BOUND: packed_once}


def gradients(run: Function, layer: Attention, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """The output, and the gradients of x and the parameters."""
    out = run(x)
    return out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), dy)


def relative_error(layer: Attention, padding: Padding, x: Tensor, dy: Tensor) -> float:
    """Of all ways, the bound included, how far output and gradients of one layer with its residual are off ours, where
    tokens are real; infinity if anything is not finite."""
    found = [gradients(run, layer, x, dy) for run in whole(layer, padding, 1).values()]
    valid = padding.valid[:, :, None]
    real = [[each.double() * (valid if each.shape == x.shape else 1) for each in one] for one in found]
    pairs = [pair for other in real[1:] for pair in zip(real[0], other, strict=True)]
    errors = [float((a - b).norm() / a.norm()) for a, b in pairs]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


if __name__ == "__main__":
    figures = main()
    print(json.dumps(figures))
    sys.exit(not figures["error"] < CLOSE)
