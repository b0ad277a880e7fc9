"""Attention over a paged cache, in plain torch: the specification of `lmops.ops.paged_attention`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmops.reference.attention import attention


def paged_attention(
    query: Tensor,
    k: Tensor,
    v: Tensor,
    block_table: Tensor,
    context_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Each sequence's queries over the keys that its row of the table names, a sequence at a time.

    query (T, H, D): sequence s has query[cu_seqlens_q[s] : cu_seqlens_q[s + 1]], the last of which has the position of
    its last key. k (n_blocks, block_size, KV, D), v (n_blocks, block_size, KV, Dv): numbers, not quantized. Key j of
    sequence s is k[block_table[s, j // block_size], j % block_size], for j < context_lens[s].
    options: left, right, scale, softcap and sinks of `lmops.reference.attention.attention`; alibi_slopes: (H,) or
        (S, H).
    Returns (T, H, Dv) in query's dtype and the LSE (H, T).
    """
    n_tokens, n_heads, _ = query.shape
    block_size = k.shape[1]
    out = query.new_zeros(n_tokens, n_heads, v.shape[3])
    lse = query.new_full((n_heads, n_tokens), float("-inf"), dtype=torch.promote_types(query.dtype, torch.float32))
    ends = cu_seqlens_q.tolist()
    for s, n_keys in enumerate(context_lens.tolist()):
        of_seq = slice(ends[s], ends[s + 1])
        at = torch.arange(n_keys, device=query.device)
        blocks = block_table[s].long()[at // block_size]
        # what lies behind a window has no block; it is not seen either
        keys, values = (t[blocks.clamp(min=0), at % block_size].transpose(0, 1)[None] for t in (k, v))
        o, l = attention(
            query[of_seq].transpose(0, 1)[None], keys, values, bottom_right=True,
            alibi_slopes=alibi_slopes[s] if alibi_slopes is not None and alibi_slopes.ndim == 2 else alibi_slopes,
            **options,
        )  # fmt: skip
        out[of_seq], lse[:, of_seq] = o[0].transpose(0, 1), l[0]
    return out, lse
