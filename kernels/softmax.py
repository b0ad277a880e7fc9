"""Softmax and log-softmax of rows with a temperature, forward and backward (docs/kernels.md has the sketches).

Rows are addressed as (outer, row, column): a program takes ROWS neighbouring rows of one outer index. Rows that fit
one tile of COLS columns (FITS) are read once. Longer ones are streamed: the statistics of all tiles first, the first
tile last, since it then stays in registers; the others are read a second time to be written.

Positions and columns: a row seldom starts on a 16-byte boundary unless its length is a multiple of VEC elements, and
an access is only vectorised where the compiler sees that a whole aligned group of VEC elements shares one mask value.
So positions p count from the boundary at or before the row, `shift` elements early: column = p - shift. The main tile
takes the groups that lie wholly inside the row; the at most VEC - 1 columns before and after them are the edge tile
(EDGE > 0). No access leaves the row. VEC is 1 where the tensors are not aligned alike.
"""

import triton
import triton.language as tl

from .common import LN2, LOG2E, online_softmax_step, row_offset

NO_COLUMN: tl.constexpr = tl.constexpr(2147483647)


@triton.jit
def rows_of_program(n_rows, n_cols, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """The program's outer index, its rows (ROWS,), and how many first columns each sees (a scalar or (ROWS, 1))."""
    blocks = tl.cdiv(n_rows, ROWS)
    rows = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    length = n_cols
    if CAUSAL:
        length = tl.minimum(tl.maximum(rows[:, None] + 1 + n_cols - n_rows, 0), n_cols)
    return tl.program_id(0) // blocks, rows, length


@triton.jit
def align(offset, VEC: tl.constexpr):
    """Offsets (R,) rounded down to VEC elements, and by how many: two (R, 1)."""
    aligned = offset // VEC * VEC
    return aligned[:, None], (offset - aligned).to(tl.int32)[:, None]


@triton.jit
def main_mask(p, shift, n_cols, length, VEC: tl.constexpr):
    """(R, C): the group of position p lies inside the row, and some of it before column `length`."""
    first = p // VEC * VEC - shift
    return (first >= 0) & (first + VEC <= n_cols) & (first < length)


@triton.jit
def edge_tile(shift, n_cols, VEC: tl.constexpr, EDGE: tl.constexpr):
    """Positions (R, EDGE) of the partial first and last group, and where they are columns of the row."""
    e = tl.arange(0, EDGE)[None, :]
    last = (shift + n_cols) // VEC * VEC
    p = tl.where(e < VEC, e, last + e - VEC)
    in_first = (e < VEC) & ((shift > 0) | (shift + n_cols < VEC))
    in_last = (e >= VEC) & (e < 2 * VEC) & (last > 0)
    return p, (in_first | in_last) & (p >= shift) & (p < shift + n_cols)


@triton.jit
def load(ptr, offset, mask, visible, fill: tl.constexpr, ACC: tl.constexpr, CAUSAL: tl.constexpr):
    """A tile in the accumulation type, `fill` where it is masked or, with CAUSAL, not visible."""
    tile = tl.load(ptr + offset, mask=mask, other=fill)
    if CAUSAL:
        tile = tl.where(visible, tile, fill)
    return tile.to(ACC)


@triton.jit
def row_temperature(ptr, outer, rows, in_rows, outer_shape, strides, ACC: tl.constexpr, PER_ROW: tl.constexpr):
    """Temperatures (ROWS,); NaN in place of one that is not finite and at least 0."""
    if PER_ROW:
        t = tl.load(ptr + row_offset(outer, rows, outer_shape, strides), mask=in_rows, other=1.0).to(ACC)
    else:
        t = tl.full(rows.shape, 0.0, ACC) + ptr
    return tl.where((t >= 0) & (t < float("inf")), t, float("nan"))


@triton.jit
def inverse(t, numerator: tl.constexpr):
    """numerator / t, 0 for a temperature of 0 and finite where it would overflow."""
    q = numerator / tl.where(t == 0, 1.0, t)
    return tl.where(t == 0, 0.0, tl.where(q > 1e38, 1e38, q))


@triton.jit
def accumulate(x, m, l, scale):
    """Take a tile into the running maximum m and sum l of its rows, each (R,)."""
    _, m, l, _ = online_softmax_step(x, m, l, scale)
    return m, l


@triton.jit
def first_maximum(
    x_ptr, offset, x_col, in_rows, n_cols, length, m, ROWS: tl.constexpr, COLS: tl.constexpr, ACC: tl.constexpr
):
    """Column (ROWS,) of the first entry that equals the row's maximum m, -1 if the row holds a NaN.

    Reads the rows again, in small tiles: few rows need it, and all would pay for the registers of a search in passing.
    """
    SEARCH: tl.constexpr = COLS // 8 if COLS > 128 else 16
    first = tl.full((ROWS,), NO_COLUMN, tl.int32)
    for start in range(0, n_cols, SEARCH):
        c = start + tl.arange(0, SEARCH)[None, :]
        mask = in_rows[:, None] & (c < length)
        x = tl.load(x_ptr + offset[:, None] + c.to(tl.int64) * x_col, mask=mask, other=float("-inf")).to(ACC)
        found = tl.where((x == m[:, None]) & (x > float("-inf")), c, NO_COLUMN)
        first = tl.minimum(first, tl.min(tl.where(x != x, -1, found), 1))
    return first


@triton.jit
def normalise(x, column, m, l, first, scale, t, GREEDY: tl.constexpr, LOG: tl.constexpr):
    """Probabilities of a tile, or their logarithms, from its rows' statistics."""
    peak = tl.where(m == float("-inf"), 0.0, m)[:, None]
    total = tl.where(l == 0, 1.0, l)[:, None]
    z = (x - peak) * scale[:, None]
    y = (z - tl.log2(total)) * LN2 if LOG else tl.exp2(z) * (1 / total)
    if GREEDY:
        no, yes = float("-inf") if LOG else 0.0, 0.0 if LOG else 1.0
        one_hot = tl.where(column == first[:, None], yes, no)
        y = tl.where(t[:, None] == 0, tl.where(first[:, None] < 0, float("nan"), one_hot), y)
    return y


@triton.jit
def softmax_forward_kernel(
    x_ptr, y_ptr, t_ptr, outer_shape, n_rows, n_cols, x_strides, y_strides, t_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr, FITS: tl.constexpr,
    PER_ROW: tl.constexpr, GREEDY: tl.constexpr, CAUSAL: tl.constexpr, LOG: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = softmax(x / t), or its logarithm with LOG, over the last dimension.

    x, y: (*outer, n_rows, n_cols), any strides, in elements.
    t: a number or, with PER_ROW, a pointer to (*outer, n_rows). 0 gives the one-hot of the row's first maximum
    (compiled in with GREEDY), anything but a finite number of at least 0 gives NaN.
    CAUSAL: row i sees the columns 0 .. i + n_cols - n_rows, the others are neither read nor weighed.
    A row that sees nothing but -inf gives 0 (LOG: -inf).
    """
    outer, rows, length = rows_of_program(n_rows, n_cols, ROWS, CAUSAL)
    in_rows = rows < n_rows
    t = row_temperature(t_ptr, outer, rows, in_rows, outer_shape, t_strides, ACC, PER_ROW)
    scale = inverse(tl.where(t == 0, 1.0, t), LOG2E)
    x_offset = row_offset(outer, rows, outer_shape, x_strides)
    x_row, shift = align(x_offset, VEC)
    y_row, _ = align(row_offset(outer, rows, outer_shape, y_strides), VEC)
    x_col, y_col = x_strides[len(x_strides) - 1], y_strides[len(y_strides) - 1]

    m = tl.full((ROWS,), float("-inf"), ACC)
    l = tl.zeros((ROWS,), ACC)
    tile = tl.arange(0, COLS)[None, :]
    if not FITS:
        stop = tl.max(length + shift) if CAUSAL else n_cols + VEC - 1
        for start in range(COLS, stop, COLS):
            p = start + tile
            mask = in_rows[:, None] & main_mask(p, shift, n_cols, length, VEC)
            x = load(x_ptr, x_row + p.to(tl.int64) * x_col, mask, p - shift < length, float("-inf"), ACC, CAUSAL)
            m, l = accumulate(x, m, l, scale)
    # the edges and the first tile last: they are still in registers when the statistics are complete
    if EDGE:
        e, in_edge = edge_tile(shift, n_cols, VEC, EDGE)
        in_edge = in_edge & in_rows[:, None]
        x_edge = load(x_ptr, x_row + e, in_edge & (e - shift < length), True, float("-inf"), ACC, False)
        m, l = accumulate(x_edge, m, l, scale)
    mask = in_rows[:, None] & main_mask(tile, shift, n_cols, length, VEC)
    seen = tile - shift < length
    x = load(x_ptr, x_row + tile.to(tl.int64) * x_col, mask, seen, float("-inf"), ACC, CAUSAL)
    m, l = accumulate(x, m, l, scale)

    first = tl.full((ROWS,), NO_COLUMN, tl.int32)
    if GREEDY:
        if tl.min(t) == 0:
            first = first_maximum(x_ptr, x_offset, x_col, in_rows, n_cols, length, m, ROWS, COLS, ACC)
    if EDGE:
        y = normalise(x_edge, e - shift, m, l, first, scale, t, GREEDY, LOG)
        tl.store(y_ptr + y_row + e, y, mask=in_edge)
    y = normalise(x, tile - shift, m, l, first, scale, t, GREEDY, LOG)
    mask = in_rows[:, None] & main_mask(tile, shift, n_cols, n_cols, VEC)
    tl.store(y_ptr + y_row + tile.to(tl.int64) * y_col, y, mask=mask)
    if not FITS:
        for start in range(COLS, n_cols + VEC - 1, COLS):
            p = start + tile
            mask = in_rows[:, None] & main_mask(p, shift, n_cols, length, VEC)
            x = load(x_ptr, x_row + p.to(tl.int64) * x_col, mask, p - shift < length, float("-inf"), ACC, CAUSAL)
            y = normalise(x, p - shift, m, l, first, scale, t, GREEDY, LOG)
            mask = in_rows[:, None] & main_mask(p, shift, n_cols, n_cols, VEC)
            tl.store(y_ptr + y_row + p.to(tl.int64) * y_col, y, mask=mask)


@triton.jit
def gradient(y, dy, total, LOG: tl.constexpr):
    """Gradient with respect to x / t of a tile, from the row's `total`; 0 at masked entries."""
    return dy - tl.exp2(y * LOG2E) * total if LOG else y * (dy - total)


@triton.jit
def load_y_dy(
    y_ptr, dy_ptr, y_offset, dy_offset, mask, visible, ACC: tl.constexpr, CAUSAL: tl.constexpr, LOG: tl.constexpr
):
    """Tiles of y and dy; entries that the forward masked out (y = 0, LOG: -inf) take no part: dy is 0 there."""
    nothing: tl.constexpr = float("-inf") if LOG else 0.0
    y = load(y_ptr, y_offset, mask, visible, nothing, ACC, CAUSAL)
    dy = load(dy_ptr, dy_offset, mask, True, 0.0, ACC, False)
    return y, tl.where(y == nothing, 0.0, dy)


@triton.jit
def weigh(g, y, LOG: tl.constexpr):
    """Sum over a tile's columns of g log(softmax): what the temperature's gradient adds up."""
    if LOG:
        log_y = tl.where(y == float("-inf"), 0.0, y)
    else:
        log_y = tl.log2(tl.where(y == 0, 1.0, y)) * LN2
    return tl.sum(g * log_y, 1)


@triton.jit
def softmax_backward_kernel(
    y_ptr, dy_ptr, dx_ptr, t_ptr, dt_ptr, outer_shape, n_rows, n_cols,
    y_strides, dy_strides, dx_strides, t_strides, dt_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr, FITS: tl.constexpr,
    PER_ROW: tl.constexpr, CAUSAL: tl.constexpr, LOG: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx = y (dy - sum(y dy)) / t, or with LOG (dy - exp(y) sum(dy)) / t; with PER_ROW also dt = -sum(dx log(softmax)).

    y: what the forward returned, dy and dx: all (*outer, n_rows, n_cols); t, dt: (*outer, n_rows).
    The weights z = x / t of dt = -sum(g z) / t are taken as log(softmax), which differs from z by a constant a row:
    the gradients g of a row add up to 0, so x need not be kept. A temperature of 0 has gradients of 0.
    """
    outer, rows, length = rows_of_program(n_rows, n_cols, ROWS, CAUSAL)
    in_rows = rows < n_rows
    inverse_t = inverse(row_temperature(t_ptr, outer, rows, in_rows, outer_shape, t_strides, ACC, PER_ROW), 1.0)
    y_row, shift = align(row_offset(outer, rows, outer_shape, y_strides), VEC)
    dy_row, _ = align(row_offset(outer, rows, outer_shape, dy_strides), VEC)
    dx_row, _ = align(row_offset(outer, rows, outer_shape, dx_strides), VEC)
    y_col, dy_col = y_strides[len(y_strides) - 1], dy_strides[len(dy_strides) - 1]
    dx_col = dx_strides[len(dx_strides) - 1]

    total = tl.zeros((ROWS,), ACC)
    tile = tl.arange(0, COLS)[None, :]
    if not FITS:
        stop = tl.max(length + shift) if CAUSAL else n_cols + VEC - 1
        for start in range(COLS, stop, COLS):
            p = (start + tile).to(tl.int64)
            mask = in_rows[:, None] & main_mask(start + tile, shift, n_cols, length, VEC)
            seen = start + tile - shift < length
            y, dy = load_y_dy(y_ptr, dy_ptr, y_row + p * y_col, dy_row + p * dy_col, mask, seen, ACC, CAUSAL, LOG)
            total += tl.sum(dy if LOG else y * dy, 1)
    if EDGE:
        e, in_edge = edge_tile(shift, n_cols, VEC, EDGE)
        in_edge = in_edge & in_rows[:, None]
        seen_edge = in_edge & (e - shift < length)
        y_edge, dy_edge = load_y_dy(y_ptr, dy_ptr, y_row + e, dy_row + e, seen_edge, True, ACC, False, LOG)
        total += tl.sum(dy_edge if LOG else y_edge * dy_edge, 1)
    p = tile.to(tl.int64)
    mask = in_rows[:, None] & main_mask(tile, shift, n_cols, length, VEC)
    seen = tile - shift < length
    y, dy = load_y_dy(y_ptr, dy_ptr, y_row + p * y_col, dy_row + p * dy_col, mask, seen, ACC, CAUSAL, LOG)
    total += tl.sum(dy if LOG else y * dy, 1)

    weighed = tl.zeros((ROWS,), ACC)
    if EDGE:
        g = gradient(y_edge, dy_edge, total[:, None], LOG) * inverse_t[:, None]
        if PER_ROW:
            weighed += weigh(g, y_edge, LOG)
        tl.store(dx_ptr + dx_row + e, g, mask=in_edge)
    g = gradient(y, dy, total[:, None], LOG) * inverse_t[:, None]
    if PER_ROW:
        weighed += weigh(g, y, LOG)
    mask = in_rows[:, None] & main_mask(tile, shift, n_cols, n_cols, VEC)
    tl.store(dx_ptr + dx_row + p * dx_col, g, mask=mask)
    if not FITS:
        for start in range(COLS, n_cols + VEC - 1, COLS):
            p = (start + tile).to(tl.int64)
            mask = in_rows[:, None] & main_mask(start + tile, shift, n_cols, length, VEC)
            seen = start + tile - shift < length
            y, dy = load_y_dy(y_ptr, dy_ptr, y_row + p * y_col, dy_row + p * dy_col, mask, seen, ACC, CAUSAL, LOG)
            g = gradient(y, dy, total[:, None], LOG) * inverse_t[:, None]
            if PER_ROW:
                weighed += weigh(g, y, LOG)
            mask = in_rows[:, None] & main_mask(start + tile, shift, n_cols, n_cols, VEC)
            tl.store(dx_ptr + dx_row + p * dx_col, g, mask=mask)
    if PER_ROW:
        dt = row_offset(outer, rows, outer_shape, dt_strides)
        tl.store(dt_ptr + dt, -weighed, mask=in_rows)
