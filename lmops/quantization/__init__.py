"""Quantized weights: `QuantizedTensor`."""

from lmops.quantization.tensor import QuantizedTensor

__all__ = ["QuantizedTensor"]
