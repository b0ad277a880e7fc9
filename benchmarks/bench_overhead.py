"""What a call costs on the host at batch 1, beside the same launches made with `kernel[grid](...)` directly.

    python -m benchmarks.bench_overhead [--target sm_90] [--rounds 20]

No GPU is needed: kernels are compiled for the target, and a driver that launches nothing takes the place of the GPU's.
So a call is all that Python and torch's dispatcher do: checks, the launch's shape, memory for the result, Triton's own
binding of arguments. Memory is the CPU's here, and making the tensors' GPU the current one, a few microseconds, is left
out. Some functions also compute with torch's operators, products or the mean over rows: their time, when they are
called directly, is the column "torch", and the ratio is of the call to launches and torch's operators together. The
three kinds of calls alternate in blocks; figures are the least of the blocks' means, in microseconds of processor time.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.runtime.driver import driver as runtime_driver

import lmops
from benchmarks.compile_report import TARGETS, CompileOnlyDriver
from lmops.cache import PagedKVCache
from lmops.flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from lmops.ops._launch import Launch
from lmops.ops.paged_cache import copy_blocks
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


def operators() -> dict[str, Call | tuple[Call, Call]]:
    """Every operator on the inputs of one token, a row or a query or a prompt of one; backward ones as autograd does.

    With a second call: what the function computes with torch's operators, beside its launches.
    """
    half: dict[str, Any] = {"dtype": torch.float16}
    ops = torch.ops.lmops
    x, weight, packed = torch.randn(1, 4096, **half), torch.randn(4096, **half), torch.randn(1, 8192, **half)
    stats, probabilities = torch.randn(1, 2), torch.softmax(x, -1)
    q = torch.randn(1, 32, 1, 128, **half)
    k, v = torch.randn(2, 1, 8, 1024, 128, **half)
    base = torch.randn(1, 32, 1, 2)
    attention_options = (None, None, None, None, None, None, 1, 1024, 128**-0.5, None, None, False, 0.0, 0.0)
    tokens_q, tokens_k = torch.randn(1, 1, 32, 128, **half), torch.randn(1, 1, 8, 128, **half)
    cos, sin = torch.randn(2, 1, 64, **half)
    q_in_order, k_in_order, v_in_order = (t.transpose(1, 2).contiguous() for t in (q, k, v))
    ends, ends_k = (torch.tensor([0, n], dtype=torch.int32) for n in (1, 1024))
    held = torch.tensor([1000], dtype=torch.int32)
    int4 = QuantizedTensor.quantize(torch.randn(4096, 4096, **half), bits=4, group_size=128)
    int8 = QuantizedTensor.quantize(torch.randn(4096, 4096, **half), bits=8, group_size=-1)
    int4_arguments = (int4.packed, int4.scales, int4.zeros, int4.offsets, int4.permutation, int4.format, 128, 4096)
    logits, token = torch.randn(1, 32_000, **half), torch.tensor([5])
    state, one_row, temperatures = torch.ones(5, 1), torch.ones(1), torch.full((1,), 0.8)
    hidden, head, scores = torch.randn(1, 64), torch.randn(1024, 64), torch.randn(1, 1024)
    to_hidden, to_head = torch.empty_like(hidden), torch.empty_like(head)
    pages = PagedKVCache(64, n_layers=1, n_kv_heads=8, head_dim=128)
    coded = PagedKVCache(64, n_layers=1, n_kv_heads=8, head_dim=128, pages="int8")
    batch = pages.append([pages.new_sequence()], [1])
    layer, row = pages.layers[0], torch.randn(1, 8, 128, **half)
    query, copies = torch.randn(1, 32, 128, **half), torch.tensor([[0, 1]])
    where = (batch.block_table, batch.context_lens)

    def mean() -> Tensor:
        return one_row.sum() / (token != -100).count_nonzero()

    def gradients() -> tuple[Tensor, Tensor]:
        return torch.mm(scores, head, out=to_hidden), torch.mm(scores.t(), hidden, out=to_head)

    return {
        "softmax": lambda: lmops.softmax(x),
        "softmax, a temperature a row": lambda: lmops.softmax(x, temperatures),
        "softmax backward": lambda: ops.softmax_backward(x, probabilities, None, 1.0, False, False, torch.float16),
        "log_softmax": lambda: lmops.log_softmax(x),
        "rms_norm": lambda: lmops.rms_norm(x, weight),
        "rms_norm and residual": lambda: lmops.rms_norm(x, weight, residual=x),
        "rms_norm backward": lambda: ops.norm_backward(x, None, x, stats[:, :1], weight, 0.0, False, True, False),
        "layer_norm": lambda: lmops.layer_norm(x, weight, weight),
        "layer_norm and residual": lambda: lmops.layer_norm(x, weight, weight, residual=x),
        "layer_norm backward": lambda: ops.norm_backward(x, None, x, stats, weight, 0.0, True, True, True),
        "rope": lambda: lmops.rope(tokens_q, tokens_k, cos, sin),
        "rope, in place": lambda: lmops.rope(tokens_q, tokens_k, cos, sin, inplace=True),
        "swiglu": lambda: lmops.swiglu(x, x),
        "geglu of one tensor": lambda: lmops.geglu(packed),
        "swiglu backward": lambda: ops.gated_backward(x, x, x, "silu"),
        "scaled_dot_product_attention": lambda: lmops.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        "attention backward": lambda: ops.attention_backward(q, None, q, k, v, q, base, False, *attention_options),
        "flash_attn_func": lambda: flash_attn_func(q_in_order, k_in_order, v_in_order),
        "flash_attn_varlen_func": lambda: flash_attn_varlen_func(
            q_in_order[0], k_in_order[0], v_in_order[0], ends, ends_k, 1, 1024
        ),
        "flash_attn_with_kvcache": lambda: flash_attn_with_kvcache(
            q_in_order, k_in_order, v_in_order, cache_seqlens=held
        ),
        "flash_attn_with_kvcache, appending": lambda: flash_attn_with_kvcache(
            q_in_order, k_in_order, v_in_order, k_in_order[:, :1], v_in_order[:, :1], cache_seqlens=held
        ),
        "paged_attention": lambda: lmops.paged_attention(query, layer, *where),
        "paged_attention, int8 pages": lambda: lmops.paged_attention(query, coded.layers[0], *where),
        "paged_attention, ragged": lambda: lmops.paged_attention(
            query, layer, *where, cu_seqlens_q=ends, max_seqlen_q=1
        ),
        "store_kv": lambda: lmops.store_kv(row, row, layer, batch.slot_mapping),
        "store_kv, int8 pages": lambda: lmops.store_kv(row, row, coded.layers[0], batch.slot_mapping),
        "store_kv and rope": lambda: lmops.store_kv(
            row, row, layer, batch.slot_mapping, cos=cos, sin=sin, positions=batch.positions
        ),
        "copy_blocks": lambda: copy_blocks(layer, copies),
        "quantized_embedding": lambda: lmops.quantized_embedding(token, int8),
        "quantized_matmul": lambda: lmops.quantized_matmul(x, int4),
        "quantized_matmul backward": lambda: ops.quantized_matmul_backward(x, *int4_arguments),
        "int8_matmul": lambda: lmops.int8_matmul(x, int8),
        "sample": lambda: lmops.sample(logits, temperature=0.8, seed=1),
        "sample, top-p": lambda: lmops.sample(logits, temperature=0.8, top_p=0.9, seed=1),
        "filter_logits": lambda: lmops.filter_logits(logits, temperature=0.8, top_p=0.9),
        "verify_draft": lambda: lmops.verify_draft(logits.expand(1, 2, -1), token[None], seed=1),
        "cross_entropy": (lambda: lmops.cross_entropy(logits, token), lambda: mean().to(torch.float16)),
        "cross_entropy with its gradient": lambda: ops.cross_entropy_forward(
            logits, token, None, one_row, logits, -100, 0.0, 0.0, 0.0, 1.0
        ),
        "cross_entropy backward": lambda: ops.cross_entropy_backward(
            logits, token, None, one_row, state, logits, -100, 0.0, 0.0, 0.0, 1.0
        ),
        "kl_div": (lambda: lmops.kl_div(logits, logits), lambda: one_row.sum().to(torch.float16)),
        "kl_div with its gradient": lambda: ops.kl_div_forward(logits, logits, None, one_row, logits, 1.0, False),
        "kl_div backward": lambda: ops.kl_div_backward(logits, logits, None, one_row, state, logits, 1.0, False),
        "scale_unless_one": lambda: ops.scale_unless_one(scores, one_row),
        "linear_cross_entropy": (
            lambda: lmops.linear_cross_entropy(hidden, head, token),
            lambda: (F.linear(hidden, head), mean()),
        ),
        "linear_cross_entropy backward": (
            lambda: ops.linear_cross_entropy_backward(
                hidden, head, None, token, None, one_row, state[:3], [True, True, False], -100, 0.0, 0.0, 0.0, 1.0
            ),
            lambda: (F.linear(hidden, head), *gradients()),
        ),
        "linear_kl_div": (
            lambda: lmops.linear_kl_div(hidden, head, hidden, head),
            lambda: (F.linear(hidden, head), F.linear(hidden, head), one_row.sum()),
        ),
        "linear_kl_div backward": (
            lambda: ops.linear_kl_div_backward(
                hidden, head, None, hidden, head, None, None, one_row, state, [True, True, False], 1.0, False
            ),
            lambda: (F.linear(hidden, head), F.linear(hidden, head), *gradients()),
        ),
    }


def bare(call: Call) -> tuple[Call, int]:
    """The launches of a call, made directly with the same arguments, and how many they are."""
    launches: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []
    launch = Launch.__call__

    def note(self: Launch, *leading: Any) -> None:
        launches.append((self.kernel, self.grid, (*leading, *self.arguments), self.options))
        launch(self, *leading)

    with patch.object(Launch, "__call__", note):
        call()

    def again() -> None:
        for kernel, grid, args, kwargs in launches:
            kernel[grid](*args, **kwargs)

    return again, len(launches)


def microseconds(call: Call, calls: int) -> float:
    start = time.process_time()
    for _ in range(calls):
        call()
    return 1e6 * (time.process_time() - start) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Warning only once for all operators")  # `implementation` overrides on purpose
    runtime_driver.set_active(NoLaunch(TARGETS[args.target].gpu))
    print(f"torch {torch.__version__}, {args.target}, microseconds a call")
    print(f"{'':36}{'launches':>9}{'kernel[grid]':>14}{'torch':>7}{'call':>7}{'ratio':>7}")
    with torch.inference_mode(), implementation("triton"):
        for name, given in operators().items():
            call, torchs = given if isinstance(given, tuple) else (given, None)
            direct, launches = bare(call)
            kinds = [direct, call] if torchs is None else [direct, call, torchs]
            blocks = [[microseconds(kind, 200) for kind in kinds] for _ in range(args.rounds)]
            base, ours, *others = (min(times) for times in zip(*blocks, strict=True))
            extra = sum(others)
            print(f"{name:36}{launches:9}{base:14.1f}{extra:7.1f}{ours:7.1f}{ours / (base + extra):7.2f}", flush=True)


if __name__ == "__main__":
    main()
