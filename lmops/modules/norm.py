"""Drop-in modules for torch.nn.RMSNorm and torch.nn.LayerNorm that can add a residual on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lmops.ops.norm import layer_norm, rms_norm


class RMSNorm(nn.RMSNorm):
    """Takes the place of `torch.nn.RMSNorm`, with the same arguments and weights; computes `lmops.rms_norm`.

    forward(x, residual) returns (norm(x + residual), x + residual). weight_offset: 1 for Gemma's norms. The result has
    x's dtype, also where the weight's is another. Without eps it is the one of the dtype that sums are formed in,
    float64 or float32, as in torch.
    """

    def __init__(self, *args: Any, weight_offset: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.weight_offset = weight_offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        eps = default_eps(x) if self.eps is None else self.eps
        rows, weight, residual_rows = _rows(self, x, self.weight, residual)
        y = rms_norm(rows, weight, eps, residual=residual_rows, weight_offset=self.weight_offset)
        return _like(x, y)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", weight_offset={self.weight_offset}" if self.weight_offset else "")


class LayerNorm(nn.LayerNorm):
    """Takes the place of `torch.nn.LayerNorm`, with the same arguments and weights; computes `lmops.layer_norm`.

    forward(x, residual) returns (norm(x + residual), x + residual).
    """

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        rows, weight, bias, residual_rows = _rows(self, x, self.weight, self.bias, residual)
        return _like(x, layer_norm(rows, weight, bias, self.eps, residual=residual_rows))


def default_eps(x: Tensor) -> float:
    """Of torch's RMSNorm, whatever its documentation says of x's dtype."""
    return torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps


def _rows(module: nn.RMSNorm | nn.LayerNorm, x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """x and the other tensors with the dimensions that are normalised together as one."""
    ndim = len(module.normalized_shape)
    if x.shape[x.ndim - ndim :] != module.normalized_shape:
        expected = ", ".join(map(str, module.normalized_shape))
        raise ValueError(f"x must have shape (..., {expected}) to be normalised, got {tuple(x.shape)}")
    return (x, *others) if ndim == 1 else tuple(None if t is None else t.flatten(-ndim) for t in (x, *others))


def _like(x: Tensor, y: Any) -> Any:
    return tuple(t.view_as(x) for t in y) if isinstance(y, tuple) else y.view_as(x)
