"""Losses of a language model, in plain torch: the specification of `lmops.cross_entropy`, `kl_div` and linear forms."""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross entropy of softmax(z) with the target, z = softcap tanh(input / softcap) / temperature.

    input: (C,), (N, C) or (N, C, d1, ...). target: class indices, the shape of input without C, or probabilities, the
    shape of input. With w the class weights, s the label smoothing and L = log sum exp z, a token of class y has

        loss = (1 - s) w_y (L - z_y) + s / C sum_j w_j (L - z_j) + z_loss L^2

    and with probabilities q, which are smoothed to (1 - s) q + s / C, sum_j q_j w_j (L - z_j) + z_loss L^2.
    A token of class ignore_index has 0. "mean" divides the sum by that of w_y over the tokens that are not ignored,
    with probabilities by the number of tokens. Entries of -inf stay -inf under softcap.
    Computed in promote_types(input.dtype, float32) and returned in `dtype` (default: input's).
    """
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    x = x if x.ndim == 1 else x.movedim(1, -1)
    if softcap is not None:
        masked = x == NEG_INF
        x = (softcap * torch.tanh(x.masked_fill(masked, 0) / softcap)).masked_fill(masked, NEG_INF)
    z = x / temperature
    lse = z.logsumexp(-1)
    log_p = torch.log_softmax(z, -1)
    n_classes = z.shape[-1]
    w = torch.ones(n_classes, dtype=z.dtype, device=z.device) if weight is None else weight.to(z.dtype)

    if target.is_floating_point():
        q = target.to(z.dtype)
        q = q if q.ndim == 1 else q.movedim(1, -1)
        q = (1 - label_smoothing) * q + label_smoothing / n_classes
        loss = -(q * w * log_p).sum(-1) + z_loss * lse.square()
        total = torch.tensor(loss.numel(), dtype=z.dtype, device=z.device)
    else:
        kept = target != ignore_index
        y = target.long().masked_fill(~kept, 0)
        nll = -log_p.gather(-1, y.unsqueeze(-1)).squeeze(-1) * w[y]
        loss = (1 - label_smoothing) * nll + z_loss * lse.square()
        if label_smoothing:
            loss = loss - label_smoothing / n_classes * (log_p * w).sum(-1)
        loss = torch.where(kept, loss, 0)
        total = torch.where(kept, w[y], 0).sum()
    return _reduce(loss, total, reduction).to(dtype or input.dtype)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, target, ...)`; the class weights are `class_weight`.

    hidden: (..., d). weight: (V, d). bias: (V,). target: (...).
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    rows = logits.reshape(-1, logits.shape[-1])
    options["weight"] = options.pop("class_weight", None)
    loss = cross_entropy(rows, target.reshape(-1), **options)
    return loss.view(target.shape) if loss.ndim else loss


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    reverse: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """KL(p || q) of p = softmax(teacher / temperature) and q = softmax(student / temperature); reverse: KL(q || p).

    student_logits, teacher_logits: (..., V). mask: (...), False where a row does not count. reduction: "none" one
    value a row, "sum", "batchmean" the sum over the size of the first dimension, "mean" the sum over the number of rows
    that count. 0 log 0 is 0. No gradient for the teacher.
    """
    compute = torch.promote_types(student_logits.dtype, torch.float32)
    log_q = torch.log_softmax(student_logits.to(compute) / temperature, -1)
    log_p = torch.log_softmax(teacher_logits.detach().to(compute) / temperature, -1)
    a, b = (log_q, log_p) if reverse else (log_p, log_q)
    nothing = a == NEG_INF
    rows = (a.exp() * (a.masked_fill(nothing, 0) - b.masked_fill(nothing, 0))).sum(-1)
    kept = torch.ones_like(rows, dtype=torch.bool) if mask is None else mask
    rows = torch.where(kept, rows, 0)
    total = kept.sum() if reduction == "mean" else torch.tensor(rows.shape[0] if rows.ndim else 1)
    reduction = "mean" if reduction == "batchmean" else reduction
    return _reduce(rows, total, reduction).to(dtype or student_logits.dtype)


def _reduce(loss: Tensor, total: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / total if reduction == "mean" else loss.sum()
