"""Drop-in torch modules over the operators."""

from lmops.modules.softmax import LogSoftmax, Softmax

__all__ = ["LogSoftmax", "Softmax"]
