"""Layers over `QuantLinear`: an embedding that reads rows of a quantized table, and several linear layers as one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lmops.ops.quantized_embedding import quantized_embedding
from lmops.quantization.linear import QuantLinear


class QuantEmbedding(nn.Module):
    """tokens -> rows of a quantized table (n_tokens, width), dequantized: torch.nn.Embedding over a `QuantLinear`.

    table: holds the weight. A model whose head is tied to its embedding gives its head, and both stay one in copies,
    on another device and in memory.
    """

    def __init__(self, table: QuantLinear) -> None:
        super().__init__()
        self.table = table

    @property
    def weight(self) -> Tensor:
        """Stands for the dequantized table, as `QuantLinear.weight` does."""
        return self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(...) integers below n_tokens -> (..., width) in the table's `dtype`."""
        return quantized_embedding(tokens, self.table.quantized, self.table.dtype)


class JoinedLinear(nn.Module):
    """The outputs of several linear layers of one x, one behind the other: what a fused matrix computes.

    For parts that cannot be one matrix, such as quantized ones of different formats or different act-order.

    parts: layers without a bias. bias: (the sum of the parts' n_out,) or None.
    """

    bias: Tensor | None

    def __init__(self, parts: Iterable[nn.Module], bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., n_in) -> (..., the sum of the parts' n_out)."""
        y = torch.cat([part(x) for part in self.parts], dim=-1)
        return y if self.bias is None else y + self.bias
