"""Scaled dot-product attention with every feature of `lmops.ops.attention`, in plain torch: its specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmops.reference.philox import philox

NEG_INF = float("-inf")


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    bottom_right: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scores) value and the logarithm of the softmax's sum; differentiable by autograd.

    query (B, H, Sq, D), key (B, KV, Sk, D), value (B, KV, Sk, Dv); query head h uses key head h // (H / KV).
    scores = softcap(scale query key^T) - slope |distance| + bias, -inf where masked:
    distance = i + shift - j of query i and key j, with shift = Sk - Sq where bottom_right, else 0. A key is visible if
    -right <= distance <= left (None: no bound), and its bias is not -inf (boolean bias: True).
    sinks (H,): a further score a head, whose value is 0. keep (B, H, Sq, Sk): where dropout leaves a probability.
    Rows that see nothing give 0 and -inf (with sinks: the sink). What is masked takes no part, NaN and inf included;
    a NaN or inf in a visible key or value makes the row NaN.
    Computed in promote_types(query.dtype, float32). Returns (B, H, Sq, Dv) in query's dtype and (B, H, Sq) as computed.
    """
    x, _, _, v = _scores(query, key, value, bias, scale, left, right, bottom_right, softcap, alibi_slopes)
    k_len = x.shape[-1]
    if sinks is not None:
        x = torch.cat((x, sinks.to(x.dtype)[:, None, None].expand(*x.shape[:3], 1)), -1)
    peak = x.detach().amax(-1, keepdim=True) if x.shape[-1] else x.new_full((*x.shape[:3], 1), NEG_INF)
    empty = peak == NEG_INF
    p = torch.exp(x - peak.masked_fill(empty, 0))
    total = p.sum(-1, keepdim=True)
    lse = (peak + total.masked_fill(empty, 1).log()).squeeze(-1)
    p = (p / total.masked_fill(empty, 1))[..., :k_len]
    if keep is not None:
        p = p * keep / (1 - dropout_p)
    return (p @ v).to(query.dtype), lse


def backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    bottom_right: bool = False,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of `attention` with respect to query, key, value, scores (which is that of a full bias) and sinks.

    Written out, so that it needs no autograd: an operator may run where that is off. lse is what `attention` returned.
    """
    x, slope_of_cap, k, v = _scores(query, key, value, bias, scale, left, right, bottom_right, softcap, alibi_slopes)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    n_batch, kv_heads, k_len, _ = key.shape
    p = torch.exp(x - lse.to(x.dtype).masked_fill(lse == NEG_INF, math.inf).unsqueeze(-1))
    do = d_out.to(x.dtype)
    kept = p if keep is None else p * keep / (1 - dropout_p)
    dv = kept.mT @ do
    dp = do @ v.mT
    if keep is not None:
        dp = dp * keep / (1 - dropout_p)
    delta = (p * dp).sum(-1)
    if d_lse is not None:
        delta = delta - d_lse
    d_scores = (p * (dp - delta.unsqueeze(-1))).masked_fill(p == 0, 0)
    d_products = d_scores * slope_of_cap * scale
    dq, dk = d_products @ k, d_products.mT @ query.to(x.dtype)
    dk, dv = (t.view(n_batch, kv_heads, -1, k_len, t.shape[-1]).sum(2) for t in (dk, dv))
    d_sinks = None
    if sinks is not None:
        d_sinks = -(torch.exp(sinks.to(x.dtype)[:, None] - lse) * delta).sum((0, 2))
    return dq, dk, dv, d_scores, d_sinks


def _scores(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float | None, left: int | None,
    right: int | None, bottom_right: bool, softcap: float, alibi_slopes: Tensor | None,
) -> tuple[Tensor, Tensor | float, Tensor, Tensor]:  # fmt: skip
    """Scores (B, H, Sq, Sk), the slope of the softcap there, and key and value a query head, as computed with."""
    compute = torch.promote_types(query.dtype, torch.float32)
    n_heads, q_len, head_dim = query.shape[1:]
    k_len = key.shape[2]
    q = query.to(compute)
    k, v = (t.to(compute).repeat_interleave(n_heads // key.shape[1], 1) for t in (key, value))

    shift = k_len - q_len if bottom_right else 0
    distance = (torch.arange(q_len)[:, None] + shift - torch.arange(k_len)).to(query.device)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left is not None:
        visible = visible & (distance <= left)
    if right is not None:
        visible = visible & (distance >= -right)

    # zeros in place of NaN and inf, and a NaN in the scores of such keys, which the mask then may hide
    spoiled = ~(k.isfinite().all(-1) & v.isfinite().all(-1))
    if spoiled.any():
        k, v = (t.masked_fill(~t.isfinite(), 0) for t in (k, v))
    x = q @ k.mT * (1 / math.sqrt(head_dim) if scale is None else scale)
    x = x.masked_fill(spoiled.unsqueeze(-2), float("nan"))
    slope_of_cap: Tensor | float = 1.0
    if softcap:
        t = torch.tanh(x / softcap)
        x, slope_of_cap = softcap * t, 1 - t * t
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(compute).expand(query.shape[0], n_heads)
        x = x - slopes[..., None, None] * distance.abs()
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        visible = visible & (bias != NEG_INF)
        x = x + bias.to(compute).masked_fill(bias == NEG_INF, 0)
    return torch.where(visible, x, NEG_INF), slope_of_cap, k, v


def dropout_keep(seed: int, dropout_p: float, n_batch: int, n_heads: int, q_len: int, k_len: int) -> Tensor:
    """Which probabilities dropout keeps, (n_batch, n_heads, q_len, k_len) bool, as the kernels draw them.

    Entry (b, h, i, j) is kept if u >= dropout_p, with u in [0, 1) the upper 24 bits of the first word of
    Philox4x32-10 (Salmon et al., SC 2011) of the counter (j, i, b n_heads + h, 0) under the 64-bit key `seed`.
    """
    shape = (n_batch * n_heads, q_len, k_len)
    counter = [
        torch.arange(k_len).expand(shape),
        torch.arange(q_len)[:, None].expand(shape),
        torch.arange(shape[0])[:, None, None].expand(shape),
        torch.zeros(()).long().expand(shape),
    ]
    word = philox(seed, counter)[0]
    uniform = (word >> 8).to(torch.float32) * 2.0**-24
    return (uniform >= torch.tensor(dropout_p, dtype=torch.float32)).view(n_batch, n_heads, q_len, k_len)
