"""RMSNorm and LayerNorm with a residual, in plain torch: the specification of `lmops.rms_norm` and `layer_norm`."""

from __future__ import annotations

import torch
from torch import Tensor


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
    centred: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = z / sqrt(mean(z^2) + eps) (weight + weight_offset) + bias over the last dimension, and h = x + residual.

    z is h, centred (LayerNorm): h without its mean. h is rounded to x's dtype before it is normalised, y at the end;
    between them all is in promote_types(x.dtype, float32). Without residual h is x. Differentiable by autograd.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    h = x if residual is None else (x.to(compute) + residual.to(compute)).to(x.dtype)
    z = h.to(compute)
    if centred:
        z = z - z.mean(-1, keepdim=True)
    y = z * torch.rsqrt(z.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(compute) + weight_offset)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype), h
