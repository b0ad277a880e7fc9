"""Softmax with a temperature over rows of 1,024 to 262,144 columns: forward, causal, backward."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Variant
from lmops.ops.softmax import log_softmax, softmax

SIZES = (1_024, 4_096, 4_099, 16_384, 32_768, 50_257, 131_072, 262_144)
T = 0.7


def rows(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Rows of `size` columns, together 2^25 elements on a GPU, 2^20 on a CPU."""
    elements = 1 << (25 if device.type == "cuda" else 20)
    return (torch.randn(max(1, elements // size), size, device=device).to(dtype),)


def squares(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scores (batch, size, size) and the mask of what a row must not see."""
    elements = 1 << (25 if device.type == "cuda" else 20)
    x = torch.randn(max(1, elements // size**2), size, size, device=device).to(dtype)
    return x, torch.ones(size, size, dtype=torch.bool, device=device).triu(1)


def liger(x: Tensor) -> Tensor:
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return LigerSoftmaxFunction.apply(x / T)


def both(x: Tensor, mask: Tensor) -> int:
    return x.nbytes // 2 + x.nbytes  # the hidden half is written, but need not be read


ROWS = {"lmops": lambda x: softmax(x, T), "liger": liger}
FORWARD = Benchmark(
    "softmax", "softmax_forward", rows, ROWS, lambda x: torch.softmax(x / T, -1), lambda x: 2 * x.nbytes, SIZES, 4_099
)
BACKWARD = Benchmark(
    "softmax backward", "softmax_backward", rows, ROWS, FORWARD.reference, lambda x: 3 * x.nbytes, SIZES, 4_099,
    backward=True,
)  # fmt: skip
CAUSAL = Benchmark(
    "softmax causal",
    "softmax_forward",
    squares,
    {"lmops": lambda x, mask: softmax(x, T, causal=True)},
    lambda x, mask: torch.softmax((x / T).masked_fill(mask, float("-inf")), -1),
    both,
    sizes=(1_024, 4_096),
    small=512,
    largest=8_192,
)
BENCHMARKS = [FORWARD, BACKWARD, CAUSAL]


def passes(n_rows: int, n_cols: int, dtype: torch.dtype, *, temperature=T, out=None, function=softmax, dim=-1, **flags):
    """Host code that launches the forward and the backward kernel on memory that nobody fills."""

    def run() -> None:
        shape = (n_rows, n_cols) if dim == -1 else (n_cols, n_rows)
        x = torch.empty(shape, dtype=dtype, requires_grad=True)
        t = torch.empty(n_rows, requires_grad=True) if temperature == "per row" else temperature
        y = function(x, t, dim, dtype=out, **flags)
        torch.autograd.grad(y, [x, t] if isinstance(t, Tensor) else [x], torch.empty_like(y))

    return run


half, bf16, fp32, fp64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# tiles grow with the row until one no longer fits, so the longest that fits, in each of the ways to hold it, is where
# registers run out first. Rows that are not whole multiples of 16 bytes have narrow edges, and short ones nothing else
COMPILE = [
    Variant("softmax-fp16-16", passes(4_096, 16, half), wide=1),
    Variant("softmax-bf16-50", passes(4_096, 50, bf16)),
    Variant("softmax-bf16-100", passes(4_096, 100, bf16), wide=0.75),
    Variant("softmax-fp32-one-row-1000", passes(1, 1_000, fp32), wide=1),
    Variant("softmax-fp32-1024", passes(4_096, 1_024, fp32), wide=1),
    Variant("softmax-bf16-4096", passes(4_096, 4_096, bf16), wide=1),
    Variant("softmax-fp16-4099", passes(4_096, 4_099, half), wide=0.75),
    Variant("softmax-fp16-16384", passes(512, 16_384, half), wide=1),
    Variant("softmax-fp32-32768", passes(512, 32_768, fp32), wide=1),
    Variant("softmax-bf16-32767", passes(512, 32_767, bf16), wide=0.75),
    Variant("softmax-bf16-50257", passes(512, 50_257, bf16), wide=0.75),
    Variant("softmax-bf16-131072", passes(64, 131_072, bf16), wide=1),
    Variant("softmax-fp16-to-fp32-one-row-50257", passes(1, 50_257, half, out=fp32), wide=0.75),
    Variant("softmax-bf16-greedy-16384", passes(512, 16_384, bf16, temperature=0.0), wide=0.75),
    Variant("softmax-fp32-per-row-8192", passes(512, 8_192, fp32, temperature="per row"), wide=0.75),
    Variant("softmax-bf16-per-row-8191", passes(512, 8_191, bf16, temperature="per row"), wide=0.75),
    Variant("softmax-bf16-per-row-16383", passes(512, 16_383, bf16, temperature="per row"), wide=0.75),
    Variant("softmax-bf16-per-row-50257", passes(64, 50_257, bf16, temperature="per row"), wide=0.75),
    Variant("softmax-bf16-by-column-128", passes(4_096, 128, bf16, dim=0), wide=1),
    Variant("softmax-fp16-by-column-1024", passes(4_096, 1_024, half, dim=0), wide=1),
    Variant("softmax-fp32-by-column-4096", passes(4_096, 4_096, fp32, dim=0), wide=1),
    Variant("softmax-bf16-causal-2048", passes(2_048, 2_048, bf16, causal=True), wide=1),
    Variant("softmax-fp16-causal-32768", passes(512, 32_768, half, causal=True), wide=1),
    Variant("softmax-bf16-causal-40001", passes(512, 40_001, bf16, causal=True), wide=0.75),
    Variant("softmax-bf16-log-16384", passes(512, 16_384, bf16, function=log_softmax), wide=1),
    Variant("softmax-fp32-log-50257", passes(64, 50_257, fp32, function=log_softmax), wide=0.75),
    Variant(
        "softmax-bf16-log-causal-per-row-16384",
        passes(512, 16_384, bf16, function=log_softmax, causal=True, temperature="per row"),
        wide=0.75,
    ),
    Variant("softmax-fp64-4096", passes(512, 4_096, fp64), wide=1),
    Variant("softmax-fp64-8192", passes(64, 8_192, fp64), wide=1),
    Variant("softmax-fp64-per-row-50257", passes(64, 50_257, fp64, temperature="per row"), wide=0.75),
]
