"""Drop-in torch modules over the operators."""

from .softmax import LogSoftmax, Softmax

__all__ = ["LogSoftmax", "Softmax"]
