"""GPTQ (arXiv 2210.17323): columns are rounded one by one, and those that follow make up for the error of each."""

from __future__ import annotations

import torch
from torch import Tensor

from lmops.quantization.rounding import check_weight, choose_scales, columns
from lmops.quantization.tensor import RANGES, ZERO_DTYPES, QuantizedTensor

BLOCK = 128  # columns whose updates are applied to the rest at once


def gptq(
    weight: Tensor,
    gram: Tensor,
    bits: int = 4,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
    damping: float = 0.01,
    name: str | None = None,
) -> QuantizedTensor:
    """A weight (n_out, n_in) quantized so that its product with the inputs of `gram` changes little.

    gram: (n_in, n_in), the sum of x^T x over the inputs x of the layer, in any unit.
    damping: added to gram's diagonal, as a share of its mean; ten times more as often as gram stays singular.
    name: of the layer, for errors.
    Columns are rounded in the order of their second moment, the largest first (act-order), yet groups are of
    neighbouring columns, whose scales are chosen beforehand: the result needs no permutation of x.
    Raises ValueError or TypeError for what `round_to_nearest` does, and for NaN or infinities in gram.
    """
    where = f" of {name}" if name else ""
    scale_dtype = check_weight(weight, bits, group_size, scale_dtype, name)
    n_out, n_in = weight.shape
    if gram.shape != (n_in, n_in):
        raise ValueError(f"gram{where} must be {(n_in, n_in)}, got {tuple(gram.shape)}")
    if not gram.isfinite().all():
        raise ValueError(f"the calibration inputs{where} have NaN or infinite values")
    moments = gram.diagonal()
    scales, zeros = choose_scales(
        weight.detach(), bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype,
        importance=moments,
    )  # fmt: skip
    low, high = RANGES[f"int{bits}"]
    order = moments.argsort(descending=True, stable=True)
    inverse = _inverse_factor(gram[order][:, order], damping, where)
    w = weight.detach().float()[:, order].contiguous()
    s = columns(scales.float(), group_size, n_in)[:, order]
    if zeros is None:
        z = torch.full_like(s, low + 2 ** (bits - 1))
    else:
        z = columns(zeros.float(), group_size, n_in)[:, order]
    codes = torch.empty_like(w)
    for start in range(0, n_in, BLOCK):
        stop = min(start + BLOCK, n_in)
        errors = w.new_empty(n_out, stop - start)
        block = w[:, start:stop]
        for i in range(stop - start):
            k = start + i
            column = block[:, i]
            u = (column / s[:, k]).round_().add_(z[:, k]).clamp_(low, high)
            codes[:, k] = u
            error = (column - (u - z[:, k]) * s[:, k]) / inverse[k, k]
            block[:, i + 1 :].addr_(error, inverse[k, k + 1 : stop], alpha=-1)
            errors[:, i] = error
        w[:, stop:].addmm_(errors, inverse[start:stop, stop:], alpha=-1)
    codes = torch.empty_like(codes).index_copy_(1, order, codes).to(ZERO_DTYPES[f"int{bits}"])
    return QuantizedTensor.from_codes(codes, scales, zeros, bits=bits, group_size=group_size, name=name)


def _inverse_factor(gram: Tensor, damping: float, where: str) -> Tensor:
    """The upper triangular U with U^T U = gram^-1, of gram with a damped diagonal."""
    gram = gram.float()
    diagonal = gram.diagonal()
    # an input that is always 0 leaves its column free: 1 there rounds it to nearest
    mean = diagonal.mean().item() or 1.0
    dead = diagonal == 0
    while damping <= 1:
        damped = gram.clone()
        damped.diagonal().add_(damping * mean).masked_fill_(dead, mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
        if not failed:
            return factor
        damping *= 10
    raise ValueError(f"the calibration inputs{where} are so alike that GPTQ cannot invert their second moments")
