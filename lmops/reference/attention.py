"""Scaled dot-product attention with every feature of `lmops.ops.attention`, in plain torch: its specification."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    sinks (H,): a further score a head, whose value is 0. keep (B, H, Sq, Sk): False where dropout removes a probability.
    Rows that see nothing give 0 and -inf (with sinks: the sink). What is masked takes no part, NaN and inf included;
    a NaN or inf in a visible key or value makes the row NaN.
    Computed in promote_types(query.dtype, float32). Returns (B, H, Sq, Dv) in query's dtype and (B, H, Sq) as computed.
    """
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
    scores = q @ k.mT * (1 / math.sqrt(head_dim) if scale is None else scale)
    scores = scores.masked_fill(spoiled.unsqueeze(-2), float("nan"))
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        slopes = alibi_slopes.to(compute).expand(q.shape[0], n_heads)
        scores = scores - slopes[..., None, None] * distance.abs()
    if bias is not None and bias.dtype == torch.bool:
        visible = visible & bias
    elif bias is not None:
        visible = visible & (bias != NEG_INF)
        scores = scores + bias.to(compute).masked_fill(bias == NEG_INF, 0)
    scores = torch.where(visible, scores, NEG_INF)

    if sinks is not None:
        scores = torch.cat((scores, sinks.to(compute)[:, None, None].expand(*scores.shape[:3], 1)), -1)
    peak = (
        scores.detach().amax(-1, keepdim=True)
        if scores.shape[-1]
        else scores.new_full(scores.shape[:3] + (1,), NEG_INF)
    )
    empty = peak == NEG_INF
    p = torch.exp(scores - peak.masked_fill(empty, 0))
    total = p.sum(-1, keepdim=True)
    lse = (peak + total.masked_fill(empty, 1).log()).squeeze(-1)
    p = (p / total.masked_fill(empty, 1))[..., :k_len]
    if keep is not None:
        p = p * keep / (1 - dropout_p)
    return (p @ v).to(query.dtype), lse


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


def philox(seed: int, counter: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Philox4x32: four words of 32 random bits for four words of counter, all held in int64."""

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """Upper and lower word of the product of two words, by halves: int64 does not hold it."""
        low, high = a * (b & 0xFFFF), a * (b >> 16)
        middle = high + (low >> 16)
        return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(rounds):
        high0, low0 = multiply(0xD2511F53, c0)
        high2, low2 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]
