"""The functions of the package `flash_attn` (2.7, 2.8) over lmops' attention: replace the import, keep the code.

    from lmops.flash_attn import flash_attn_func, flash_attn_varlen_func

Names, arguments, defaults and layouts are flash-attn's. More is allowed: CPUs, float32, any head dimension up to 256
(without gradients 512) and another one for v, softcap with dropout; softmax_lse has gradients. What differs:

- Results are always the same bitwise; `deterministic` is taken and changes nothing.
- The third result of `return_attn_probs=True`, S_dmask, is None: attention never holds its probabilities, nor dropout
  its mask. flash-attn gives an empty tensor, and with dropout one for its own tests.
- softmax_lse of a query that sees no key is -inf, the logarithm of an empty sum; flash-attn gives +inf. With causal
  and alibi_slopes it is that of the scores below; flash-attn's is larger by slope * (i + seqlen_k - seqlen_q).
- The right side of window_size counts also where seqlen_q > seqlen_k; flash-attn ignores one of seqlen_k or more.
- Pages of a paged cache may have any size, and the cache float32. `num_splits` is taken and changes nothing: the split
  follows from the shapes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lmops.ops.attention import attention, check_window
from lmops.ops.paged_attention import checked, paged_attention_of_tokens, paged_attention_op
from lmops.ops.paged_cache import KVPages, append_slots, store_kv
from lmops.ops.rope import rope

# layouts: dimensions by their names, or sizes
Q = ["batch", "seqlen_q", "nheads", "headdim"]
K = ["batch", "seqlen_k", "nheads_k", "headdim"]
V = ["batch", "seqlen_k", "nheads_k", "headdim_v"]
KV = ["batch", "seqlen_k", "2", "nheads_k", "headdim"]
QKV = ["batch", "seqlen", "3", "nheads", "headdim"]
NEW_K = ["batch", "seqlen_new", "nheads_k", "headdim"]
NEW_V = ["batch", "seqlen_new", "nheads_k", "headdim_v"]
CACHED_K = ["batch_cache", "seqlen_cache", "nheads_k", "headdim"]
CACHED_V = ["batch_cache", "seqlen_cache", "nheads_k", "headdim_v"]
PAGES_K = ["n_blocks", "block_size", "nheads_k", "headdim"]
PAGES_V = ["n_blocks", "block_size", "nheads_k", "headdim_v"]
PACKED_Q = ["total_q", "nheads", "headdim"]
PACKED_K = ["total_k", "nheads_k", "headdim"]
PACKED_V = ["total_k", "nheads_k", "headdim_v"]
PACKED_KV = ["total_k", "2", "nheads_k", "headdim"]
PACKED_QKV = ["total", "3", "nheads", "headdim"]
ENDS = ["batch+1"]
TABLE = ["batch", "blocks"]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """softmax(scores) v, head by head, in memory linear in the lengths.

    q: (batch, seqlen_q, nheads, headdim). k: (batch, seqlen_k, nheads_k, headdim). v: (batch, seqlen_k, nheads_k,
    headdim_v), where headdim_v may be another. float16, bfloat16 or float32 (on the CPU also float64), any strides;
    accumulated in float32. Head h of q takes head h // (nheads / nheads_k) of k and v.

    scores of query i and key j = softcap(softmax_scale q_i k_j) - alibi_slope |i + seqlen_k - seqlen_q - j|.

    dropout_p: the probability with which dropout removes an entry of the softmax; 0 for inference.
    softmax_scale: 1 / sqrt(headdim) by default.
    causal: the last query sees all keys, each one before it a key less: masks align at the bottom right. Seen (1) of 5
        keys by 2 queries, and of 2 keys by 5 queries:

            1 1 1 1 0        0 0
            1 1 1 1 1        0 0
                             0 0
                             1 0
                             1 1

    window_size: (left, right), -1 for no bound. Query i sees the keys from i + seqlen_k - seqlen_q - left to
        i + seqlen_k - seqlen_q + right; causal makes right 0.
    softcap: softcap(x) = softcap tanh(x / softcap) where above 0.
    alibi_slopes: (nheads,) or (batch, nheads).

    Returns out, (batch, seqlen_q, nheads, headdim_v) in q's dtype, and with return_attn_probs (out, softmax_lse, None):
    softmax_lse (batch, nheads, seqlen_q) in float32 is the natural logarithm of the softmax's sum. Both have gradients
    with respect to q, k and v. A query that sees no key has out 0, softmax_lse -inf and no gradient.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    try:
        return _attention(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
        )
    except Exception:
        _check_layouts(q=(q, Q), k=(k, K), v=(v, V))
        raise


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of q and kv (batch, seqlen_k, 2, nheads_k, headdim): keys, then values; all else as there."""
    try:
        k, v = kv.unbind(2)
        return _attention(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
        )
    except Exception:
        _check_layouts(q=(q, Q), kv=(kv, KV))
        raise


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of qkv (batch, seqlen, 3, nheads, headdim): queries, keys, values; all else as there."""
    try:
        q, k, v = qkv.unbind(2)
        return _attention(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs
        )
    except Exception:
        _check_layouts(qkv=(qkv, QKV))
        raise


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_func` of sequences of unequal lengths that stand one behind the other, without padding.

    q: (total_q, nheads, headdim). k: (total_k, nheads_k, headdim). v: (total_k, nheads_k, headdim_v).
    cu_seqlens_q, cu_seqlens_k: (batch + 1,) int32: where each sequence begins, then the total. Sequence n is
        q[cu_seqlens_q[n] : cu_seqlens_q[n + 1]] over its own keys alone; either part may be empty.
    max_seqlen_q, max_seqlen_k: the longest lengths. All else is as in `flash_attn_func`, a sequence at a time.
    block_table: (batch, blocks) int32: k and v are pages then, (n_blocks, block_size, nheads_k, headdim), and key j of
        sequence n is k[block_table[n, j // block_size], j % block_size], for j below its length in cu_seqlens_k.
        Without gradients and dropout.

    Returns out, (total_q, nheads, headdim_v), and with return_attn_probs (out, softmax_lse, None) with softmax_lse
    (nheads, total_q).
    Raises ValueError or TypeError for arguments that do not fit together. On a GPU the values of cu_seqlens_q,
    cu_seqlens_k and block_table are not checked, and queries beyond max_seqlen_q are not computed.
    """
    if block_table is not None:
        if dropout_p:
            raise NotImplementedError(f"dropout_p must be 0 with block_table, got {dropout_p}: pages are for inference")
        _check_layouts(
            q=(q, PACKED_Q), k=(k, PAGES_K), v=(v, PAGES_V), block_table=(block_table, TABLE),
            cu_seqlens_q=(cu_seqlens_q, ENDS), cu_seqlens_k=(cu_seqlens_k, ENDS),
        )  # fmt: skip
        out, lse = paged_attention_of_tokens(
            q, KVPages(k, v), block_table, cu_seqlens_k.diff(), cu_q=cu_seqlens_q, max_q=max_seqlen_q,
            scale=softmax_scale, causal=causal, window=check_window(window_size, "window_size"),
            softcap=max(softcap, 0), slopes=alibi_slopes,
        )  # fmt: skip
        return (out, lse, None) if return_attn_probs else out
    try:
        return _attention(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        )  # fmt: skip
    except Exception:
        _check_layouts(
            q=(q, PACKED_Q), k=(k, PACKED_K), v=(v, PACKED_V), cu_seqlens_q=(cu_seqlens_q, ENDS),
            cu_seqlens_k=(cu_seqlens_k, ENDS),
        )  # fmt: skip
        raise


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of q and kv (total_k, 2, nheads_k, headdim): keys, then values; all else as there."""
    try:
        k, v = kv.unbind(1)
        return _attention(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs,
            cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        )  # fmt: skip
    except Exception:
        _check_layouts(
            q=(q, PACKED_Q), kv=(kv, PACKED_KV), cu_seqlens_q=(cu_seqlens_q, ENDS), cu_seqlens_k=(cu_seqlens_k, ENDS)
        )
        raise


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """`flash_attn_varlen_func` of qkv (total, 3, nheads, headdim), with cu_seqlens and max_seqlen for queries and keys.

    qkv holds queries, then keys, then values. All else is as there.
    """
    try:
        q, k, v = qkv.unbind(1)
        return _attention(
            q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs,
            cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
        )  # fmt: skip
    except Exception:
        _check_layouts(qkv=(qkv, PACKED_QKV), cu_seqlens=(cu_seqlens, ENDS))
        raise


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over a cache, which k and v are appended to first, in place: a step of decoding in one call.

    q: (batch, seqlen_q, nheads, headdim). k_cache, v_cache: (batch_cache, seqlen_cache, nheads_k, headdim), row n of it
        being sequence n's, or row cache_batch_idx[n], (batch,) int32; or with block_table (batch, blocks) int32 pages
        (n_blocks, block_size, nheads_k, headdim), where block_table[n, i] has the tokens i block_size and following.
    k, v: (batch, seqlen_new, nheads_k, headdim), written behind the cache_seqlens tokens that are there.
    cache_seqlens: (batch,) int32, or one number for all; by default all of the cache is filled.
    cache_leftpad: (batch,) int32, how many slots at the start of a row hold nothing; not with block_table.
    rotary_cos, rotary_sin: (n_positions, rotary_dim / 2): k is rotated by its place in the cache; q likewise if causal
        or with a window, else all of it by cache_seqlens. rotary_interleaved: pairs are (2 i, 2 i + 1), else
        (i, i + rotary_dim / 2). Only with k and v.
    softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`, where seqlen_k is what the cache
        holds after appending.

    Returns out, (batch, seqlen_q, nheads, headdim), and with return_softmax_lse also the LSE (batch, nheads, seqlen_q).
    Raises ValueError or TypeError for arguments that do not fit together, before anything is written, but for values of
    cache_batch_idx, cache_leftpad and block_table. On a GPU these and cache_seqlens' are not checked: tokens that have
    no place are not written.
    """
    of_k, of_v = (CACHED_K, CACHED_V) if block_table is None else (PAGES_K, PAGES_V)
    _check_layouts(q=(q, Q), k_cache=(k_cache, of_k), v_cache=(v_cache, of_v))
    batch, seqlen_q = q.shape[:2]
    size = k_cache.shape[1]
    if block_table is not None and (cache_batch_idx is not None or cache_leftpad is not None):
        name = "cache_leftpad" if cache_batch_idx is None else "cache_batch_idx"
        raise ValueError(f"{name} must be None with block_table, which says where tokens are")
    if block_table is not None:
        table = block_table
    elif cache_batch_idx is not None:
        table = cache_batch_idx[:, None]
    elif k_cache.shape[0] < batch:
        raise ValueError(f"k_cache must have a row for each of the {batch} sequences of q, got {k_cache.shape[0]}")
    else:
        table = torch.arange(batch, dtype=torch.int32, device=q.device)[:, None]
    if cache_seqlens is None or isinstance(cache_seqlens, int):
        n = table.shape[1] * size if cache_seqlens is None else cache_seqlens
        cache_seqlens = torch.full((batch,), n, dtype=torch.int32, device=q.device)
    for name, t in (("cache_seqlens", cache_seqlens), ("cache_batch_idx", cache_batch_idx), ("leftpad", cache_leftpad)):
        if t is not None and (t.shape != (batch,) or t.dtype != torch.int32 or t.device != q.device):
            raise ValueError(
                f"{name} must be int32 of shape ({batch},) on {q.device}, got {t.dtype} of shape {tuple(t.shape)} on"
                f" {t.device}"
            )
    pages = KVPages(k_cache, v_cache)
    if (k is None) != (v is None):
        raise ValueError("k and v must be given together")
    if (rotary_cos is None) != (rotary_sin is None):
        raise ValueError("rotary_cos and rotary_sin must be given together")
    if rotary_cos is not None and k is None:
        raise ValueError("rotary_cos must be None without k and v: it rotates what is appended")
    window = check_window(window_size, "window_size")
    if k is not None and v is not None:
        _check_layouts(q=(q, Q), k=(k, NEW_K), v=(v, NEW_V))
        moving = causal or window != (None, None)
        slots, positions, places, cache_seqlens = append_slots(
            cache_seqlens, table, k.shape[1], seqlen_q, size, moving=moving
        )
    queries = q.flatten(0, 1)
    arguments = checked(
        queries, pages, table, cache_seqlens, max_q=seqlen_q, leftpad=cache_leftpad, scale=softmax_scale,
        causal=causal, window=window, softcap=max(softcap, 0), slopes=alibi_slopes,
    )  # fmt: skip
    if k is not None and v is not None:
        if rotary_cos is not None and rotary_sin is not None:
            q, _ = rope(q, None, rotary_cos, rotary_sin, positions=places, interleaved=rotary_interleaved)
            queries = q.flatten(0, 1)
        store_kv(
            k.flatten(0, 1), v.flatten(0, 1), pages, slots, cos=rotary_cos, sin=rotary_sin,
            positions=None if rotary_cos is None else positions, interleaved=rotary_interleaved,
        )  # fmt: skip
    out, lse = paged_attention_op(queries, *arguments)
    out = out.view(batch, seqlen_q, *out.shape[1:])
    return (out, lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1)) if return_softmax_lse else out


def _check_layouts(**arguments: tuple[Tensor, list[str]]) -> None:
    """Raise unless tensors have the dimensions that their layouts name: equal sizes by one name, digits as they are.

    What only reads calls this after it has failed: the attention below finds the same faults, in its own words, and
    each check a call takes the host 0.6 microseconds a tensor.
    """
    sizes = {"2": 2, "3": 3}
    for name, (tensor, dims) in arguments.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor ({', '.join(dims)}), got {type(tensor).__name__}")
        known, shape = sizes.copy(), tensor.shape
        if len(shape) == len(dims):
            for dim, n in zip(dims, shape, strict=True):
                if sizes.setdefault(dim, n) != n:
                    break
            else:
                continue
        named = [f"{dim}={known[dim]}" if dim in known and not dim.isdigit() else dim for dim in dims]
        raise ValueError(f"{name} must be ({', '.join(named)}), got shape {tuple(shape)}")


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    return_attn_probs: bool,
    **packing: Any,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """lmops' attention on views, heads before positions; with `packing` a batch of 1. The results as flash-attn's."""
    if softmax_scale is not None and not -math.inf < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be finite, or None for 1 / sqrt(headdim), got {softmax_scale}")
    left, right = check_window(window_size, "window_size")
    if packing:
        if packing["cu_seqlens_q"] is None:
            raise TypeError("cu_seqlens_q must be a tensor (batch+1), got None")
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    out, lse = attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        scale=softmax_scale,
        left=left,
        right=0 if causal else right,
        bottom_right=True,
        softcap=None if not softcap or softcap <= 0 else softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        **packing,
    )
    out = out.transpose(1, 2)
    if packing:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse, None) if return_attn_probs else out
