"""Flash attention over sequences of 512 to 16,384: forward, backward, and the compiled variants of all kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.harness import Backward, Benchmark, Variant
from lmops.ops.attention import attention, scaled_dot_product_attention
from lmops.reference.attention import attention as reference

SIZES = (512, 1_024, 2_048, 4_096, 8_192, 16_384)
ON_CPU = (128, 512, 1_024)
SCORES_AT_ONCE = 1 << 26  # in the reference: 512 MiB each time that they are held in float64


def projected(dim: int, size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (batch, heads, size, dim), heads behind positions in memory, as a projection leaves them.

    On a GPU 16,384 tokens in all of 2,048 numbers each, on a CPU 512 of 256: a longer sequence makes a smaller batch.
    """
    tokens, width = (1 << 14, 2_048) if device.type == "cuda" else (1 << 9, 256)
    shape = (max(1, tokens // size), size, width // dim, dim)
    q, k, v = (torch.randn(shape, device=device).to(dtype).transpose(1, 2) for _ in range(3))
    return q, k, v


def by_blocks(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The reference for some queries at a time, and again in the backward, so that the scores of all are never held."""

    def block(first: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        end = first + q.shape[2] if causal else k.shape[2]
        return reference(q, k[:, :, :end], v[:, :, :end], right=0 if causal else None, bottom_right=causal)[0]

    length = max(1, SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]))
    blocks = [
        checkpoint(block, first, q[:, :, first : first + length], k, v, use_reentrant=False)
        for first in range(0, q.shape[2], length)
    ]
    return torch.cat(blocks, 2)


def of_torch(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if backend == SDPBackend.MATH and q.shape[2] > 4_096:
        raise ValueError("holds all scores in memory: left out above 4,096")
    with sdpa_kernel(backend):
        try:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        except RuntimeError as error:
            if "No available kernel" in str(error) or "No viable backend" in str(error):
                raise ImportError(f"torch has no such kernel for these inputs on {q.device.type}") from error
            raise


@cache
def triangle(size: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, i, j: i >= j, None, None, size, size, device=str(device))


@cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, fullgraph=True, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    if q.device.type == "cpu" and q.requires_grad:
        raise ImportError("torch's FlexAttention has no backward on a CPU")
    return compiled_flex()(q, k, v, block_mask=triangle(q.shape[2], q.device) if causal else None)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal).transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=causal)  # type: ignore[return-value]


PROVIDERS: dict[str, Callable[..., Tensor]] = {
    "lmops": ours,
    "torch flash": partial(of_torch, SDPBackend.FLASH_ATTENTION),
    "torch memory-efficient": partial(of_torch, SDPBackend.EFFICIENT_ATTENTION),
    "torch cuDNN": partial(of_torch, SDPBackend.CUDNN_ATTENTION),
    "torch math": partial(of_torch, SDPBackend.MATH),
    "FlexAttention": flex,
    "flash-attn": flash_attn,
}


# what the name says; the work, in forwards; the tensors that are read or written: q, k, v and o in the forward, these,
# do, dq, dk and dv in the backward, and beside them little
PASSES: dict[Backward, tuple[str, float, int]] = {
    False: ("forward", 1, 4),
    True: ("backward", 2.5, 8),
    "and forward": ("forward and backward", 3.5, 12),
}


def case(dim: int, causal: bool, backward: Backward) -> Benchmark:
    """One of PASSES. "torch", the measure of the others, is the backend that torch chooses by itself."""
    what, work, tensors = PASSES[backward]

    def operations(q: Tensor, k: Tensor, v: Tensor) -> int:
        return int(work * 4 * q.numel() * k.shape[2] / (2 if causal else 1))

    return Benchmark(
        f"attention {what} {dim}{' causal' if causal else ''}",
        "attention_backward" if backward else "attention_forward",
        partial(projected, dim),
        {name: partial(provider, causal=causal) for name, provider in PROVIDERS.items()},
        partial(by_blocks, causal=causal),
        lambda q, k, v: tensors * q.nbytes,
        SIZES,
        small=128,
        operations=operations,
        eager=partial(F.scaled_dot_product_attention, is_causal=causal),
        dtypes=(torch.bfloat16, torch.float16),
        backward=backward,
        sizes_on_cpu=ON_CPU,
    )


BENCHMARKS = [case(dim, causal, backward) for backward in PASSES for dim in (64, 128) for causal in (False, True)]


def passes(
    dim: int, dtype: torch.dtype, *, length=1_024, heads=8, kv_heads=8, value_dim=None, backward=True, packed=False,
    **arguments,
):  # fmt: skip
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
    Variant(
        "attention-fp16-128-causal-gqa-packed",
        passes(128, half, right=0, bottom_right=True, kv_heads=2, packed=True),
        tensor_core="native",
    ),
    Variant("attention-bf16-128-window", passes(128, bf16, left=256, right=0, bottom_right=True), tensor_core="native"),
    Variant(
        "attention-bf16-128-mask",
        passes(128, bf16, bias=lambda: torch.empty(2, 1, 1_024, 1_024, dtype=torch.bool)),
        tensor_core="native",
    ),
    Variant(
        "attention-bf16-64-bias-gradient",
        passes(64, bf16, bias=lambda: torch.empty(1, 8, 1_024, 1_024, dtype=bf16, requires_grad=True)),
        tensor_core="native",
    ),
    Variant("attention-bf16-256-softcap-causal", passes(256, bf16, right=0, softcap=50.0), tensor_core="native"),
    Variant(
        "attention-fp16-128-alibi-causal",
        passes(128, half, right=0, alibi_slopes=lambda: torch.empty(8)),
        tensor_core="native",
    ),
    Variant(
        "attention-bf16-64-sinks-window",
        passes(64, bf16, left=128, right=0, sinks=lambda: torch.empty(8, dtype=bf16, requires_grad=True)),
        tensor_core="native",
    ),
    Variant("attention-bf16-128-dropout-causal", passes(128, bf16, right=0, dropout_p=0.1), tensor_core="native"),
    Variant("attention-fp16-80", passes(80, half, right=0), tensor_core="native"),
    Variant("attention-bf16-192-values-128", passes(192, bf16, value_dim=128, right=0), tensor_core="native"),
    Variant("attention-bf16-512", passes(512, bf16, backward=False, right=0), tensor_core="any"),
    Variant("attention-bf16-128-decode", passes(128, bf16, length=1, kv_heads=2, backward=False), tensor_core="any"),
    Variant("attention-bf16-16-short", passes(16, bf16, length=40, kv_heads=8), tensor_core="any"),
    Variant("attention-fp32-64-causal", passes(64, fp32, right=0)),
    Variant("attention-fp32-128-causal", passes(128, fp32, right=0)),
    Variant("attention-fp32-192-values-128-causal", passes(192, fp32, value_dim=128, right=0)),
    Variant("attention-fp32-256", passes(256, fp32)),
]
