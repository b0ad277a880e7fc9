"""Cross entropy and the divergence of two models over rows of logits, with their gradients (docs/kernels.md).

A kernel takes rows, or a chunk of the vocabulary's columns of them, into running statistics (FORWARD), which begin
with its FIRST chunk and give the row's loss after its LAST; writes the gradient with respect to the logits from
complete statistics (GRAD); or both, when the row is one chunk. Rows are walked through as in softmax.py: those that fit
one tile (FITS) are read once, longer ones twice but for their first HELD columns, which may be more than a tile. The
statistics are planes of one float32 tensor (planes, *rows).
"""

import triton
import triton.language as tl

from .common import LN2, online_softmax_step, row_offset, tanh
from .softmax import align, edge_tile, load, main_mask, rows_of_program


@triton.jit
def cap(x, softcap, SOFTCAP: tl.constexpr):
    """softcap tanh(x / softcap) with SOFTCAP; -inf stays -inf."""
    if SOFTCAP:
        x = tl.where(x == float("-inf"), float("-inf"), softcap * tanh(x / softcap))
    return x


@triton.jit
def afresh(x, zero, BACKEND: tl.constexpr):
    """x, such that what was computed from it before is computed again and not kept in registers in between.

    x: of 16 or 32 bits. zero: int32, of x's shape or broadcast to it, 0 without the compiler's knowledge; what it is
    computed from comes first. BACKEND: "cuda", "hip", or anything else for x as it is.
    """
    PACK: tl.constexpr = 32 // x.dtype.primitive_bitwidth
    if BACKEND == "cuda":
        USES: tl.constexpr = "=r,r,r,r" if PACK == 2 else "=r,r,r"
        x = tl.inline_asm_elementwise("or.b32 $0, $1, $2;", USES, [x, zero], x.dtype, True, PACK)
    elif BACKEND == "hip":
        USES: tl.constexpr = "=v,v,v,v" if PACK == 2 else "=v,v,v"
        x = tl.inline_asm_elementwise("v_or_b32 $0, $1, $2", USES, [x, zero], x.dtype, True, PACK)
    return x


@triton.jit
def zero_after(n, x):
    """A zero for `afresh`, not known before x is, which has 32 bits. n: not negative."""
    return (n >> 31) & x.to(tl.int32, bitcast=True)


@triton.jit
def finite(m):
    """Maxima to subtract: 0 for a row of nothing but -inf, so that -inf stays -inf and does not become NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def moved(before, now):
    """before - now, 0 where nothing was seen before."""
    return tl.where(before == float("-inf"), 0.0, before - now)


@triton.jit
def class_weights(ptr, column, inside, WEIGHTED: tl.constexpr):
    """Weights of a tile's classes, 0 outside the row; without WEIGHTED each is 1."""
    if WEIGHTED:
        w = tl.load(ptr + column, mask=inside, other=0.0).to(tl.float32)
    else:
        w = tl.where(inside, 1.0, 0.0)
    return w


@triton.jit
def take(u, column, inside, weight_ptr, m, l, smooth, base, scale, WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr):
    """Take a tile into maximum m, sum l and, with SMOOTH, smooth = sum w (u - base), each (R,).

    base is the first maximum that is finite: near the later ones, so that the sum keeps its digits, and constant.
    """
    before = m
    _, m, l, _ = online_softmax_step(u, m, l, scale)
    if SMOOTH:
        base = tl.where(before == float("-inf"), finite(m), base)
        w = class_weights(weight_ptr, column, inside, WEIGHTED)
        smooth += tl.sum(tl.where(inside, w * (u - base[:, None]), 0.0), 1)
    return m, l, smooth, base


@triton.jit
def held_tile(i: tl.constexpr, rows, shift, n_cols, COLS: tl.constexpr, PIECES: tl.constexpr, VEC: tl.constexpr):
    """Positions (1, C) of tile i of those that are held, and where they are inside `rows` (R, 1).

    Only the first and the last can reach beyond the row: (PIECES - 1) * COLS < n_cols.
    """
    p = i * COLS + tl.arange(0, COLS)[None, :]
    first = p // VEC * VEC - shift
    inside = rows
    if i == 0:
        inside = inside & (first >= 0)
    if i == PIECES - 1:
        inside = inside & (first + VEC <= n_cols)
    return p, inside


@triton.jit
def hold(
    ptr, row, col, read, shift, n_cols,
    COLS: tl.constexpr, PIECES: tl.constexpr, VEC: tl.constexpr, FITS: tl.constexpr,
):  # fmt: skip
    """The first PIECES tiles of COLS columns of rows at offsets `row`, in the tensor's own type, -inf where masked.

    Unless the rows fit, these loads go past the L1 cache, which then keeps the columns that are read a second time.
    """
    CACHE: tl.constexpr = "" if FITS else ".cg"
    held = ()
    for i in tl.static_range(PIECES):
        p, inside = held_tile(i, read, shift, n_cols, COLS, PIECES, VEC)
        at = ptr + row + p.to(tl.int64) * col
        held += (tl.load(at, mask=inside, other=float("-inf"), cache_modifier=CACHE),)
    return held


@triton.jit
def largest(held, PIECES: tl.constexpr):
    """Maxima (R,) of tiles that are held."""
    top = held[0].to(tl.float32)
    for i in tl.static_range(1, PIECES):
        top = tl.maximum(top, held[i].to(tl.float32))
    return tl.max(top, 1)


@triton.jit
def take_held(
    held, shift, n_cols, read, weight_ptr, m, l, smooth, base, scale, softcap,
    COLS: tl.constexpr, PIECES: tl.constexpr, VEC: tl.constexpr,
    WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """What `take` does, for tiles that are held: maximum first, and one sum over lanes."""
    before = m
    m = tl.maximum(m, cap(largest(held, PIECES), softcap, SOFTCAP))
    peak = finite(m)
    if SMOOTH:
        base = tl.where(before == float("-inf"), peak, base)
    sums = tl.zeros(held[0].shape, tl.float32)
    below = tl.zeros(held[0].shape, tl.float32)
    for i in tl.static_range(PIECES):
        zero = zero_after(n_cols, sums) if SMOOTH or SOFTCAP else n_cols >> 31
        if not (SMOOTH or SOFTCAP) or i * COLS < n_cols:  # always: a branch, as in `store_held`
            u = cap(afresh(held[i], zero, BACKEND).to(tl.float32), softcap, SOFTCAP)
            sums += tl.exp2((u - peak[:, None]) * scale[:, None])
            if SMOOTH:
                p, inside = held_tile(i, read, shift, n_cols, COLS, PIECES, VEC)
                w = class_weights(weight_ptr, p - shift, inside, WEIGHTED)
                below += tl.where(inside, w * (u - base[:, None]), 0.0)
    if SMOOTH:
        smooth += tl.sum(below, 1)
    return m, l * tl.exp2((before - peak) * scale) + tl.sum(sums, 1), smooth, base


@triton.jit
def gradient(
    u, column, inside, weight_ptr, y, m, inverse_l, pull, extra, spread, scale, softcap,
    WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """pull (p - [column = y]) + extra p - spread w, times the softcap's derivative; p is the probability.

    At the target 1 is subtracted before anything is multiplied, or p near 1 would lose its digits.
    """
    p = tl.exp2((u - m[:, None]) * scale[:, None]) * inverse_l[:, None]
    at_target = (p - 1) * pull[:, None] + p * extra[:, None]
    d = tl.where(column == y[:, None], at_target, p * (pull + extra)[:, None])
    if SMOOTH:
        d -= spread[:, None] * class_weights(weight_ptr, column, inside, WEIGHTED)
    if SOFTCAP:
        t = u / softcap
        d *= tl.where(u == float("-inf"), 0.0, 1 - t * t)
    return d


@triton.jit
def store_held(
    dx_ptr, dx_row, dx_col, held, shift, n_cols, in_rows, weight_ptr, y, m, l, inverse_l, pull, extra, spread, scale,
    softcap, COLS: tl.constexpr, PIECES: tl.constexpr, VEC: tl.constexpr,
    WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """Write the gradient of tiles that are held."""
    zero = zero_after(n_cols, l)[:, None]
    for i in tl.static_range(PIECES):
        if i * COLS < n_cols:  # always: a branch, across which compilers do not mix tiles
            p, inside = held_tile(i, in_rows[:, None], shift, n_cols, COLS, PIECES, VEC)
            u = cap(afresh(held[i], zero, BACKEND).to(tl.float32), softcap, SOFTCAP)
            d = gradient(
                u, p - shift, inside, weight_ptr, y, m, inverse_l, pull, extra, spread, scale, softcap,
                WEIGHTED, SMOOTH, SOFTCAP,
            )  # fmt: skip
            tl.store(dx_ptr + dx_row + p.to(tl.int64) * dx_col, d, mask=inside)


@triton.jit(do_not_specialize=["first_class", "ignore_index", "plane"])
def cross_entropy_kernel(
    x_ptr, dx_ptr, target_ptr, weight_ptr, weight_sum_ptr, grad_ptr, state_ptr, outer_shape, n_rows, n_cols, plane,
    first_class, n_classes, ignore_index, label_smoothing, z_loss, softcap, scale, inverse_t,
    x_strides, dx_strides, target_strides, grad_strides, state_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr,
    FITS: tl.constexpr, FORWARD: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, GRAD: tl.constexpr,
    WEIGHTED: tl.constexpr, SMOOTH: tl.constexpr, SOFTCAP: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """loss = (1 - s) w_y (L - z_y) + s / n sum_j w_j (L - z_j) + z_loss L^2, and its gradient times grad.

    z = x / t with x capped, L = log sum exp z, y the target, s the label smoothing, w the class weights.
    x, dx: (*rows, n_cols), the classes first_class .. first_class + n_cols of n_classes; dx may be x.
    target, grad: (*rows). weight: (n_classes,), weight_sum: its sum, read with SMOOTH. scale: log2(e) / t.
    state: (planes, *rows), `plane` elements apart: loss, maximum m and sum of exp((x - m) / t); while chunks still come
    also x_y, sum w (x - base) and base. inverse_t: 1 / t. The loss of a target out of range is NaN, of ignore_index 0.
    """
    outer, rows, _ = rows_of_program(n_rows, n_cols, ROWS, False)
    in_rows = rows < n_rows
    target = tl.load(target_ptr + row_offset(outer, rows, outer_shape, target_strides), mask=in_rows, other=0)
    target = target.to(tl.int64)
    kept = in_rows & (target != ignore_index)
    valid = (target >= 0) & (target < n_classes)
    y = tl.where(kept & valid & (target >= first_class) & (target < first_class + n_cols), target - first_class, -1)
    y = y.to(tl.int32)
    w_y = tl.full((ROWS,), 1.0, tl.float32)
    if WEIGHTED:
        w_y = tl.load(weight_ptr + target, mask=kept & valid, other=0.0).to(tl.float32)
        weight_ptr += first_class
    if SMOOTH:
        sum_of_weights = tl.load(weight_sum_ptr) if WEIGHTED else n_classes

    state = state_ptr + row_offset(outer, rows, outer_shape, state_strides)
    scale = tl.full((ROWS,), 0.0, tl.float32) + scale
    x_offset = row_offset(outer, rows, outer_shape, x_strides)
    x_row, shift = align(x_offset, VEC)
    x_col = x_strides[len(x_strides) - 1]
    STEP: tl.constexpr = 2 * COLS
    step = tl.arange(0, STEP)[None, :]
    read = kept[:, None]  # the logits of ignored tokens are not read
    stop = tl.max(tl.where(kept, n_cols + VEC - 1, 0))

    m = tl.full((ROWS,), float("-inf"), tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    smooth = tl.zeros((ROWS,), tl.float32)
    base = tl.zeros((ROWS,), tl.float32)
    if FORWARD:
        # first of all, since the gradient may be written over it
        x_y = tl.load(x_ptr + x_offset + y.to(tl.int64) * x_col, mask=y >= 0, other=0.0).to(tl.float32)
        x_y = cap(x_y, softcap, SOFTCAP)
        if not FIRST:
            m = tl.load(state + plane, mask=in_rows, other=0.0)
            l = tl.load(state + 2 * plane, mask=in_rows, other=0.0)
            x_y = tl.where(y >= 0, x_y, tl.load(state + 3 * plane, mask=in_rows, other=0.0))
            if SMOOTH:
                smooth = tl.load(state + 4 * plane, mask=in_rows, other=0.0)
                base = tl.load(state + 5 * plane, mask=in_rows, other=0.0)
        if not FITS:
            for start in range(PIECES * COLS, stop, STEP):
                p = start + step
                inside = read & main_mask(p, shift, n_cols, n_cols, VEC)
                x = load(x_ptr, x_row + p.to(tl.int64) * x_col, inside, True, float("-inf"), tl.float32, False)
                u = cap(x, softcap, SOFTCAP)
                m, l, smooth, base = take(u, p - shift, inside, weight_ptr, m, l, smooth, base, scale, WEIGHTED, SMOOTH)
    # the edges and the first tile last: they are still in registers when the statistics are complete
    if EDGE:
        e, in_edge = edge_tile(shift, n_cols, VEC, EDGE)
        x_edge = load(x_ptr, x_row + e, in_edge & read, True, float("-inf"), tl.float32, False)
        u_edge = cap(x_edge, softcap, SOFTCAP)
        if FORWARD:
            m, l, smooth, base = take(
                u_edge, e - shift, in_edge & read, weight_ptr, m, l, smooth, base, scale, WEIGHTED, SMOOTH
            )
    held = hold(x_ptr, x_row, x_col, read, shift, n_cols, COLS, PIECES, VEC, FITS)
    if FORWARD:
        m, l, smooth, base = take_held(
            held, shift, n_cols, read, weight_ptr, m, l, smooth, base, scale, softcap,
            COLS, PIECES, VEC, WEIGHTED, SMOOTH, SOFTCAP, BACKEND,
        )  # fmt: skip
        if LAST:
            m, log_l = finite(m), tl.log2(l) * LN2
            loss = (1 - label_smoothing) * w_y * (log_l + (m - x_y) * inverse_t)
            if SMOOTH:
                all_below = sum_of_weights * (log_l + (m - base) * inverse_t) - smooth * inverse_t
                loss += label_smoothing / n_classes * all_below
            lse = log_l + m * inverse_t
            loss += tl.where(z_loss == 0, 0.0, z_loss * lse * lse)
            loss = tl.where(kept, tl.where(valid, loss, float("nan")), 0.0)
            tl.store(state, loss, mask=in_rows)
            m, l = tl.where(kept, m, 0.0), tl.where(kept, l, 1.0)
        else:
            tl.store(state + 3 * plane, x_y, mask=in_rows)
            if SMOOTH:
                tl.store(state + 4 * plane, smooth, mask=in_rows)
                tl.store(state + 5 * plane, base, mask=in_rows)
        tl.store(state + plane, m, mask=in_rows)
        tl.store(state + 2 * plane, l, mask=in_rows)
    else:
        m = tl.load(state + plane, mask=in_rows, other=0.0)
        l = tl.load(state + 2 * plane, mask=in_rows, other=1.0)

    if GRAD:
        g = tl.load(grad_ptr + row_offset(outer, rows, outer_shape, grad_strides), mask=in_rows, other=0.0)
        g = tl.where(kept, tl.where(valid, g * inverse_t, float("nan")), 0.0)
        pull = g * (1 - label_smoothing) * w_y
        spread = g * (label_smoothing / n_classes)
        extra = tl.where(z_loss == 0, 0.0, 2 * g * z_loss * (tl.log2(l) * LN2 + m * inverse_t))
        if SMOOTH:
            extra += spread * sum_of_weights
        inverse_l = 1 / l
        dx_row, _ = align(row_offset(outer, rows, outer_shape, dx_strides), VEC)
        dx_col = dx_strides[len(dx_strides) - 1]
        if EDGE:
            in_edge = in_edge & in_rows[:, None]
            d_edge = gradient(
                u_edge, e - shift, in_edge, weight_ptr, y, m, inverse_l, pull, extra, spread, scale, softcap,
                WEIGHTED, SMOOTH, SOFTCAP,
            )  # fmt: skip
            tl.store(dx_ptr + dx_row + e, d_edge, mask=in_edge)
        store_held(
            dx_ptr, dx_row, dx_col, held, shift, n_cols, in_rows, weight_ptr, y, m, l, inverse_l, pull, extra, spread,
            scale, softcap, COLS, PIECES, VEC, WEIGHTED, SMOOTH, SOFTCAP, BACKEND,
        )  # fmt: skip
        if not FITS:
            # backwards: what was read last is the likeliest to lie in a cache
            for back in range(0, n_cols + VEC - 1 - PIECES * COLS, STEP):
                start = (n_cols + VEC - 2 - PIECES * COLS) // STEP * STEP + PIECES * COLS - back
                p = start + step
                inside = in_rows[:, None] & main_mask(p, shift, n_cols, n_cols, VEC)
                x = load(x_ptr, x_row + p.to(tl.int64) * x_col, inside & read, True, float("-inf"), tl.float32, False)
                u = cap(x, softcap, SOFTCAP)
                d = gradient(
                    u, p - shift, inside, weight_ptr, y, m, inverse_l, pull, extra, spread, scale, softcap,
                    WEIGHTED, SMOOTH, SOFTCAP,
                )  # fmt: skip
                tl.store(dx_ptr + dx_row + p.to(tl.int64) * dx_col, d, mask=inside)


@triton.jit
def take_pair(s, t, sm, sl, tm, tl_, total, scale, REVERSE: tl.constexpr):
    """Take tiles of student and teacher into maxima, sums and total = sum of weights times differences, each (R,)."""
    s_before, t_before, before = sm, tm, sl if REVERSE else tl_
    s_e, sm, sl, s_alpha = online_softmax_step(s, sm, sl, scale)
    t_e, tm, tl_, t_alpha = online_softmax_step(t, tm, tl_, scale)
    apart = moved(t_before, finite(tm)) - moved(s_before, finite(sm))
    further = (t - finite(tm)[:, None]) - (s - finite(sm)[:, None])
    if REVERSE:
        total = s_alpha * (total - before * apart) + tl.sum(tl.where(s_e == 0, 0.0, s_e * -further), 1)
    else:
        total = t_alpha * (total + before * apart) + tl.sum(tl.where(t_e == 0, 0.0, t_e * further), 1)
    return sm, sl, tm, tl_, total


@triton.jit
def take_pair_held(
    held_s, held_t, n_cols, sm, sl, tm, tl_, total, scale,
    PIECES: tl.constexpr, REVERSE: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """What `take_pair` does, for tiles that are held: maxima first, and one sum over lanes of each kind."""
    s_before, t_before, before = sm, tm, sl if REVERSE else tl_
    sm, tm = tl.maximum(sm, largest(held_s, PIECES)), tl.maximum(tm, largest(held_t, PIECES))
    s_peak, t_peak = finite(sm), finite(tm)
    s_alpha, t_alpha = tl.exp2((s_before - s_peak) * scale), tl.exp2((t_before - t_peak) * scale)
    s_sums = tl.zeros(held_s[0].shape, tl.float32)
    t_sums = tl.zeros(held_s[0].shape, tl.float32)
    totals = tl.zeros(held_s[0].shape, tl.float32)
    for i in tl.static_range(PIECES):
        s = afresh(held_s[i], n_cols >> 31, BACKEND).to(tl.float32) - s_peak[:, None]
        t = afresh(held_t[i], n_cols >> 31, BACKEND).to(tl.float32) - t_peak[:, None]
        s_e, t_e = tl.exp2(s * scale[:, None]), tl.exp2(t * scale[:, None])
        s_sums += s_e
        t_sums += t_e
        if REVERSE:
            totals += tl.where(s_e == 0, 0.0, s_e * (s - t))
        else:
            totals += tl.where(t_e == 0, 0.0, t_e * (t - s))
    apart = moved(t_before, t_peak) - moved(s_before, s_peak)
    if REVERSE:
        total = s_alpha * (total - before * apart) + tl.sum(totals, 1)
    else:
        total = t_alpha * (total + before * apart) + tl.sum(totals, 1)
    return sm, sl * s_alpha + tl.sum(s_sums, 1), tm, tl_ * t_alpha + tl.sum(t_sums, 1), total


@triton.jit
def divergence(s, t, sm, tm, scale, inverse_t, apart, REVERSE: tl.constexpr):
    """A tile's p log(p / q), or REVERSE q log(q / p), times p's sum (q's), from complete statistics.

    apart: log(sl / tl_).
    """
    log_ratio = ((t - tm[:, None]) - (s - sm[:, None])) * inverse_t + apart[:, None]
    if REVERSE:
        e, log_ratio = tl.exp2((s - sm[:, None]) * scale[:, None]), -log_ratio
    else:
        e = tl.exp2((t - tm[:, None]) * scale[:, None])
    return tl.where(e == 0, 0.0, e * log_ratio)


@triton.jit
def divergence_held(
    held_s, held_t, n_cols, sm, sl, tm, scale, inverse_t, apart,
    PIECES: tl.constexpr, REVERSE: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """Sum (R,) of `divergence` over tiles that are held."""
    zero = zero_after(n_cols, sl)[:, None]
    terms = tl.zeros(held_s[0].shape, tl.float32)
    for i in tl.static_range(PIECES):
        s = afresh(held_s[i], zero, BACKEND).to(tl.float32)
        t = afresh(held_t[i], zero, BACKEND).to(tl.float32)
        terms += divergence(s, t, sm, tm, scale, inverse_t, apart, REVERSE)
    return tl.sum(terms, 1)


@triton.jit
def pair_gradient(s, t, sm, tm, s_push, t_push, offset, scale, inverse_t, REVERSE: tl.constexpr):
    """Gradient of a tile of the student's logits: s_push q - t_push p, or REVERSE s_push q (log(q / p) - KL)."""
    s_e = tl.exp2((s - sm[:, None]) * scale[:, None])
    if REVERSE:
        further = ((s - sm[:, None]) - (t - tm[:, None])) * inverse_t - offset[:, None]
        d = tl.where(s_e == 0, 0.0, s_e * s_push[:, None] * further)
    else:
        d = s_e * s_push[:, None] - tl.exp2((t - tm[:, None]) * scale[:, None]) * t_push[:, None]
    return d


@triton.jit
def store_pair_held(
    dx_ptr, dx_row, dx_col, held_s, held_t, shift, n_cols, in_rows, total, sm, tm, s_push, t_push, offset, scale,
    inverse_t, COLS: tl.constexpr, PIECES: tl.constexpr, VEC: tl.constexpr,
    REVERSE: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """Write the gradient of tiles that are held."""
    zero = zero_after(n_cols, total)[:, None]
    for i in tl.static_range(PIECES):
        if i * COLS < n_cols:  # as in `store_held`
            p, inside = held_tile(i, in_rows[:, None], shift, n_cols, COLS, PIECES, VEC)
            s = afresh(held_s[i], zero, BACKEND).to(tl.float32)
            t = afresh(held_t[i], zero, BACKEND).to(tl.float32)
            d = pair_gradient(s, t, sm, tm, s_push, t_push, offset, scale, inverse_t, REVERSE)
            tl.store(dx_ptr + dx_row + p.to(tl.int64) * dx_col, d, mask=inside)


@triton.jit
def load_pair(x_ptr, y_ptr, x_offset, y_offset, mask):
    """Tiles of student and teacher, -inf where masked."""
    s = load(x_ptr, x_offset, mask, True, float("-inf"), tl.float32, False)
    return s, load(y_ptr, y_offset, mask, True, float("-inf"), tl.float32, False)


@triton.jit(do_not_specialize=["plane"])
def kl_div_kernel(
    x_ptr, y_ptr, dx_ptr, mask_ptr, grad_ptr, state_ptr, outer_shape, n_rows, n_cols, plane, scale, temperature,
    x_strides, y_strides, dx_strides, mask_strides, grad_strides, state_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, PIECES: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr,
    FITS: tl.constexpr, FORWARD: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, GRAD: tl.constexpr,
    MASKED: tl.constexpr, REVERSE: tl.constexpr, BACKEND: tl.constexpr,
):  # fmt: skip
    """KL(p || q) of p = softmax(y / t) and q = softmax(x / t), REVERSE KL(q || p), and its gradient for x times grad.

    x, y, dx: (*rows, n_cols); dx may be x. mask, with MASKED, and grad: (*rows). scale: log2(e) / t, temperature: t.
    state: (planes, *rows), `plane` elements apart: value (of chunks: the sum of p times (y - x)), maximum and sum of
    exponentials of x, and of y. Rows that are masked out have value 0 and gradient 0.
    """
    outer, rows, _ = rows_of_program(n_rows, n_cols, ROWS, False)
    in_rows = rows < n_rows
    kept = in_rows
    if MASKED:
        mask = tl.load(mask_ptr + row_offset(outer, rows, outer_shape, mask_strides), mask=in_rows, other=0)
        kept = in_rows & (mask != 0)
    state = state_ptr + row_offset(outer, rows, outer_shape, state_strides)
    scale = tl.full((ROWS,), 0.0, tl.float32) + scale
    t_row = tl.full((ROWS,), 0.0, tl.float32) + temperature
    inverse_t = 1 / temperature
    x_row, shift = align(row_offset(outer, rows, outer_shape, x_strides), VEC)
    y_row, _ = align(row_offset(outer, rows, outer_shape, y_strides), VEC)
    x_col, y_col = x_strides[len(x_strides) - 1], y_strides[len(y_strides) - 1]
    STEP: tl.constexpr = 2 * COLS
    step = tl.arange(0, STEP)[None, :]
    read = kept[:, None]
    stop = tl.max(tl.where(kept, n_cols + VEC - 1, 0))

    total = tl.zeros((ROWS,), tl.float32)
    sm = tl.full((ROWS,), float("-inf"), tl.float32)
    sl = tl.zeros((ROWS,), tl.float32)
    tm = tl.full((ROWS,), float("-inf"), tl.float32)
    tl_ = tl.zeros((ROWS,), tl.float32)
    if not (FORWARD and FIRST):
        total = tl.load(state, mask=in_rows, other=0.0)
        sm = tl.load(state + plane, mask=in_rows, other=0.0)
        sl = tl.load(state + 2 * plane, mask=in_rows, other=1.0)
        tm = tl.load(state + 3 * plane, mask=in_rows, other=0.0)
        tl_ = tl.load(state + 4 * plane, mask=in_rows, other=1.0)
    if FORWARD and not FITS:
        for start in range(PIECES * COLS, stop, STEP):
            p = start + step
            inside = read & main_mask(p, shift, n_cols, n_cols, VEC)
            p = p.to(tl.int64)
            s, t = load_pair(x_ptr, y_ptr, x_row + p * x_col, y_row + p * y_col, inside)
            sm, sl, tm, tl_, total = take_pair(s, t, sm, sl, tm, tl_, total, scale, REVERSE)
    if EDGE:
        e, in_edge = edge_tile(shift, n_cols, VEC, EDGE)
        s_edge, t_edge = load_pair(x_ptr, y_ptr, x_row + e, y_row + e, in_edge & read)
        if FORWARD:
            sm, sl, tm, tl_, total = take_pair(s_edge, t_edge, sm, sl, tm, tl_, total, scale, REVERSE)
    held_s = hold(x_ptr, x_row, x_col, read, shift, n_cols, COLS, PIECES, VEC, FITS)
    held_t = hold(y_ptr, y_row, y_col, read, shift, n_cols, COLS, PIECES, VEC, FITS)
    if FORWARD:
        sm, sl, tm, tl_, total = take_pair_held(
            held_s, held_t, n_cols, sm, sl, tm, tl_, total, scale, PIECES, REVERSE, BACKEND
        )
        if LAST:
            apart = tl.log2(sl / tl_) * LN2
            if FITS and FIRST:  # all of the row is here: term by term, which keeps the most digits
                sm, tm = finite(sm), finite(tm)
                total = divergence_held(
                    held_s, held_t, n_cols, sm, sl, tm, scale, inverse_t, apart, PIECES, REVERSE, BACKEND
                )
                if EDGE:
                    total += tl.sum(divergence(s_edge, t_edge, sm, tm, scale, inverse_t, apart, REVERSE), 1)
                total /= sl if REVERSE else tl_
            else:
                # exact divisions: the two terms mostly cancel
                total = tl.div_rn(tl.div_rn(total, sl if REVERSE else tl_), t_row)
                total = total - apart if REVERSE else total + apart
            total = tl.where(kept, total, 0.0)
            sm, sl = tl.where(kept, finite(sm), 0.0), tl.where(kept, sl, 1.0)
            tm, tl_ = tl.where(kept, finite(tm), 0.0), tl.where(kept, tl_, 1.0)
        tl.store(state, total, mask=in_rows)
        tl.store(state + plane, sm, mask=in_rows)
        tl.store(state + 2 * plane, sl, mask=in_rows)
        tl.store(state + 3 * plane, tm, mask=in_rows)
        tl.store(state + 4 * plane, tl_, mask=in_rows)

    if GRAD:
        g = tl.load(grad_ptr + row_offset(outer, rows, outer_shape, grad_strides), mask=in_rows, other=0.0)
        g = tl.where(kept, g * inverse_t, 0.0)
        s_push, t_push = g / sl, g / tl_
        offset = total + tl.log2(sl / tl_) * LN2
        dx_row, _ = align(row_offset(outer, rows, outer_shape, dx_strides), VEC)
        dx_col = dx_strides[len(dx_strides) - 1]
        if EDGE:
            d_edge = pair_gradient(s_edge, t_edge, sm, tm, s_push, t_push, offset, scale, inverse_t, REVERSE)
            tl.store(dx_ptr + dx_row + e, d_edge, mask=in_edge & in_rows[:, None])
        store_pair_held(
            dx_ptr, dx_row, dx_col, held_s, held_t, shift, n_cols, in_rows, total, sm, tm, s_push, t_push, offset,
            scale, inverse_t, COLS, PIECES, VEC, REVERSE, BACKEND,
        )  # fmt: skip
        if not FITS:
            # backwards: what was read last is the likeliest to lie in a cache
            for back in range(0, n_cols + VEC - 1 - PIECES * COLS, STEP):
                start = (n_cols + VEC - 2 - PIECES * COLS) // STEP * STEP + PIECES * COLS - back
                inside = in_rows[:, None] & main_mask(start + step, shift, n_cols, n_cols, VEC)
                p = (start + step).to(tl.int64)
                s, t = load_pair(x_ptr, y_ptr, x_row + p * x_col, y_row + p * y_col, inside & read)
                d = pair_gradient(s, t, sm, tm, s_push, t_push, offset, scale, inverse_t, REVERSE)
                tl.store(dx_ptr + dx_row + p * dx_col, d, mask=inside)


@triton.jit
def scale_kernel(x_ptr, factor_ptr, n, BLOCK: tl.constexpr):
    """x *= factor, n elements, unless the factor is 1: then nothing but the factor is read."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1:
        whole = n // 16 * 16  # whole groups, so that the mask splits none
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + offset, mask=offset < whole, other=0.0).to(tl.float32)
        tl.store(x_ptr + offset, x * factor, mask=offset < whole)
        if tl.program_id(0) == 0:
            rest = whole.to(tl.int64) + tl.arange(0, 16)
            tail = tl.load(x_ptr + rest, mask=rest < n, other=0.0).to(tl.float32)
            tl.store(x_ptr + rest, tail * factor, mask=rest < n)
