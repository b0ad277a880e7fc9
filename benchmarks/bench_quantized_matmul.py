"""x times an int4 or int8 weight, for layers of GPT-2 XL, Llama-7B and Llama-70B at 1 to 4,096 rows of x.

Peers get the same codes and scales, and are checked against the same truth. bitsandbytes is one where x is rounded to 8
bits too; its 4 bits are NF4 or FP4, so its results are those of another weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.harness import Benchmark, Variant
from lmops.ops.int8_matmul import int8_matmul
from lmops.ops.quantized_embedding import quantized_embedding
from lmops.ops.quantized_matmul import quantized_matmul, quantized_matmul_backward
from lmops.ops.quantized_matmul_cpu import CPUWeight, cpu_weight_helps
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


def shape_of(layer: str, device: torch.device) -> tuple[int, int]:
    """(n_out, n_in) of a layer; on a CPU at most 4,096 of each."""
    n_out, n_in = LAYERS[layer]
    return (min(n_out, 4_096), min(n_in, 4_096)) if device.type == "cpu" else (n_out, n_in)


def benchmark(layer: str, bits: int, group_size: int) -> Benchmark:
    """A layer with a quantized weight."""
    kept, repacked = WeakIdKeyDictionary(), WeakIdKeyDictionary()

    def inputs(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """x, the dequantized weight, the packed one, and where torch has a kernel: the same codes as it packs them."""
        n_out, n_in = shape_of(layer, device)
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
        if not cpu_weight_helps(x, packed, None):
            return quantized_matmul(x, q)
        if packed not in kept:  # on a CPU a layer keeps this form, made in its first call
            kept[packed] = CPUWeight(q)
        return kept[packed].matmul(x)

    def torch_int4(x: Tensor, w: Tensor, packed: Tensor, scales: Tensor, *rest: Tensor) -> Tensor:
        if not rest:
            raise ImportError("torch has no such kernel for this format")
        run = torch._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else torch._weight_int4pack_mm
        return run(x, rest[0], group_size, rest[1])

    def gemlite(x: Tensor, w: Tensor, packed: Tensor, scales: Tensor, *rest: Tensor) -> Tensor:
        from gemlite.core import TORCH_TO_DTYPE, GemLiteLinear

        if x.device.type == "cpu":
            raise ImportError("gemlite has kernels for GPUs only")
        if packed not in repacked:
            n_out, n_in = w.shape
            q = QuantizedTensor(packed, scales, None, None, None, f"int{bits}", group_size, (n_out, n_in))
            dtype = TORCH_TO_DTYPE[x.dtype]
            layer = GemLiteLinear(
                bits, group_size=n_in if group_size == -1 else group_size, in_features=n_in, out_features=n_out,
                input_dtype=dtype, output_dtype=dtype,
            )  # fmt: skip
            zeros = torch.full_like(scales.T, 8).contiguous() if bits == 4 else None
            repacked[packed] = layer.pack(q.codes(), scales.T.contiguous(), zeros, None)
        return repacked[packed](x)

    return Benchmark(
        f"quantized-matmul int{bits} {'row' if group_size == -1 else f'g{group_size}'} {layer}",
        "quantized_matmul_forward",
        inputs,
        {"lmops": ours, "torch int4 (torchao)": torch_int4, "gemlite": gemlite},
        lambda x, w, *rest: x @ w.T,
        lambda x, w, packed, scales, *rest: x.nbytes + packed.nbytes + scales.nbytes + x.shape[0] * w.shape[0] * 2,
        ROWS,
        small=8,
        operations=lambda x, w, *rest: 2 * x.shape[0] * w.numel(),
        dtypes=(torch.bfloat16,),
        sizes_on_cpu=(1, 8),
    )


def benchmark_w8a8(layer: str) -> Benchmark:
    """The same with x rounded to 8 bits: an x that is 8 bits to begin with, so that all must give the same product."""

    def inputs(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """x, the dequantized weight, the packed one, its codes (n_out, n_in)."""
        n_out, n_in = shape_of(layer, device)
        q = QuantizedTensor.quantize(torch.randn(n_out, n_in, device=device).mul_(0.02), 8, -1, scale_dtype=dtype)
        codes = torch.randint(-127, 128, (size, n_in), device=device)
        codes[:, 0] = 127
        return codes.to(dtype) / 32, q.dequantize(dtype), q.packed, q.scales, q.codes()

    def ours(x: Tensor, w: Tensor, packed: Tensor, scales: Tensor, *rest: Tensor) -> Tensor:
        n_out, n_in = w.shape
        return int8_matmul(x, QuantizedTensor(packed, scales, None, None, None, "int8", -1, (n_out, n_in)))

    def torch_int(x: Tensor, w: Tensor, packed: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
        """What torchao runs for int8 weights with rows of x rounded."""
        if x.device.type == "cuda" and len(x) <= 16:
            raise ImportError("torch._int_mm takes 17 rows and more on a GPU")
        x_scales = x.abs().amax(1, keepdim=True).float() / 127
        products = torch._int_mm((x / x_scales).round().to(torch.int8), codes.T)
        return (products * x_scales * scales[0].float()).to(x.dtype)

    def bitsandbytes(x: Tensor, w: Tensor, packed: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_quant

        x_codes, largest, _ = int8_vectorwise_quant(x)
        columns = scales[0].float() * 127
        return torch.ops.bitsandbytes.int8_scaled_mm(x_codes, codes, largest, columns, dtype=x.dtype)

    return Benchmark(
        f"int8-matmul {layer}",
        "int8_matmul_forward",
        inputs,
        {"lmops": ours, "torch._int_mm (torchao)": torch_int, "bitsandbytes": bitsandbytes},
        lambda x, w, *rest: x @ w.T,
        lambda x, w, packed, scales, codes: x.nbytes + packed.nbytes + scales.nbytes + x.shape[0] * w.shape[0] * 2,
        ROWS,
        small=8,
        operations=lambda x, w, *rest: 2 * x.shape[0] * w.numel(),
        dtypes=(torch.float16,),
        sizes_on_cpu=(1, 8),
    )


def torch_pack(q: QuantizedTensor) -> Tensor:
    """The codes as `torch._weight_int4pack_mm` wants them, which is the kernel behind torchao's int4 weights."""
    codes = q.codes()
    if codes.device.type == "cpu":
        return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return torch._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).contiguous(), 8)


BENCHMARKS = [
    *(benchmark(layer, bits, g) for layer in LAYERS for bits, g in ((4, 64), (8, -1))),
    *map(benchmark_w8a8, LAYERS),
]


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


def rounded(n_rows: int, **format):
    """Host code that launches the product of 8-bit numbers."""

    def run() -> None:
        int8_matmul(torch.empty(n_rows, 4_096, dtype=bf16), QuantizedTensor.empty((4_096, 4_096), 8, **format))

    return run


def embedded(**format):
    """Host code that launches the lookup of 64 rows in a table."""

    def run() -> None:
        table = QuantizedTensor.empty((32_000, 4_096), **format)
        quantized_embedding(torch.zeros(64, dtype=torch.int64), table, dtype=bf16)

    return run


half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
TYPES = {"bf16": bf16, "fp16": half, "fp32": fp32}
FORMATS: dict[str, dict[str, Any]] = {
    "int4-g128": {"group_size": 128},
    "int4-g128-zeros": {"group_size": 128, "zeros": True},
    "int4-g32-offsets": {"group_size": 32, "offsets": True, "scale_dtype": half},
    "int4-g48-zeros": {"group_size": 48, "zeros": True},
    "int8-row": {"bits": 8},
    "int8-g64-zeros": {"bits": 8, "group_size": 64, "zeros": True},
    "fp8": {"bits": 8, "fp8": True},
}


def variant(
    format: str, dtype: str, n_rows: int, shape: tuple[int, int] = (4_096, 4_096), name: str = "", **options: bool
) -> Variant:
    n_out, n_in = shape
    return Variant(
        f"quantized-matmul-{name}{format}-{dtype}-{n_rows}",
        product(n_rows, n_out, n_in, TYPES[dtype], **FORMATS[format], **options),
        "any" if dtype != "fp32" else False,
    )


# few rows, which split the columns, and every width of tile. GPT-2 XL's 1,600 columns end within a unit, and the odd
# layer's rows are not aligned
COMPILE = [
    *(variant(f, t, n) for f in FORMATS for t, n in (("bf16", 1), ("bf16", 512), ("fp16", 512))),
    *(variant("int4-g128", "bf16", n) for n in (32, 64, 128)),
    *(variant(f, "fp32", n) for f, n in (("int4-g128-zeros", 1), ("int4-g32-offsets", 512), ("int8-row", 512))),
    *(variant("int4-g128", "bf16", n, (6_400, 1_600), "gpt2-xl-bias-", bias=True) for n in (1, 512)),
    *(variant("int4-g128", "bf16", n, (4_095, 4_099), "odd-") for n in (1, 512)),
    *(variant(f, "bf16", 512, name="dx-", backward=True) for f in FORMATS),
    *(variant(f, "fp32", 512, name="dx-", backward=True) for f in ("int4-g128-zeros", "int4-g32-offsets", "int8-row")),
    *(Variant(f"int8-matmul-bf16-{n}", rounded(n), "any") for n in (1, 64, 512)),
    *(Variant(f"quantized-embedding-{f}", embedded(**FORMATS[f])) for f in ("int4-g128-zeros", "int8-row")),
]
