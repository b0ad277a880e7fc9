"""Rotary position embedding in plain torch: the specification of `lmops.rope`."""

from __future__ import annotations

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """x (*tokens, heads, D) with its first pairs of dimensions rotated by the angles of cos and sin (*tokens, r).

    Pairs are (i, i + r), interleaved (2 i, 2 i + 1), i < r; dimensions from 2 r on stay. cos and sin broadcast over
    tokens. Computed in promote_types(x.dtype, float32) and returned in x's dtype. Differentiable by autograd.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    c, s = cos.to(compute).unsqueeze(-2), sin.to(compute).unsqueeze(-2)
    rotated, rest = x[..., : 2 * half].to(compute), x[..., 2 * half :]
    a, b = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.split(half, -1)
    pair = (a * c - b * s, b * c + a * s)
    rotated = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((rotated.to(x.dtype), rest), -1)
