"""Flash attention over sequences of 512 to 16,384: forward, backward, and the compiled variants of all kernels."""

from __future__ import annotations

import torch

from benchmarks.harness import Variant
from lmops.ops.attention import attention

BENCHMARKS: list = []


def passes(dim: int, dtype: torch.dtype, *, length=1_024, heads=8, kv_heads=8, value_dim=None, backward=True, packed=False,
           needs=(), sinks=False, **arguments):  # fmt: skip
    """Host code that launches the forward and the backward kernels on memory that nobody fills."""

    def run() -> None:
        q = torch.empty(1 if packed else 2, heads, length, dim, dtype=dtype, requires_grad=backward)
        k = torch.empty(1 if packed else 2, kv_heads, 1_024, dim, dtype=dtype, requires_grad=backward)
        v = torch.empty(1 if packed else 2, kv_heads, 1_024, value_dim or dim, dtype=dtype, requires_grad=backward)
        given = {name: value() if callable(value) else value for name, value in arguments.items()}
        if packed:
            given |= {f"cu_seqlens_{x}": torch.tensor([0, 512, 1_024], dtype=torch.int32) for x in "qk"}
        out, _ = attention(q, k, v, **given)
        if backward:
            wanted = [q, k, v, *(t for t in given.values() if isinstance(t, torch.Tensor) and t.requires_grad)]
            torch.autograd.grad(out, wanted, torch.empty_like(out))

    return run


half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
COMPILE = [
    Variant("attention-bf16-64-causal", passes(64, bf16, right=0), tensor_core="native"),
    Variant("attention-bf16-128", passes(128, bf16), tensor_core="native"),
    Variant("attention-bf16-128-causal", passes(128, bf16, right=0), tensor_core="native"),
    Variant("attention-fp16-128-causal-gqa-packed", passes(128, half, right=0, bottom_right=True, kv_heads=2, packed=True), tensor_core="native"),
    Variant("attention-bf16-128-window", passes(128, bf16, left=256, right=0, bottom_right=True), tensor_core="native"),
    Variant("attention-bf16-128-mask", passes(128, bf16, bias=lambda: torch.empty(2, 1, 1_024, 1_024, dtype=torch.bool)), tensor_core="native"),
    Variant("attention-bf16-64-bias-gradient", passes(64, bf16, bias=lambda: torch.empty(1, 8, 1_024, 1_024, dtype=bf16, requires_grad=True)), tensor_core="native"),
    Variant("attention-bf16-256-softcap-causal", passes(256, bf16, right=0, softcap=50.0), tensor_core="native"),
    Variant("attention-fp16-128-alibi-causal", passes(128, half, right=0, alibi_slopes=lambda: torch.empty(8)), tensor_core="native"),
    Variant("attention-bf16-64-sinks-window", passes(64, bf16, left=128, right=0, sinks=lambda: torch.empty(8, dtype=bf16, requires_grad=True)), tensor_core="native"),
    Variant("attention-bf16-128-dropout-causal", passes(128, bf16, right=0, dropout_p=0.1), tensor_core="native"),
    Variant("attention-fp16-80", passes(80, half, right=0), tensor_core="native"),
    Variant("attention-bf16-192-values-128", passes(192, bf16, value_dim=128, right=0), tensor_core="native"),
    Variant("attention-bf16-512", passes(512, bf16, backward=False, right=0), tensor_core="any"),
    Variant("attention-bf16-128-decode", passes(128, bf16, length=1, kv_heads=2, backward=False), tensor_core="any"),
    Variant("attention-bf16-16-short", passes(16, bf16, length=40, kv_heads=8), tensor_core="any"),
    Variant("attention-fp32-64-causal", passes(64, fp32, right=0)),
    Variant("attention-fp32-128-causal", passes(128, fp32, right=0)),
    Variant("attention-fp32-256", passes(256, fp32)),
]  # fmt: skip
