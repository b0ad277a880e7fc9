"""The torch operators. One file an operator: launcher, CPU implementation, gradient, public function."""

from .softmax import log_softmax, softmax

__all__ = ["log_softmax", "softmax"]
