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
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from lmops.ops.attention import attention, check_window


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
    _check_layouts(
        q=(q, "batch seqlen_q nheads headdim"),
        k=(k, "batch seqlen_k nheads_k headdim"),
        v=(v, "batch seqlen_k nheads_k headdim_v"),
    )
    return _attention(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)


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
    _check_layouts(q=(q, "batch seqlen_q nheads headdim"), kv=(kv, "batch seqlen_k 2 nheads_k headdim"))
    k, v = kv.unbind(2)
    return _attention(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)


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
    _check_layouts(qkv=(qkv, "batch seqlen 3 nheads headdim"))
    q, k, v = qkv.unbind(2)
    return _attention(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs)


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
    block_table: keys and values in a paged cache; not there yet.

    Returns out, (total_q, nheads, headdim_v), and with return_attn_probs (out, softmax_lse, None) with softmax_lse
    (nheads, total_q).
    Raises ValueError or TypeError for arguments that do not fit together, NotImplementedError for block_table. On a GPU
    the values of cu_seqlens_q and cu_seqlens_k are not checked, and queries beyond max_seqlen_q are not computed.
    """
    if block_table is not None:
        raise NotImplementedError(
            "block_table is not supported yet: it follows with lmops' paged KV cache."
            " Until then k and v must be (total_k, nheads_k, headdim), with block_table=None"
        )
    _check_layouts(
        q=(q, "total_q nheads headdim"),
        k=(k, "total_k nheads_k headdim"),
        v=(v, "total_k nheads_k headdim_v"),
        cu_seqlens_q=(cu_seqlens_q, "batch+1"),
        cu_seqlens_k=(cu_seqlens_k, "batch+1"),
    )
    return _attention(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip


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
    _check_layouts(
        q=(q, "total_q nheads headdim"),
        kv=(kv, "total_k 2 nheads_k headdim"),
        cu_seqlens_q=(cu_seqlens_q, "batch+1"),
        cu_seqlens_k=(cu_seqlens_k, "batch+1"),
    )
    k, v = kv.unbind(1)
    return _attention(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
    )  # fmt: skip


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
    _check_layouts(qkv=(qkv, "total 3 nheads headdim"), cu_seqlens=(cu_seqlens, "batch+1"))
    q, k, v = qkv.unbind(1)
    return _attention(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, return_attn_probs,
        cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_q=max_seqlen, max_seqlen_k=max_seqlen,
    )  # fmt: skip


def _check_layouts(**arguments: tuple[Tensor, str]) -> None:
    """Raise unless tensors have the dimensions that their layouts name: equal sizes by one name, digits as they are."""
    sizes: dict[str, int] = {}
    for name, (tensor, layout) in arguments.items():
        dims = layout.split()
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor ({', '.join(dims)}), got {type(tensor).__name__}")
        expected = [int(dim) if dim.isdigit() else sizes.get(dim) for dim in dims]
        if tensor.ndim != len(dims) or any(e not in (None, n) for e, n in zip(expected, tensor.shape, strict=True)):
            known = [f"{dim}={sizes[dim]}" if dim in sizes else dim for dim in dims]
            raise ValueError(f"{name} must be ({', '.join(known)}), got shape {tuple(tensor.shape)}")
        sizes.update(zip(dims, tensor.shape, strict=True))


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
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, or None for 1 / sqrt(headdim), got {softmax_scale}")
    left, right = check_window(window_size, "window_size")
    if packing:
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
