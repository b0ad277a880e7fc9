"""Rotary position embedding of queries and keys in one launch: forward, and in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Variant
from lmops.ops.rope import rope

SIZES = (1, 512, 4_096, 16_384)
HEADS, KV_HEADS, DIM = 32, 8, 128


def heads(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """Queries and keys of `size` tokens, and tables for them."""
    angles = torch.arange(size, device=device)[:, None] * 10_000.0 ** -(torch.arange(64, device=device) / 64)
    q, k = (torch.randn(size, n, DIM, device=device).to(dtype) for n in (HEADS, KV_HEADS))
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


def ours(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
    return rope(q, k, cos, sin)


def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
    from liger_kernel.ops.rope import LigerRopeFunction

    twice = [torch.cat((t, t), -1)[None] for t in (cos, sin)]
    out = LigerRopeFunction.apply(q.transpose(0, 1)[None].clone(), k.transpose(0, 1)[None].clone(), *twice)
    return tuple(x[0].transpose(0, 1) for x in out)


def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
    """As transformers' `apply_rotary_pos_emb` does it."""
    cos, sin = (torch.cat((t, t), -1)[:, None] for t in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat((-b, a), -1) * sin

    return turn(q), turn(k)


PROVIDERS: dict[str, Any] = {"lmops": ours, "liger": liger}
BENCHMARKS = [
    Benchmark(
        "rope", "rope", heads, PROVIDERS, plain, lambda q, k, c, s: 2 * (q.nbytes + k.nbytes) + 2 * c.nbytes, SIZES, 64,
        sizes_on_cpu=(1, 512),
    ),
]  # fmt: skip


def passes(n: int, q_heads: int, k_heads: int, dim: int, dtype: torch.dtype, *, r=None, table=torch.float32, **options):
    """Host code that launches the kernel, out of place and in place, on memory that nobody fills."""

    def run() -> None:
        q, k = (torch.empty(n, heads, dim, dtype=dtype) for heads in (q_heads, k_heads))
        cos = torch.empty(n, r or dim // 2, dtype=table)
        rope(q, k, cos, cos, **options)
        rope(q, k, cos, cos, inplace=True, **options)

    return run


half, bf16, fp32, fp64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
COMPILE = [
    Variant("rope-bf16-128", passes(4_096, 32, 8, 128, bf16), wide=1),
    Variant("rope-bf16-64-positions", passes(4_096, 9, 3, 64, bf16, positions=torch.empty(4_096).long()), wide=0.8),
    Variant("rope-fp16-128-one-token", passes(1, 32, 8, 128, half, table=half)),
    Variant("rope-bf16-256-interleaved", passes(4_096, 16, 16, 256, bf16, interleaved=True), wide=1),
    Variant("rope-bf16-128-of-which-64", passes(4_096, 32, 8, 128, bf16, r=32), wide=1),
    Variant("rope-fp16-80-of-which-40", passes(512, 8, 8, 80, half, r=20)),
    Variant("rope-fp32-128", passes(512, 32, 8, 128, fp32), wide=1),
    Variant("rope-fp64-64-interleaved", passes(64, 4, 2, 64, fp64, interleaved=True), wide=1),
]
