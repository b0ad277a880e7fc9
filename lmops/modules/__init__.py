"""Drop-in torch modules over the operators."""

from lmops.modules.attention import CrossAttention, SelfAttention
from lmops.modules.loss import CrossEntropyLoss, LinearCrossEntropy
from lmops.modules.sampler import Sampler
from lmops.modules.softmax import LogSoftmax, Softmax

__all__ = [
    "CrossAttention",
    "CrossEntropyLoss",
    "LinearCrossEntropy",
    "LogSoftmax",
    "Sampler",
    "SelfAttention",
    "Softmax",
]
