"""What an operator costs on the host at batch 1, beside the same launches made with `kernel[grid](...)` directly.

    python -m benchmarks.bench_overhead [--target sm_90] [--rounds 20]

No GPU is needed: kernels are compiled for the target, and a driver that launches nothing takes the place of the GPU's.
So a call is all that Python and torch's dispatcher do: checks, the launch's shape, memory for the result, Triton's own
binding of arguments. Memory is the CPU's here, and making the tensors' GPU the current one, a few microseconds, is left
out. Calls of both kinds alternate in blocks; figures are the medians of the blocks' means, in microseconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.driver import driver as runtime_driver
from triton.runtime.jit import JITFunction

import lmops
from benchmarks.compile_report import TARGETS, CompileOnlyDriver
from lmops.cache import PagedKVCache
from lmops.flash_attn import flash_attn_func
from lmops.ops.activation import swiglu
from lmops.ops.norm import layer_norm, rms_norm
from lmops.ops.paged_attention import paged_attention
from lmops.ops.paged_cache import copy_blocks, store_kv
from lmops.ops.rope import rope
from lmops.quantization import QuantizedTensor
from lmops.testing import implementation

Call = Callable[[], object]


class NoLaunch(CompileOnlyDriver):
    """Takes kernels to their launch, and leaves that out."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.device = super().get_current_device()

    def get_current_device(self) -> str:
        return self.device

    utils = SimpleNamespace(
        load_binary=lambda *_: (0, 0, 0, 0, 1024),
        get_device_properties=lambda _: {"max_shared_mem": 1 << 20, "multiprocessor_count": 132},
        unload_module=lambda _: None,
    )

    def launcher_cls(self, source: Any, metadata: Any) -> Call:
        return lambda *arguments: None


def operators() -> dict[str, Call]:
    """Every operator on the inputs of one token: a row, a query, a prompt of one."""
    half: dict[str, Any] = {"dtype": torch.float16}
    x, weight = torch.randn(1, 4096, **half), torch.randn(4096, **half)
    q = torch.randn(1, 32, 1, 128, **half)
    k, v = torch.randn(2, 1, 8, 1024, 128, **half)
    tokens_q, tokens_k = torch.randn(1, 1, 32, 128, **half), torch.randn(1, 1, 8, 128, **half)
    cos, sin = torch.randn(2, 1, 64, **half)
    q_in_order, k_in_order, v_in_order = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    int4 = QuantizedTensor.quantize(torch.randn(4096, 4096, **half), bits=4, group_size=128)
    int8 = QuantizedTensor.quantize(torch.randn(4096, 4096, **half), bits=8, group_size=-1)
    logits, token = torch.randn(1, 32_000, **half), torch.tensor([5])
    cache = PagedKVCache(64, n_layers=1, n_kv_heads=8, head_dim=128)
    batch = cache.append([cache.new_sequence()], [1])
    copies = torch.tensor([[0, 1]])
    pages, row = cache.layers[0], torch.randn(1, 8, 128, **half)
    query = torch.randn(1, 32, 128, **half)
    return {
        "softmax": lambda: lmops.softmax(x),
        "rms_norm": lambda: rms_norm(x, weight),
        "layer_norm": lambda: layer_norm(x, weight, weight),
        "rope": lambda: rope(tokens_q, tokens_k, cos, sin, inplace=True),
        "swiglu": lambda: swiglu(x, x),
        "log_softmax": lambda: lmops.log_softmax(x),
        "scaled_dot_product_attention": lambda: lmops.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "paged_attention": lambda: paged_attention(query, pages, batch.block_table, batch.context_lens),
        "store_kv": lambda: store_kv(row, row, pages, batch.slot_mapping),
        "flash_attn_func": lambda: flash_attn_func(q_in_order, k_in_order, v_in_order),
        "copy_blocks": lambda: copy_blocks(pages, copies),
        "quantized_embedding": lambda: lmops.quantized_embedding(token, int8),
        "quantized_matmul": lambda: lmops.quantized_matmul(x, int4),
        "int8_matmul": lambda: lmops.int8_matmul(x, int8),
        "sample": lambda: lmops.sample(logits, temperature=0.8, seed=1),
        "sample, top-p": lambda: lmops.sample(logits, temperature=0.8, top_p=0.9, seed=1),
        "filter_logits": lambda: lmops.filter_logits(logits, temperature=0.8, top_p=0.9),
        "verify_draft": lambda: lmops.verify_draft(logits.expand(1, 2, -1), token[None], seed=1),
        "cross_entropy": lambda: lmops.cross_entropy(logits, token),
        "kl_div": lambda: lmops.kl_div(logits, logits),
    }


def bare(call: Call) -> tuple[Call, int]:
    """The launches of a call, made directly with the same arguments, and how many they are."""
    launches: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []
    run = JITFunction.run

    def note(self, *args, grid, warmup, **kwargs):
        launches.append((self, grid, args, kwargs))
        return run(self, *args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = note
    try:
        call()
    finally:
        JITFunction.run = run

    def again() -> None:
        for kernel, grid, args, kwargs in launches:
            kernel[grid](*args, **kwargs)

    return again, len(launches)


def microseconds(call: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return 1e6 * (time.perf_counter() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # `implementation` overrides on purpose
    runtime_driver.set_active(NoLaunch(TARGETS[args.target].gpu))
    print(f"torch {torch.__version__}, {args.target}, microseconds a call")
    print(f"{'':30}{'launches':>9}{'kernel[grid]':>14}{'operator':>10}{'ratio':>7}")
    with torch.inference_mode(), implementation("triton"):
        for name, call in operators().items():
            direct, launches = bare(call)
            times: tuple[list[float], list[float]] = ([], [])
            for _ in range(args.rounds):
                for kind, which in zip((direct, call), times, strict=True):
                    which.append(microseconds(kind, 200))
            base, ours = (statistics.median(t) for t in times)
            print(f"{name:30}{launches:9}{base:14.1f}{ours:10.1f}{ours / base:7.2f}", flush=True)


if __name__ == "__main__":
    main()
