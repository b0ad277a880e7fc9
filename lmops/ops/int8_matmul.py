"""x quantized to 8 bits a row, times an int8 or fp8 weight: schema, launcher, CPU implementation, public function."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, differentiated, target_name
from lmops.ops.quantized_matmul import FLOATS, Product, Quantized, Tile, product, quantized_matmul_backward, run_product
from lmops.reference.quantization import int8_matmul as reference

BLOCK_K = 128  # bytes, two units


def int8_matmul_tile(n_rows: int, n_out: int, n_bytes: int) -> Tile:
    """The tile for n_rows rows times a weight of n_out rows of n_bytes bytes; columns are split to fill a GPU."""
    block_n = min(max(16, 1 << (n_rows - 1).bit_length()), 128)
    block_m, num_warps = (128, 8) if block_n == 128 else (64, 4)
    blocks = -(-n_bytes // BLOCK_K)
    tiles = -(-n_out // block_m) * -(-n_rows // block_n)
    wanted = max(1, (512 if block_n <= 32 else 256) // tiles)
    blocks_a_split = max(4, -(-blocks // wanted))
    return Tile(block_m, block_n, -(-blocks // blocks_a_split), num_warps, 3 if block_n == 128 else 4)


def _fake(x: Tensor, packed: Tensor, scales: Tensor, smooth: Tensor | None, bias: Tensor | None, format: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[1])


@prepared
def _prepare(
    rows: Tensor, packed: Tensor, scales: Tensor, smooth: Tensor | None, bias: Tensor | None, format: str
) -> tuple[Launch, Product]:
    """What rounds the rows, its leading arguments rows, smooth, codes and scales; and their product with the weight."""
    from lmops.kernels.int8_matmul import int8_matmul_kernel, quantize_rows_kernel

    fp8, target = format == "fp8", target_name()
    if fp8 and (not target.startswith("sm_") or int(target[3:]) < 89):
        raise NotImplementedError(f"int8_matmul with an fp8 weight needs products of e4m3, which {target} has not")
    (n_rows, n_in), (units, n_out) = rows.shape, packed.shape[:2]
    n_bytes = 64 * units
    block = min(8_192, 1 << (n_bytes - 1).bit_length())
    quantize = Launch(
        quantize_rows_kernel, (n_rows,), n_rows, n_in, n_bytes, rows.stride(0), SMOOTH=smooth is not None, FP8=fp8,
        FITS=block >= n_bytes, BLOCK=block, num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    tile, blocks = int8_matmul_tile(n_rows, n_out, n_bytes), -(-n_bytes // BLOCK_K)
    return quantize, product(
        int8_matmul_kernel, tile, n_rows, n_out, bias is not None, n_bytes, -(-blocks // tile.splits), K=BLOCK_K,
        EDGE=n_bytes % BLOCK_K != 0, FP8=fp8,
    )  # fmt: skip


def _triton(
    x: Tensor, packed: Tensor, scales: Tensor, smooth: Tensor | None, bias: Tensor | None, format: str
) -> Tensor:
    y = _fake(x, packed, scales, smooth, bias, format)
    if y.numel() == 0:
        return y
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    quantize, multiply = _prepare(rows, packed, scales, smooth, bias, format)
    eight_bits = torch.float8_e4m3fn if format == "fp8" else torch.int8
    codes = torch.empty(len(rows), 64 * packed.shape[0], dtype=eight_bits, device=x.device)
    x_scales = torch.empty(len(rows), dtype=torch.float32, device=x.device)
    quantize(rows, smooth, codes, x_scales)
    run_product(multiply, len(rows), bias, y, codes, x_scales, packed.view(eight_bits), scales)
    return y


int8_matmul_forward = define_op(
    "int8_matmul_forward(Tensor x, Tensor packed, Tensor scales, Tensor? smooth, Tensor? bias, str format) -> Tensor",
    triton=_triton,
    torch_cpu=reference,
    fake=_fake,
)


class _Int8Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, scales, smooth, bias, format):
        ctx.save_for_backward(packed, scales, smooth)
        ctx.arguments = format, x.shape[-1], None if bias is None else bias.dtype
        return int8_matmul_forward(x, packed, scales, smooth, bias, format)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        packed, scales, smooth = ctx.saved_tensors
        format, n_in, bias_dtype = ctx.arguments
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = quantized_matmul_backward(dy, packed, scales, None, None, None, format, -1, n_in)
            dx = dx if smooth is None else (dx / smooth).to(dx.dtype)
        if ctx.needs_input_grad[4]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=bias_dtype)
        return dx, None, None, None, db, None


def int8_matmul(x: Tensor, w: Quantized, bias: Tensor | None = None, *, smooth: Tensor | None = None) -> Tensor:
    """(x / smooth) w^T + bias with x rounded to 8 bits on the fly: the products are of 8-bit numbers (W8A8).

    A row of x / smooth is divided by its largest magnitude over 127 and rounded half to even (LLM.int8's row scales,
    Dettmers et al., 2022); with an fp8 weight over 448, to e4m3. int8 products are added up in int32, exactly.

    x: (..., n_in) float16, bfloat16 or float32, any strides.
    w: a `lmops.quantization.QuantizedTensor` (n_out, n_in) of 8 bits with one scale a row: format int8 or fp8,
        group_size -1, symmetric.
    bias: (n_out,) floating point. smooth: (n_in,) floating point, not 0: SmoothQuant's scales, by which w's columns
        have been multiplied before they were quantized (Xiao et al., 2023).
    Returns (..., n_out) in x's dtype; a row of x with NaN or infinity gives NaN. Differentiable once with respect to x
    and bias as if x had not been rounded. Raises TypeError, ValueError, and NotImplementedError for an fp8 weight on a
    GPU without products of e4m3 (before sm_89).
    """
    if not hasattr(w, "packed"):
        raise TypeError(f"w must be a lmops.quantization.QuantizedTensor, got {type(w).__name__}")
    if w.format == "int4" or w.group_size != -1 or w.zeros is not None or w.offsets is not None:
        raise ValueError(f"w must have 8 bits, one scale a row and no zeros or offsets, got {w}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16 or float32, got {x.dtype}")
    n_out, n_in = w.shape
    if x.ndim == 0 or x.shape[-1] != n_in:
        raise ValueError(f"x must be (..., {n_in}) for a weight of shape {(n_out, n_in)}, got {tuple(x.shape)}")
    for what, t, n in (("bias", bias, n_out), ("smooth", smooth, n_in)):
        if t is not None and (t.shape != (n,) or not t.is_floating_point()):
            raise ValueError(f"{what} must be ({n},) floating point, got {tuple(t.shape)} {t.dtype}")
    for what, t in (("w", w.packed), ("bias", bias), ("smooth", smooth)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{what} must be on {x.device} like x, got {t.device}")
    run = _Int8Matmul.apply if differentiated(x, bias) else int8_matmul_forward
    return run(x, w.packed, w.scales, smooth, bias, w.format)
