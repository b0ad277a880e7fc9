"""Perplexity of a model in float32 and quantized in several ways, on text that Python itself carries.

    python -m benchmarks.perplexity --model SmolLM2-135M-Instruct.Q4_1.gguf
    python -m benchmarks.perplexity --model SmolLM2-135M-Instruct.Q4_1.gguf --pages

With --pages the weights stay in float32 and the keys and values are in a paged cache, quantized in several ways: each
token is predicted through what the pages hold of it and of those before it, as in decoding.
The text is the language reference that `help()` shows, `pydoc_data.topics` of the standard library. Its paragraphs,
each once, are cut in two: the first half is for calibration, the second for evaluation, so they share none.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import math
import platform
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from lmops.cache import PagedKVCache
from lmops.integrations.optimize import optimize
from lmops.models import GPT, load
from lmops.ops.paged_cache import Format
from lmops.quantization import QuantLinear, quantize_model, smooth_quantize

WINDOW = 512  # tokens; each is predicted from those before it in its window
TEXT = "556061ea97a4"  # of Python 3.11.7; another patch release has another text, and other perplexities

STORED = "as it is stored"
# name, bits, group_size, method
WAYS = (
    ("int8, a row", 8, -1, "rtn"),
    ("w8a8", 8, -1, "w8a8"),
    ("w8a8, SmoothQuant", 8, -1, "smoothquant"),
    ("int4, 128, rounded", 4, 128, "rtn"),
    ("int4, 128, GPTQ", 4, 128, "gptq"),
    ("int4, 128, AWQ", 4, 128, "awq"),
    ("int4, 32, rounded", 4, 32, "rtn"),
    ("int4, 32, GPTQ", 4, 32, "gptq"),
    ("int4, 32, AWQ", 4, 32, "awq"),
)


def text_halves() -> tuple[str, str, str]:
    """The text for calibration, that for evaluation, and the first digits of the SHA-256 of both."""
    from pydoc_data.topics import topics

    paragraphs = list(dict.fromkeys("\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")))
    half = len(paragraphs) // 2
    first, second = "\n\n".join(paragraphs[:half]), "\n\n".join(paragraphs[half:])
    return first, second, hashlib.sha256((first + second).encode()).hexdigest()[:12]


@torch.no_grad()
def perplexity(model: GPT, windows: Tensor, batch: int = 4) -> float:
    """exp of the mean loss of all tokens of windows (N, T) but the first of each."""
    loss = sum(
        F.cross_entropy(model(w)[:, :-1].float().flatten(0, 1), w[:, 1:].flatten(), reduction="sum").item()
        for w in windows.split(batch)
    )
    return math.exp(loss / windows[:, 1:].numel())


@torch.no_grad()
def perplexity_through_pages(model: GPT, windows: Tensor, dtype: torch.dtype, pages: Format) -> tuple[float, int]:
    """`perplexity` with all keys and values read from pages, and the bytes a token takes in them."""
    c, length, loss = model.config, windows.shape[1], 0.0
    for w in windows.split(4):
        cache = PagedKVCache(
            -(-length // 16) * len(w), n_layers=c.n_layers, n_kv_heads=c.n_kv_heads, head_dim=c.head_dim, dtype=dtype,
            pages=pages, prefix_caching=False, window=c.attention_window,
        )  # fmt: skip
        batch = cache.append([cache.new_sequence() for _ in w], [length] * len(w))
        logits = model(w.reshape(1, -1), cache=batch).view(*w.shape, -1)
        loss += F.cross_entropy(logits[:, :-1].float().flatten(0, 1), w[:, 1:].flatten(), reduction="sum").item()
    return math.exp(loss / windows[:, 1:].numel()), cache.plan.block_bytes // 16


def compare_pages(model: GPT, windows: Tensor) -> None:
    print(f"{'pages':20}{'bytes a token':>14}{'perplexity':>12}{'to float32':>12}", flush=True)
    base = None
    ways: list[tuple[str, torch.dtype, Format]] = [
        ("float32", torch.float32, "native"), ("float16", torch.float16, "native"), ("int8", torch.float16, "int8"),
        ("fp8", torch.float16, "fp8"), ("int4", torch.float16, "int4"),
    ]  # fmt: skip
    for name, dtype, pages in ways:
        value, n_bytes = perplexity_through_pages(model, windows, dtype, pages)
        base = base or value
        print(f"{name:20}{n_bytes:14,}{value:12.4f}{f'{100 * (value / base - 1):+.3f} %':>12}", flush=True)


def bits_per_weight(model: GPT) -> float:
    """Stored bits of the linear layers but the head, over their weights."""
    layers = [m for m in model.blocks.modules() if isinstance(m, torch.nn.Linear)]
    stored = sum(m.quantized.nbytes if isinstance(m, QuantLinear) else m.weight.nbytes for m in layers)
    return 8 * stored / sum(m.in_features * m.out_features for m in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as lmops.load takes it")
    parser.add_argument("--tokens", type=int, default=8192, help="to evaluate on")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--symmetric", action="store_true", help="int4 without zero points")
    parser.add_argument("--pages", action="store_true", help="compare pages of keys and values instead")
    parser.add_argument("--only", default="", help="ways whose name contains this")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model, dtype=torch.float32, quantized="dequantize")
    assert tokenizer is not None, "the model has no tokenizer"
    first, second, digest = text_halves()
    if digest != TEXT:
        print(f"note: this Python's text is {digest}, that of docs/results/quality.md is {TEXT}")
    calibration = torch.tensor(tokenizer.encode(first)[: options.calibration_tokens]).split(WINDOW)
    windows = torch.tensor(tokenizer.encode(second)[: options.tokens // WINDOW * WINDOW]).view(-1, WINDOW)

    print(f"python {platform.python_version()}, torch {torch.__version__}, text {digest}, {windows.numel()} tokens")
    if options.pages:
        compare_pages(model, windows)
        return
    print(f"{'':20}{'bits a weight':>14}{'perplexity':>12}{'to float32':>12}{'seconds':>9}", flush=True)
    base = perplexity(model, windows)
    print(f"{'float32':20}{bits_per_weight(model):14.3f}{base:12.4f}{'':>12}{'':>9}", flush=True)

    def row(name: str, quantized: GPT, seconds: float) -> None:
        value = perplexity(quantized, windows)
        change = f"{100 * (value / base - 1):+.3f} %"
        print(f"{name:20}{bits_per_weight(quantized):14.3f}{value:12.4f}{change:>12}{seconds:9.0f}", flush=True)

    kept, _ = load(options.model, dtype=torch.float32, load_tokenizer=False)
    if options.only in STORED and any(isinstance(m, QuantLinear) for m in kept.modules()):
        row(STORED, kept, 0)
    del kept
    for name, bits, group_size, method in WAYS:
        if options.only not in name:
            continue
        quantized, start = copy.deepcopy(model), time.perf_counter()
        if method == "w8a8":
            optimize(quantized, attention=False, softmax=False, norm=False, loss=False, linear="w8a8")
        elif method == "smoothquant":
            smooth_quantize(quantized, calibration)
        else:
            quantize_model(
                quantized, bits, group_size, method, calibration=calibration, symmetric=options.symmetric or bits == 8,
                scale_dtype=torch.float16, progress=False,
            )  # fmt: skip
        row(name, quantized, time.perf_counter() - start)


if __name__ == "__main__":
    main()
