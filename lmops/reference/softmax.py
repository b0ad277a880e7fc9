"""Softmax and log-softmax with a temperature, in plain torch: the specification of `lmops.softmax`."""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def softmax(
    x: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    causal: bool = False,
    log: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(x / temperature), or its logarithm, over the last dimension; differentiable by autograd.

    x: (..., n_rows, n_cols). temperature: a number or a tensor that broadcasts to (..., n_rows).
    causal: row i sees the columns 0 .. i + n_cols - n_rows, the others count as -inf.
    Entries of -inf have probability 0 and no gradient; a row of nothing else gives 0 (log: -inf) throughout.
    Temperature 0 gives the one-hot of the first maximum, with no gradient.
    Computed in promote_types(x.dtype, float32) and returned in `dtype` (default: x's).
    """
    z = x.to(torch.promote_types(x.dtype, torch.float32))
    t = torch.as_tensor(temperature, dtype=z.dtype, device=z.device).expand(z.shape[:-1]).unsqueeze(-1)
    masked = z == NEG_INF
    if causal:
        masked = masked | ~torch.ones_like(masked).tril(z.shape[-1] - z.shape[-2])
    empty = masked.all(-1, keepdim=True)
    greedy = t == 0

    # masked entries are replaced before the division and again after it, so that no gradient meets 0 * inf
    scores = z.masked_fill(masked, 0) / t.masked_fill(greedy, 1)
    scores = scores.masked_fill(masked & ~empty, NEG_INF)
    y = torch.log_softmax(scores, -1) if log else torch.softmax(scores, -1)
    if greedy.any() and z.shape[-1]:
        first = z.masked_fill(masked, NEG_INF).argmax(-1, keepdim=True)
        one_hot = torch.zeros_like(z).scatter(-1, first, 1.0)
        one_hot = one_hot.masked_fill(z.isnan().any(-1, keepdim=True), float("nan"))
        y = torch.where(greedy, one_hot.log() if log else one_hot, y)
    if log:
        y = y.masked_fill(masked, NEG_INF)  # a constant: without this the entries would take a gradient
    y = y.masked_fill(empty, NEG_INF if log else 0.0)
    return y.to(dtype or x.dtype)
