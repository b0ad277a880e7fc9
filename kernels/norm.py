"""RMSNorm and LayerNorm with the residual's addition, forward and backward (docs/kernels.md has the sketches).

Rows are walked through as in softmax.py: ROWS neighbouring rows a program, in one tile of COLS columns where they fit
(FITS), otherwise streamed, with the first tile last, since it is still in registers when the statistics are complete.
CENTRED is LayerNorm. Statistics are float32 planes of one tensor (planes, *rows): 1 / sqrt(var + eps), then the mean.
"""

import triton
import triton.language as tl

from .common import row_offset
from .softmax import align, edge_tile, main_mask, rows_of_program


@triton.jit
def load_sum(
    x_ptr, residual_ptr, h_ptr, x_at, residual_at, h_at, mask, RESIDUAL: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """A tile of h = x + residual, rounded to x's type as it is stored; without RESIDUAL a tile of x."""
    h = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    if RESIDUAL:
        residual = tl.load(residual_ptr + residual_at, mask=mask, other=0.0)
        h = (h.to(ACC) + residual.to(ACC)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + h_at, h, mask=mask)
    return h.to(ACC)


@triton.jit
def count_columns(start, shift, n_cols, COLS: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr):
    """How many columns of each row the main tile from position `start` on holds: (R, 1), without EDGE a scalar."""
    first, last = start, start + COLS
    if EDGE:
        first = tl.maximum(tl.where(shift > 0, VEC, 0), first)
        last = tl.minimum((shift + n_cols) // VEC * VEC, last)
    else:
        last = tl.minimum(n_cols, last)
    count = last - first
    return tl.where(count > 0, count, 0)


@triton.jit
def divide(x, y):
    """x / y and, below, 1 / sqrt(x): a few numbers a row, which float32 rounds as it should, not approximately."""
    y = y + tl.zeros_like(x)
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def inverse_root(x):
    root = tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)
    return divide(tl.full(x.shape, 1.0, x.dtype), root)


@triton.jit
def take(h, inside, count, n, mean, m2, CENTRED: tl.constexpr):
    """Take a tile with `count` columns inside into the statistics of n columns: all (R, 1).

    m2 is the sum of squares, CENTRED that of distances from the mean, put together as Chan et al. (1979) do: nothing
    large is subtracted from anything large.
    """
    if CENTRED:
        tile_mean = divide(tl.sum(h, 1, keep_dims=True), tl.where(count > 0, count, 1))
        away = tl.where(inside, h - tile_mean, 0.0)
        total = n + count
        moved = tile_mean - mean
        share = count / tl.where(total > 0, total, 1.0)
        m2 += tl.sum(away * away, 1, keep_dims=True) + tl.where(count > 0, moved * moved * (n * share), 0.0)
        mean += tl.where(count > 0, moved * share, 0.0)
        n = total
    else:
        m2 += tl.sum(h * h, 1, keep_dims=True)
    return n, mean, m2


@triton.jit
def normalise(
    h, column, inside, mean, rstd, weight_ptr, bias_ptr, weight_offset,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """(h - mean) rstd (weight + weight_offset) + bias of a tile."""
    y = (h - mean) * rstd if CENTRED else h * rstd
    if WEIGHT:
        y *= tl.load(weight_ptr + column, mask=inside, other=0.0).to(h.dtype) + weight_offset
    if BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0.0).to(h.dtype)
    return y


@triton.jit(do_not_specialize=["plane", "eps", "weight_offset"])
def norm_forward_kernel(
    x_ptr, residual_ptr, h_ptr, y_ptr, weight_ptr, bias_ptr, stats_ptr, outer_shape, n_rows, n_cols, plane, eps,
    weight_offset, x_strides, residual_strides, h_strides, y_strides, stats_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr, FITS: tl.constexpr,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, STATS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """h = x + residual; y = z / sqrt(mean(z^2) + eps) (weight + weight_offset) + bias, z = h, CENTRED h - mean(h).

    x, residual, h, y: (*outer, n_rows, n_cols), any strides, in elements. Without RESIDUAL h is x, and not written.
    weight, bias: (n_cols,). stats: (planes, *outer, n_rows), `plane` elements apart, written with STATS.
    """
    outer, rows, _ = rows_of_program(n_rows, n_cols, ROWS, False)
    in_rows = (rows < n_rows)[:, None]
    x_row, shift = align(row_offset(outer, rows, outer_shape, x_strides), VEC)
    y_row, _ = align(row_offset(outer, rows, outer_shape, y_strides), VEC)
    x_col, y_col = x_strides[len(x_strides) - 1], y_strides[len(y_strides) - 1]
    r_row, r_col, h_row, h_col, h_from = x_row, x_col, x_row, x_col, x_ptr
    if RESIDUAL:
        r_row, _ = align(row_offset(outer, rows, outer_shape, residual_strides), VEC)
        h_row, _ = align(row_offset(outer, rows, outer_shape, h_strides), VEC)
        r_col, h_col = residual_strides[len(residual_strides) - 1], h_strides[len(h_strides) - 1]
        h_from = h_ptr
    if not EDGE:  # known when it is compiled, so that columns are the same for all rows
        shift = 0

    n = tl.zeros((ROWS, 1), ACC)
    mean = tl.zeros((ROWS, 1), ACC)
    m2 = tl.zeros((ROWS, 1), ACC)
    tile = tl.arange(0, COLS)[None, :]
    if not FITS:
        for start in range(COLS, n_cols + VEC - 1, COLS):
            p = (start + tile).to(tl.int64)
            inside = in_rows & main_mask(start + tile, shift, n_cols, n_cols, VEC)
            h = load_sum(
                x_ptr, residual_ptr, h_ptr, x_row + p * x_col, r_row + p * r_col, h_row + p * h_col, inside,
                RESIDUAL, ACC,
            )  # fmt: skip
            count = count_columns(start, shift, n_cols, COLS, VEC, EDGE)
            n, mean, m2 = take(h, inside, count, n, mean, m2, CENTRED)
    # the edges and the first tile last: they are still in registers when the statistics are complete
    if EDGE:
        e, in_edge = edge_tile(shift, n_cols, VEC, EDGE)
        in_edge = in_edge & in_rows
        h_edge = load_sum(x_ptr, residual_ptr, h_ptr, x_row + e, r_row + e, h_row + e, in_edge, RESIDUAL, ACC)
        count = tl.sum(in_edge.to(tl.int32), 1, keep_dims=True)
        n, mean, m2 = take(h_edge, in_edge, count, n, mean, m2, CENTRED)
    p = tile.to(tl.int64)
    inside = in_rows & main_mask(tile, shift, n_cols, n_cols, VEC)
    h = load_sum(
        x_ptr, residual_ptr, h_ptr, x_row + p * x_col, r_row + p * r_col, h_row + p * h_col, inside, RESIDUAL, ACC
    )
    n, mean, m2 = take(h, inside, count_columns(0, shift, n_cols, COLS, VEC, EDGE), n, mean, m2, CENTRED)
    rstd = inverse_root(divide(m2, n_cols) + eps)

    if STATS:
        stats = stats_ptr + row_offset(outer, rows, outer_shape, stats_strides)[:, None]
        tl.store(stats, rstd, mask=in_rows)
        if CENTRED:
            tl.store(stats + plane, mean, mask=in_rows)
    if EDGE:
        y = normalise(
            h_edge, e - shift, in_edge, mean, rstd, weight_ptr, bias_ptr, weight_offset, CENTRED, WEIGHT, BIAS
        )
        tl.store(y_ptr + y_row + e, y, mask=in_edge)
    # without EDGE the weight is one row for all rows, loaded once
    in_columns = inside if EDGE else main_mask(tile, shift, n_cols, n_cols, VEC)
    y = normalise(h, tile - shift, in_columns, mean, rstd, weight_ptr, bias_ptr, weight_offset, CENTRED, WEIGHT, BIAS)
    tl.store(y_ptr + y_row + p * y_col, y, mask=inside)
    if not FITS:
        if RESIDUAL:  # what the program reads now, its other threads may have written
            tl.debug_barrier()
        for start in range(COLS, n_cols + VEC - 1, COLS):
            p = (start + tile).to(tl.int64)
            in_columns = main_mask(start + tile, shift, n_cols, n_cols, VEC)
            inside = in_rows & in_columns
            h = tl.load(h_from + h_row + p * h_col, mask=inside, other=0.0).to(ACC)
            y = normalise(
                h, start + tile - shift, inside if EDGE else in_columns, mean, rstd, weight_ptr, bias_ptr,
                weight_offset, CENTRED, WEIGHT, BIAS,
            )  # fmt: skip
            tl.store(y_ptr + y_row + p * y_col, y, mask=inside)


@triton.jit
def rows_of_block(block, n_rows, ROWS: tl.constexpr):
    """Outer index and rows (ROWS,) of the block-th block of ROWS rows."""
    blocks = tl.cdiv(n_rows, ROWS)
    return block // blocks, block % blocks * ROWS + tl.arange(0, ROWS)


@triton.jit
def load_stats(stats_ptr, offset, in_rows, plane, CENTRED: tl.constexpr):
    """Mean and 1 / deviation of rows, (R, 1) each; 0 outside."""
    rstd = tl.load(stats_ptr + offset, mask=in_rows, other=0.0)[:, None]
    mean = tl.zeros_like(rstd)
    if CENTRED:
        mean = tl.load(stats_ptr + plane + offset, mask=in_rows, other=0.0)[:, None]
    return mean, rstd


@triton.jit
def load_normalised(x_ptr, dy_ptr, x_at, dy_at, inside, mean, rstd, CENTRED: tl.constexpr, ACC: tl.constexpr):
    """Tiles of the normalised rows and of dy, both 0 outside."""
    x = tl.load(x_ptr + x_at, mask=inside, other=0.0).to(ACC)
    dy = tl.load(dy_ptr + dy_at, mask=inside, other=0.0).to(ACC)
    z = tl.where(inside, (x - mean) * rstd, 0.0) if CENTRED else x * rstd
    return z, dy


@triton.jit
def load_weight(weight_ptr, column, inside, weight_offset, WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """weight + weight_offset of a tile's columns, without WEIGHT 1."""
    if WEIGHT:
        return tl.load(weight_ptr + column, mask=inside, other=0.0).to(ACC) + weight_offset
    else:
        return 1.0


@triton.jit(do_not_specialize=["plane", "weight_offset", "n_blocks"])
def norm_backward_kernel(
    x_ptr, dy_ptr, dh_ptr, dx_ptr, weight_ptr, partial_ptr, stats_ptr, outer_shape, n_rows, n_cols, n_blocks, plane,
    weight_offset, x_strides, dy_strides, dh_strides, dx_strides, stats_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, FITS: tl.constexpr,
    CENTRED: tl.constexpr, WEIGHT: tl.constexpr, RESIDUAL: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """dx = rstd (g - mean(g) - z mean(g z)) + dh, with g = dy (weight + weight_offset) and z = (x - mean) rstd.

    RMSNorm has neither mean. x is what was normalised; x, dy, dh, dx: (*outer, n_rows, n_cols), dh with RESIDUAL.
    partial: (programs, DWEIGHT + DBIAS, n_cols), this program's sums over its rows of dy z and of dy. Programs take
    every num_programs-th block of rows, so they are written once and in a fixed order. They need rows that fit.
    """
    tile = tl.arange(0, COLS)[None, :]
    p = tile.to(tl.int64)
    in_columns = main_mask(tile, 0, n_cols, n_cols, VEC)
    x_col, dy_col = x_strides[len(x_strides) - 1], dy_strides[len(dy_strides) - 1]
    dh_col, dx_col = dh_strides[len(dh_strides) - 1], dx_strides[len(dx_strides) - 1]
    weight = load_weight(weight_ptr, tile, in_columns, weight_offset, WEIGHT, ACC)
    dweight = tl.zeros((ROWS, COLS), ACC)
    dbias = tl.zeros((ROWS, COLS), ACC)
    for block in range(tl.program_id(0), n_blocks, tl.num_programs(0)):
        outer, rows = rows_of_block(block, n_rows, ROWS)
        in_rows = rows < n_rows
        mean, rstd = load_stats(stats_ptr, row_offset(outer, rows, outer_shape, stats_strides), in_rows, plane, CENTRED)
        x_row = row_offset(outer, rows, outer_shape, x_strides)[:, None]
        dy_row = row_offset(outer, rows, outer_shape, dy_strides)[:, None]
        dh_row = row_offset(outer, rows, outer_shape, dh_strides)[:, None]
        dx_row = row_offset(outer, rows, outer_shape, dx_strides)[:, None]
        sum_g = tl.zeros((ROWS, 1), ACC)
        sum_gz = tl.zeros((ROWS, 1), ACC)
        if not FITS:
            for start in range(COLS, n_cols, COLS):
                column = (start + tile).to(tl.int64)
                in_tile = main_mask(start + tile, 0, n_cols, n_cols, VEC)
                inside = in_rows[:, None] & in_tile
                z, dy = load_normalised(
                    x_ptr, dy_ptr, x_row + column * x_col, dy_row + column * dy_col, inside, mean, rstd, CENTRED, ACC
                )
                g = dy * load_weight(weight_ptr, start + tile, in_tile, weight_offset, WEIGHT, ACC)
                sum_gz += tl.sum(g * z, 1, keep_dims=True)
                if CENTRED:
                    sum_g += tl.sum(g, 1, keep_dims=True)
        inside = in_rows[:, None] & in_columns
        z, dy = load_normalised(x_ptr, dy_ptr, x_row + p * x_col, dy_row + p * dy_col, inside, mean, rstd, CENTRED, ACC)
        if DWEIGHT:
            dweight += dy * z
        if DBIAS:
            dbias += dy
        g = dy * weight
        sum_gz += tl.sum(g * z, 1, keep_dims=True)
        if CENTRED:
            sum_g += tl.sum(g, 1, keep_dims=True)
        mean_gz, mean_g = divide(sum_gz, n_cols), divide(sum_g, n_cols)
        dx = (g - mean_g - z * mean_gz) * rstd
        if RESIDUAL:
            dx += tl.load(dh_ptr + dh_row + p * dh_col, mask=inside, other=0.0).to(ACC)
        tl.store(dx_ptr + dx_row + p * dx_col, dx, mask=inside)
        if not FITS:
            for start in range(COLS, n_cols, COLS):
                column = (start + tile).to(tl.int64)
                in_tile = main_mask(start + tile, 0, n_cols, n_cols, VEC)
                inside = in_rows[:, None] & in_tile
                z, dy = load_normalised(
                    x_ptr, dy_ptr, x_row + column * x_col, dy_row + column * dy_col, inside, mean, rstd, CENTRED, ACC
                )
                g = dy * load_weight(weight_ptr, start + tile, in_tile, weight_offset, WEIGHT, ACC)
                dx = (g - mean_g - z * mean_gz) * rstd
                if RESIDUAL:
                    dx += tl.load(dh_ptr + dh_row + column * dh_col, mask=inside, other=0.0).to(ACC)
                tl.store(dx_ptr + dx_row + column * dx_col, dx, mask=inside)
    if DWEIGHT or DBIAS:
        store_sums(dweight, dbias, tl.program_id(0), tile, in_columns, partial_ptr, n_cols, DWEIGHT, DBIAS)


@triton.jit
def store_sums(
    dweight, dbias, program, column, in_columns, partial_ptr, n_cols, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr
):
    """Sums over the rows of dweight and dbias (ROWS, COLS), to the program's rows of partial."""
    sums_ptr = partial_ptr + program.to(tl.int64) * (DWEIGHT + DBIAS) * n_cols + column
    if DWEIGHT:
        tl.store(sums_ptr, tl.sum(dweight, 0, keep_dims=True), mask=in_columns)
    if DBIAS:
        tl.store(sums_ptr + DWEIGHT * n_cols, tl.sum(dbias, 0, keep_dims=True), mask=in_columns)


@triton.jit(do_not_specialize=["plane", "n_blocks"])
def norm_parameters_kernel(
    x_ptr, dy_ptr, partial_ptr, stats_ptr, outer_shape, n_rows, n_cols, n_blocks, plane,
    x_strides, dy_strides, stats_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr,
    CENTRED: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of dy z and dy for rows that do not fit: program (i, j) takes COLS columns of every j-th block of rows.

    Arguments as of `norm_backward_kernel`; partial: (num_programs(1), DWEIGHT + DBIAS, n_cols).
    """
    column = tl.program_id(0) * COLS + tl.arange(0, COLS)[None, :]
    in_columns = main_mask(column, 0, n_cols, n_cols, VEC)
    x_col, dy_col = x_strides[len(x_strides) - 1], dy_strides[len(dy_strides) - 1]
    x_at, dy_at = column.to(tl.int64) * x_col, column.to(tl.int64) * dy_col
    dweight = tl.zeros((ROWS, COLS), ACC)
    dbias = tl.zeros((ROWS, COLS), ACC)
    for block in range(tl.program_id(1), n_blocks, tl.num_programs(1)):
        outer, rows = rows_of_block(block, n_rows, ROWS)
        in_rows = rows < n_rows
        mean, rstd = load_stats(stats_ptr, row_offset(outer, rows, outer_shape, stats_strides), in_rows, plane, CENTRED)
        x_row = row_offset(outer, rows, outer_shape, x_strides)[:, None]
        dy_row = row_offset(outer, rows, outer_shape, dy_strides)[:, None]
        inside = in_rows[:, None] & in_columns
        z, dy = load_normalised(x_ptr, dy_ptr, x_row + x_at, dy_row + dy_at, inside, mean, rstd, CENTRED, ACC)
        if DWEIGHT:
            dweight += dy * z
        if DBIAS:
            dbias += dy
    store_sums(dweight, dbias, tl.program_id(1), column, in_columns, partial_ptr, n_cols, DWEIGHT, DBIAS)
