"""Products of 8-bit numbers: x quantized a row on the fly, times an int8 or fp8 weight with a scale a row.

The weight is the packed layout of kernels/quantized_matmul.py read as bytes: (units, n_out, 64). A product does not
mind the order of its columns, so the codes of x are written in the order that a unit of the weight has, and neither is
unpacked: byte 2 p + i of a unit is column 32 i + word(p), where word(8 t + 4 c + 2 h + b) = 16 c + 8 h + 2 t + b.
"""

import triton
import triton.language as tl


@triton.jit
def load_smooth(x_ptr, smooth_ptr, columns, n_in, SMOOTH: tl.constexpr):
    """Columns of a row of x in float32, divided by their `smooth`; 0 behind the last."""
    x = tl.load(x_ptr + columns, mask=columns < n_in, other=0.0).to(tl.float32)
    if SMOOTH:
        x = tl.div_rn(x, tl.load(smooth_ptr + columns, mask=columns < n_in, other=1.0).to(tl.float32))
    return x


@triton.jit(do_not_specialize=["n_rows"])
def quantize_rows_kernel(
    x_ptr, smooth_ptr, codes_ptr, scales_ptr, n_rows, n_in, n_bytes, x_stride,
    SMOOTH: tl.constexpr, FP8: tl.constexpr, FITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """codes = round(x / smooth / scale), half to even, with scale = max |x / smooth| / 127 of a row (FP8: / 448, e4m3).

    x: (n_rows, n_in), rows x_stride elements apart; smooth: (n_in,), with SMOOTH; codes: (n_rows, n_bytes), in the
    order of packed units, 0 behind n_in; scales: (n_rows,) float32, NaN for a row with NaN or infinity, 1 for one of 0.
    FITS: BLOCK columns are all of them, and x is read once.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    codes_ptr += row * n_bytes
    block = tl.arange(0, BLOCK)
    x = load_smooth(x_ptr, smooth_ptr, block, n_in, SMOOTH)
    top = tl.abs(x)
    bad = tl.where(x - x == 0, 0, 1)
    if not FITS:
        for start in range(BLOCK, n_in, BLOCK):
            x = load_smooth(x_ptr, smooth_ptr, start + block, n_in, SMOOTH)
            top = tl.maximum(top, tl.abs(x))
            bad = tl.maximum(bad, tl.where(x - x == 0, 0, 1))
    largest = tl.max(top, 0)
    scale = tl.div_rn(largest, 448.0 if FP8 else 127.0)
    scale = tl.where(scale == 0, 1.0, scale)
    good = tl.max(bad, 0) == 0
    tl.store(scales_ptr + row, tl.where(good, scale, float("nan")))
    for start in range(0, n_bytes, BLOCK):
        if not FITS:
            x = load_smooth(x_ptr, smooth_ptr, start + block, n_in, SMOOTH)
        q = tl.div_rn(tl.where(good, x, 0.0), scale)
        if FP8:
            q = tl.minimum(tl.maximum(q, -448.0), 448.0).to(tl.float8e4nv)
        else:  # adding 1.5 2^23 leaves no bits behind the point
            q = (tl.minimum(tl.maximum(q, -127.0), 127.0) + 12582912.0) - 12582912.0
            q = q.to(tl.int8)
        q = q.reshape(BLOCK // 64, 2, 2, 2, 4, 2).permute(0, 4, 2, 3, 5, 1).reshape(BLOCK)
        tl.store(codes_ptr + start + block, q, mask=start + block < n_bytes)


@triton.jit(do_not_specialize=["n_rows", "blocks_a_split"])
def int8_matmul_kernel(
    codes_ptr, x_scales_ptr, w_ptr, w_scales_ptr, bias_ptr, y_ptr, n_rows, n_out, n_bytes, blocks_a_split,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr,
    EDGE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """y = (codes W^T) x_scales w_scales + bias, products of 8 bits added up in int32 (FP8: e4m3 in float32).

    codes: (n_rows, n_bytes); W: (n_bytes / 64, n_out, 64); x_scales: (n_rows,) float32; w_scales, bias: (n_out,).
    y: (n_rows, n_out), computed transposed. SPLIT: a program takes blocks_a_split blocks of K bytes, and y is
    (splits, n_rows, n_out) in float32, without the bias. EDGE: n_bytes is no multiple of K.
    """
    n_out_tiles = tl.cdiv(n_out, M)
    out0, row0 = tl.program_id(0) % n_out_tiles * M, tl.program_id(0) // n_out_tiles * N
    split = tl.program_id(1)
    outs, rows, k = out0 + tl.arange(0, M), row0 + tl.arange(0, N), tl.arange(0, K)
    in_outs, in_rows = outs < n_out, rows < n_rows
    codes_ptr += tl.cast(row0, tl.int64) * n_bytes
    x_offset = tl.arange(0, N)[None, :] * n_bytes + k[:, None]
    unit_stride = tl.cast(n_out, tl.int64) * 64
    w_offset = (k // 64)[None, :] * unit_stride + (tl.arange(0, M)[:, None] * 64 + (k % 64)[None, :])
    w_ptr += tl.cast(out0, tl.int64) * 64
    acc = tl.zeros((M, N), tl.float32 if FP8 else tl.int32)
    ZERO: tl.constexpr = 0.0 if FP8 else 0
    begin = split * blocks_a_split
    for block in range(begin, tl.minimum(begin + blocks_a_split, tl.cdiv(n_bytes, K))):
        w_mask, x_mask = in_outs[:, None], in_rows[None, :]
        if EDGE:
            inside = block * K + k < n_bytes
            w_mask, x_mask = w_mask & inside[None, :], x_mask & inside[:, None]
        w = tl.load(w_ptr + block * (K // 64) * unit_stride + w_offset, mask=w_mask, other=ZERO)
        x = tl.load(codes_ptr + block * K + x_offset, mask=x_mask, other=ZERO)
        if FP8:
            acc = tl.dot(w, x, acc)
        else:
            acc = tl.dot(w, x, acc, out_dtype=tl.int32)
    x_scales = tl.load(x_scales_ptr + rows, mask=in_rows, other=0.0)
    y = acc.to(tl.float32) * tl.load(w_scales_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)[:, None]
    y *= x_scales[None, :]
    if BIAS:
        y += tl.load(bias_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        y_ptr += tl.cast(split, tl.int64) * n_rows * n_out
    y_offset = rows.to(tl.int64)[None, :] * n_out + outs[:, None]
    tl.store(y_ptr + y_offset, y.to(y_ptr.dtype.element_ty), mask=in_rows[None, :] & in_outs[:, None])
