"""Flash attention (Dao, arXiv 2307.08691): softmax(q k^T scale) v and its gradients, without the scores in memory.

Shapes in comments: M queries and N keys of a tile, D head_dim of queries and keys, E of values. The maths, the masks
and the order of the tiles are in docs/kernels.md. What all the kernels take:

    q (B, H, Sq, D), k (B, KV, Sk, D), v (B, KV, Sk, E), o and do (B, H, Sq, E); strides in elements
    lse (B, H, Sq) float32, contiguous: the natural logarithm of the softmax's sum
    base (B, H, Sq, 2) float32, contiguous: the same in base 2 as the forward has it, the largest score and the rest: p
        = 2^(factor scores - base - rest). WIDE, for float32: they are not added up, which would round
    bias   broadcast to (B, H, Sq, Sk) by strides of 0; BIAS: "" for none, "mask" (False hides), "add"
    slopes (B or 1, H) float32 (ALIBI), sinks (H,) (SINKS), seed (1,) int64 (DROPOUT)
    PACKED: B is 1 in memory, and cu_q, cu_k (N + 1,) int32 hold where the N sequences begin
    query i sees key j if -right <= i + shift - j <= left, where shift = Sk - Sq if BOTTOM_RIGHT else 0;
    LEFT, RIGHT: whether there is that bound. GROUP = H / KV
    SCALED: between the products and the scores lies more than a positive factor. factor: log2(e), unless SCALED times
        scale
"""

import triton
import triton.language as tl

from .common import LN2, LOG2E, online_softmax_step, tanh

# ---------------------------------------------------------------------------------------- what a program works on


@triton.jit
def program(FIRST_BATCH: tl.constexpr, REVERSE: tl.constexpr):
    """Tile, head and batch of this program. The tiles of a head are neighbours: they share its keys in L2."""
    tile = tl.program_id(0)
    if REVERSE:  # the tiles with most to do go first, so that no long one is left at the end
        tile = tl.num_programs(0) - 1 - tile
    return tile, tl.program_id(1), FIRST_BATCH + tl.program_id(2)


@triton.jit
def sequence(cu_ptr, batch, length, PACKED: tl.constexpr):
    """Batch in memory, first position and length of sequence `batch`; packed ones are cut to the tensor's length."""
    if PACKED:
        first = tl.minimum(tl.maximum(tl.load(cu_ptr + batch), 0), length)
        end = tl.minimum(tl.maximum(tl.load(cu_ptr + batch + 1), first), length)
        return batch * 0, first, end - first
    else:
        return batch, batch * 0, length


@triton.jit
def visible_range(first, last, before, after, length, BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCK: tl.constexpr):
    """The columns first - before .. last + after of 0 .. length - 1 in tiles: begin, full_begin, full_end, end.

    Row r of first .. last sees the columns r - before .. r + after; BEFORE, AFTER: whether there is that bound. The
    tiles from full_begin to full_end are seen wholly by all rows, those before and after them by some rows in part.
    """
    begin, full_begin, full_end, end = 0, 0, length, length
    if BEFORE:
        begin = tl.maximum(first - before, 0)
        full_begin = tl.maximum(last - before, 0)
    if AFTER:
        end = tl.minimum(tl.maximum(last + after + 1, 0), length)
        full_end = tl.minimum(tl.maximum(first + after + 1, 0), length)
    begin = tl.minimum(begin // BLOCK * BLOCK, end)
    full_begin = tl.maximum(tl.minimum(tl.cdiv(full_begin, BLOCK) * BLOCK, end), begin)
    full_end = tl.maximum(full_end // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def afresh(x, PTX: tl.constexpr):
    """x, but what is computed from it is computed again rather than kept in registers through a loop."""
    if PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
    else:
        return x


@triton.jit
def offset(index, strides):
    """Offset in elements of (batch, head, position, dim); int64 before the first multiplication."""
    b, h, s, d = index
    return b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[1] + s.to(tl.int64) * strides[2] + d * strides[3]


@triton.jit
def load_tile(ptr, start, offsets, stride, in_rows, DIM: tl.constexpr, EDGE: tl.constexpr,
              desc=None, batch=0, head=0, first=0, DESCRIPTOR: tl.constexpr = False):  # fmt: skip
    """Rows from `start` on of a matrix, as many as offsets has; 0 from column DIM on, at an EDGE also outside in_rows.

    ptr: to row 0. offsets: (rows, columns), of the elements of a tile from its first: they stay, and only a scalar base
    moves, which the compiler turns into one address a lane.
    DESCRIPTOR: by a tensor descriptor, where batch and head say which matrix it is and `first` which is its row 0.
    Behind the end of a tensor it gives 0 by itself.
    """
    if DESCRIPTOR:
        return desc.load([batch, head, first + start, 0]).reshape(offsets.shape)
    else:
        tile_ptr = ptr + tl.cast(start, tl.int64) * stride + offsets
        in_dims = (tl.arange(0, offsets.shape[1]) < DIM)[None, :]
        if EDGE:
            return tl.load(tile_ptr, mask=in_rows[:, None] & in_dims, other=0.0)
        elif offsets.shape[1] == DIM:
            return tl.load(tile_ptr)
        else:
            return tl.load(tile_ptr, mask=in_dims, other=0.0)


@triton.jit
def dot_transposed(a, b, c, PRECISION: tl.constexpr, PARTS: tl.constexpr):
    """c + a b^T, in PARTS of the columns side by side: a product without tensor cores keeps its rows in registers."""
    if PARTS == 1:
        return tl.dot(a, b.T, c, input_precision=PRECISION)
    else:
        a = a.reshape((a.shape[0], PARTS, a.shape[1] // PARTS)).permute((1, 0, 2))
        b = b.reshape((b.shape[0], PARTS, b.shape[1] // PARTS)).permute((1, 2, 0))
        return c + tl.sum(tl.dot(a, b, input_precision=PRECISION), 0)


@triton.jit
def load_stats(stats_ptr, rows, in_rows, EDGE: tl.constexpr, WIDE: tl.constexpr):
    """base, delta and rest of rows, counted from the one at stats_ptr; base is inf, for a p of 0, where no query is."""
    if WIDE:
        at = stats_ptr + 3 * rows
        base = tl.load(at, mask=in_rows, other=float("inf"))
        return base, tl.load(at + 1, mask=in_rows, other=0.0), tl.load(at + 2, mask=in_rows, other=0.0)
    else:
        # pairs: one access, and side by side in the registers of a lane
        pairs_ptr = stats_ptr + 2 * rows[:, None] + tl.arange(0, 2)[None, :]
        if EDGE:
            base, delta = tl.split(tl.load(pairs_ptr, mask=in_rows[:, None], other=float("inf")))
        else:
            base, delta = tl.split(tl.load(pairs_ptr))
        return base, delta, 0.0


@triton.jit
def without_nonfinite(tile):
    """The tile with rows of zeros in place of those that hold a NaN or inf, and (ROWS,) NaN for these, else 0.

    Added to the scores before the mask, the NaN reaches the queries that see such a key. The key itself must go,
    because 0 x NaN would reach the other queries of the tile as well.
    """
    spoiled = tl.where(tl.sum(tile.to(tl.float32) * 0.0, 1) == 0.0, 0.0, float("nan"))
    return tl.where((spoiled == 0.0)[:, None], tile, 0.0), spoiled


# ------------------------------------------------------------------------------------------- scores, masks, dropout


@triton.jit
def scores(x, rows, cols, bias, slope, scale, softcap, low, high, SCALED: tl.constexpr, SOFTCAP: tl.constexpr,
           ALIBI: tl.constexpr, BIAS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr):  # fmt: skip
    """What enters the softmax, from products x, and d scores / d x scale; -inf where hidden.

    rows, cols: positions, of queries with the shift, that broadcast to x.
    LOW, HIGH: cols below low, and above high, are hidden.
    """
    slope_of_cap = 1.0
    if SCALED:
        x *= scale
    if SOFTCAP:
        t = tanh(x / softcap)
        x, slope_of_cap = softcap * t, 1 - t * t
    if ALIBI:
        x -= slope * tl.abs(rows - cols).to(tl.float32)
    if BIAS == "mask":
        x = tl.where(bias, x, float("-inf"))
    if BIAS == "add":
        x = tl.where(bias == float("-inf"), float("-inf"), x + bias)
    if HIGH:
        x = tl.where(cols <= high, x, float("-inf"))
    if LOW:
        x = tl.where(cols >= low, x, float("-inf"))
    return x, slope_of_cap


@triton.jit
def load_bias(bias_ptr, rows, cols, strides, q_len, k_len, BIAS: tl.constexpr):
    """Bias at rows and cols, which broadcast against each other; 0 where there is none."""
    if BIAS == "":
        return 0.0
    else:
        at = bias_ptr + rows.to(tl.int64) * strides[2] + cols.to(tl.int64) * strides[3]
        bias = tl.load(at, mask=(rows < q_len) & (cols < k_len), other=0)
        return bias if BIAS == "mask" else bias.to(tl.float32)


@triton.jit
def kept(seed, rows, cols, head, dropout_p):
    """Which probabilities dropout keeps: 24 bits of Philox of the position, as in lmops.reference.attention."""
    word, _, _, _ = tl.philox(seed, cols, rows, head, head * 0)
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08 >= dropout_p  # 2^-24


# ---------------------------------------------------------------------------------------------------------- kernels


# lengths and bounds vary from call to call, and knowing their divisors would change nothing
VARYING = ("n_batch", "n_heads", "q_total", "k_total", "left", "right")


@triton.jit(do_not_specialize=VARYING)
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, o_ptr, lse_ptr, base_ptr, bias_ptr, slopes_ptr, sinks_ptr, cu_q_ptr, cu_k_ptr,
    seed_ptr,
    q_strides, k_strides, v_strides, o_strides, bias_strides, slopes_stride,
    n_heads, q_total, k_total, scale, factor, left, right, softcap, dropout_p,
    FIRST_BATCH: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, PACK: tl.constexpr,
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr, BASE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr, PTX: tl.constexpr, OFFSET: tl.constexpr, ALIKE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = softmax(scores) v and lse = log sum exp(scores) for BLOCK_M rows.

    A row is a query, or (PACK > 1) one of PACK query heads that share a key head, at one position: few queries then
    fill a tile, and read keys once. DESCRIPTOR: k_desc and v_desc are tensor descriptors of k and v. OFFSET: the
    integers that hold offsets within a tile. ALIKE: k and v lie alike in memory. PTX: the target is NVIDIA's.
    BASE: a backward follows, which needs base.
    """
    tile, head0, batch = program(FIRST_BATCH, RIGHT)
    q_batch, q_first, q_len = sequence(cu_q_ptr, batch, q_total, PACKED)
    k_batch, k_first, k_len = sequence(cu_k_ptr, batch, k_total, PACKED)
    row0 = tile * BLOCK_M
    if row0 >= q_len * PACK:
        return
    kv_head = head0 * PACK // GROUP
    rows = row0 + tl.arange(0, BLOCK_M)
    positions, heads = rows // PACK, head0 * PACK + rows % PACK  # (M,)
    in_rows = positions < q_len
    cols, dims, value_dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_at = offset((q_batch, heads[:, None], (q_first + positions)[:, None], dims[None, :]), q_strides)
    q = tl.load(q_ptr + q_at, mask=in_rows[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)

    k_ptr += offset((k_batch, kv_head, k_first, 0), k_strides)
    v_ptr += offset((k_batch, kv_head, k_first, 0), v_strides)
    k_offsets = cols.to(OFFSET)[:, None] * k_strides[2] + dims.to(OFFSET)[None, :] * k_strides[3]
    v_offsets = (
        k_offsets if ALIKE else cols.to(OFFSET)[:, None] * v_strides[2] + value_dims.to(OFFSET)[None, :] * v_strides[3]
    )
    if BIAS != "":
        bias_ptr += batch.to(tl.int64) * bias_strides[0] + heads.to(tl.int64)[:, None] * bias_strides[1]
    slope = tl.load(slopes_ptr + batch * slopes_stride + heads)[:, None] if ALIBI else 0.0
    seed = tl.load(seed_ptr) if DROPOUT else 0

    shift = k_len - q_len if BOTTOM_RIGHT else 0
    rows = positions + shift
    low, high = rows - left if LEFT else rows, tl.minimum(rows + right, k_len - 1) if RIGHT else rows * 0 + k_len - 1
    last = tl.minimum(row0 + BLOCK_M - 1, q_len * PACK - 1) // PACK
    begin, full_begin, full_end, end = visible_range(
        row0 // PACK + shift, last + shift, left, right, k_len, LEFT, RIGHT, BLOCK_N
    )
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # where every warp has whole rows, a lane sums what it holds of them
    l = tl.zeros((BLOCK_M, 8) if BLOCK_M >= 128 else (BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for EDGE in tl.static_range(2):
        # the edges are one loop: the tiles before the full ones, then those after them
        skip = full_end - full_begin
        for start in tl.range(
            begin + skip if EDGE else full_begin,
            end if EDGE else full_end,
            BLOCK_N,
            num_stages=1 if EDGE else None,
            disable_licm=EDGE,  # what only the edges need takes no registers in the loop over full tiles
        ):
            if EDGE and LEFT:  # without, there are none before
                start -= tl.where(start < full_end, skip, 0)
            at = start + cols
            in_cols = at < k_len
            # not by descriptors at the edges: what these need there takes scalar registers in the loop over full tiles
            k = load_tile(k_ptr, start, k_offsets, k_strides[2], in_cols, HEAD_DIM, EDGE,
                          k_desc, k_batch, kv_head, k_first, DESCRIPTOR and not EDGE)  # fmt: skip
            # beside k: two descriptors' loads one after the other wait at one barrier
            v = load_tile(v_ptr, start, v_offsets, v_strides[2], in_cols, VALUE_DIM, EDGE,
                          v_desc, k_batch, kv_head, k_first, DESCRIPTOR and not EDGE)  # fmt: skip
            x = tl.dot(q, k.T, input_precision=PRECISION)  # (M, N)
            if EDGE or (BIAS != ""):
                v, spoiled = without_nonfinite(v)
                x += spoiled[None, :]
            bias = load_bias(bias_ptr, positions[:, None], at[None, :], bias_strides, q_len, k_len, BIAS)
            x, _ = scores(x, rows[:, None], at[None, :], bias, slope, scale, softcap, low[:, None], high[:, None],
                          SCALED, SOFTCAP, ALIBI, BIAS, EDGE and LEFT, EDGE)  # fmt: skip
            p, m, l, alpha = online_softmax_step(x, m, l, factor, True, EDGE or (BIAS != ""))
            if DROPOUT:
                keep = kept(seed, positions[:, None], at[None, :], (batch * n_heads + heads)[:, None], dropout_p)
                p = tl.where(keep, p, 0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    if BLOCK_M >= 128:
        l = tl.sum(l, 1)
    if SINKS:
        sink = tl.load(sinks_ptr + heads).to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sink)
        alpha = tl.exp2(m - m_new)
        m, l, acc = m_new, l * alpha + tl.exp2(sink - m_new), acc * alpha[:, None]
    rows = afresh(row0, PTX) + tl.arange(0, BLOCK_M)
    positions, heads = rows // PACK, head0 * PACK + rows % PACK
    in_rows = positions < q_len
    empty = l == 0
    rest = tl.log2(tl.where(empty, 1.0, l))
    row_at = (q_batch * n_heads + heads).to(tl.int64) * q_total + q_first + positions  # in lse and base
    tl.store(lse_ptr + row_at, (m + rest) * LN2, mask=in_rows)
    if BASE:  # inf: a row that sees nothing has p 0
        # + 0.0: of scores that are all 0 or -0, lanes may have found the one or the other to be the largest
        tl.store(base_ptr + 2 * row_at, tl.where(empty, float("inf"), m + 0.0), mask=in_rows)
        tl.store(base_ptr + 2 * row_at + 1, rest, mask=in_rows)
    o = acc * (1 / tl.where(empty, 1.0, l * (1 - dropout_p) if DROPOUT else l))[:, None]
    o_at = offset((q_batch, heads[:, None], (q_first + positions)[:, None], value_dims[None, :]), o_strides)
    in_o = in_rows[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(o_ptr + o_at, o.to(o_ptr.dtype.element_ty), mask=in_o)


@triton.jit(do_not_specialize=VARYING)
def attention_backward_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, o_ptr, do_ptr, dq_ptr, base_ptr, dlse_ptr, stats_ptr, bias_ptr, slopes_ptr,
    cu_q_ptr, cu_k_ptr, seed_ptr,
    q_strides, k_strides, v_strides, o_strides, do_strides, dq_strides, dlse_strides, bias_strides, slopes_stride,
    n_heads, q_total, k_total, scale, factor, left, right, softcap, dropout_p,
    FIRST_BATCH: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr, DLSE: tl.constexpr, WIDE: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTOR: tl.constexpr, PTX: tl.constexpr, OFFSET: tl.constexpr, ALIKE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq = ds k for BLOCK_M queries, ds = p (do v^T - delta) scale, where delta = sum_e o do - dlse.

    For the other kernels it writes stats (B, H, Sq, 2) float32: base with the rest, and delta; WIDE (B, H, Sq, 3): the
    rest by itself.
    DLSE: the gradient of lse is there, (B, H, Sq) with dlse_strides.
    """
    tile, head, batch = program(FIRST_BATCH, RIGHT)
    q_batch, q_first, q_len = sequence(cu_q_ptr, batch, q_total, PACKED)
    k_batch, k_first, k_len = sequence(cu_k_ptr, batch, k_total, PACKED)
    row0 = tile * BLOCK_M
    if row0 >= q_len:
        return
    kv_head = head // GROUP
    positions = row0 + tl.arange(0, BLOCK_M)
    in_rows = positions < q_len
    cols, dims, value_dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_rows = (q_first + positions)[:, None]
    in_q, in_o = in_rows[:, None] & (dims < HEAD_DIM)[None, :], in_rows[:, None] & (value_dims < VALUE_DIM)[None, :]
    q = tl.load(q_ptr + offset((q_batch, head, q_rows, dims[None, :]), q_strides), mask=in_q, other=0.0)
    do = tl.load(do_ptr + offset((q_batch, head, q_rows, value_dims[None, :]), do_strides), mask=in_o, other=0.0)
    o = tl.load(o_ptr + offset((q_batch, head, q_rows, value_dims[None, :]), o_strides), mask=in_o, other=0.0)
    row_at = (q_batch * n_heads + head).to(tl.int64) * q_total + q_first + positions  # in base
    # the selection keeps a product from being contracted with the sum across lanes, after which lanes that hold copies
    # of one sum would differ in the last bit
    delta = tl.sum(tl.where(in_o, o.to(tl.float32) * do.to(tl.float32), 0.0), 1)
    if DLSE:
        dlse_at = q_batch.to(tl.int64) * dlse_strides[0] + head.to(tl.int64) * dlse_strides[1]
        delta -= tl.load(
            dlse_ptr + dlse_at + (q_first + positions).to(tl.int64) * dlse_strides[2], mask=in_rows, other=0.0
        )
    base = tl.load(base_ptr + 2 * row_at, mask=in_rows, other=float("inf"))
    rest = tl.load(base_ptr + 2 * row_at + 1, mask=in_rows, other=0.0)
    if WIDE:
        tl.store(stats_ptr + 3 * row_at + 2, rest, mask=in_rows)
    else:
        base += rest
    tl.store(stats_ptr + (3 if WIDE else 2) * row_at, base, mask=in_rows)
    tl.store(stats_ptr + (3 if WIDE else 2) * row_at + 1, delta, mask=in_rows)

    k_ptr += offset((k_batch, kv_head, k_first, 0), k_strides)
    v_ptr += offset((k_batch, kv_head, k_first, 0), v_strides)
    k_offsets = cols.to(OFFSET)[:, None] * k_strides[2] + dims.to(OFFSET)[None, :] * k_strides[3]
    v_offsets = (
        k_offsets if ALIKE else cols.to(OFFSET)[:, None] * v_strides[2] + value_dims.to(OFFSET)[None, :] * v_strides[3]
    )
    if BIAS != "":
        bias_ptr += batch.to(tl.int64) * bias_strides[0] + head.to(tl.int64) * bias_strides[1]
    slope = tl.load(slopes_ptr + batch * slopes_stride + head) if ALIBI else 0.0
    seed = tl.load(seed_ptr) if DROPOUT else 0

    shift = k_len - q_len if BOTTOM_RIGHT else 0
    rows = positions + shift
    low, high = rows - left if LEFT else rows, tl.minimum(rows + right, k_len - 1) if RIGHT else rows * 0 + k_len - 1
    begin, full_begin, full_end, end = visible_range(
        row0 + shift, tl.minimum(row0 + BLOCK_M, q_len) - 1 + shift, left, right, k_len, LEFT, RIGHT, BLOCK_N
    )
    PARTS: tl.constexpr = 8 if WIDE and PRECISION == "ieee" and max(BLOCK_D, BLOCK_E) > 128 else 1
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    # a large tile leaves no register to spare: the edges go first, what only they need is gone when the full ones come
    FIRST: tl.constexpr = 1 if BLOCK_N > 64 else 0
    for EDGE in tl.static_range(FIRST, -1 if FIRST else 2, -1 if FIRST else 1):
        skip = full_end - full_begin
        for start in tl.range(
            begin + skip if EDGE else full_begin, end if EDGE else full_end, BLOCK_N, num_stages=1 if EDGE else None
        ):
            if EDGE and LEFT:
                start -= tl.where(start < full_end, skip, 0)
            at = start + cols
            in_cols = at < k_len
            k = load_tile(k_ptr, start, k_offsets, k_strides[2], in_cols, HEAD_DIM, EDGE,
                          k_desc, k_batch, kv_head, k_first, DESCRIPTOR)  # fmt: skip
            if EDGE or (BIAS != ""):
                k, spoiled = without_nonfinite(k)
            x = dot_transposed(q, k, tl.zeros((BLOCK_M, BLOCK_N), tl.float32), PRECISION, PARTS)  # (M, N)
            if EDGE or (BIAS != ""):
                x += spoiled[None, :]
            bias = load_bias(bias_ptr, positions[:, None], at[None, :], bias_strides, q_len, k_len, BIAS)
            x, slope_of_cap = scores(x, rows[:, None], at[None, :], bias, slope, scale, softcap, low[:, None],
                                     high[:, None], SCALED, SOFTCAP, ALIBI, BIAS, EDGE and LEFT, EDGE)  # fmt: skip
            v = load_tile(v_ptr, start, v_offsets, v_strides[2], in_cols, VALUE_DIM, EDGE,
                          v_desc, k_batch, kv_head, k_first, DESCRIPTOR)  # fmt: skip
            z = x * factor - base[:, None]
            p = tl.exp2(z - rest[:, None] if WIDE else z)
            # without dropout -delta is the first value of the sum
            dp = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) - (0.0 if DROPOUT or WIDE else delta[:, None])
            dp = dot_transposed(do, v, dp, PRECISION, PARTS)
            if DROPOUT:
                keep = kept(seed, positions[:, None], at[None, :], batch * n_heads + head, dropout_p)
                dp = tl.where(keep, dp * (1 / (1 - dropout_p)), 0.0)
            ds = p * (dp - delta[:, None] if DROPOUT or WIDE else dp)
            if SOFTCAP:
                ds *= slope_of_cap
            if EDGE or (BIAS != ""):  # what is hidden takes no part, whatever is in v there
                ds = tl.where(p == 0, 0.0, ds)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    positions = afresh(row0, PTX) + tl.arange(0, BLOCK_M)
    dims = afresh(row0 * 0, PTX) + tl.arange(0, BLOCK_D)
    in_q = (positions < q_len)[:, None] & (dims < HEAD_DIM)[None, :]
    dq_at = offset((q_batch, head, (q_first + positions)[:, None], dims[None, :]), dq_strides)
    tl.store(dq_ptr + dq_at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_q)


@triton.jit(do_not_specialize=VARYING)
def attention_backward_dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, q_desc, k_desc, v_desc, do_desc, dk_ptr, dv_ptr, stats_ptr, bias_ptr, slopes_ptr,
    cu_q_ptr, cu_k_ptr, seed_ptr,
    q_strides, k_strides, v_strides, do_strides, dk_strides, dv_strides, bias_strides, slopes_stride,
    n_heads, q_total, k_total, scale, factor, left, right, softcap, dropout_p,
    FIRST_BATCH: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr,
    PACKED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, BIAS: tl.constexpr,
    ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIPTOR: tl.constexpr, EDGE_STAGES: tl.constexpr, PTX: tl.constexpr,
    OFFSET: tl.constexpr, ALIKE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dk = ds^T q and dv = p^T do for BLOCK_N keys of a key head, summed over its query heads.

    Scores are computed transposed, k q^T, so that p^T and ds^T are the left operands of the products as they come.
    DESCRIPTOR: q_desc, k_desc, v_desc and do_desc are tensor descriptors; not PACKED, where behind a sequence there are
    no zeros. EDGE_STAGES: of the pipeline of loads at the edges, or None for that of the full tiles.
    """
    tile, kv_head, batch = program(FIRST_BATCH, LEFT and not RIGHT)
    q_batch, q_first, q_len = sequence(cu_q_ptr, batch, q_total, PACKED)
    k_batch, k_first, k_len = sequence(cu_k_ptr, batch, k_total, PACKED)
    col0 = tile * BLOCK_N
    if col0 >= k_len:
        return
    cols = col0 + tl.arange(0, BLOCK_N)
    rows, dims, value_dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    in_cols = cols < k_len
    k_rows = (k_first + cols)[:, None]
    in_k, in_v = in_cols[:, None] & (dims < HEAD_DIM)[None, :], in_cols[:, None] & (value_dims < VALUE_DIM)[None, :]
    if DESCRIPTOR:
        k = k_desc.load([k_batch, kv_head, k_first + col0, 0]).reshape((BLOCK_N, BLOCK_D))
        v = v_desc.load([k_batch, kv_head, k_first + col0, 0]).reshape((BLOCK_N, BLOCK_E))
    else:
        k = tl.load(k_ptr + offset((k_batch, kv_head, k_rows, dims[None, :]), k_strides), mask=in_k, other=0.0)
        v = tl.load(v_ptr + offset((k_batch, kv_head, k_rows, value_dims[None, :]), v_strides), mask=in_v, other=0.0)
    q_offsets = rows.to(OFFSET)[:, None] * q_strides[2] + dims.to(OFFSET)[None, :] * q_strides[3]
    do_offsets = (
        q_offsets
        if ALIKE
        else rows.to(OFFSET)[:, None] * do_strides[2] + value_dims.to(OFFSET)[None, :] * do_strides[3]
    )
    seed = tl.load(seed_ptr) if DROPOUT else 0

    # seen from the keys: key j is seen by the queries j - shift - right .. j - shift + left
    shift = k_len - q_len if BOTTOM_RIGHT else 0
    begin, full_begin, full_end, end = visible_range(
        col0 - shift, tl.minimum(col0 + BLOCK_N, k_len) - 1 - shift, right, left, q_len, RIGHT, LEFT, BLOCK_M
    )
    STATS: tl.constexpr = 3 if WIDE else 2  # numbers a row
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_E), tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        head_q_ptr = q_ptr + offset((q_batch, head, q_first, 0), q_strides)
        head_do_ptr = do_ptr + offset((q_batch, head, q_first, 0), do_strides)
        head_stats_ptr = stats_ptr + STATS * ((q_batch * n_heads + head).to(tl.int64) * q_total + q_first)
        slope = tl.load(slopes_ptr + batch * slopes_stride + head) if ALIBI else 0.0
        head_bias_ptr = bias_ptr
        if BIAS != "":
            head_bias_ptr += batch.to(tl.int64) * bias_strides[0] + head.to(tl.int64) * bias_strides[1]
        for EDGE in tl.static_range(2):
            skip = full_end - full_begin
            tile_stats_ptr = head_stats_ptr + STATS * full_begin
            for start in tl.range(
                begin + skip if EDGE else full_begin,
                end if EDGE else full_end,
                BLOCK_M,
                num_stages=EDGE_STAGES if EDGE else None,
                disable_licm=EDGE,  # what only the edges need takes no registers in the loop over full tiles
            ):
                if EDGE:
                    start -= tl.where(start < full_end, skip, 0)
                at = start + rows
                in_rows = at < q_len
                q = load_tile(head_q_ptr, start, q_offsets, q_strides[2], in_rows, HEAD_DIM, EDGE,
                              q_desc, q_batch, head, q_first, DESCRIPTOR)  # fmt: skip
                do = load_tile(head_do_ptr, start, do_offsets, do_strides[2], in_rows, VALUE_DIM, EDGE,
                               do_desc, q_batch, head, q_first, DESCRIPTOR)  # fmt: skip
                if EDGE:
                    tile_stats_ptr = head_stats_ptr + STATS * start
                base, delta, rest = load_stats(tile_stats_ptr, rows, in_rows, EDGE, WIDE)
                # it moves, since added to it `start` would be 64 bits wide for the whole loop
                tile_stats_ptr += STATS * BLOCK_M
                xt = tl.dot(k, q.T, input_precision=PRECISION)  # (N, M)
                bias = load_bias(head_bias_ptr, at[None, :], cols[:, None], bias_strides, q_len, k_len, BIAS)
                query = (at + shift)[None, :]
                xt, slope_of_cap = scores(xt, query, cols[:, None], bias, slope, scale, softcap,
                                          query - left if LEFT else 0, query + right if RIGHT else 0, SCALED, SOFTCAP,
                                          ALIBI, BIAS, EDGE and LEFT, EDGE and RIGHT)  # fmt: skip
                zt = xt * factor - base[None, :]
                pt = tl.exp2(zt - rest[None, :] if WIDE else zt)
                kept_pt = pt
                if DROPOUT:
                    keep = kept(seed, at[None, :], cols[:, None], batch * n_heads + head, dropout_p)
                    kept_pt = tl.where(keep, pt * (1 / (1 - dropout_p)), 0.0)
                dv = tl.dot(kept_pt.to(do.dtype), do, dv, input_precision=PRECISION)
                # delta can go in as the first value of the sum, and takes no registers and no subtraction of its own
                dpt = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) - (0.0 if DROPOUT or WIDE else delta[None, :])
                dpt = tl.dot(v, do.T, dpt, input_precision=PRECISION)
                if DROPOUT:
                    dpt = tl.where(keep, dpt * (1 / (1 - dropout_p)), 0.0)
                dst = pt * (dpt - delta[None, :] if DROPOUT or WIDE else dpt)
                if SOFTCAP:
                    dst *= slope_of_cap
                if EDGE or (BIAS != ""):
                    dst = tl.where(pt == 0, 0.0, dst)
                dk = tl.dot(dst.to(q.dtype), q, dk, input_precision=PRECISION)
    cols = afresh(col0, PTX) + tl.arange(0, BLOCK_N)
    in_cols = cols < k_len
    k_rows = (k_first + cols)[:, None]
    in_k, in_v = in_cols[:, None] & (dims < HEAD_DIM)[None, :], in_cols[:, None] & (value_dims < VALUE_DIM)[None, :]
    dk_at = offset((k_batch, kv_head, k_rows, dims[None, :]), dk_strides)
    dv_at = offset((k_batch, kv_head, k_rows, value_dims[None, :]), dv_strides)
    tl.store(dk_ptr + dk_at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=in_k)
    tl.store(dv_ptr + dv_at, dv.to(dv_ptr.dtype.element_ty), mask=in_v)


@triton.jit(do_not_specialize=VARYING)
def attention_backward_bias_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dbias_ptr, stats_ptr, bias_ptr, slopes_ptr, seed_ptr,
    q_strides, k_strides, v_strides, do_strides, dbias_strides, bias_strides, slopes_stride,
    n_batch, n_heads, q_total, k_total, scale, factor, left, right, softcap, dropout_p,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, SUM: tl.constexpr,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, ALIBI: tl.constexpr,
    SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dbias = p (do v^T - delta) in a tile, summed over the dimensions of (B, H, Sq, Sk) that the bias broadcasts.

    SUM: for each of the four whether it does. dbias: the bias's shape, float32; a program writes what is its own, and
    walks in a fixed order through what it sums, which is why no atomics are needed.
    """
    # a dimension of the grid is 1 where the program sums over it
    grid_q, grid_k = 1 if SUM[2] else tl.cdiv(q_total, BLOCK_M), 1 if SUM[3] else tl.cdiv(k_total, BLOCK_N)
    grid_h = 1 if SUM[1] else n_heads
    pid = tl.program_id(0)
    own_k, own_q, own_h, own_b = (
        pid % grid_k,
        pid // grid_k % grid_q,
        pid // (grid_k * grid_q) % grid_h,
        pid // (grid_k * grid_q * grid_h),
    )
    count_q, count_k = tl.cdiv(q_total, BLOCK_M) if SUM[2] else 1, tl.cdiv(k_total, BLOCK_N) if SUM[3] else 1
    count_h, count_b = n_heads if SUM[1] else 1, n_batch if SUM[0] else 1
    dims, value_dims = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_E)[None, :]
    seed = tl.load(seed_ptr) if DROPOUT else 0
    shift = k_total - q_total if BOTTOM_RIGHT else 0
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i in range(count_b * count_h * count_q * count_k):
        first_row = (own_q + i // count_k % count_q) * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        cols = (own_k + i % count_k) * BLOCK_N + tl.arange(0, BLOCK_N)
        head = own_h + i // (count_k * count_q) % count_h
        batch = own_b + i // (count_k * count_q * count_h)
        in_rows, in_cols = (rows < q_total)[:, None], (cols < k_total)[:, None]
        q_at, k_at = (
            offset((batch, head, rows[:, None], dims), q_strides),
            offset((batch, head // GROUP, cols[:, None], dims), k_strides),
        )
        q = tl.load(q_ptr + q_at, mask=in_rows & (dims < HEAD_DIM), other=0.0)
        k = tl.load(k_ptr + k_at, mask=in_cols & (dims < HEAD_DIM), other=0.0)
        do_at, v_at = (
            offset((batch, head, rows[:, None], value_dims), do_strides),
            offset((batch, head // GROUP, cols[:, None], value_dims), v_strides),
        )
        do = tl.load(do_ptr + do_at, mask=in_rows & (value_dims < VALUE_DIM), other=0.0)
        v = tl.load(v_ptr + v_at, mask=in_cols & (value_dims < VALUE_DIM), other=0.0)
        row_at = (batch * n_heads + head).to(tl.int64) * q_total + first_row
        tile_stats_ptr = stats_ptr + (3 if WIDE else 2) * row_at
        base, delta, rest = load_stats(tile_stats_ptr, tl.arange(0, BLOCK_M), rows < q_total, True, WIDE)
        slope = tl.load(slopes_ptr + batch * slopes_stride + head) if ALIBI else 0.0
        head_bias_ptr = bias_ptr + batch.to(tl.int64) * bias_strides[0] + head.to(tl.int64) * bias_strides[1]
        bias = load_bias(head_bias_ptr, rows[:, None], cols[None, :], bias_strides, q_total, k_total, "add")
        low = rows + shift - left if LEFT else rows
        high = tl.minimum(rows + shift + right, k_total - 1) if RIGHT else rows * 0 + k_total - 1
        x, _ = scores(tl.dot(q, k.T, input_precision=PRECISION), (rows + shift)[:, None], cols[None, :], bias, slope,
                      scale, softcap, low[:, None], high[:, None], True, SOFTCAP, ALIBI, "add", LEFT, True)  # fmt: skip
        p = tl.exp2(x * factor - base[:, None] - rest[:, None]) if WIDE else tl.exp2(x * factor - base[:, None])
        dp = tl.dot(do, v.T, input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed, rows[:, None], cols[None, :], batch * n_heads + head, dropout_p)
            dp = tl.where(keep, dp * (1 / (1 - dropout_p)), 0.0)
        dbias += tl.where(p == 0, 0.0, p * (dp - delta[:, None]))
    own_rows, own_cols = own_q * BLOCK_M + tl.arange(0, BLOCK_M), own_k * BLOCK_N + tl.arange(0, BLOCK_N)
    if SUM[2]:
        dbias = tl.sum(dbias, 0, keep_dims=True)
        own_rows = tl.zeros((1,), tl.int32)
    if SUM[3]:
        dbias = tl.sum(dbias, 1, keep_dims=True)
        own_cols = tl.zeros((1,), tl.int32)
    at = offset((own_b, own_h, own_rows[:, None], own_cols[None, :]), dbias_strides)
    inside = (own_rows < (1 if SUM[2] else q_total))[:, None] & (own_cols < (1 if SUM[3] else k_total))[None, :]
    tl.store(dbias_ptr + at, dbias.to(dbias_ptr.dtype.element_ty), mask=inside)
