"""lmops: Triton kernels that make torch language models fast, and the modules, models and tools around them."""

from .ops import log_softmax, softmax

__version__ = "0.1.0"
__all__ = ["__version__", "log_softmax", "softmax"]
