"""Attention over a paged KV cache: queries of many sequences, a few or many of each, over pages that a table names.

Shapes in comments: M rows and N keys of a tile, D head_dim of queries and keys, E of values. A row is a query token
and one of the GROUP query heads that share a key head: few queries then fill a tile, and read a key once for all heads.

    q (T, H, D), the tokens of the S sequences one behind the other; cu_q (S + 1,) int32 says where each begins
    k (n_blocks, block_size, KV, D), v (n_blocks, block_size, KV, E); strides in elements, the last one is 1
    FORMAT: what pages hold: "native" numbers; "int8"; "fp8", the bytes of e4m3; "int4", two numbers a byte, the low
        nibble first. The scale of a token and head is in k_scale, v_scale (n_blocks, block_size, KV), for "int4"
        (..., 2) with a minimum behind it: number = quantized x scale + minimum
    table (S, width) int32: block i of a sequence holds its keys i block_size .. (i + 1) block_size - 1
    context (S,) int32: how many keys there are. The last query of a sequence has the position of its last key

Blocks behind a window may be -1 in the table, and what no query sees is never loaded: not the slots past `context`,
nor those before the window. A number that is no block's is taken for the nearest that is: nothing outside k and v is
read. docs/kernels.md has the split over the keys, and why a combination of its parts is exact.
"""

import triton
import triton.language as tl

from .attention import scores, visible_range, without_nonfinite
from .common import LN2, LOG2E, online_softmax_step


@triton.jit
def ragged(cu_q_ptr, tile, n_seqs, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sequence that tile `tile` belongs to, and its first tile.

    Sequence s has the tiles from cu_q[s] GROUP // BLOCK_M + s on: sometimes one more than it needs, so that where they
    begin follows from one number.
    """
    index = tl.arange(0, 256)
    seq = 0
    for start in range(0, n_seqs, 256):
        begins = tl.load(cu_q_ptr + start + index, mask=start + index < n_seqs, other=0)
        before = (start + index < n_seqs) & (begins * GROUP // BLOCK_M + start + index <= tile)
        seq += tl.sum(before.to(tl.int32), 0)
    seq = tl.maximum(seq - 1, 0)
    return seq, tl.load(cu_q_ptr + seq) * GROUP // BLOCK_M + seq


@triton.jit
def find_page(table_ptr, start, cols, end, n_blocks, block_size, ONE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
              EDGE: tl.constexpr):  # fmt: skip
    """Block and slot of the keys start + cols. ONE: all N lie in one block, and both are of the first; else (N,)."""
    at = start if ONE else start + cols
    size = block_size if ONE else BLOCK_SIZE
    if EDGE:
        block = tl.load(table_ptr + at // size, mask=at < end, other=0)
    else:
        block = tl.load(table_ptr + at // size)
    return tl.minimum(tl.maximum(block, 0), n_blocks - 1).to(tl.int64), at % size


@triton.jit
def page_offset(block, slot, strides, ONE: tl.constexpr):
    """Offset in elements of the keys that `find_page` found: a scalar, or (N, 1)."""
    offset = block * strides[0] + slot.to(tl.int64) * strides[1]
    return offset if ONE else offset[:, None]


@triton.jit
def load_page(tile_ptr, in_rows, BYTES: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr, cols):
    """(N, bytes or elements of a row), 0 outside in_rows at an EDGE, and from column BYTES on."""
    if EDGE:
        return tl.load(tile_ptr, mask=in_rows[:, None] & (cols < BYTES)[None, :], other=0)
    elif BYTES == PADDED:
        return tl.load(tile_ptr)
    else:
        return tl.load(tile_ptr, mask=(cols < BYTES)[None, :], other=0)


@triton.constexpr_function
def widen_ptx(FORMAT, HALF):
    """PTX that turns four bytes into numbers, two of 16 bits in a register; of "int4" the low nibbles, then the high.

    An integer is put into the bits of a power of two, which is then subtracted: exact, and without a conversion, of
    which a multiprocessor starts an eighth as many. HALF: float16, else bfloat16.
    """
    spread = "prmt.b32 a, {x}, 0, 0x4140; prmt.b32 b, {x}, 0, 0x4342;"  # a byte in the low half of 16 bits each
    ones, one, places = "0xbf80bf80", "0x3f803f80", "ab"
    if FORMAT == "int8" and HALF:  # 1024 + (code + 128) - 1152
        body = "xor.b32 c, $2, 0x80808080; prmt.b32 a, c, 0x64646464, 0x4140; prmt.b32 b, c, 0x64646464, 0x4342;"
        body += "mov.b32 c, 0x64806480; sub.f16x2 $0, a, c; sub.f16x2 $1, b, c;"
    elif FORMAT == "int8":  # (128 + low 7 bits) - (256 if the sign is set, else 128)
        body = spread.format(x="$2") + f"mov.b32 d, {ones};"
        for i, r in enumerate(places):
            body += f"lop3.b32 c, {r}, 0x007f007f, 0x43004300, 0xea; lop3.b32 {r}, {r}, 0x00800080, 0x43004300, 0xea;"
            body += f"fma.rn.bf16x2 ${i}, {r}, d, c;"
    elif FORMAT == "int4":  # 1024 + code - 1032, or 128 + code - 136
        body = spread.format(x="$4") + f"mov.b32 d, {'0x64086408' if HALF else '0xc308c308'}; mov.b32 e, {one};"
        power = "0x64006400" if HALF else "0x43004300"
        for i, r in enumerate(places):
            body += f"lop3.b32 c, {r}, 0x000f000f, {power}, 0xea; shr.u32 {r}, {r}, 4;"
            body += f"lop3.b32 {r}, {r}, 0x000f000f, {power}, 0xea;"
            for to, x in ((i, "c"), (i + 2, r)):
                body += f"sub.f16x2 ${to}, {x}, d;" if HALF else f"fma.rn.bf16x2 ${to}, {x}, e, d;"
    else:  # e4m3 is a float16 with fewer bits and an exponent less by 8, and a bfloat16 with one less by 120
        body = "prmt.b32 a, $2, 0, 0x1404; prmt.b32 b, $2, 0, 0x3424;"
        body += "" if HALF else "mov.b32 d, 0x77807780; mov.b32 e, 0x80008000;"  # 2^112, -0
        for i, r in enumerate(places):
            mask, by = ("0x3f803f80", 1) if HALF else ("0x07f007f0", 4)
            body += f"and.b32 c, {r}, 0x80008000; shr.u32 {r}, {r}, {by};"
            body += f"lop3.b32 {f'${i}' if HALF else r}, {r}, {mask}, c, 0xea;"
            body += "" if HALF else f"fma.rn.bf16x2 ${i}, {r}, d, e;"
    return "{.reg .b32 a, b, c, d, e;" + body + "}"


@triton.jit
def decode(tile, dtype: tl.constexpr, FORMAT: tl.constexpr, PTX: tl.constexpr):
    """The codes of a tile of pages in `dtype`: of "fp8" 2^-8 of what they stand for, of "int4" 8 less."""
    if FORMAT == "native":
        return tile.to(dtype)
    elif FORMAT == "int4":
        if PTX and dtype != tl.float32:
            low, high = tl.inline_asm_elementwise(
                widen_ptx(FORMAT, dtype == tl.float16), "=r,=r,=r,=r,r", [tile], (dtype.value, dtype.value), True, 4
            )
        else:
            low, high = ((tile & 15).to(tl.int8) - 8).to(dtype), ((tile >> 4).to(tl.int8) - 8).to(dtype)
        return tl.join(low, high).reshape(tile.shape[0], 2 * tile.shape[1])
    elif PTX and dtype != tl.float32:
        return tl.inline_asm_elementwise(
            widen_ptx(FORMAT, dtype == tl.float16), "=r,=r,r", [tile], dtype.value, True, 4
        )
    elif FORMAT == "int8":
        return tile.to(dtype)
    else:  # see widen_ptx
        bits = tile.to(tl.uint16)
        sign = (bits & 0x80) << 8
        if dtype == tl.bfloat16:
            scale = tl.full((), 0x7780, tl.uint16).to(tl.bfloat16, bitcast=True)  # 2^112
            return (sign | ((bits & 0x7F) << 4)).to(tl.bfloat16, bitcast=True) * scale
        else:
            return (sign | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True).to(dtype)


@triton.jit
def load_scale(scale_ptr, block, slot, cols, strides, in_cols, FORMAT: tl.constexpr, ONE: tl.constexpr,
               EDGE: tl.constexpr):  # fmt: skip
    """Scale and minimum of N keys, (N,) float32, as they apply to what `decode` gives."""
    if FORMAT == "native":
        return 1.0, 0.0
    else:
        at = scale_ptr + page_offset_of_scales(block, slot, cols, strides, ONE)
        if FORMAT == "int4":
            pairs_ptr = at[:, None] + tl.arange(0, 2)[None, :] * strides[3]
            if EDGE:
                scale, minimum = tl.split(tl.load(pairs_ptr, mask=in_cols[:, None], other=0.0))
            else:
                scale, minimum = tl.split(tl.load(pairs_ptr))
            # codes about 0 leave sums half as much to cancel
            return scale.to(tl.float32), minimum.to(tl.float32) + 8 * scale.to(tl.float32)
        else:
            scale = (tl.load(at, mask=in_cols, other=0.0) if EDGE else tl.load(at)).to(tl.float32)
            return (scale * 256 if FORMAT == "fp8" else scale), 0.0


@triton.jit
def dequantize(codes, scale, minimum, FORMAT: tl.constexpr):
    """Numbers (N, D or E) of what `decode` and `load_scale` give."""
    if FORMAT == "native":
        return codes
    elif FORMAT == "int4":
        return codes * scale[:, None] + minimum[:, None]
    else:
        return codes * scale[:, None]


@triton.jit
def page_offset_of_scales(block, slot, cols, strides, ONE: tl.constexpr):
    offset = block * strides[0] + slot.to(tl.int64) * strides[1]
    return offset + cols * strides[1] if ONE else offset


# what varies from call to call
VARYING = ("n_seqs", "n_tokens", "q_len", "n_blocks", "capacity", "shared", "left", "right", "least")


@triton.jit(do_not_specialize=VARYING)
def paged_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, table_ptr, context_ptr, cu_q_ptr, leftpad_ptr, slopes_ptr, sinks_ptr,
    o_ptr, lse_ptr,
    q_strides, k_strides, v_strides, k_scale_strides, v_scale_strides, table_stride, slopes_stride, o_strides,
    lse_strides,
    n_seqs, n_tokens, q_len, n_blocks, block_size, capacity, shared, scale, factor, left, right, softcap, least,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, ONE: tl.constexpr, RAGGED: tl.constexpr, PREFIX: tl.constexpr, SUFFIX: tl.constexpr,
    LEFTPAD: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, SCALED: tl.constexpr, PARTS: tl.constexpr, ORDERED: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = softmax(scores) v and lse = log sum exp(scores) for BLOCK_M rows, or of a part of the keys (PARTS).

    Programs: tiles of rows x key heads x parts. With PARTS, part p takes so many tiles of the keys that all get
    equally many, but not fewer than `least`; o is its own softmax's, and lse in base 2.
    PREFIX: all queries see the `shared` first keys of sequence 0, and no others; SUFFIX: the keys before `shared` are
    left out. RAGGED: cu_q says where queries begin; else each sequence has q_len. LEFTPAD: (S,) slots before its keys.
    ORDERED: a row adds up its keys in the same order whatever other rows the tile has.
    """
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if RAGGED:
        seq, first_tile = ragged(cu_q_ptr, tile, n_seqs, GROUP, BLOCK_M)
        q_first = tl.minimum(tl.maximum(tl.load(cu_q_ptr + seq), 0), n_tokens)
        q_len = tl.minimum(tl.maximum(tl.load(cu_q_ptr + seq + 1), q_first), n_tokens) - q_first
    else:
        tiles = tl.cdiv(q_len * GROUP, BLOCK_M)
        seq = tile // tiles
        first_tile, q_first = seq * tiles, seq * q_len
    row0 = (tile - first_tile) * BLOCK_M
    if row0 >= q_len * GROUP:
        return
    rows = row0 + tl.arange(0, BLOCK_M)
    positions, heads = rows // GROUP, kv_head * GROUP + rows % GROUP  # (M,)
    in_rows = positions < q_len
    tokens = (q_first + positions).to(tl.int64)
    lse_at = lse_ptr + tokens * lse_strides[0] + heads * lse_strides[1] + part * lse_strides[2]

    context = shared if PREFIX else tl.minimum(tl.maximum(tl.load(context_ptr + seq), 0), capacity)
    if LEFTPAD:
        pad = tl.minimum(tl.maximum(tl.load(leftpad_ptr + seq), 0), context).to(tl.int64)
        k_ptr += pad * k_strides[1]
        v_ptr += pad * v_strides[1]
        context -= pad.to(tl.int32)
    shift = 0 if PREFIX else context - q_len
    last = tl.minimum(row0 + BLOCK_M - 1, q_len * GROUP - 1) // GROUP
    begin, full_begin, full_end, end = visible_range(
        row0 // GROUP + shift, last + shift, left, right, context, LEFT, RIGHT, BLOCK_N
    )
    first_key = tl.maximum(row0 // GROUP + shift - left, 0) if LEFT else 0
    if SUFFIX:
        first_key = tl.maximum(first_key, shared)
        begin = tl.minimum(tl.maximum(begin, shared // BLOCK_N * BLOCK_N), end)
        full_begin = tl.maximum(full_begin, tl.minimum(tl.cdiv(shared, BLOCK_N) * BLOCK_N, end))
        full_end = tl.maximum(full_end, full_begin)
    if ORDERED and LEFT:  # the edges come last: without full tiles all come in the order of the keys
        full_begin, full_end = begin, begin
    if PARTS:
        tiles_of_part = tl.maximum(tl.cdiv(tl.cdiv(end - begin, BLOCK_N), tl.num_programs(2)), least)
        begin += part * tiles_of_part * BLOCK_N
        end = tl.minimum(end, begin + tiles_of_part * BLOCK_N)
        if begin >= end:
            tl.store(lse_at, tl.full((BLOCK_M,), float("-inf"), tl.float32), mask=in_rows)
            return
        full_begin = tl.minimum(tl.maximum(full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(full_end, full_begin), end)

    cols, dims, value_dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    q_at = tokens[:, None] * q_strides[0] + heads[:, None] * q_strides[1] + dims[None, :] * q_strides[2]
    q = tl.load(q_ptr + q_at, mask=in_rows[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    # codes become numbers before a product of float32; in 16 bits that would round, and scales come in behind it
    BEHIND: tl.constexpr = FORMAT != "native" and q.dtype != tl.float32
    MINIMA: tl.constexpr = BEHIND and FORMAT == "int4"
    q_sum = tl.sum(q.to(tl.float32), 1)[:, None] if MINIMA else 0.0

    # in what pages hold: numbers, or bytes
    SHARE: tl.constexpr = 2 if FORMAT == "int4" else 1
    k_cols, v_cols = tl.arange(0, BLOCK_D // SHARE), tl.arange(0, BLOCK_E // SHARE)
    k_ptr += kv_head.to(tl.int64) * k_strides[2]
    v_ptr += kv_head.to(tl.int64) * v_strides[2]
    k_offsets = k_cols[None, :] + cols[:, None] * k_strides[1] if ONE else k_cols[None, :]
    v_offsets = v_cols[None, :] + cols[:, None] * v_strides[1] if ONE else v_cols[None, :]
    if FORMAT != "native":
        k_scale_ptr += kv_head.to(tl.int64) * k_scale_strides[2]
        v_scale_ptr += kv_head.to(tl.int64) * v_scale_strides[2]
    table_ptr += seq.to(tl.int64) * table_stride
    slope = tl.load(slopes_ptr + seq * slopes_stride + heads)[:, None] if ALIBI else 0.0

    queries = positions + shift
    low = tl.maximum(queries - left, first_key) if LEFT else queries * 0 + first_key
    high = tl.minimum(queries + right, context - 1) if RIGHT else queries * 0 + context - 1
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    l = tl.zeros((BLOCK_M,), tl.float32)
    floor = tl.zeros((BLOCK_M,), tl.float32)  # what the minima of "int4" values add to every element of o
    acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    for EDGE in tl.static_range(2):
        # the edges are one loop: the tiles before the full ones, then those after them
        skip = full_end - full_begin
        for start in tl.range(
            begin + skip if EDGE else full_begin, end if EDGE else full_end, BLOCK_N, num_stages=1 if EDGE else None
        ):
            if EDGE:
                start -= tl.where(start < full_end, skip, 0)
            at = start + cols
            in_cols = (at >= first_key) & (at < context)
            block, slot = find_page(table_ptr, start, cols, context, n_blocks, block_size, ONE, BLOCK_SIZE, EDGE)
            k = load_page(k_ptr + (page_offset(block, slot, k_strides, ONE) + k_offsets), in_cols, HEAD_DIM // SHARE,
                          BLOCK_D // SHARE, EDGE, k_cols)  # fmt: skip
            k_scale, k_min = load_scale(k_scale_ptr, block, slot, cols, k_scale_strides, in_cols, FORMAT, ONE, EDGE)
            k = decode(k, q.dtype, FORMAT, PTX)
            if not BEHIND:
                k = dequantize(k, k_scale, k_min, FORMAT)
            x = tl.dot(q, k.T, input_precision=PRECISION)  # (M, N)
            v = load_page(v_ptr + (page_offset(block, slot, v_strides, ONE) + v_offsets), in_cols, VALUE_DIM // SHARE,
                          BLOCK_E // SHARE, EDGE, v_cols)  # fmt: skip
            v_scale, v_min = load_scale(v_scale_ptr, block, slot, cols, v_scale_strides, in_cols, FORMAT, ONE, EDGE)
            v = decode(v, q.dtype, FORMAT, PTX)
            if not BEHIND:
                v = dequantize(v, v_scale, v_min, FORMAT)
            if BEHIND:
                x *= k_scale[None, :]
            if MINIMA:
                x += q_sum * k_min[None, :]
            if EDGE:
                if BEHIND:
                    spoiled = v_scale * 0.0
                    v_scale = tl.where(spoiled == 0.0, v_scale, 0.0)
                else:
                    v, spoiled = without_nonfinite(v)
                x += spoiled[None, :]
            x, _ = scores(x, queries[:, None], at[None, :], 0.0, slope, scale, softcap, low[:, None], high[:, None],
                          SCALED, SOFTCAP, ALIBI, "", EDGE and (LEFT or SUFFIX), EDGE)  # fmt: skip
            p, m, l, alpha = online_softmax_step(x, m, l, factor, True, EDGE)
            if MINIMA:
                # the selection keeps a product from being contracted with the sum across lanes, after which lanes that
                # hold copies of a sum would differ
                floor = floor * alpha + tl.sum(tl.where(p > 0, p * v_min[None, :], 0.0), 1)
            if BEHIND:
                p *= v_scale[None, :]
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)

    if SINKS:
        sink = tl.load(sinks_ptr + heads).to(tl.float32) * LOG2E
        m_new = tl.maximum(m, sink)
        alpha = tl.exp2(m - m_new)
        m, l, acc = m_new, l * alpha + tl.exp2(sink - m_new), acc * alpha[:, None]
        floor *= alpha
    empty = l == 0
    total = tl.where(empty, 1.0, l)
    lse = m + tl.log2(total)
    tl.store(lse_at, lse if PARTS else lse * LN2, mask=in_rows)
    if MINIMA:
        acc += floor[:, None]
    o = acc * (1 / total)[:, None]
    o_at = tokens[:, None] * o_strides[0] + heads[:, None] * o_strides[1] + value_dims[None, :]
    in_o = in_rows[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(o_ptr + part * o_strides[2] + o_at, o.to(o_ptr.dtype.element_ty), mask=in_o)


@triton.jit(do_not_specialize=["n_heads", "n_tokens", "n_parts"])
def combine_kernel(
    part_ptr, part_lse_ptr, sinks_ptr, o_ptr, lse_ptr, o_strides, lse_strides, n_heads, n_tokens, n_parts,
    VALUE_DIM: tl.constexpr, SINKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """o = sum_p w_p part_p / sum_p w_p with w_p = 2^part_lse_p, of one token and head; lse is the logarithm of the sum.

    part (T, H, P, E) float32 and part_lse (T, H, P) float32, contiguous. A part of no keys, whose lse is -inf, is not
    read: nothing is in it.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    row = token.to(tl.int64) * n_heads + head
    parts, value_dims = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    part_lse = tl.load(part_lse_ptr + row * n_parts + parts, mask=parts < n_parts, other=float("-inf"))
    top = tl.max(part_lse, 0)
    if SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp2(part_lse - shift)  # (P,)
    total = tl.sum(weight, 0)
    if SINKS:
        total += tl.exp2(sink - shift)
    at = part_ptr + (row * n_parts + parts[:, None]) * VALUE_DIM + value_dims[None, :]
    part = tl.load(at, mask=(part_lse > float("-inf"))[:, None] & (value_dims < VALUE_DIM)[None, :], other=0.0)
    total_or_1 = tl.where(total == 0, 1.0, total)
    o = tl.sum(part * weight[:, None], 0) / total_or_1
    o_at = token.to(tl.int64) * o_strides[0] + head * o_strides[1] + value_dims
    tl.store(o_ptr + o_at, o.to(o_ptr.dtype.element_ty), mask=value_dims < VALUE_DIM)
    lse = (shift + tl.log2(total_or_1)) * LN2
    tl.store(lse_ptr + token.to(tl.int64) * lse_strides[0] + head * lse_strides[1],
             tl.where(total == 0, float("-inf"), lse))  # fmt: skip
