"""RMSNorm and LayerNorm of rows of 576 to 65,536 columns: forward, with a residual, backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Variant
from lmops.ops.norm import layer_norm, rms_norm

SIZES = (576, 4_096, 8_192, 16_384, 65_536)
EPS = 1e-5


def rows(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Rows of `size` columns, together 2^25 elements on a GPU, 2^19 on a CPU; weight and bias."""
    n = max(1, (1 << (25 if device.type == "cuda" else 19)) // size)
    return (
        torch.randn(n, size, device=device).to(dtype),
        *torch.randn(2, size, device=device).to(dtype).unbind(),
    )


def x_and_weight(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return rows(size, dtype, device)[:2]


def with_residual(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    x, weight, _ = rows(size, dtype, device)
    return x, weight, torch.randn_like(x)


def torch_rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def torch_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def liger_rms(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, EPS)


def liger_layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPS)


RMS: dict[str, Any] = {"lmops": lambda x, w: rms_norm(x, w, EPS), "liger": liger_rms}
LAYER: dict[str, Any] = {"lmops": lambda x, w, b: layer_norm(x, w, b, EPS), "liger": liger_layer}
BENCHMARKS = [
    Benchmark("rms norm", "norm", x_and_weight, RMS, torch_rms, lambda x, w: 2 * x.nbytes, SIZES, 576),
    Benchmark(
        "rms norm of a sum", "norm_forward", with_residual,
        {"lmops": lambda x, w, r: rms_norm(x, w, EPS, residual=r)[0]},
        lambda x, w, r: torch_rms(x + r, w), lambda x, w, r: 4 * x.nbytes, SIZES, 576,
    ),
    Benchmark(
        "rms norm backward", "norm_backward", x_and_weight, RMS, torch_rms, lambda x, w: 3 * x.nbytes, SIZES, 576,
        backward=True,
    ),
    Benchmark("layer norm", "norm", rows, LAYER, torch_layer, lambda x, w, b: 2 * x.nbytes, SIZES, 576),
    Benchmark(
        "layer norm backward", "norm_backward", rows, LAYER, torch_layer, lambda x, w, b: 3 * x.nbytes, SIZES, 576,
        backward=True,
    ),
]  # fmt: skip


def passes(n_rows: int, n_cols: int, dtype: torch.dtype, *, layer=False, residual=False, params=True, by_column=False):
    """Host code that launches the forward and the backward kernels on memory that nobody fills."""

    def run() -> None:
        x = torch.empty((n_cols, n_rows) if by_column else (n_rows, n_cols), dtype=dtype, requires_grad=True)
        x = x.T if by_column else x
        weights = [torch.empty(n_cols, dtype=dtype, requires_grad=True) for _ in range(1 + layer)] if params else []
        norm: Any = layer_norm if layer else rms_norm
        y = norm(x, *weights, residual=x if residual else None)
        out = y if residual else (y,)
        torch.autograd.grad(out, [x, *weights], [torch.empty_like(t) for t in out])

    return run


half, bf16, fp32, fp64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
# the longest rows that fit in each way to hold them are where registers run out first
COMPILE = [
    Variant("norm-rms-bf16-64", passes(4_096, 64, bf16, residual=True), wide=0.7),
    Variant("norm-rms-bf16-576", passes(4_096, 576, bf16), wide=0.9),
    Variant("norm-rms-bf16-1003", passes(4_096, 1_003, bf16, residual=True)),
    Variant("norm-rms-bf16-4096", passes(4_096, 4_096, bf16, residual=True), wide=0.9),
    Variant("norm-rms-fp32-4096", passes(4_096, 4_096, fp32), wide=0.9),
    Variant("norm-rms-bf16-8192", passes(4_096, 8_192, bf16, residual=True), wide=0.9),
    Variant("norm-rms-fp32-8192", passes(4_096, 8_192, fp32, residual=True), wide=0.9),
    Variant("norm-rms-bf16-8192-frozen", passes(4_096, 8_192, bf16, params=False), wide=0.9),
    Variant("norm-rms-bf16-16384", passes(512, 16_384, bf16), wide=0.9),
    Variant("norm-rms-fp16-32768", passes(512, 32_768, half, residual=True), wide=0.9),
    Variant("norm-rms-bf16-65536", passes(512, 65_536, bf16, residual=True), wide=0.9),
    Variant("norm-rms-fp32-one-row-40001", passes(1, 40_001, fp32, residual=True)),
    Variant("norm-layer-fp16-768", passes(4_096, 768, half, layer=True), wide=0.9),
    Variant("norm-layer-fp32-1600", passes(4_096, 1_600, fp32, layer=True, residual=True), wide=0.9),
    Variant("norm-layer-bf16-4096", passes(4_096, 4_096, bf16, layer=True, residual=True), wide=0.9),
    Variant("norm-layer-bf16-8192", passes(4_096, 8_192, bf16, layer=True, residual=True), wide=0.9),
    Variant("norm-layer-fp32-8192", passes(4_096, 8_192, fp32, layer=True, residual=True), wide=0.9),
    Variant("norm-layer-bf16-8191", passes(4_096, 8_191, bf16, layer=True, residual=True)),
    Variant("norm-layer-fp32-32768", passes(512, 32_768, fp32, layer=True), wide=0.9),
    Variant("norm-layer-bf16-32767", passes(512, 32_767, bf16, layer=True)),
    Variant("norm-layer-fp32-65536", passes(64, 65_536, fp32, layer=True, residual=True), wide=0.9),
    Variant("norm-layer-bf16-by-column-1024", passes(4_096, 1_024, bf16, layer=True, by_column=True), wide=0.7),
    Variant("norm-layer-fp64-1024", passes(512, 1_024, fp64, layer=True, residual=True), wide=0.9),
    Variant("norm-layer-fp64-4096", passes(64, 4_096, fp64, layer=True), wide=0.9),
]
