"""Gated activations in plain torch: the specification of `lmops.swiglu` and `lmops.geglu`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up; activation: "silu", "gelu", "gelu_tanh". Differentiable by autograd.

    Computed in promote_types(gate.dtype, float32) and returned in gate's dtype.
    """
    compute = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(compute)
    if activation == "silu":
        a = F.silu(g)
    else:
        a = F.gelu(g, approximate="tanh" if activation == "gelu_tanh" else "none")
    return (a * up.to(compute)).to(gate.dtype)
