"""Attention over a paged KV cache: tiles, launcher, CPU implementation, schema, public function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, differentiated, target_name
from lmops.ops.attention import (
    LOG2E,
    NEG_INF,
    Tile,
    attention_cpu,
    block_dim,
    check_a_head,
    check_window,
)
from lmops.ops.paged_cache import FLOATS, FORMATS, KVPages, as_bytes

SCHEMA = (
    "paged_attention(Tensor query, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor block_table,"
    " Tensor context_lens, Tensor? cu_q, Tensor? leftpad, Tensor? slopes, Tensor? sinks, SymInt max_q, float scale,"
    " SymInt? left, SymInt? right, float softcap, SymInt shared, bool batch_invariant) -> (Tensor, Tensor)"
)


def _fake(query: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    value_dim = v.shape[3] * (2 if v.dtype == torch.uint8 else 1)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty(*query.shape[:2], value_dim), lse


# -------------------------------------------------------------------------------------------------------------- CPU


def _cpu(
    query: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, block_table: Tensor,
    context_lens: Tensor, cu_q: Tensor | None, leftpad: Tensor | None, slopes: Tensor | None, sinks: Tensor | None,
    max_q: int, scale: float, left: int | None, right: int | None, softcap: float, shared: int, batch_invariant: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """torch's own attention a sequence, over a view of the pages where they lie in a row, else over a copy of them."""
    block_size = k.shape[1]
    table, lengths = block_table.numpy(), context_lens.tolist()
    ends = [i * max_q for i in range(len(lengths) + 1)] if cu_q is None else cu_q.tolist()
    pads = [0] * len(lengths) if leftpad is None else leftpad.tolist()
    _check_lengths(table, lengths, ends, pads, query.shape[0], block_size, max_q, shared)
    # whether the slots of a head stand one behind the other in memory, as those of PagedKVCache do
    in_rows = k_scale is None and all(t.stride(0) == block_size * t.stride(1) for t in (k, v))
    queries = (query if k_scale is None else query.float()).transpose(0, 1)[None]  # (1, H, T, D)
    outs, lses = [], []
    for s, n_keys in enumerate(lengths):
        q_len = ends[s + 1] - ends[s]
        # the first key that is seen, and so the first block that is needed
        first = pads[s] if left is None else max(pads[s], n_keys - q_len - left)
        n, skip = n_keys - first, first % block_size
        blocks = _blocks(table[s, first // block_size : -(-n_keys // block_size)], k.shape[0], s)
        if in_rows and isinstance(blocks, slice):
            keys, values = (_slots(t, blocks.start * block_size + skip, n) for t in (k, v))
        else:
            keys = _gather(k, k_scale, blocks)[:, skip : skip + n][None]
            values = _gather(v, v_scale, blocks)[:, skip : skip + n][None]
        if keys.dtype != queries.dtype:
            keys, values = keys.to(queries.dtype), values.to(queries.dtype)
        out, lse = attention_cpu(
            queries.narrow(2, ends[s], q_len), keys, values,
            None, slopes[s] if slopes is not None and slopes.ndim == 2 else slopes, sinks, None, None, None,
            q_len, n, scale, *_needed(left, right, q_len, n), True, softcap, 0.0,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    if not outs:
        return _fake(query, k, v)
    out, lse = (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 2), torch.cat(lses, 2))
    # (1, H, T, Dv) and (1, H, T); of one query that is a view
    out = out[0].transpose(0, 1).to(query.dtype)
    return out.contiguous() if len(out) > 1 else out.reshape(out.shape), lse.view(lse.shape[1:])


def _needed(left: int | None, right: int | None, q_len: int, n_keys: int) -> tuple[int | None, int | None]:
    """The bounds without those that hide nothing, which torch's attention then need not know of."""
    if left is not None and n_keys - 1 <= left:
        left = None
    return left, None if right is not None and q_len - 1 <= right else right


def _blocks(blocks: np.ndarray, n_blocks: int, s: int) -> slice | Tensor:
    """What to index pages with: a slice where blocks follow one another."""
    n = len(blocks)
    first, last = (int(blocks[0]), int(blocks[-1])) if n else (0, -1)
    if last - first == n - 1 and (n < 3 or (blocks[1:] - blocks[:-1] == 1).all()):
        if first >= 0 and last < n_blocks:
            return slice(first, last + 1)
    elif blocks.min() >= 0 and blocks.max() < n_blocks:
        return torch.from_numpy(blocks.astype(np.int64))
    raise ValueError(f"block_table must name blocks 0 to {n_blocks - 1}, got {blocks.tolist()} for sequence {s}")


def _slots(pages: Tensor, first: int, n: int) -> Tensor:
    """(1, KV, n, D): slots first .. first + n - 1. One operator, since a step of decoding costs operators."""
    block, slot, head, dim = pages.stride()
    return pages.as_strided(
        (1, pages.shape[2], n, pages.shape[3]), (block, head, slot, dim), pages.storage_offset() + first * slot
    )


def _gather(pages: Tensor, scale: Tensor | None, blocks: slice | Tensor) -> Tensor:
    """(KV, n, D), as numbers: the slots of the blocks, one block behind the other."""
    tokens = pages[blocks].permute(2, 0, 1, 3).flatten(1, 2)
    if scale is None:
        return tokens
    scale = scale[blocks].transpose(1, 2).transpose(0, 1).flatten(1, 2).float()
    if pages.dtype != torch.uint8:
        return tokens.float() * scale[..., None]
    numbers = torch.stack((tokens & 15, tokens >> 4), -1).flatten(-2).float()
    return torch.addcmul(scale[..., 1:], numbers, scale[..., :1])


def _check_lengths(
    table: np.ndarray, lengths: list[int], ends: Sequence[int], pads: list[int], n_tokens: int, block_size: int,
    max_q: int, shared: int,
) -> None:  # fmt: skip
    """What on a GPU only memory safety is kept for, since reading it would wait."""
    if ends[0] != 0 or ends[-1] != n_tokens or any(a > b for a, b in pairwise(ends)):
        raise ValueError(
            f"cu_seqlens_q must start at 0, not decrease, and end at the {n_tokens} tokens given, got {list(ends)}"
        )
    width = table.shape[1]
    common = table[0, : -(-shared // block_size)] if shared else table[:0]
    for s, n_keys in enumerate(lengths):
        q_len = ends[s + 1] - ends[s]
        if q_len > max_q:
            raise ValueError(f"max_seqlen_q is {max_q}, but sequence {s} has {q_len} queries")
        if not 0 <= n_keys <= width * block_size:
            raise ValueError(
                f"context_lens must be 0 to {width * block_size}, the {width} blocks of {block_size} of block_table,"
                f" got {n_keys} for sequence {s}"
            )
        if not 0 <= pads[s] <= n_keys:
            raise ValueError(f"cache_leftpad must be 0 to {n_keys}, the keys of sequence {s}, got {pads[s]}")
        if shared and (n_keys - q_len < shared or (table[s, : len(common)] != common).any()):
            raise ValueError(
                f"shared_prefix is {shared} tokens, which all sequences must have before their queries, in the same"
                f" blocks; sequence {s} has {n_keys - q_len}, in {table[s, : len(common)].tolist()}"
            )


# ---------------------------------------------------------------------------------------------------------- kernels


def paged_tile(dim: int, element_size: int, rows: int, target: str, kind: str = "plain") -> Tile:
    """The tile of paged attention on `target` ("sm_80", "sm_90", "sm_100", "gfx942").

    dim: the longer head_dim, as a power of 2; element_size: of queries; rows: of a sequence, its queries times the
    query heads of a key head; kind: "quantized" pages, scores that are the products ("plain"), or "other" scores. From
    `python -m benchmarks.compile_report`: the largest tile that does not spill. With few rows two warps are enough to
    load what memory gives, and wait less for each other than four.
    """
    bucket = next(most for most in (64, 128, 256, 512) if dim <= most)
    size = "few" if rows <= 16 else "many"
    if element_size == 4:
        tiles = WIDE_TILES | (GFX_WIDE_TILES if target.startswith("gfx") else {})
    else:
        tiles = GFX_TILES if target.startswith("gfx") else TILES
        tiles = tiles | {"sm_90": WGMMA_TILES, "sm_100": TCGEN05_TILES}.get(target, {})
    return Tile(*tiles.get((bucket, f"{size}, {kind}"), tiles[bucket, size]))


# (rows, keys, warps, stages) by head_dim up to, and whether rows are at most 16. Of quantized pages at least 32 keys
# where tensor cores multiply: see _triton
TILES = {
    (64, "few"): (16, 32, 2, 3),
    (64, "many"): (64, 64, 4, 2),
    (64, "many, other"): (64, 32, 4, 2),
    (64, "many, quantized"): (64, 32, 4, 2),
    (128, "few"): (16, 32, 2, 3),
    (128, "many"): (64, 64, 4, 2),
    (128, "many, other"): (64, 32, 8, 2),
    (128, "many, quantized"): (64, 32, 8, 2),
    (256, "few"): (16, 16, 4, 3),
    (256, "few, quantized"): (16, 32, 4, 3),
    (256, "many"): (64, 32, 8, 2),
    (512, "few"): (16, 32, 8, 2),
    (512, "many"): (16, 32, 8, 2),
}
# where it is another on a target with wgmma, and on one with tcgen05
WGMMA_TILES = {
    (64, "many"): (128, 64, 8, 2),
    (128, "many"): (128, 64, 8, 2),
    (128, "many, other"): (64, 32, 4, 2),
    (128, "many, quantized"): (64, 32, 4, 2),
}
TCGEN05_TILES = WGMMA_TILES | {(128, "few"): (16, 32, 4, 3), (128, "many, quantized"): (64, 64, 8, 2)}
GFX_TILES = {
    (64, "few"): (16, 64, 4, 1),
    (64, "many"): (64, 32, 4, 1),
    (64, "many, other"): (64, 16, 4, 1),
    (64, "many, quantized"): (64, 16, 4, 1),
    (128, "few"): (16, 32, 4, 1),
    (128, "many"): (64, 32, 4, 1),
    (128, "many, other"): (64, 16, 4, 1),
    (128, "many, quantized"): (64, 16, 4, 1),
    (256, "few"): (16, 16, 4, 1),
    (256, "many"): (64, 16, 4, 1),
    (512, "few"): (16, 16, 8, 1),
    (512, "many"): (16, 16, 8, 1),
}
# float32: products without tensor cores keep whole rows of both operands in registers
WIDE_TILES = {
    (64, "few"): (16, 32, 4, 2),
    (64, "many"): (32, 32, 4, 1),
    (128, "few"): (16, 32, 8, 1),
    (128, "few, quantized"): (16, 16, 8, 2),
    (128, "many"): (16, 16, 8, 1),
    (128, "many, quantized"): (16, 16, 8, 2),
    (256, "few"): (16, 16, 8, 1),
    (256, "few, quantized"): (16, 16, 4, 1),
    (256, "many"): (16, 16, 8, 1),
    (256, "many, quantized"): (16, 16, 4, 1),
    (512, "few"): (16, 16, 8, 1),
    (512, "many"): (16, 16, 8, 1),
}
GFX_WIDE_TILES = {(512, "few"): (16, 16, 4, 1), (512, "many"): (16, 16, 4, 1)}
LEAST_KEYS = 256  # a part of the keys that is worth a program
MOST_KEYS = 4_096  # a part that the longest sequence of a batch may keep a program busy with, while others have ended
PART_BYTES = 64 << 20  # memory for the results of parts


def n_parts(programs: int, capacity: int, row_bytes: int, n_cores: int) -> int:
    """In how many parts the keys of a sequence are split: a value of shapes alone, so that a captured graph fits all.

    programs: without a split; capacity: keys that the block table has room for; row_bytes: of the results of one part.
    Four programs a core keep memory busy; and as lengths are unknown, one long sequence must not be one program's.
    """
    wanted = max(-(-4 * n_cores // max(1, programs)), -(-capacity // MOST_KEYS))
    return max(1, min(wanted, capacity // LEAST_KEYS, PART_BYTES // max(1, row_bytes), 64))


def _n_cores(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 108  # of an A100: in an interpreter or a simulator


@dataclass(frozen=True)
class _Plan:
    """The launches of a call: over the shared prefix, over what is behind it, and of the combination of their parts.

    parts: of the prefix and of all; 0 of all: one launch writes the result.
    """

    prefix: Launch | None
    suffix: Launch
    combine: Launch | None
    prefix_parts: int
    all_parts: int


@prepared
def _prepare(
    query: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, block_table: Tensor,
    context_lens: Tensor, cu_q: Tensor | None, leftpad: Tensor | None, slopes: Tensor | None, sinks: Tensor | None,
    out: Tensor, lse: Tensor, max_q: int, scale: float, left: int | None, right: int | None, softcap: float,
    shared: int, batch_invariant: bool, rounded: bool,
) -> _Plan:  # fmt: skip
    """Leading arguments of the launches are the tensors up to sinks, output and LSE, or those of the parts.

    rounded: products of float32 may be rounded to TF32.
    """
    from lmops.kernels.paged_attention import combine_kernel, paged_attention_kernel

    n_tokens, n_heads, head_dim = query.shape
    n_seqs, width = block_table.shape
    n_blocks, block_size, kv_heads = k.shape[:3]
    value_dim, group = out.shape[2], n_heads // kv_heads
    format = FORMATS.get(k.dtype, "native")
    # Triton 3.7 gets products of 16 terms on tensor cores wrong where the right factor is widened from 8 bits; 3.9 does
    # not. Tiles of float32 queries have that few keys, and therefore do not use tensor cores for quantized pages
    precision = "tf32" if rounded and format == "native" else "ieee"
    block_d, block_e = (max(16 if format == "native" else 32, block_dim(d)) for d in (head_dim, value_dim))
    dim, target = max(block_d, block_e), target_name()
    # the maximum of the products is that of the scores only if all that lies between them is a positive factor
    scaled = softcap != 0 or slopes is not None or scale <= 0
    # whether few or many rows share a tile must not depend on the batch where results may not
    kind = "quantized" if format != "native" else "other" if scaled or left is not None else "plain"
    tile = paged_tile(dim, query.element_size(), group if batch_invariant else max_q * group, target, kind)
    if cu_q is None:
        row_tiles = n_seqs * -(-max_q * group // tile.block_m)
    else:
        row_tiles = n_tokens * group // tile.block_m + n_seqs
    cores, row_bytes = _n_cores(query.device), 4 * n_tokens * n_heads * value_dim
    parts = 1 if batch_invariant else n_parts(row_tiles * kv_heads, width * block_size - shared, row_bytes, cores)
    prefix_parts = 0
    if shared:
        prefix_tile = paged_tile(dim, query.element_size(), n_tokens * group, target, kind)
        prefix_tiles = -(-n_tokens * group // prefix_tile.block_m)
        prefix_parts = n_parts(prefix_tiles * kv_heads, shared, row_bytes, cores)
    all_parts = prefix_parts + parts if shared or parts > 1 else 0
    if all_parts:  # (T, H, P, E) and (T, H, P)
        o_strides: tuple[int, ...] = (n_heads * all_parts * value_dim, all_parts * value_dim, value_dim)
        lse_strides: tuple[int, ...] = (n_heads * all_parts, all_parts, 1)
    else:
        o_strides, lse_strides = (*out.stride()[:2], 0), (*lse.t().stride(), 0)

    def attend(prefix: bool, row_tiles: int, tile: Tile, parts: int) -> Launch:
        """Over the shared prefix, by all queries as if they were one sequence's, or over what is behind."""
        one = width == 1 or block_size % tile.block_n == 0
        return Launch(
            paged_attention_kernel, (row_tiles, kv_heads, parts),
            query.stride(), k.stride(), v.stride(),
            (0, 0, 0) if k_scale is None else k_scale.stride(), (0, 0, 0) if v_scale is None else v_scale.stride(),
            block_table.stride(0), slopes.shape[-1] if slopes is not None and slopes.ndim == 2 else 0,
            o_strides, lse_strides,
            1 if prefix else n_seqs, n_tokens, n_tokens if prefix else max_q, n_blocks, block_size,
            width * block_size, shared, scale,
            LOG2E if scaled else scale * LOG2E, left or 0, right or 0, softcap, LEAST_KEYS // tile.block_n,
            HEAD_DIM=head_dim, VALUE_DIM=value_dim, GROUP=group, FORMAT=format, BLOCK_SIZE=1 if one else block_size,
            ONE=one, RAGGED=cu_q is not None and not prefix, PREFIX=prefix, SUFFIX=shared > 0 and not prefix,
            LEFTPAD=leftpad is not None, LEFT=left is not None, RIGHT=right is not None and not prefix,
            ALIBI=slopes is not None, SOFTCAP=softcap != 0, SINKS=sinks is not None and not all_parts, SCALED=scaled,
            PARTS=all_parts > 0, ORDERED=batch_invariant, PRECISION=precision, PTX=target.startswith("sm_"),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_D=block_d, BLOCK_E=block_e,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip

    return _Plan(
        attend(True, prefix_tiles, prefix_tile, prefix_parts) if shared else None,
        attend(False, row_tiles, tile, parts),
        Launch(
            combine_kernel, (n_tokens, n_heads), out.stride()[:2], lse.stride()[::-1], n_heads, n_tokens, all_parts,
            VALUE_DIM=value_dim, SINKS=sinks is not None, BLOCK_P=1 << (all_parts - 1).bit_length(),
            BLOCK_E=block_dim(value_dim), num_warps=4 if all_parts > 8 else 1,
        ) if all_parts else None,
        prefix_parts,
        all_parts,
    )  # fmt: skip


def _triton(
    query: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, block_table: Tensor,
    context_lens: Tensor, cu_q: Tensor | None, leftpad: Tensor | None, slopes: Tensor | None, sinks: Tensor | None,
    *numbers: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = _fake(query, k, v)
    if out.numel() == 0 or block_table.shape[1] == 0 or k.shape[0] == 0:
        return out.zero_(), lse.fill_(NEG_INF)
    tensors = (query, k, v, k_scale, v_scale, block_table, context_lens, cu_q, leftpad, slopes)
    rounded = torch.get_float32_matmul_precision() != "highest"
    plan = _prepare(*tensors, sinks, out, lse, *numbers, rounded)
    tensors = (query, as_bytes(k), as_bytes(v), *tensors[3:])
    if plan.combine is None:
        plan.suffix(*tensors, sinks, out, lse)
        return out, lse
    part_o = query.new_empty(*query.shape[:2], plan.all_parts, out.shape[2], dtype=torch.float32)
    part_lse = query.new_empty(*query.shape[:2], plan.all_parts, dtype=torch.float32)
    if plan.prefix is not None:
        plan.prefix(*tensors, None, part_o, part_lse)
    first = plan.prefix_parts
    behind = (part_o[:, :, first:], part_lse[:, :, first:]) if first else (part_o, part_lse)
    plan.suffix(*tensors, None, *behind)
    plan.combine(part_o, part_lse, sinks, out, lse)
    return out, lse


paged_attention_op = define_op(SCHEMA, triton=_triton, torch_cpu=_cpu, fake=_fake)


# ------------------------------------------------------------------------------------------------------------ public


def paged_attention(
    query: Tensor,
    pages: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    shared_prefix: int = 0,
    batch_invariant: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scores) value of queries over the keys and values of a paged cache (arXiv 2309.06180).

    query: one token a sequence (S, H, D), equally many (S, Q, H, D), or as many as cu_seqlens_q says (T, H, D);
        float16, bfloat16 or float32. The last query of a sequence has the position of its last key, which has been
        stored already: decoding a token, verifying drafts and prefilling a chunk are one call, of one ragged batch.
    pages: of one layer, in query's dtype, of 16 bits for float32, or quantized. Query head h takes key head
        h // (H / KV).
    block_table: (S, width) int32: block i of a sequence holds its tokens i block_size and following. Entries behind
        context_lens, and before a window, are not looked at.
    context_lens: (S,) int32, how many tokens of a sequence have a key, those of query included. 0: nothing is seen.
    cu_seqlens_q: (S + 1,) int32, where the queries of each sequence begin, then T. max_seqlen_q: the most queries of a
        sequence: on a GPU only a hint by which the tile is chosen.
    scale, softcap, alibi_slopes, sinks: as in `lmops.ops.attention.attention`; alibi_slopes (H,) or (S, H).
    causal, window: a query sees no key behind its own position; (left, right): nor further before and behind than that.
    shared_prefix: so many first tokens are, in the same blocks, those of all sequences, before all queries: their keys
        are read once for all (cascade). Not with window or alibi_slopes. Results are those without it up to rounding.
    batch_invariant: a row's result is bitwise the same whatever else is in the batch. The keys are not split over
        programs then, which is slow for few long sequences.
    return_lse: also the natural logarithm of the softmax's sum, float32: (S, H), (S, H, Q), or (H, T).

    Results are repeatable bitwise, and the launch depends on shapes alone, so that a CUDA graph captured once serves
    any lengths. Rows that see nothing give 0 and -inf. What is in slots that are not seen never reaches a result.
    Raises ValueError or TypeError for arguments that do not fit together. What block_table, context_lens and
    cu_seqlens_q hold is checked on the CPU; on a GPU, where that would wait, nothing outside the pages is read.
    There is no gradient: NotImplementedError where one is asked for.
    """
    if differentiated(query):
        raise NotImplementedError("paged_attention has no gradient; call it under torch.no_grad()")
    shape = query.shape
    if query.ndim not in (3, 4) or (query.ndim == 4 and cu_seqlens_q is not None):
        raise ValueError(
            "query must be (sequences, heads, head_dim), (sequences, queries, heads, head_dim), or with cu_seqlens_q"
            f" (tokens, heads, head_dim), got shape {tuple(shape)}"
        )
    if query.ndim == 4:
        query = query.flatten(0, 1)
    out, lse = paged_attention_of_tokens(
        query, pages, block_table, context_lens, cu_q=cu_seqlens_q,
        max_q=max_seqlen_q if cu_seqlens_q is not None else 1 if len(shape) == 3 else shape[1],
        scale=scale, causal=causal, window=check_window(window, "window"), softcap=softcap, slopes=alibi_slopes,
        sinks=sinks, shared=shared_prefix, batch_invariant=batch_invariant,
    )  # fmt: skip
    if cu_seqlens_q is None:
        lse = lse.t() if len(shape) == 3 else lse.unflatten(1, shape[:2]).transpose(0, 1)
    out = out.view(*shape[:-1], out.shape[-1])
    return (out, lse) if return_lse else out


def paged_attention_of_tokens(
    query: Tensor,
    pages: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`paged_attention` of query (T, H, D): output (T, H, Dv) and LSE (H, T), with the options of `checked`."""
    return paged_attention_op(query, *checked(query, pages, block_table, context_lens, **options))


def checked(
    query: Tensor,
    pages: KVPages,
    block_table: Tensor,
    context_lens: Tensor,
    *,
    cu_q: Tensor | None = None,
    max_q: int | None = None,
    leftpad: Tensor | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: tuple[int | None, int | None] = (None, None),
    softcap: float | None = None,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    shared: int = 0,
    batch_invariant: bool = False,
) -> tuple[Any, ...]:
    """What `paged_attention_op` takes behind query (T, H, D), once it is found to fit. Without cu_q each sequence has
    max_q queries.

    leftpad: (S,) int32, how many slots at the start of a sequence hold nothing; context_lens counts them. The table
    must have one block a sequence then.
    """
    n_tokens, n_heads, head_dim = query.shape
    if query.dtype not in FLOATS:
        raise TypeError(f"query must be float16, bfloat16 or float32, got {query.dtype}")
    if pages.format == "native" and query.dtype not in (pages.k.dtype, torch.float32):
        raise TypeError(f"query must be {pages.k.dtype} like the pages, or float32, got {query.dtype}")
    if query.device != pages.k.device:
        raise TypeError(f"query must be on {pages.k.device} like the pages, got {query.device}")
    if head_dim != pages.head_dim:
        raise ValueError(f"query must have the pages' head_dim {pages.head_dim}, got shape {tuple(query.shape)}")
    if pages.n_kv_heads == 0 or n_heads % pages.n_kv_heads:
        raise ValueError(f"query's heads must be a multiple of the pages' {pages.n_kv_heads}, got {n_heads}")
    if not 1 <= head_dim <= 512 or not 1 <= pages.value_dim <= 512:
        raise ValueError(f"head_dim must be 1 to 512, got {head_dim} and {pages.value_dim}")
    if pages.k.stride(3) != 1 or pages.v.stride(3) != 1:
        raise ValueError(f"pages must be contiguous in head_dim, got strides {pages.k.stride()} and {pages.v.stride()}")
    if block_table.ndim != 2 or block_table.dtype != torch.int32 or block_table.device != query.device:
        raise ValueError(
            f"block_table must be int32 of shape (sequences, blocks) on {query.device}, got {block_table.dtype} of"
            f" shape {tuple(block_table.shape)} on {block_table.device}"
        )
    n_seqs = block_table.shape[0]
    for name, t, size in (("context_lens", context_lens, n_seqs), ("cu_seqlens_q", cu_q, n_seqs + 1)):
        if t is not None and (t.shape != (size,) or t.dtype != torch.int32 or t.device != query.device):
            raise ValueError(
                f"{name} must be int32 of shape ({size},) on {query.device}, got {t.dtype} of shape {tuple(t.shape)}"
                f" on {t.device}"
            )
    if cu_q is None and max_q is not None and n_tokens != n_seqs * max_q:
        raise ValueError(f"query must be of the {n_seqs} sequences of block_table, got {n_tokens // max(1, max_q)}")
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        block_table = block_table.contiguous()
    if slopes is not None:
        check_a_head("alibi_slopes", slopes, query, [(n_heads,), (n_seqs, n_heads)])
        slopes = slopes.detach().float().contiguous()
    if sinks is not None:
        check_a_head("sinks", sinks, query, [(n_heads,)])
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive, or None or 0 for none, got {softcap}")
    scale = 1 / math.sqrt(head_dim) if scale is None else float(scale)
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be finite, got {scale}")
    left, right = window
    if causal:
        right = 0
    if not 0 <= shared <= block_table.shape[1] * pages.block_size:
        raise ValueError(
            f"shared_prefix must be 0 to {block_table.shape[1] * pages.block_size}, what block_table has room for,"
            f" got {shared}"
        )
    if shared and (left is not None or slopes is not None):
        raise NotImplementedError(
            "shared_prefix cannot be combined with window or alibi_slopes: distances to its keys differ by sequence"
        )
    if cu_q is None and max_q == 1 and right == 0:
        right = None  # the only query of a sequence sees all its keys
    return (
        pages.k, pages.v, pages.k_scale, pages.v_scale, block_table, context_lens, cu_q, leftpad, slopes, sinks,
        n_tokens if max_q is None else max_q, scale, left, right, float(softcap or 0), shared, batch_invariant,
    )  # fmt: skip
