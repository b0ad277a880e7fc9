"""Quantized weights in plain torch: the packed layout, what its numbers mean, and the matmul: the specification.

A weight (n_out, n_in) is held as codes u and, for each group of `group_size` columns of a row, a scale s:

    w = s (u - 8)       int4, u in 0 .. 15          w = s u       int8, u in -128 .. 127; fp8, u an e4m3 number
    w = s (u - z)       with integer zero points    w = s u + z   with floating-point offsets

Codes are packed 16 bits at a time, in units of 128 columns (int4) or 64 columns (int8, fp8), into (units, n_out, 32):

    int4    bits    15..12   11..8    7..4     3..0        8 bits    bits     15..8     7..0
            column  96 + j   64 + j   32 + j   j                     column   32 + j    j         of unit u, word j

so a unit of a row is 64 bytes, and one shift and mask of its words gives a part of 32 neighbouring columns. In memory
word j = 16 c + 8 h + 2 t + b (c, h, b < 2, t < 4) is at place 8 t + 4 c + 2 h + b: the four lanes of a tensor core that
share a row read 16 bytes each and then hold the columns that they need. Columns behind n_in are packed as 0. Scales,
zeros and offsets are (groups, n_out).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

WORDS = 32  # of 16 bits, a unit of a row


def bits_of(format: str) -> int:
    """Bits of a code."""
    return 4 if format == "int4" else 8


def unit_columns(format: str) -> int:
    """Columns that a unit of the packed layout holds."""
    return WORDS * 16 // bits_of(format)


def pack(codes: Tensor, format: str) -> Tensor:
    """(n_out, n_in) codes, integers or for fp8 float8_e4m3fn, as (units, n_out, 32) int16."""
    bits, columns = bits_of(format), unit_columns(format)
    u = (codes.view(torch.uint8) if codes.dtype == torch.float8_e4m3fn else codes.to(torch.int16) & (1 << bits) - 1).to(
        torch.int32
    )
    u = F.pad(u, (0, -u.shape[1] % columns)).unflatten(1, (-1, 16 // bits, WORDS))  # (n_out, units, part, word)
    words = u[:, :, 0]
    for part in range(1, 16 // bits):
        words = words | u[:, :, part] << bits * part
    places = words.unflatten(2, (2, 2, 4, 2)).permute(1, 0, 4, 2, 3, 5)  # (units, n_out, t, c, h, b)
    return places.to(torch.int16).reshape(-1, codes.shape[0], WORDS)  # the upper bits wrap


def unpack(packed: Tensor, format: str, n_in: int) -> Tensor:
    """The inverse of `pack`: int4 as uint8, int8 as int8, fp8 as float8_e4m3fn."""
    bits = bits_of(format)
    shifts = torch.arange(0, 16, bits, dtype=torch.int16, device=packed.device)[:, None]
    words = packed.unflatten(2, (4, 2, 2, 2)).permute(0, 1, 3, 4, 2, 5).flatten(2)
    parts = (words.unsqueeze(2) >> shifts) & ((1 << bits) - 1)  # (units, n_out, part, word)
    u = parts.to(torch.uint8).permute(1, 0, 2, 3).flatten(1)[:, :n_in].contiguous()
    return u if format == "int4" else u.view(torch.int8 if format == "int8" else torch.float8_e4m3fn)


def per_column(groups: Tensor, group_size: int, n_in: int) -> Tensor:
    """A value a group, (groups, n_out), as one a column, (n_out, n_in)."""
    if len(groups) == 1:
        return groups.T
    return groups.T.repeat_interleave(group_size, 1)[:, :n_in]


def dequantize(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    offsets: Tensor | None,
    permutation: Tensor | None,
    format: str,
    group_size: int,
    n_in: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight (n_out, n_in), computed in promote_types(dtype, float32) and rounded once.

    zeros, offsets: (groups, n_out), at most one of them. permutation: (n_in,), packed column k is column
    permutation[k] of the weight.
    """
    compute = torch.promote_types(dtype, torch.float32)
    w = unpack(packed, format, n_in).to(compute)
    s = per_column(scales.to(compute), group_size, n_in)
    if offsets is not None:
        w = w.mul_(s).add_(per_column(offsets.to(compute), group_size, n_in))
    elif zeros is not None:
        w = w.sub_(per_column(zeros.to(compute), group_size, n_in)).mul_(s)
    else:
        w = (w.sub_(8) if format == "int4" else w).mul_(s)
    if permutation is not None:
        w = torch.empty_like(w).index_copy_(1, permutation.long(), w)
    return w.to(dtype)


def row_chunks(n_out: int, n_in: int, elements: int = 1 << 20) -> Iterator[slice]:
    """Slices over n_out rows of n_in columns, of about so many elements each."""
    step = max(1, elements // max(1, n_in))
    return (slice(start, min(start + step, n_out)) for start in range(0, n_out, step))


def quantized_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., n_in) times the dequantized weight (n_out, n_in) transposed, plus bias; in float32 at least."""
    compute = torch.promote_types(x.dtype, torch.float32)
    y = x.to(compute) @ weight.to(compute).T
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)


def quantize_rows(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Rows of x (rows, n) as codes, int8 or float8_e4m3fn, and scales (rows, 1) float32: x is about codes * scales.

    A scale is the largest magnitude over 127 (fp8: 448), 1 for a row of zeros, NaN for one that is not finite.
    """
    x = x.float()
    largest = 448.0 if format == "fp8" else 127.0
    scales = x.abs().amax(1, keepdim=True) / largest
    scales = scales.masked_fill(scales == 0, 1.0)
    q = (x.nan_to_num(0.0, 0.0, 0.0) / scales.nan_to_num(1.0, 1.0)).clamp(-largest, largest)
    codes = q.to(torch.float8_e4m3fn) if format == "fp8" else q.round().to(torch.int8)
    return codes, scales.masked_fill(~scales.isfinite(), float("nan"))


def int8_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, smooth: Tensor | None, bias: Tensor | None, format: str
) -> Tensor:
    """x (..., n_in) / smooth (n_in,) quantized a row, times an 8-bit weight with scales (1, n_out), plus bias."""
    return int8_matmul_of_codes(x, unpack(packed, format, x.shape[-1]), scales, smooth, bias)


def int8_matmul_of_codes(x: Tensor, w: Tensor, scales: Tensor, smooth: Tensor | None, bias: Tensor | None) -> Tensor:
    """The same of codes w (n_out, n_in), int8 or float8_e4m3fn."""
    rows, fp8 = x.reshape(-1, x.shape[-1]), w.dtype == torch.float8_e4m3fn
    rows = rows if smooth is None else rows.float() / smooth.float()
    codes, x_scales = quantize_rows(rows, "fp8" if fp8 else "int8")
    # of one column torch._int_mm gives garbage on a CPU
    in_floats = fp8 or w.shape[1] == 1
    exact = codes.float() @ w.float().T if in_floats else torch._int_mm(codes, w.T).float()
    y = exact * scales.float() * x_scales
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], w.shape[0])
