"""`W8A8Linear`: a linear layer whose products are of 8-bit numbers on both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from lmops.ops.int8_matmul import int8_matmul
from lmops.quantization.linear import QuantLinear


class W8A8Linear(QuantLinear):
    """A `QuantLinear` that rounds x to 8 bits too, a scale a row, on the fly: `lmops.int8_matmul`.

    Its weight must have the format int8 or fp8, one scale a row (group_size -1), and no zeros or offsets; forward
    raises ValueError otherwise. x is float16, bfloat16 or float32. A state_dict is that of a `QuantLinear`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) in x's dtype, under autocast in autocast's."""
        kind = x.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        return int8_matmul(x, self.quantized, self.bias)
