"""Cross entropy and its linear form over vocabularies of 32,000 to 128,256, and the divergence to a teacher.

    python -m benchmarks.bench_loss

prints the memory of cross entropy and of the linear form, by formula, at the sizes of training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Benchmark, Variant, table
from lmops.ops.linear_loss import _head_blocks, linear_cross_entropy, linear_kl_div
from lmops.ops.loss import cross_entropy, kl_div

SIZES = (32_000, 50_257, 128_256)


def tokens(size: int, device: torch.device) -> int:
    """Rows of `size` classes: together about 2^28 logits on a GPU, 2^22 on a CPU."""
    return max(1, (1 << (28 if device.type == "cuda" else 22)) // size)


def logits(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    n = tokens(size, device)
    return torch.randn(n, size, device=device).to(dtype), torch.randint(0, size, (n,), device=device)


def head(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, weight and target of a model with `size` classes."""
    n, width = (8_192, 4_096) if device.type == "cuda" else (256, 128)
    hidden = torch.randn(n, width, device=device).to(dtype)
    weight = (torch.randn(size, width, device=device) / width**0.5).to(dtype)
    return hidden, weight, torch.randint(0, size, (n,), device=device)


def two_models(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    n = tokens(size, device)
    return torch.randn(n, size, device=device).to(dtype), torch.randn(n, size, device=device).to(dtype)


def liger(x: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return LigerCrossEntropyFunction.apply(x, y)[0]


def liger_linear(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    return LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, y)[0]


def composite(hidden: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), y)


def divergence(x: Tensor, y: Tensor) -> Tensor:
    p, q = torch.log_softmax(y.detach(), -1), torch.log_softmax(x, -1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True)


def products(hidden: Tensor, weight: Tensor, y: Tensor) -> int:
    return 3 * 2 * hidden.shape[0] * weight.numel()


CROSS_ENTROPY = Benchmark(
    "cross entropy, forward and backward", "cross_entropy_forward", logits, {"lmops": cross_entropy, "liger": liger},
    F.cross_entropy, lambda x, y: 2 * x.nbytes, SIZES, 1_003, backward="and forward",
)  # fmt: skip
LINEAR = Benchmark(
    "linear cross entropy, forward and backward", "linear_cross_entropy_forward", head,
    {"lmops": lambda h, w, y: linear_cross_entropy(h, w, y, dtype=h.dtype), "liger": liger_linear},
    composite, lambda h, w, y: 3 * (h.nbytes + w.nbytes), SIZES, 1_003, operations=products, backward="and forward",
)  # fmt: skip
KL_DIV = Benchmark(
    "divergence, forward", "kl_div_forward", two_models, {"lmops": kl_div}, divergence,
    lambda x, y: x.nbytes + y.nbytes, SIZES, 1_003,
)  # fmt: skip
BENCHMARKS = [CROSS_ENTROPY, LINEAR, KL_DIV]


def memory(n: int, n_classes: int, width: int, dtype: torch.dtype = torch.bfloat16) -> list[list[str]]:
    """Bytes beyond inputs, gradients and results: (what, MB), for each way to the loss and its gradients."""
    hidden = torch.empty(n, width, dtype=dtype, device="meta")
    weight = torch.empty(n_classes, width, dtype=dtype, device="meta")
    size = hidden.element_size()
    blocks = _head_blocks([(hidden, weight)], (True, True, False))
    sums = blocks.tokens * width * (4 + size) if size < 4 else 0
    linear = blocks.tokens * blocks.classes * size + sums + 4 * n * (6 + 3 + 2)
    every = n * n_classes * size
    ways = {
        "torch: logits, their log-softmax and its gradient": 3 * every,
        "cross_entropy: logits and gradient": 2 * every,
        "cross_entropy, inplace_backward": every,
        "linear_cross_entropy": linear,
    }
    return [[f"{n} x {n_classes} x {width}", way, f"{used / 1e6:,.1f}"] for way, used in ways.items()]


def passes(n: int, size: int, dtype: torch.dtype, *, gradient: bool = True, function=cross_entropy, **options):
    """Host code that launches cross entropy or the divergence on memory that nobody fills."""

    def run() -> None:
        x = torch.empty(n, size, dtype=dtype, requires_grad=gradient)
        other = torch.empty(n, size, dtype=dtype) if function is kl_div else torch.empty(n, dtype=torch.int64)
        y = function(x, other, **options)
        if gradient:
            torch.autograd.grad(y, x, torch.empty_like(y))

    return run


def linear_passes(n: int, size: int, width: int, dtype: torch.dtype, *, teacher: bool = False, **options):
    """The same of the linear forms."""

    def run() -> None:
        hidden, weight = (torch.empty(k, width, dtype=dtype, requires_grad=True) for k in (n, size))
        if teacher:
            y = linear_kl_div(hidden, weight, torch.empty(n, width, dtype=dtype), weight, **options)
        else:
            y = linear_cross_entropy(hidden, weight, torch.empty(n, dtype=torch.int64), **options)
        torch.autograd.grad(y, (hidden, weight), torch.empty_like(y))

    return run


half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
ALL: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "temperature": 0.7}
COMPILE = [
    Variant("loss-fp32-50", passes(4_096, 50, fp32)),
    Variant("loss-bf16-1003", passes(4_096, 1_003, bf16), wide=0.5),
    Variant("loss-bf16-8192", passes(512, 8_192, bf16), wide=0.6),
    Variant("loss-bf16-16384", passes(512, 16_384, bf16), wide=0.6),
    Variant("loss-bf16-32000", passes(512, 32_000, bf16), wide=0.75),
    Variant("loss-bf16-32768-everything", passes(512, 32_768, bf16, **ALL), wide=0.75),
    Variant("loss-bf16-50257", passes(512, 50_257, bf16), wide=0.75),
    Variant("loss-bf16-81919", passes(64, 81_919, bf16), wide=0.75),
    Variant("loss-bf16-81920", passes(64, 81_920, bf16), wide=0.75),
    Variant("loss-bf16-90001", passes(64, 90_001, bf16), wide=0.75),
    Variant("loss-bf16-128256", passes(64, 128_256, bf16), wide=0.75),
    Variant("loss-bf16-128256-forward", passes(64, 128_256, bf16, gradient=False), wide=0.6),
    Variant("loss-fp32-32000", passes(512, 32_000, fp32), wide=0.75),
    Variant("loss-fp32-50257", passes(512, 50_257, fp32), wide=0.75),
    Variant("loss-fp32-128256-everything", passes(64, 128_256, fp32, **ALL), wide=0.75),
    Variant("loss-fp16-32767", passes(512, 32_767, half), wide=0.5),
    Variant("loss-bf16-50257-none", passes(512, 50_257, bf16, reduction="none"), wide=0.6),
    Variant("loss-bf16-90001-everything", passes(64, 90_001, bf16, **ALL), wide=0.75),
    Variant("loss-bf16-16383-weights", passes(64, 16_383, bf16, weight=torch.empty(16_383), **ALL)),
    Variant("loss-bf16-50257-weights", passes(64, 50_257, bf16, weight=torch.empty(50_257), **ALL)),
    Variant("loss-fp32-40959", passes(64, 40_959, fp32), wide=0.75),
    Variant("loss-fp32-16383-everything", passes(64, 16_383, fp32, **ALL), wide=0.6),
    Variant("loss-bf16-50257-smooth", passes(64, 50_257, bf16, label_smoothing=0.1), wide=0.75),
    Variant("loss-bf16-50257-softcap", passes(64, 50_257, bf16, softcap=30.0), wide=0.75),
    Variant("loss-linear-bf16", linear_passes(2_048, 5_000, 16, bf16), wide=0.4),
    Variant("loss-linear-fp32-everything", linear_passes(2_048, 5_003, 16, fp32, **ALL), wide=0.5),
    Variant("loss-kl-bf16-1003", passes(4_096, 1_003, bf16, function=kl_div), wide=0.5),
    Variant("loss-kl-bf16-16384", passes(512, 16_384, bf16, function=kl_div), wide=0.75),
    Variant("loss-kl-bf16-50257", passes(512, 50_257, bf16, function=kl_div), wide=0.75),
    Variant("loss-kl-bf16-28671", passes(512, 28_671, bf16, function=kl_div), wide=0.75),
    Variant("loss-kl-bf16-32000", passes(512, 32_000, bf16, function=kl_div), wide=0.75),
    Variant("loss-kl-fp32-16383-reverse", passes(512, 16_383, fp32, function=kl_div, reverse=True), wide=0.75),
    Variant("loss-kl-fp32-128256-reverse", passes(64, 128_256, fp32, function=kl_div, reverse=True), wide=0.75),
    Variant("loss-kl-linear-bf16", linear_passes(2_048, 5_000, 16, bf16, teacher=True), wide=0.5),
]


if __name__ == "__main__":
    lines = [line for size in ((8_192, 131_072, 4_096), (2_048, 49_152, 576)) for line in memory(*size)]
    print(table(["tokens x classes x width", "bfloat16, beside inputs, gradients and results", "MB"], lines))
