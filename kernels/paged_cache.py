"""New keys and values written to the pages of a cache, and pages copied (lmops/reference/paged_cache.py has the maths).

Slot s is in block s // BLOCK_SIZE at s % BLOCK_SIZE. FORMAT "native", "int8", "fp8" (as bytes) or "int4" (two elements
a byte). A program stores some heads of a token; a row is what the token has for one of them.

Offsets are formed in units of VEC elements, of which every stride but a column's is a multiple: so the compiler sees
that rows begin on a boundary, whatever their length. A row that is rotated is held in parts, a tile each: the first
elements of its pairs, the second ones, and what is not rotated. Interleaved pairs are one part.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def part_columns(part, D, HALF, INTERLEAVED):
    """First column and number of columns of a part."""
    if HALF == 0:
        return 0, D
    ends = [0, 2 * HALF, D] if INTERLEAVED else [0, HALF, 2 * HALF, D]
    return ends[part], ends[part + 1] - ends[part]


@triton.constexpr_function
def padded(n):
    """The width of a tile with n columns."""
    return triton.next_power_of_2(n)


@triton.jit
def column_tile(column_stride, FIRST: tl.constexpr, N: tl.constexpr):
    """Offsets (1, PAD) of N columns from column FIRST on, and which are."""
    c = tl.arange(0, padded(N))[None, :]
    return (FIRST + c).to(tl.int64) * column_stride, c < N


@triton.jit
def load_part(ptr, offset, column_stride, in_rows, FIRST: tl.constexpr, N: tl.constexpr):
    """N columns of rows that begin at offset (ROWS, 1): (ROWS, PAD), 0 where there is nothing."""
    columns, inside = column_tile(column_stride, FIRST, N)
    return tl.load(ptr + offset + columns, mask=in_rows & inside, other=0)


@triton.jit
def load_rotated(
    ptr, cos_ptr, sin_ptr, offset, column_stride, position, n_positions, in_rows,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """The parts of rows of keys in float32, rotated by the angles of a position; NaN if there are none."""
    c = tl.arange(0, padded(HALF))[None, :]
    there = (position >= 0) & (position < n_positions)
    inside = c < tl.where(there, HALF, 0)
    cos = tl.load(cos_ptr + position * HALF + c, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * HALF + c, mask=inside, other=0.0).to(tl.float32)
    cos = tl.where(there, cos, float("nan"))
    if INTERLEAVED:
        x = load_part(ptr, offset, column_stride, in_rows, 0, 2 * HALF).to(tl.float32)
        a, b = tl.split(x.reshape(x.shape[0], padded(HALF), 2))
        turned = (tl.join(a * cos - b * sin, b * cos + a * sin).reshape(x.shape[0], 2 * padded(HALF)),)
    else:
        a = load_part(ptr, offset, column_stride, in_rows, 0, HALF).to(tl.float32)
        b = load_part(ptr, offset, column_stride, in_rows, HALF, HALF).to(tl.float32)
        turned = (a * cos - b * sin, b * cos + a * sin)
    if D > 2 * HALF:
        rest = load_part(ptr, offset, column_stride, in_rows, 2 * HALF, D - 2 * HALF).to(tl.float32)
        if INTERLEAVED:
            return turned[0], rest
        else:
            return turned[0], turned[1], rest
    else:
        return turned


@triton.jit
def largest_bits(parts):
    """The bits of the largest magnitude of each row, (ROWS, 1): from 0x7F800000 on there is a NaN or an infinity."""
    top = tl.max(parts[0].to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)
    for i in tl.static_range(1, len(parts)):
        top = tl.maximum(top, tl.max(parts[i].to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
    return top[:, None]


@triton.jit
def least(parts, good, SIGN: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The least of SIGN x of each good row, (ROWS, 1)."""
    bottom = tl.full((parts[0].shape[0],), float("inf"), tl.float32)
    for i in tl.static_range(len(parts)):
        c = tl.arange(0, parts[i].shape[1])[None, :]
        inside = c < part_columns(i, D, HALF, INTERLEAVED)[1]
        bottom = tl.minimum(bottom, tl.min(tl.where(inside & good, parts[i] * SIGN, float("inf")), 1))
    return bottom[:, None]


@triton.jit
def to_e4m3(x):
    """Bytes of x in float8_e4m3fn as int32, rounded half to even; x from -448 to 448."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) >> 20) - (120 << 3)
    # an ulp of numbers from 2^14 on is 2^-9, that of e4m3's subnormal numbers
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(magnitude < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def store_part(
    x, ptr, column_stride, step, low, good, in_rows, FIRST: tl.constexpr, N: tl.constexpr, FORMAT: tl.constexpr
):
    """N columns of rows from column FIRST on, as codes of steps (from `low` on, for int4), to ptr (ROWS, 1)."""
    if FORMAT == "int4":
        q = tl.div_rn(tl.where(good, x, 0.0) - low, step)
        # adding 1.5 2^23 leaves no bits behind the point
        q = ((tl.minimum(tl.maximum(q, 0.0), 15.0) + 12582912.0) - 12582912.0).to(tl.int32)
        even, odd = tl.split(q.reshape(q.shape[0], q.shape[1] // 2, 2))
        columns, inside = column_tile(column_stride, FIRST // 2, N // 2)
        tl.store(ptr + columns, (even | odd << 4).to(ptr.dtype.element_ty), mask=in_rows & inside)
    else:
        if FORMAT == "int8":
            q = tl.div_rn(tl.where(good, x, 0.0), step)
            x = (tl.minimum(tl.maximum(q, -127.0), 127.0) + 12582912.0) - 12582912.0
        elif FORMAT == "fp8":
            q = tl.div_rn(tl.where(good, x, 0.0), step)
            x = to_e4m3(tl.minimum(tl.maximum(q, -448.0), 448.0))
        columns, inside = column_tile(column_stride, FIRST, N)
        tl.store(ptr + columns, x.to(ptr.dtype.element_ty), mask=in_rows & inside)


@triton.jit
def store_rows(
    parts, pages_ptr, scale_ptr, slot, heads, in_rows, page_strides, scale_strides, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, VEC: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Rows to a slot and heads (ROWS, 1), quantized as FORMAT says."""
    block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    pages_ptr += (block * page_strides[0] + place * page_strides[1]) * VEC + heads * page_strides[2] * VEC
    good, low, step = in_rows, 0.0, 1.0
    if FORMAT != "native":
        good = largest_bits(parts) < 0x7F800000
        if FORMAT == "int4":
            low = tl.where(good, least(parts, good, 1.0, D, HALF, INTERLEAVED), 0.0)
            high = tl.where(good, -least(parts, good, -1.0, D, HALF, INTERLEAVED), 0.0)
            scale = tl.div_rn(high * 0.5 - low * 0.5, 7.5)
        else:
            largest = tl.where(good, largest_bits(parts), 0).to(tl.float32, bitcast=True)
            scale = tl.div_rn(largest, 448.0 if FORMAT == "fp8" else 127.0)
        bound: tl.constexpr = 65504.0 if scale_ptr.dtype.element_ty == tl.float16 else 3.4028234663852886e38
        scale = tl.minimum(scale, bound).to(scale_ptr.dtype.element_ty)
        scale_ptr += block * scale_strides[0] + place * scale_strides[1] + heads * scale_strides[2]
        tl.store(scale_ptr, tl.where(good, scale, float("nan")), mask=in_rows)
        if FORMAT == "int4":
            low = tl.minimum(tl.maximum(low, -bound), bound).to(scale_ptr.dtype.element_ty)
            tl.store(scale_ptr + scale_strides[3], tl.where(good, low, float("nan")), mask=in_rows)
            low = low.to(tl.float32)
        step = scale.to(tl.float32)
        step = tl.where(step == 0, 1.0, step)
    for i in tl.static_range(len(parts)):
        store_part(
            parts[i], pages_ptr, page_strides[3], step, low, good, in_rows,
            part_columns(i, D, HALF, INTERLEAVED)[0], part_columns(i, D, HALF, INTERLEAVED)[1], FORMAT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_slots", "n_positions"])
def store_kv_kernel(
    k_ptr, v_ptr, k_pages_ptr, v_pages_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, cos_ptr, sin_ptr, positions_ptr,
    n_slots, n_positions, k_strides, v_strides, k_page_strides, v_page_strides, k_scale_strides, v_scale_strides,
    ROWS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, VEC: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """pages[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = k, v for ROWS heads of a token. Other slots are left out.

    k: (tokens, HEADS, D), v: (tokens, HEADS, DV); pages: (blocks, BLOCK_SIZE, HEADS, D and DV, half of it for int4);
    scales: (blocks, BLOCK_SIZE, HEADS, 1, for int4 2). All strides in elements, those of the first four but the
    columns' divided by VEC. slots: (tokens,) int64, n_slots: of the pages.
    HALF > 0: k is rotated by the angles of positions (tokens,) int64, of which cos and sin (n_positions, HALF) are
    given; other positions give NaN.
    """
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    in_rows = heads < HEADS
    slot = tl.load(slots_ptr + token)
    if (slot >= 0) & (slot < n_slots):
        k_offset = token * k_strides[0] * VEC + heads * k_strides[1] * VEC
        v_offset = token * v_strides[0] * VEC + heads * v_strides[1] * VEC
        # both are loaded before the first store, which the compiler would not move a load over
        v = load_part(v_ptr, v_offset, v_strides[2], in_rows, 0, DV)
        if HALF:
            k = load_rotated(
                k_ptr, cos_ptr, sin_ptr, k_offset, k_strides[2], tl.load(positions_ptr + token), n_positions, in_rows,
                D, HALF, INTERLEAVED,
            )  # fmt: skip
        else:
            k = (load_part(k_ptr, k_offset, k_strides[2], in_rows, 0, D),)
            if FORMAT != "native":
                k = (k[0].to(tl.float32),)
        if FORMAT != "native":
            v = v.to(tl.float32)
        store_rows(
            k, k_pages_ptr, k_scale_ptr, slot, heads, in_rows, k_page_strides, k_scale_strides, BLOCK_SIZE,
            D, HALF, INTERLEAVED, VEC, FORMAT,
        )  # fmt: skip
        store_rows(
            (v,), v_pages_ptr, v_scale_ptr, slot, heads, in_rows, v_page_strides, v_scale_strides, BLOCK_SIZE,
            DV, 0, False, VEC, FORMAT,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_seqs", "n_new", "n_queries", "width"])
def append_slots_kernel(
    lengths_ptr, table_ptr, slots_ptr, positions_ptr, places_ptr, after_ptr, n_seqs, n_new, n_queries, width,
    block_size, lengths_stride, table_strides, MOVING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Position lengths[s] + j of new token j of sequence s, and its slot by the table, -1 where that has no block.

    lengths: (n_seqs,) int32; table: (n_seqs, width) int32, any strides. slots, positions: (n_seqs, n_new) int64.
    places: (n_seqs, n_queries) int64, lengths[s] + i with MOVING, else lengths[s]; after: (n_seqs,) int32, n_new more.
    """
    a_seq = tl.maximum(tl.maximum(n_new, n_queries), 1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    seq, j = i // a_seq, i % a_seq
    inside = seq < n_seqs
    length = tl.load(lengths_ptr + seq * lengths_stride, mask=inside, other=0)
    position = length.to(tl.int64) + j
    new = inside & (j < n_new)
    entry = position // block_size
    there = new & (position >= 0) & (entry < width)
    block = tl.load(table_ptr + seq * table_strides[0] + entry * table_strides[1], mask=there, other=-1).to(tl.int64)
    slot = tl.where(block >= 0, block * block_size + position % block_size, -1)
    tl.store(slots_ptr + seq * n_new + j, slot, mask=new)
    tl.store(positions_ptr + seq * n_new + j, position, mask=new)
    place = position if MOVING else position - j
    tl.store(places_ptr + seq * n_queries + j, place, mask=inside & (j < n_queries))
    tl.store(after_ptr + seq, length + n_new, mask=inside & (j == 0))


@triton.jit
def copy_page(ptr, src, dst, head, n_tokens, strides, N: tl.constexpr, SLOTS: tl.constexpr, VEC: tl.constexpr):
    """The first n_tokens slots of a head of block src to block dst; N columns."""
    src_ptr = ptr + (src * strides[0] + head * strides[2]) * VEC
    dst_ptr = ptr + (dst * strides[0] + head * strides[2]) * VEC
    columns, inside = column_tile(strides[3], 0, N)
    s = tl.arange(0, SLOTS)[:, None]
    tile = s.to(tl.int64) * strides[1] * VEC + columns
    for start in range(0, n_tokens, SLOTS):
        first = tl.cast(start, tl.int64) * strides[1] * VEC
        mask = (start + s < n_tokens) & inside
        tl.store(dst_ptr + first + tile, tl.load(src_ptr + first + tile, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["n_blocks"])
def copy_blocks_kernel(
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, copies_ptr, n_blocks, k_strides, v_strides, k_scale_strides,
    v_scale_strides,
    D: tl.constexpr, DV: tl.constexpr, SCALES: tl.constexpr, BLOCK_SIZE: tl.constexpr, COUNTS: tl.constexpr,
    SLOTS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """pages[dst, :n] = pages[src, :n] of one head and one of copies; blocks that are not there are left out.

    copies: (n_copies, 2) int64, src and dst, n = BLOCK_SIZE; with COUNTS (n_copies, 3), and n. Pages: (n_blocks,
    BLOCK_SIZE, heads, D and DV), scales with SCALES > 0 columns; strides in elements, the pages' divided by VEC.
    """
    copy_ptr = copies_ptr + tl.program_id(0).to(tl.int64) * (3 if COUNTS else 2)
    head = tl.program_id(1).to(tl.int64)
    src, dst = tl.load(copy_ptr), tl.load(copy_ptr + 1)
    n_tokens = tl.minimum(tl.load(copy_ptr + 2), BLOCK_SIZE).to(tl.int32) if COUNTS else BLOCK_SIZE
    there = (src >= 0) & (src < n_blocks) & (dst >= 0) & (dst < n_blocks)
    n_tokens = tl.where(there, n_tokens, 0)
    copy_page(k_ptr, src, dst, head, n_tokens, k_strides, D, SLOTS, VEC)
    copy_page(v_ptr, src, dst, head, n_tokens, v_strides, DV, SLOTS, VEC)
    if SCALES:
        copy_page(k_scale_ptr, src, dst, head, n_tokens, k_scale_strides, SCALES, SLOTS, 1)
        copy_page(v_scale_ptr, src, dst, head, n_tokens, v_scale_strides, SCALES, SLOTS, 1)
