"""New keys and values written to the pages of a layer, as a decode step and a prefill do, and blocks copied."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Call, Variant
from lmops.ops.paged_cache import Format, KVPages, append_slots, copy_blocks, store_kv
from lmops.reference.paged_cache import rotate

HEADS, DIM, BLOCK = 8, 128, 16
SIZES = (1, 16, 256, 4_096)
CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}


def empty_pages(
    n_blocks: int,
    dtype: torch.dtype,
    format: Format = "native",
    *,
    heads: int = HEADS,
    dim: int = DIM,
    block: int = BLOCK,
    device: torch.device | None = None,
) -> KVPages:
    """Pages in the order of memory that a cache has: of a head all blocks."""

    def tensor(dtype: torch.dtype, *columns: int) -> Tensor:
        return torch.empty(heads, n_blocks, block, *columns, dtype=dtype, device=device).movedim(0, 2)

    if format == "native":
        return KVPages(tensor(dtype, dim), tensor(dtype, dim))
    width, columns = (dim // 2, (2,)) if format == "int4" else (dim, ())
    scales = torch.float32 if dtype == torch.float32 else torch.float16
    return KVPages(
        tensor(CODES[format], width), tensor(CODES[format], width), tensor(scales, *columns), tensor(scales, *columns)
    )


def new_tokens(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """k and v of `size` tokens, pages with room for twice as many, slots anywhere, and angles."""
    k, v = torch.randn(2, size, HEADS, DIM, device=device).to(dtype)
    slots = torch.randperm(2 * size + BLOCK, device=device)[:size]
    pages = empty_pages(-(-(2 * size + BLOCK) // BLOCK), dtype, device=device)
    angles = torch.rand(size, DIM // 2, device=device)
    return k, v, pages.k, pages.v, slots, angles.cos(), angles.sin()


def ours(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    store_kv(k, v, KVPages(k_pages, v_pages), slots)
    return k_pages[slots // BLOCK, slots % BLOCK]


def put(k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    k_pages[slots // BLOCK, slots % BLOCK] = k
    v_pages[slots // BLOCK, slots % BLOCK] = v
    return k_pages[slots // BLOCK, slots % BLOCK]


def ours_rotated(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    positions = torch.arange(len(k), device=k.device)
    store_kv(k, v, KVPages(k_pages, v_pages), slots, cos=cos, sin=sin, positions=positions)
    return k_pages[slots // BLOCK, slots % BLOCK]


def put_rotated(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, slots: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    return put(rotate(k, cos, sin, False).to(k.dtype), v, k_pages, v_pages, slots, cos, sin)


def moved(k: Tensor, v: Tensor, *rest: Tensor) -> int:
    return 2 * (k.nbytes + v.nbytes) + 2 * k.nbytes  # and what the check reads


BENCHMARKS = [
    Benchmark("store_kv", "store_kv", new_tokens, {"lmops": ours}, put, moved, SIZES, 16),
    Benchmark("store_kv, rotated", "store_kv", new_tokens, {"lmops": ours_rotated}, put_rotated, moved, SIZES, 16),
]


def stores(dtype: torch.dtype, format: Format = "native", *, rope_dim: int = 0, interleaved: bool = False,
           dim: int = DIM, heads: int = HEADS) -> Call:  # fmt: skip
    """Host code that launches the kernel for 64 tokens of memory that nobody fills."""

    def run() -> None:
        pages = empty_pages(16, dtype, format, dim=dim, heads=heads)
        k, v = torch.empty(2, 64, heads, dim, dtype=dtype)
        numbers = torch.empty(64, dtype=torch.int64)
        angles = torch.empty(1_000, rope_dim // 2) if rope_dim else None
        positions = numbers if rope_dim else None
        store_kv(k, v, pages, numbers, cos=angles, sin=angles, positions=positions, interleaved=interleaved)

    return run


def copies(dtype: torch.dtype, format: Format = "native", dim: int = DIM) -> Call:
    def run() -> None:
        copy_blocks(empty_pages(16, dtype, format, dim=dim), torch.empty(4, 3, dtype=torch.int64))

    return run


half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32


def appends() -> None:
    lengths, table = torch.empty(64, dtype=torch.int32), torch.empty(64, 512, dtype=torch.int32)
    append_slots(lengths, table, 1, 1, BLOCK)


COMPILE = [
    Variant("paged-cache-store-bf16", stores(bf16), wide=0.8),
    Variant("paged-cache-store-fp32", stores(fp32), wide=0.8),
    Variant("paged-cache-store-bf16-72", stores(bf16, dim=72, heads=3), wide=0.8),
    Variant("paged-cache-store-bf16-256", stores(bf16, dim=256), wide=0.8),
    Variant("paged-cache-store-bf16-rope", stores(bf16, rope_dim=DIM), wide=0.8),
    Variant("paged-cache-store-bf16-interleaved", stores(bf16, rope_dim=DIM, interleaved=True), wide=0.8),
    Variant("paged-cache-store-bf16-partial-rope", stores(bf16, rope_dim=32, dim=80), wide=0.7),
    Variant("paged-cache-store-int8", stores(half, "int8"), wide=0.8),
    Variant("paged-cache-store-fp8-rope", stores(bf16, "fp8", rope_dim=DIM), wide=0.7),
    Variant("paged-cache-store-int4", stores(bf16, "int4"), wide=0.7),
    Variant("paged-cache-store-int4-rope", stores(bf16, "int4", rope_dim=64, dim=64), wide=0.55),
    Variant("paged-cache-store-int4-interleaved-fp32", stores(fp32, "int4", rope_dim=64, interleaved=True), wide=0.8),
    Variant("paged-cache-copy-bf16", copies(bf16), wide=0.9),
    Variant("paged-cache-copy-int8", copies(half, "int8"), wide=0.8),
    Variant("paged-cache-copy-int4-80", copies(half, "int4", dim=80)),
    Variant("paged-cache-append", appends),
]
