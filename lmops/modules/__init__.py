"""Drop-in torch modules over the operators."""

from lmops.modules.attention import CrossAttention, SelfAttention
from lmops.modules.sampler import Sampler
from lmops.modules.softmax import LogSoftmax, Softmax

__all__ = ["CrossAttention", "LogSoftmax", "Sampler", "SelfAttention", "Softmax"]
