"""Drop-in torch modules over the operators."""

from lmops.modules.attention import CrossAttention, SelfAttention
from lmops.modules.softmax import LogSoftmax, Softmax

__all__ = ["CrossAttention", "LogSoftmax", "SelfAttention", "Softmax"]
