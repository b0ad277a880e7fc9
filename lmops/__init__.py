"""lmops: Triton kernels that make torch language models fast, and the modules, models and tools around them."""

from lmops import flash_attn, modules, quantization
from lmops.cache import PagedKVCache
from lmops.engine import generate
from lmops.integrations.optimize import optimize, restore
from lmops.models import GPT, GPTConfig, load
from lmops.ops.activation import geglu, swiglu
from lmops.ops.attention import scaled_dot_product_attention
from lmops.ops.int8_matmul import int8_matmul
from lmops.ops.linear_loss import linear_cross_entropy, linear_kl_div
from lmops.ops.loss import cross_entropy, kl_div
from lmops.ops.norm import layer_norm, rms_norm
from lmops.ops.paged_attention import paged_attention
from lmops.ops.paged_cache import KVPages, store_kv
from lmops.ops.quantized_embedding import quantized_embedding
from lmops.ops.quantized_matmul import quantized_matmul
from lmops.ops.rope import rope
from lmops.ops.sampling import filter_logits, sample, verify_draft
from lmops.ops.softmax import log_softmax, softmax

__version__ = "0.1.0"
__all__ = [
    "GPT",
    "GPTConfig",
    "KVPages",
    "PagedKVCache",
    "__version__",
    "cross_entropy",
    "filter_logits",
    "flash_attn",
    "geglu",
    "generate",
    "int8_matmul",
    "kl_div",
    "layer_norm",
    "linear_cross_entropy",
    "linear_kl_div",
    "load",
    "log_softmax",
    "modules",
    "optimize",
    "paged_attention",
    "quantization",
    "quantized_embedding",
    "quantized_matmul",
    "restore",
    "rms_norm",
    "rope",
    "sample",
    "scaled_dot_product_attention",
    "softmax",
    "store_kv",
    "swiglu",
    "verify_draft",
]
