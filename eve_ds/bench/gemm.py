"""The machine's matrix-product peak: what every other figure is measured against.

Shapes: M rows, K inner, N columns; T tokens, D dim, H hidden, E experts, k choices per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt
from torch import Tensor

from eve_ds.bench.benchmark import Benchmark, Column, Row, share, show_ms
from eve_ds.bench.machine import choose_device
from eve_ds.bench.timing import Candidate, add_timing_options, in_turn, medians, milliseconds
from eve_ds.engine.deepspeed_config import multiplies_bf16

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
AUTO = "auto is bf16 where the device multiplies it by itself, else fp32"
# A timed run repeats a product for about so long, at most so often: the clock is too coarse for a single small one.
SAMPLE_MS, MOST_CALLS = 10, 100


@dataclass(frozen=True)
class Product:
    """[M, K] x [K, N], or ``batch`` of them at once.

    Args:
        transposed: which factors are stored the other way round, as a weight [N, K] is in x w', and dy in dy' x.
    """

    rows: int
    inner: int
    columns: int
    transposed: tuple[bool, bool] = (False, False)
    batch: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns

    def __str__(self) -> str:
        first, second = ("'" if flag else "" for flag in self.transposed)
        many = f"{self.batch} x " if self.batch > 1 else ""
        return f"{many}[{self.rows}x{self.inner}]{first} x [{self.inner}x{self.columns}]{second}"


@dataclass(frozen=True)
class Measured:
    """A product, its time in milliseconds, and the floating-point operations a second that it reached."""

    product: Product
    ms: float

    @property
    def flops_per_second(self) -> float:
        return self.product.flops / self.ms * 1000


def linear_products(rows: int, inner: int, outer: int) -> list[Product]:
    """The three products of a linear layer: x w', then dy w and dy' x in the backward pass."""
    return [
        Product(rows, inner, outer, (False, True)),
        Product(rows, outer, inner),
        Product(outer, rows, inner, (True, False)),
    ]


def expert_products(tokens: int, num_experts: int, top_k: int, dim: int, hidden: int) -> list[Product]:
    """The six products of an expert that serves its even share of the choices, ceil(k T / E) rows."""
    rows = max(1, math.ceil(tokens * top_k / num_experts))
    return linear_products(rows, dim, hidden) + linear_products(rows, hidden, dim)


def measure(
    products: Sequence[Product], dtype: torch.dtype, device: torch.device, repeats: int, warmup: int
) -> list[Measured]:
    """Time each product on operands that stay where they are (so in the cache, if they fit): the best it can do."""
    found = []
    for product in products:
        multiply = _multiplication(product, dtype, device)
        multiply()
        calls = min(MOST_CALLS, math.ceil(SAMPLE_MS / milliseconds(multiply, device)))
        taken = in_turn({"product": Candidate(_repeated(multiply, calls))}, device, repeats, warmup)
        found.append(Measured(product, medians(taken)["product"] / calls))
    return found


def find_peak(
    options: Namespace, products: Sequence[Product], dtype: torch.dtype, device: torch.device
) -> tuple[Measured, list[Measured]]:
    """The fastest of ``products`` and of the square ones in ``options``; and ``products``, measured.

    The median of each counts, as it does for what is compared with it.
    """
    every = measure([*square_products(options), *products], dtype, device, options.repeats, options.warmup)
    return max(every, key=lambda one: one.flops_per_second), every[len(options.squares) :]


def _multiplication(product: Product, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    first = _factor(product.rows, product.inner, product.transposed[0], product.batch, dtype, device)
    second = _factor(product.inner, product.columns, product.transposed[1], product.batch, dtype, device)
    multiply: Callable[..., Tensor] = torch.bmm
    if product.batch == 1:
        multiply, first, second = torch.mm, first[0], second[0]
    out = multiply(first, second)
    return lambda: multiply(first, second, out=out)


def _repeated(run: Callable[[], object], calls: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(calls):
            run()

    return repeated


def _factor(rows: int, columns: int, flip: bool, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    shape = (batch, columns, rows) if flip else (batch, rows, columns)
    values = torch.randn(shape, device=device, dtype=dtype)
    return values.transpose(1, 2) if flip else values


def add_peak_options(parser: ArgumentParser, squares: tuple[int, ...] = (2048, 4096)) -> None:
    """Square products whose rate counts for the peak, beside the products that are timed."""
    parser.add_argument(
        "--squares", nargs="+", type=PositiveInt, default=list(squares), help="sides of square products for the peak"
    )


def square_products(options: Namespace) -> list[Product]:
    return [Product(size, size, size) for size in options.squares]


def add_dtypes_option(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help=f"{what}, rows each; all that are quick here")


def dtypes_of(device: torch.device) -> list[str]:
    """The dtypes that ``device`` multiplies by itself."""
    return [name for name in DTYPES if name == "fp32" or multiplies_bf16(device.type)]


def add_model_options(parser: ArgumentParser) -> None:
    """The sizes of a MoE layer; the defaults are EVE-Base's."""
    parser.add_argument("--dim", type=PositiveInt, default=768, help="width D of the tokens")
    parser.add_argument("--hidden", type=PositiveInt, default=3072, help="hidden width H of an expert")
    parser.add_argument("--experts", type=PositiveInt, default=32, help="experts E")
    parser.add_argument("--top_k", type=PositiveInt, default=2, help="experts k that a token visits")


def _add_options(parser: ArgumentParser) -> None:
    add_timing_options(parser)
    add_peak_options(parser, squares=(1024, 2048, 4096))
    add_model_options(parser)
    add_dtypes_option(parser, "of the factors")
    parser.add_argument("--tokens", nargs="+", type=PositiveInt, default=[948, 11376], help="that the experts share")


def _rows(options: Namespace) -> Iterator[Row]:
    device = choose_device(options.device)
    products = square_products(options)
    for tokens in options.tokens:
        products += expert_products(tokens, options.experts, options.top_k, options.dim, options.hidden)
    for dtype in options.dtypes or dtypes_of(device):
        measured = measure(products, DTYPES[dtype], device, options.repeats, options.warmup)
        best = max(one.flops_per_second for one in measured)
        for one in measured:
            yield {
                "dtype": dtype,
                "product": str(one.product),
                "ms": one.ms,
                "flops": one.product.flops,
                "tflops": one.flops_per_second / 1e12,
                "share_of_peak": one.flops_per_second / best,
            }


BENCHMARK = Benchmark(
    "Matrix products alone.\n\nSquare ones and those of EVE's experts; the best is the peak of its dtype.",
    [
        Column("dtype", "dtype"),
        Column("product", "product (' = stored transposed)", width=34),
        Column("ms", "ms", show_ms),
        Column("tflops", "TFLOP/s", lambda value: f"{value:.3f}"),
        Column("share_of_peak", "of peak", share),
    ],
    _add_options,
    _rows,
)
