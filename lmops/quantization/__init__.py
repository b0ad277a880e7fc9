"""Quantized weights, `QuantLinear` which computes with one, and the ways to choose them."""

from lmops.quantization.gptq import gptq
from lmops.quantization.layers import JoinedLinear, QuantEmbedding
from lmops.quantization.linear import QuantLinear
from lmops.quantization.quantize import quantize_model
from lmops.quantization.rounding import fake_quantize, round_to_nearest
from lmops.quantization.tensor import QuantizedTensor
from lmops.quantization.w8a8 import W8A8Linear, smooth_quantize

__all__ = [
    "JoinedLinear",
    "QuantEmbedding",
    "QuantLinear",
    "QuantizedTensor",
    "W8A8Linear",
    "fake_quantize",
    "gptq",
    "quantize_model",
    "round_to_nearest",
    "smooth_quantize",
]
