"""SwiGLU and GeGLU of a layer's hidden width, packed as one product leaves them: forward and backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Variant
from lmops.ops.activation import geglu, swiglu

SIZES = (1_536, 8_192, 14_336)


def packed(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Gate and up of `size` columns each, side by side, together 2^26 elements on a GPU, 2^20 on a CPU."""
    n = max(1, (1 << (25 if device.type == "cuda" else 19)) // size)
    return (torch.randn(n, 2 * size, device=device).to(dtype),)


def torch_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def torch_geglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def liger(x: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(*x.chunk(2, -1))


PROVIDERS: dict[str, Any] = {"lmops": swiglu, "liger": liger}
BENCHMARKS = [
    Benchmark("swiglu", "gated_forward", packed, PROVIDERS, torch_swiglu, lambda x: 3 * x.nbytes // 2, SIZES, 1_536),
    Benchmark(
        "swiglu backward", "gated_backward", packed, PROVIDERS, torch_swiglu, lambda x: 5 * x.nbytes // 2, SIZES, 1_536,
        backward=True,
    ),
    Benchmark(
        "geglu", "gated_forward", packed, {"lmops": geglu}, torch_geglu, lambda x: 3 * x.nbytes // 2, SIZES, 1_536
    ),
]  # fmt: skip


def passes(n_rows: int, n_cols: int, dtype: torch.dtype, *, function=swiglu, apart=False, by_column=False, **options):
    """Host code that launches the forward and the backward kernel on memory that nobody fills."""

    def run() -> None:
        inputs = [torch.empty(n_rows, n_cols, dtype=dtype, requires_grad=True) for _ in range(1 + apart)]
        views = [x.T for x in inputs] if by_column else inputs
        y = function(*views, **options)
        torch.autograd.grad(y, inputs, torch.empty_like(y))

    return run


half, bf16, fp32, fp64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
COMPILE = [
    Variant("gated-swiglu-bf16-packed-3072", passes(4_096, 3_072, bf16), wide=1),
    Variant("gated-swiglu-bf16-apart-14336", passes(4_096, 14_336, bf16, apart=True), wide=1),
    Variant("gated-swiglu-fp32-packed-16384", passes(512, 16_384, fp32), wide=1),
    Variant("gated-swiglu-fp16-apart-1003", passes(4_096, 1_003, half, apart=True), wide=0.75),
    Variant("gated-swiglu-bf16-packed-2006", passes(4_096, 2_006, bf16)),
    Variant("gated-swiglu-fp16-by-column", passes(512, 4_096, half, apart=True, by_column=True), wide=1),
    Variant("gated-geglu-bf16-packed-32768", passes(512, 32_768, bf16, function=geglu), wide=1),
    Variant("gated-geglu-exact-bf16-packed", passes(512, 6_144, bf16, function=geglu, approximate="none"), wide=1),
    Variant("gated-geglu-exact-fp64-packed", passes(64, 4_096, fp64, function=geglu, approximate="none"), wide=1),
]
