"""x times an int4 or int8 weight, for layers of GPT-2 XL, Llama-7B and Llama-70B at 1 to 4,096 rows of x."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Variant
from lmops.ops.quantized_matmul import quantized_matmul, quantized_matmul_backward
from lmops.quantization import QuantizedTensor

ROWS = (1, 8, 64, 512, 4_096)
LAYERS = {  # (n_out, n_in)
    "gpt2-xl-up": (6_400, 1_600),
    "gpt2-xl-down": (1_600, 6_400),
    "llama-7b-qkv": (12_288, 4_096),
    "llama-7b-up": (22_016, 4_096),
    "llama-7b-down": (4_096, 11_008),
    "llama-70b-qkv": (10_240, 8_192),
    "llama-70b-up": (57_344, 8_192),
    "llama-70b-down": (8_192, 28_672),
}


def benchmark(layer: str, bits: int, group_size: int) -> Benchmark:
    """A layer with a quantized weight; on a CPU at most 4,096 by 4,096 of it."""

    def inputs(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """x, the dequantized weight, the packed one, and where torch has a kernel: the same codes as it packs them."""
        n_out, n_in = LAYERS[layer]
        if device.type == "cpu":
            n_out, n_in = min(n_out, 4_096), min(n_in, 4_096)
        w = torch.randn(n_out, n_in, device=device).mul_(0.02)
        q = QuantizedTensor.quantize(w, bits, group_size, scale_dtype=dtype)
        tensors = [torch.randn(size, n_in, device=device).to(dtype), q.dequantize(dtype), q.packed, q.scales]
        # group 64 divides the width of every layer here; torch's zero is in the scaled weight's units
        if bits == 4 and dtype == torch.bfloat16 and n_in % group_size == 0:
            tensors += [torch_pack(q), torch.stack([q.scales, torch.zeros_like(q.scales)], -1)]
        return tuple(tensors)

    def ours(x: Tensor, w: Tensor, packed: Tensor, scales: Tensor, *rest: Tensor) -> Tensor:
        n_out, n_in = w.shape
        q = QuantizedTensor(packed, scales, None, None, None, f"int{bits}", group_size, (n_out, n_in))
        return quantized_matmul(x, q)

    def torch_int4(x: Tensor, w: Tensor, packed: Tensor, scales: Tensor, *rest: Tensor) -> Tensor:
        if not rest:
            raise ImportError("torch has no such kernel for this format")
        run = torch._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch._weight_int4pack_mm
        return run(x, rest[0], group_size, rest[1])

    return Benchmark(
        f"quantized-matmul int{bits} {'row' if group_size == -1 else f'g{group_size}'} {layer}",
        "quantized_matmul_forward",
        inputs,
        {"lmops": ours, "torch int4 (torchao)": torch_int4},
        lambda x, w, *rest: x @ w.T,
        lambda x, w, packed, scales, *rest: x.nbytes + packed.nbytes + scales.nbytes + x.shape[0] * w.shape[0] * 2,
        ROWS,
        small=8,
        operations=lambda x, w, *rest: 2 * x.shape[0] * w.numel(),
        dtypes=(torch.bfloat16,),
        sizes_on_cpu=(1, 8),
    )


def torch_pack(q: QuantizedTensor) -> Tensor:
    """The codes as `torch._weight_int4pack_mm` wants them, which is the kernel behind torchao's int4 weights."""
    codes = q.codes()
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)


BENCHMARKS = [benchmark(layer, bits, g) for layer in LAYERS for bits, g in ((4, 64), (8, -1))]


def product(n_rows: int, n_out: int, n_in: int, dtype: torch.dtype, *, bias=False, backward=False, **format):
    """Host code that launches the product, or the gradient of x, on memory that nobody fills."""

    def run() -> None:
        q = QuantizedTensor.empty((n_out, n_in), **({"scale_dtype": dtype} | format))
        x = torch.empty(n_rows, n_in, dtype=dtype)
        b = torch.empty(n_out, dtype=dtype) if bias else None
        if backward:
            weight = q.packed, q.scales, q.zeros, q.offsets, q.permutation, q.format, q.group_size
            quantized_matmul_backward(torch.empty(n_rows, n_out, dtype=dtype), *weight, n_in)
        else:
            quantized_matmul(x, q, b)

    return run


half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
FORMATS = {
    "int4-g128": {"group_size": 128},
    "int4-g128-zeros": {"group_size": 128, "zeros": True},
    "int4-g32": {"group_size": 32},
    "int4-g32-offsets": {"group_size": 32, "offsets": True, "scale_dtype": half},
    "int4-g48-zeros": {"group_size": 48, "zeros": True},
    "int8-row": {"bits": 8},
    "int8-g64-zeros": {"bits": 8, "group_size": 64, "zeros": True},
    "fp8": {"bits": 8, "fp8": True},
}


def name_of(dtype: torch.dtype) -> str:
    return {half: "fp16", bf16: "bf16", fp32: "fp32"}[dtype]


# few rows, which split the columns, and every width of tile; GPT-2 XL's 1,600 columns end within a unit
COMPILE = [
    *(
        Variant(
            f"quantized-matmul-{f}-{name_of(t)}-{rows}", product(rows, 4_096, 4_096, t, **FORMATS[f]), "any", wide=w
        )
        for f in FORMATS
        for t in (bf16, half)
        for rows, w in ((1, 0.0), (256, 0.0))
    ),
    *(
        Variant(
            f"quantized-matmul-int4-g128-bf16-{rows}", product(rows, 4_096, 4_096, bf16, **FORMATS["int4-g128"]), "any"
        )
        for rows in (32, 64, 128)
    ),
    Variant("quantized-matmul-gpt2-xl-bias-1", product(1, 6_400, 1_600, bf16, bias=True, group_size=64), "any"),
    Variant("quantized-matmul-gpt2-xl-bias-512", product(512, 6_400, 1_600, bf16, bias=True, group_size=64), "any"),
    Variant("quantized-matmul-odd-1", product(1, 4_095, 4_099, bf16, group_size=128), "any"),
    Variant("quantized-matmul-odd-512", product(512, 4_095, 4_099, bf16, group_size=128), "any"),
    *(
        Variant(f"quantized-matmul-{f}-fp32-{rows}", product(rows, 4_096, 4_096, fp32, **FORMATS[f]), "any")
        for f in ("int4-g128-zeros", "int8-row", "fp8")
        for rows in (1, 256)
    ),
    *(
        Variant(
            f"quantized-matmul-dx-{f}-{name_of(t)}", product(512, 4_096, 4_096, t, backward=True, **FORMATS[f]), "any"
        )
        for f in FORMATS
        for t in (bf16, fp32)
    ),
]
