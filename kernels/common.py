"""Device helpers that more than one kernel uses."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def row_offset(outer, rows, outer_shape, strides):
    """Offset in elements of each row of a tensor: rows * strides[-1] + sum of outer index d * strides[d].

    outer: scalar, the linear index over outer_shape; rows: (R,) indices in the innermost row dimension;
    strides: one a dimension of outer_shape, then the row's. Returns (R,) int64.
    """
    offset = rows.to(tl.int64) * strides[len(outer_shape)]
    for d in tl.static_range(len(outer_shape) - 1, -1, -1):
        offset += (outer % outer_shape[d]).to(tl.int64) * strides[d]
        outer = outer // outer_shape[d]
    return offset


@triton.jit
def online_softmax_step(x, m, l, scale, FOLD: tl.constexpr = False, GUARD: tl.constexpr = True):
    """One tile of the online softmax (Milakov and Gimelshein, 2018), in base 2.

    x: (R, C) scores, -inf where masked; m: (R,) maximum so far, -inf at first; l: (R,) sum of exponentials so far;
    scale: log2(e) / temperature, (R,). Returns p = 2^((x - m') scale), m', l' and the factor 2^((m - m') scale) by
    which whatever was accumulated under m must be multiplied.
    l may be (R, PARTS), sums of every PARTS-th column, to be added up after the last tile: with 8, of a product of
    tensor cores, they are sums of what a lane holds, and lanes need not exchange theirs at every step.
    FOLD: scale is a positive scalar and m holds the maximum of x scale, so that an element costs one multiply-add;
    that overflows where x scale does. GUARD: a row may have nothing in it but -inf.
    """
    top = tl.max(x, 1)
    m_new = tl.maximum(m, top * scale if FOLD else top)
    # a row with nothing in it yet: subtract 0, so that -inf stays -inf and does not become NaN
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if GUARD else m_new
    if FOLD:
        p = tl.exp2(x * scale - shift[:, None])
        alpha = tl.exp2(m - shift)
    else:
        p = tl.exp2((x - shift[:, None]) * tl.expand_dims(scale, 1))
        alpha = tl.exp2((m - shift) * scale)
    if len(l.shape) == 1:
        l = l * alpha + tl.sum(p, 1)
    else:
        l = l * alpha[:, None] + tl.sum(p.reshape(p.shape[0], p.shape[1] // l.shape[1], l.shape[1]), 1)
    return p, m_new, l, alpha


@triton.jit
def tanh(x):
    """Hyperbolic tangent: from the exponential, and near 0, where that would lose digits, the series."""
    e = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    t = (1 - e) / (1 + e)
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 0.0625, series, tl.where(x < 0, -t, t))
