"""`LoRALinear`: adapters over a linear layer, of floats or quantized."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmops.quantization.linear import QuantLinear


class LoRALinear(nn.Module):
    """base(x) + (alpha / rank) dropout(x) A^T B^T with the base frozen: LoRA (arXiv 2106.09685).

    Over a `QuantLinear` this is QLoRA (arXiv 2305.14314).

    base: a torch.nn.Linear, of floats or quantized; its parameters stop requiring gradients.
    rank: rows of A. alpha: see the formula. dropout: of x before A, in training.
    a: (rank, in_features), random; b: (out_features, rank), 0, so that training begins at the base. Both are float32
    where the base is in half precision, because optimizers add small steps; x is cast to them.
    Raises TypeError for another base, ValueError for settings out of range.
    """

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"base must be a torch.nn.Linear, got {type(base).__name__}")
        if not 1 <= rank <= min(base.in_features, base.out_features):
            least = min(base.in_features, base.out_features)
            raise ValueError(f"rank is {rank}; it must be between 1 and {least}, the smaller side of the weight")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        dtype = torch.promote_types(base.weight.dtype, torch.float32)
        self.a = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device, dtype=dtype))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device, dtype=dtype))
        nn.init.kaiming_uniform_(self.a, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        y = self.base(x)
        dropped = nn.functional.dropout(x, self.dropout, self.training).to(self.a.dtype)
        change = nn.functional.linear(nn.functional.linear(dropped, self.a), self.b)
        return y + (change * (self.alpha / self.rank)).to(y.dtype)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """A layer of floats that computes the same without adapters (but for dropout).

        Raises TypeError where the base is quantized: rounding would lose most of what was learnt. Keep the adapter, or
        set `base` to `base.dequantize()` first.
        """
        if isinstance(self.base, QuantLinear):
            raise TypeError(
                "base is quantized, and adapters cannot be merged into 4 or 8 bits: keep the LoRALinear, or make its "
                "base a float layer first with `layer.base = layer.base.dequantize()`"
            )
        base, bias = self.base, self.base.bias is not None
        weight = base.weight + (self.b @ self.a * (self.alpha / self.rank)).to(base.weight.dtype)
        merged = nn.Linear(base.in_features, base.out_features, bias, device="meta", dtype=weight.dtype)
        merged.weight = nn.Parameter(weight)
        if base.bias is not None:
            merged.bias = nn.Parameter(base.bias.clone())
        return merged.train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"
