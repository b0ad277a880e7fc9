"""Drop-in torch modules over the operators."""

from lmops.modules.attention import CrossAttention, SelfAttention
from lmops.modules.lora import LoRALinear
from lmops.modules.loss import CrossEntropyLoss, LinearCrossEntropy
from lmops.modules.norm import LayerNorm, RMSNorm
from lmops.modules.sampler import Sampler
from lmops.modules.softmax import LogSoftmax, Softmax
from lmops.quantization.linear import QuantLinear

__all__ = [
    "CrossAttention",
    "CrossEntropyLoss",
    "LayerNorm",
    "LinearCrossEntropy",
    "LoRALinear",
    "LogSoftmax",
    "QuantLinear",
    "RMSNorm",
    "Sampler",
    "SelfAttention",
    "Softmax",
]
