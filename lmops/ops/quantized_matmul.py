"""x times a quantized weight transposed: schema, launcher, CPU implementation, autograd, public function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, differentiated, target_name
from lmops.reference.quantization import dequantize, row_chunks, unit_columns

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Quantized(Protocol):
    """What the operators read of a `lmops.quantization.QuantizedTensor`, where the fields are explained."""

    @property
    def packed(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def zeros(self) -> Tensor | None: ...
    @property
    def offsets(self) -> Tensor | None: ...
    @property
    def permutation(self) -> Tensor | None: ...
    @property
    def format(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...


@dataclass(frozen=True)
class Tile:
    """What a program takes: block_m rows of the weight, block_n rows of x, and one of `splits` parts of the columns."""

    block_m: int
    block_n: int
    splits: int
    num_warps: int
    num_stages: int


def quantized_matmul_tile(
    n_rows: int, n_out: int, units: int, group_size: int, shifted: bool, compute: torch.dtype, converted: bool,
    target: str,
) -> Tile:  # fmt: skip
    """The tile for n_rows rows of x times a weight (n_out, units of columns).

    shifted: there are zeros or offsets; compute: what a weight is formed in; converted: that is not x's type. Chosen
    from what the compiler makes of them (docs/results/quantized_matmul.md). Columns are split where there are too few
    tiles to fill a GPU: with few rows, what counts is that much of the weight is on its way at any time.
    """
    block_m, block_n = 128, min(max(16, 1 << (n_rows - 1).bit_length()), 256)
    grouped, gfx = group_size != -1, target.startswith("gfx")
    # with 4 warps unpacked words would go through shared memory
    unaligned = grouped and group_size % 128 and n_out % 16 and not target.startswith(("sm_10", "gfx"))
    if compute == torch.float32 and not converted:
        block_m, block_n, num_warps, num_stages = 64, min(block_n, 32), 4, 2
    elif grouped and group_size % (32 if gfx else 16):
        block_m, block_n, num_warps, num_stages = 64, min(block_n, 64), 4, 3
    elif block_n <= 32:
        num_warps, num_stages = 8 if unaligned else 4, 4
    elif unaligned or (converted and not target.startswith(("sm_10", "gfx"))):
        block_n, num_warps, num_stages = min(block_n, 128), 8, 3
    elif block_n == 64 or target != "sm_90":
        # for sm_100 Triton 3.7.1 makes an empty kernel of 8 warps and offsets. Two stages: gfx942 has 64 KB of shared
        # memory, and takes twice the programs at a time; smaller groups spill on sm_80, shifted ones with two
        block_n, num_warps, num_stages = 64, 4, 2 if gfx or (grouped and group_size % 128 and not shifted) else 3
    else:  # results that are not aligned take more registers to store
        block_n, num_warps, num_stages = block_n if n_out % 8 == 0 else 128, 8, 3
    tiles = -(-n_out // block_m) * -(-n_rows // block_n)
    wanted = max(1, (512 if block_n <= 32 else 256) // tiles)
    units_a_split = max(2 if block_n <= 32 else 4, -(-units // wanted))
    return Tile(block_m, block_n, -(-units // units_a_split), num_warps, num_stages)


def _compute_type(x: torch.dtype, scales: torch.dtype, offsets: bool, scaled: bool, target: str) -> torch.dtype:
    """What a weight is formed in. scaled: it is multiplied by its scale, rather than the sum at the end.

    In x's type it comes out as `dequantize` rounds it, if the scales are of that type. bfloat16 holds other scales with
    a relative error of 2^-9; float16 might not hold them at all. Offsets are rounded to bfloat16 as the middle of their
    group, which is no larger than its largest weight. Other targets than NVIDIA's do not compute in bfloat16.
    """
    if x == torch.float32 or (x == torch.bfloat16 and not target.startswith("sm_")):
        return torch.float32
    if offsets and x == torch.float16:
        return torch.float16 if scales == torch.float16 else torch.float32
    return x if x in (torch.bfloat16, scales) or not scaled else torch.float32


def _arguments(
    x: Tensor, zeros: Tensor | None, offsets: Tensor | None, format: str, group_size: int, compute: torch.dtype,
    precision: str, target: str,
) -> dict[str, Any]:  # fmt: skip
    """The compile-time arguments that the kernels share."""
    import triton.language as tl

    return {
        "PARTS": 4 if format == "int4" else 2, "GROUP": max(0, group_size), "FORMAT": format,
        "SHIFT": "zeros" if zeros is not None else "offsets" if offsets is not None else "",
        "COMPUTE": getattr(tl, str(compute).removeprefix("torch.")), "PTX": target.startswith("sm_"),
        "PRECISION": "ieee" if precision == "highest" else "tf32",
        "OFFSET": tl.int32 if 256 * max(map(abs, x.stride())) < 2**31 else tl.int64,
    }  # fmt: skip


def _chunks(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None, permutation: Tensor | None,
    format: str, group_size: int, n_in: int, dtype: torch.dtype,
) -> Any:  # fmt: skip
    """Slices of the weight's rows with these rows dequantized, a few MB at a time."""
    for rows in row_chunks(packed.shape[1], n_in):
        z, o = (None if t is None else t[:, rows] for t in (zeros, offsets))
        yield rows, dequantize(packed[:, rows], scales[:, rows], z, o, permutation, format, group_size, n_in, dtype)


def _forward_fake(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, bias: Tensor | None, format: str, group_size: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], packed.shape[1])


class Product(NamedTuple):
    """A product's launch, and where its columns are split over programs how many ways, and the launch that adds up."""

    launch: Launch
    splits: int
    add: Launch | None


def product(kernel: Any, tile: Tile, n_rows: int, n_out: int, bias: bool, *arguments: Any, **options: Any) -> Product:
    """Leading arguments of `launch` are the kernel's tensors, of `add` the splits' results, the bias and the result."""
    from lmops.kernels.quantized_matmul import add_splits_kernel

    split = tile.splits > 1
    launch = Launch(
        kernel, (-(-n_out // tile.block_m) * -(-n_rows // tile.block_n), tile.splits), n_rows, n_out, *arguments,
        M=tile.block_m, N=tile.block_n, BIAS=bias and not split, SPLIT=split, num_warps=tile.num_warps,
        num_stages=tile.num_stages, **options,
    )  # fmt: skip
    grid = (-(-n_out // 1024), n_rows)
    add = Launch(add_splits_kernel, grid, n_rows, n_out, tile.splits, BIAS=bias, BLOCK=1024) if split else None
    return Product(launch, tile.splits, add)


def run_product(product: Product, n_rows: int, bias: Tensor | None, y: Tensor, *tensors: Tensor | None) -> None:
    """y (..., n_out) of the kernel's tensors before the bias."""
    if product.add is None:
        product.launch(*tensors, bias, y)
    else:
        parts = y.new_empty(product.splits, n_rows, y.shape[-1], dtype=torch.float32)
        product.launch(*tensors, bias, parts)
        product.add(parts, bias, y)


def _ahead(t: Tensor, tile: Tile, group_size: int, columns: int) -> bool:
    """Whether scales or shifts t of a tile and a unit of so many columns are loaded a unit ahead.

    Otherwise they are copied like the weight: that takes rows that are aligned and a tile of 4 bytes a lane. For single
    bytes it would make Triton choose lanes for x that suit bytes, on sm_80.
    """
    if group_size % 16 or group_size % columns == 0 or t.shape[1] % 16 or t.itemsize == 1:
        return True
    values = tile.block_m * columns // (32 if group_size % 32 == 0 else 16)
    return values * t.itemsize < 4 * 32 * tile.num_warps


@prepared
def _prepare_forward(
    rows: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None, bias: Tensor | None,
    format: str, group_size: int, dtype: torch.dtype, precision: str,
) -> Product:  # fmt: skip
    from lmops.kernels.quantized_matmul import quantized_matmul_kernel

    (n_rows, n_in), (units, n_out) = rows.shape, packed.shape[:2]
    target = target_name()
    scaled = group_size != -1 or offsets is not None
    compute = _compute_type(dtype, scales.dtype, offsets is not None, scaled, target)
    converted = dtype != torch.float32 and compute != dtype
    shift = next(t for t in (zeros, offsets, scales) if t is not None)
    tile = quantized_matmul_tile(n_rows, n_out, units, group_size, shift is not scales, compute, converted, target)
    return product(
        quantized_matmul_kernel, tile, n_rows, n_out, bias is not None, n_in, len(scales), -(-units // tile.splits),
        rows.stride(0), EDGE=n_in % unit_columns(format) != 0,
        SCALES_AHEAD=_ahead(scales, tile, group_size, unit_columns(format)),
        SHIFT_AHEAD=_ahead(shift, tile, group_size, unit_columns(format)),
        **_arguments(rows, zeros, offsets, format, group_size, compute, precision, target),
    )  # fmt: skip


def _forward_triton(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, bias: Tensor | None, format: str, group_size: int,
) -> Tensor:  # fmt: skip
    y = _forward_fake(x, packed, scales, zeros, offsets, permutation, bias, format, group_size)
    if y.numel() == 0:
        return y
    rows = x.reshape(-1, x.shape[-1])
    if permutation is not None:
        rows = rows.index_select(1, permutation)
    if rows.stride(1) != 1 or rows.stride(0) * rows.element_size() % 16 or rows.data_ptr() % 16:
        # a copy with rows of whole units is little next to reading numbers of 2 bytes one by one for every tile
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % unit_columns(format))).contiguous()
    precision = torch.get_float32_matmul_precision()
    plan = _prepare_forward(rows, packed, scales, zeros, offsets, bias, format, group_size, x.dtype, precision)
    run_product(plan, len(rows), bias, y, rows, packed, scales, zeros if offsets is None else offsets)
    return y


def _forward_cpu(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, bias: Tensor | None, format: str, group_size: int,
) -> Tensor:  # fmt: skip
    compute = torch.promote_types(x.dtype, torch.float32)
    rows_of_x = x.reshape(-1, x.shape[-1]).to(compute)
    y = torch.empty(len(rows_of_x), packed.shape[1], dtype=compute)
    for rows, w in _chunks(packed, scales, zeros, offsets, permutation, format, group_size, x.shape[-1], compute):
        y[:, rows] = rows_of_x @ w.T
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def _backward_fake(
    dy: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, format: str, group_size: int, n_in: int,
) -> Tensor:  # fmt: skip
    return dy.new_empty(*dy.shape[:-1], n_in)


@prepared
def _prepare_backward(
    rows: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None, format: str,
    group_size: int, n_in: int, precision: str,
) -> Launch:  # fmt: skip
    """A launch whose leading arguments are rows, the weight's tensors, and dx."""
    from lmops.kernels.quantized_matmul import quantized_matmul_dx_kernel

    n_rows, (units, n_out) = len(rows), packed.shape[:2]
    target = target_name()
    compute = _compute_type(rows.dtype, scales.dtype, offsets is not None, True, target)
    small = compute == torch.float32 or (group_size % 32 and group_size != -1)
    block_m, block_n, num_warps = (32, 32, 8 if rows.dtype == torch.float32 else 4) if small else (64, 64, 4)
    return Launch(
        quantized_matmul_dx_kernel, (units * -(-n_rows // block_n),), n_rows, n_out, n_in, len(scales), rows.stride(),
        M=block_m, N=block_n, num_warps=num_warps, num_stages=2,
        **_arguments(rows, zeros, offsets, format, group_size, compute, precision, target),
    )  # fmt: skip


def _backward_triton(
    dy: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, format: str, group_size: int, n_in: int,
) -> Tensor:  # fmt: skip
    dx = _backward_fake(dy, packed, scales, zeros, offsets, permutation, format, group_size, n_in)
    if dx.numel() == 0:
        return dx
    rows = dy.reshape(-1, dy.shape[-1])
    out = dx if permutation is None else torch.empty_like(dx)
    precision = torch.get_float32_matmul_precision()
    launch = _prepare_backward(rows, packed, scales, zeros, offsets, format, group_size, n_in, precision)
    launch(rows, packed, scales, zeros if offsets is None else offsets, out)
    if permutation is not None:
        dx.index_copy_(-1, permutation.long(), out)
    return dx


def _backward_cpu(
    dy: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, format: str, group_size: int, n_in: int,
) -> Tensor:  # fmt: skip
    compute = torch.promote_types(dy.dtype, torch.float32)
    rows_of_dy = dy.reshape(-1, dy.shape[-1]).to(compute)
    dx = torch.zeros(len(rows_of_dy), n_in, dtype=compute)
    for rows, w in _chunks(packed, scales, zeros, offsets, permutation, format, group_size, n_in, compute):
        dx.addmm_(rows_of_dy[:, rows], w)
    return dx.to(dy.dtype).view(*dy.shape[:-1], n_in)


quantized_matmul_forward = define_op(
    "quantized_matmul_forward(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? offsets,"
    " Tensor? permutation, Tensor? bias, str format, int group_size) -> Tensor",
    triton=_forward_triton,
    torch_cpu=_forward_cpu,
    fake=_forward_fake,
)
quantized_matmul_backward = define_op(
    "quantized_matmul_backward(Tensor dy, Tensor packed, Tensor scales, Tensor? zeros, Tensor? offsets,"
    " Tensor? permutation, str format, int group_size, int n_in) -> Tensor",
    triton=_backward_triton,
    torch_cpu=_backward_cpu,
    fake=_backward_fake,
)


class _QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, scales, zeros, offsets, permutation, bias, format, group_size):
        weight = packed, scales, zeros, offsets, permutation
        ctx.save_for_backward(*weight)
        ctx.arguments = format, group_size, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return quantized_matmul_forward(x, *weight, bias, format, group_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = quantized_matmul_backward(dy, *ctx.saved_tensors, *ctx.arguments) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[6] else None
        return dx, None, None, None, None, None, db, None, None


def quantized_matmul(x: Tensor, w: Quantized, bias: Tensor | None = None) -> Tensor:
    """x dequantize(w)^T + bias, without the dequantized weight in memory.

    x: (..., n_in) float16, bfloat16 or float32 (on a CPU also float64), any strides.
    w: a `lmops.quantization.QuantizedTensor` (n_out, n_in) on x's device.
    bias: (n_out,) floating point, or None.
    Returns (..., n_out) in x's dtype, added up in float32. On a GPU the weight is rounded to x's dtype before it is
    multiplied, as if it had been dequantized to it. Differentiable once with respect to x and bias; w is a constant.
    Raises TypeError or ValueError for another dtype, width, shape of bias, or device.
    """
    if not hasattr(w, "packed"):
        raise TypeError(f"w must be a lmops.quantization.QuantizedTensor, got {type(w).__name__}")
    if x.dtype not in FLOATS and (x.dtype != torch.float64 or x.device.type == "cuda"):
        raise TypeError(f"x must be float16, bfloat16 or float32 (on a CPU also float64), got {x.dtype}")
    n_out, n_in = w.shape
    if x.ndim == 0 or x.shape[-1] != n_in:
        raise ValueError(f"x must be (..., {n_in}) for a weight of shape {(n_out, n_in)}, got {tuple(x.shape)}")
    if bias is not None and (bias.shape != (n_out,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be ({n_out},) floating point, got {tuple(bias.shape)} {bias.dtype}")
    for what, t in (("w", w.packed), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{what} must be on {x.device} like x, got {t.device}")
    arguments = (x, w.packed, w.scales, w.zeros, w.offsets, w.permutation, bias, w.format, w.group_size)
    run = _QuantizedMatmul.apply if differentiated(x, bias) else quantized_matmul_forward
    return run(*arguments)
