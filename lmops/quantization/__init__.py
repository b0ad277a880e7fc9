"""Quantized weights: `QuantizedTensor`, and `QuantLinear` which computes with one."""

from lmops.quantization.linear import QuantLinear
from lmops.quantization.tensor import QuantizedTensor

__all__ = ["QuantLinear", "QuantizedTensor"]
