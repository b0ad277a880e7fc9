"""Products with a weight of 4 or 8 bits that is unpacked in registers (docs/kernels.md has the layout and the maths).

What the kernels take of a weight (n_out, n_in):

    packed (units, n_out, 32) int16   codes, 64 bytes a row and unit, a unit being PARTS parts of 32 columns
    scales (groups, n_out)            GROUP columns share one; GROUP = 0: a row has one
    shift  (groups, n_out)            SHIFT "zeros": integer zero points, "offsets": in the scales' type, "": none
    FORMAT "int4", "int8", "fp8"

The words of M rows and a unit are held as (2, M / 16, 8, 4, 8): the first three indices h, m, g are the row
16 m + 8 h + g. With a warp for 16 rows, or several times 16, a lane holds the 16 bytes of row g and those of row 8 + g,
and what it unpacks from them are the very numbers that it hands to the tensor core as left operand: nothing moves
between lanes. So the forward product is computed transposed, y^T (n_out, rows) = W x^T.

COMPUTE is the type in which a weight is formed, before it is rounded to x's. Codes become numbers without a conversion:
they are put into the bits of a power of two, `magic`, which is then subtracted, exactly. PTX: two of 16 bits at a time,
on NVIDIA.
"""

import triton
import triton.language as tl

# ------------------------------------------------------------------------------------------ a tile of the weight


@triton.jit
def words(M: tl.constexpr):
    """Of the words of a tile: the row (2, M / 16, 8, 1, 1), and the place in the row's 64 bytes (1, 1, 1, 4, 8)."""
    h = tl.arange(0, 2)[:, None, None, None, None]
    m = tl.arange(0, M // 16)[None, :, None, None, None]
    g = tl.arange(0, 8)[None, None, :, None, None]
    t = tl.arange(0, 4)[None, None, None, :, None]
    v = tl.arange(0, 8)[None, None, None, None, :]
    return 16 * m + 8 * h + g, 8 * t + v


@triton.jit
def as_matrix(q, M: tl.constexpr):
    """A part of a tile as (M, 32), rows and columns in their order."""
    return q.reshape(2, M // 16, 8, 4, 2, 2, 2).permute(1, 0, 2, 4, 5, 3, 6).reshape(M, 32)


@triton.jit
def load_words(packed_ptr, unit, out0, n_out, M: tl.constexpr):
    """The words of the rows out0 .. out0 + M - 1 in a unit."""
    row, place = words(M)
    tile_ptr = packed_ptr + (tl.cast(unit, tl.int64) * n_out + out0) * 32
    return tl.load(tile_ptr + (row * 32 + place), mask=out0 + row < n_out, other=0)


@triton.jit
def load_part(ptr, unit, PART: tl.constexpr, out0, n_out, n_groups, M: tl.constexpr, PARTS: tl.constexpr,
              GROUP: tl.constexpr):  # fmt: skip
    """What one part of a unit has a group: (2, M / 16, 8, 4, 1), or a value a column (2, M / 16, 8, 4, 8)."""
    row, place = words(M)
    # a value a lane, as its words lie. `& (M - 1)` changes nothing, but hides from the compiler that the rows are
    # neighbours in memory: it would choose lanes for these few values first, and then move the words there
    row = (row & (M - 1)) + tl.arange(0, 4)[None, None, None, :, None] * 0
    first = unit * (32 * PARTS) + 32 * PART
    if GROUP == 0:
        return tl.load(ptr + (out0 + row), mask=out0 + row < n_out, other=0)
    elif GROUP % 32 == 0:
        group = tl.cast(tl.minimum(first // GROUP, n_groups - 1), tl.int64)
        return tl.load(ptr + group * n_out + out0 + row, mask=out0 + row < n_out, other=0)
    else:
        t, v = place // 8, place % 8
        column = first + v // 4 * 16 + v // 2 % 2 * 8 + 2 * t + v % 2
        base = tl.minimum(first // GROUP, n_groups - 1)
        group = tl.minimum(column // GROUP, n_groups - 1) - base
        return tl.load(ptr + tl.cast(base, tl.int64) * n_out + out0 + (group * n_out + row), mask=out0 + row < n_out)


@triton.constexpr_function
def pieces(PARTS, GROUP):
    """Columns that a tile of scales has a row for: 32, 16 of which a part has two, or 0: they do without a tile."""
    if GROUP % (32 * PARTS) == 0 or GROUP % 16:
        return 0
    return 32 if GROUP % 32 == 0 else 16


@triton.jit
def load_parts(ptr, unit, out0, n_out, n_groups, M: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """What a unit has a group, for `parts_of`: a tile (pieces, M), or where a unit lies in one group its `load_part`.

    The tile is read as it lies in memory: by asynchronous copies, or a unit ahead in few registers. A warp then takes
    what its lanes need from shared memory by a few wide loads, which is much less than a load a lane, row and group.
    Nothing where a part may have many groups: as a value a column they are not worth the registers to wait in.
    """
    COLUMNS: tl.constexpr = pieces(PARTS, GROUP)
    if COLUMNS:
        first = unit * (32 * PARTS // COLUMNS)
        place = tl.arange(0, 32 * PARTS // COLUMNS)[:, None]
        row = tl.arange(0, M)[None, :]
        base = first // (GROUP // COLUMNS)
        group = tl.minimum((first + place) // (GROUP // COLUMNS), n_groups - 1) - base
        tile_ptr = ptr + tl.cast(base, tl.int64) * n_out + out0
        return tl.load(tile_ptr + (group * n_out + row), mask=out0 + row < n_out, other=0)
    elif GROUP % 16 == 0:
        return load_part(ptr, unit, 0, out0, n_out, n_groups, M, PARTS, GROUP)
    else:
        return 0


@triton.jit
def parts_of(a, M: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """What `load_parts` loaded, for each part (2, M / 16, 8, 1, 1 or 8), or one for all: a tuple."""
    COLUMNS: tl.constexpr = pieces(PARTS, GROUP)
    if COLUMNS:
        a = a.reshape(PARTS // 2, 2, 32 // COLUMNS, M // 16, 2, 8).permute(4, 3, 5, 2, 0, 1)
        even, odd = tl.split(a)
        if PARTS == 2:
            return a_word(even, M), a_word(odd, M)
        else:
            p0, p2 = tl.split(even)
            p1, p3 = tl.split(odd)
            return a_word(p0, M), a_word(p1, M), a_word(p2, M), a_word(p3, M)
    else:
        return (a,)


@triton.jit
def a_word(a, M: tl.constexpr):
    """A part's scales (2, M / 16, 8, 1 or 2, ...) beside its words; the first four of a lane are of 16 columns."""
    if a.numel == M:
        return a.reshape(2, M // 16, 8, 1, 1)
    else:
        a = a.reshape(2, M // 16, 8, 1, 2, 1).broadcast_to(2, M // 16, 8, 1, 2, 4)
        return a.reshape(2, M // 16, 8, 1, 8)


@triton.constexpr_function
def magic(FORMAT, COMPUTE, PTX):
    """What `codes` adds to a code."""
    if not PTX or tl.float32 == COMPUTE or FORMAT == "fp8":
        return 0.0
    if FORMAT == "int4":
        return 1024.0 if tl.float16 == COMPUTE else 128.0
    return 1152.0 if tl.float16 == COMPUTE else 0.0


@triton.jit
def whole(u, ADD: tl.constexpr):
    """u + ADD in float32, exactly, for int32 u from 0 to 255 and a whole number ADD of a few thousand at most."""
    return (u | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - ADD)


@triton.jit
def codes(w, PART: tl.constexpr, FORMAT: tl.constexpr, COMPUTE: tl.constexpr, PTX: tl.constexpr):
    """The codes of one part of the words plus `magic`, in COMPUTE; of fp8 divided by 2^8 in float16, else by 2^120."""
    if not PTX or tl.float32 == COMPUTE:
        if FORMAT == "int4":
            return whole((w.to(tl.int32) >> (4 * PART)) & 15, 0.0).to(COMPUTE)
        byte = (w.to(tl.int32) >> (8 * PART)) & 255
        if FORMAT == "int8":
            return whole(byte ^ 128, -128.0).to(COMPUTE)
        elif tl.float16 == COMPUTE:
            return (((byte & 128) << 8) | ((byte & 127) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            return (((byte & 128) << 24) | ((byte & 127) << 20)).to(tl.float32, bitcast=True).to(COMPUTE)
    elif FORMAT == "int4":
        if tl.float16 == COMPUTE:
            return tl.inline_asm_elementwise(
                f"{{.reg .b32 a; shr.u32 a, $1, {4 * PART}; lop3.b32 $0, a, 0x000f000f, 0x64006400, 0xea;}}",
                "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                f"{{.reg .b32 a; shr.u32 a, $1, {4 * PART}; lop3.b32 $0, a, 0x000f000f, 0x43004300, 0xea;}}",
                "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    elif FORMAT == "int8":
        if tl.float16 == COMPUTE:  # 1024 + (code + 128): the xor turns two's complement into that
            return tl.inline_asm_elementwise(
                f"{{.reg .b32 a; shr.u32 a, $1, {8 * PART}; lop3.b32 $0, a, 0x00ff00ff, 0x64806480, 0x6a;}}",
                "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:  # bfloat16 has 7 bits behind the leading one: (128 + low 7 bits) - (256 if the sign is set, else 128)
            return tl.inline_asm_elementwise(
                f"{{.reg .b32 a, b, c; shr.u32 a, $1, {8 * PART}; mov.b32 c, 0xbf80bf80;"
                "lop3.b32 b, a, 0x007f007f, 0x43004300, 0xea; lop3.b32 a, a, 0x00800080, 0x43004300, 0xea;"
                "fma.rn.bf16x2 $0, a, c, b;}",
                "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    elif tl.float16 == COMPUTE:  # sign and the 7 other bits where float16 has them, the exponent 8 too small
        return tl.inline_asm_elementwise(
            f"{{.reg .b32 a, b; shl.b32 a, $1, {8 - 8 * PART}; and.b32 b, a, 0x80008000; shr.u32 a, a, 1;"
            "lop3.b32 $0, a, 0x3f803f80, b, 0xea;}",
            "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            f"{{.reg .b32 a, b; shl.b32 a, $1, {8 - 8 * PART}; and.b32 b, a, 0x80008000; shr.u32 a, a, 4;"
            "lop3.b32 $0, a, 0x07f007f0, b, 0xea;}",
            "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def weights(w, s, z, PART: tl.constexpr, M: tl.constexpr, FORMAT: tl.constexpr, SHIFT: tl.constexpr,
            SCALED: tl.constexpr, COMPUTE: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """One part of a tile as a matrix (M, 32) in DTYPE; not SCALED: without the scales."""
    MAGIC: tl.constexpr = magic(FORMAT, COMPUTE, PTX)
    q = codes(w, PART, FORMAT, COMPUTE, PTX)
    if SHIFT == "offsets":
        # s q + z = s (q - 8) + (z + 8 s): the second is about the middle of a group, so that bfloat16 may hold it
        MIDDLE: tl.constexpr = 8.0 if FORMAT == "int4" and tl.bfloat16 == COMPUTE else 0.0
        if MIDDLE != 0.0:
            z = z.to(tl.float32) + s.to(tl.float32) * MIDDLE
        q = (q - (MAGIC + MIDDLE)) * s.to(COMPUTE) + z.to(COMPUTE)
    elif SHIFT == "zeros":
        if FORMAT == "int4":
            if PTX and tl.bfloat16 == COMPUTE:
                zero = (z.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)
            elif PTX and tl.float16 == COMPUTE:
                zero = (z.to(tl.int16) | 0x6400).to(tl.float16, bitcast=True)
            else:
                zero = whole(z.to(tl.int32), MAGIC)
        else:
            zero = whole((z.to(tl.int32) & 255) ^ 128, MAGIC - 128.0)
        q = q - zero.to(COMPUTE)
    elif FORMAT == "int4":
        q = q - (MAGIC + 8.0)
    elif FORMAT == "int8":
        q = q - MAGIC
    else:
        q = q * (256.0 if tl.float16 == COMPUTE else 1.329227995784916e36)
    if SCALED and SHIFT != "offsets":
        q = q * s.to(COMPUTE)
    return as_matrix(q.to(DTYPE), M)


# ------------------------------------------------------------------------------------------------- y = x W^T + bias


@triton.jit
def tile_of(tile, n_out_tiles, n_row_tiles, SIDE: tl.constexpr):
    """Tile of outputs and tile of rows of a program: SIDE tiles of outputs take all rows before the next do (L2)."""
    side = tile // (SIDE * n_row_tiles) * SIDE
    width = tl.minimum(n_out_tiles - side, SIDE)
    inside = tile % (SIDE * n_row_tiles)
    return side + inside % width, inside // width


@triton.jit
def add_unit(acc, w, s, z, x_ptr, scales_ptr, shift_ptr, unit, out0, n_out, n_groups, x_offset, in_rows, n_in,
             M: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, EDGE: tl.constexpr, FORMAT: tl.constexpr,
             SHIFT: tl.constexpr, SCALED: tl.constexpr, COMPUTE: tl.constexpr, PRECISION: tl.constexpr,
             PTX: tl.constexpr):  # fmt: skip
    """acc (M, N) plus one unit's product, part by part. EDGE: the unit reaches behind column n_in, x does not."""
    s, z = parts_of(s, M, PARTS, GROUP), parts_of(z, M, PARTS, GROUP)
    for PART in tl.static_range(PARTS):
        first = unit * (32 * PARTS) + 32 * PART
        mask = in_rows
        if EDGE:
            mask = in_rows & (first + tl.arange(0, 32) < n_in)[:, None]
        x = tl.load(x_ptr + first + x_offset, mask=mask, other=0.0)
        scale, shift = s[PART % len(s)], z[PART % len(z)]
        if GROUP % 16 != 0:
            scale = load_part(scales_ptr, unit, PART, out0, n_out, n_groups, M, PARTS, GROUP)
            shift = load_part(shift_ptr, unit, PART, out0, n_out, n_groups, M, PARTS, GROUP)
        q = weights(w, scale, shift, PART, M, FORMAT, SHIFT, SCALED, COMPUTE, x.dtype, PTX)
        acc = tl.dot(q, x, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["n_rows", "units_a_split"])
def quantized_matmul_kernel(
    x_ptr, packed_ptr, scales_ptr, shift_ptr, bias_ptr, y_ptr, n_rows, n_out, n_in, n_groups, units_a_split, x_stride,
    M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    SHIFT: tl.constexpr, BIAS: tl.constexpr, SPLIT: tl.constexpr, EDGE: tl.constexpr, COMPUTE: tl.constexpr,
    OFFSET: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, SCALES_AHEAD: tl.constexpr,
    SHIFT_AHEAD: tl.constexpr,
):  # fmt: skip
    """y = x W^T + bias.

    x: (n_rows, n_in), rows x_stride elements apart; bias: (n_out,), with BIAS; y: (n_rows, n_out), contiguous.
    SPLIT: a program takes units_a_split units, and y is (splits, n_rows, n_out) in float32, without the bias, to be
    added up by `add_splits_kernel`. EDGE: the last unit reaches behind n_in. OFFSET: type of a tile's offsets.
    SCALES_AHEAD, SHIFT_AHEAD: they are loaded a unit ahead, where the compiler makes no asynchronous copies of them.
    """
    out_tile, row_tile = tile_of(tl.program_id(0), tl.cdiv(n_out, M), tl.cdiv(n_rows, N), 8)
    out0, row0, split = out_tile * M, row_tile * N, tl.program_id(1)
    rows = row0 + tl.arange(0, N)
    in_rows = (rows < n_rows)[None, :]
    x_ptr += tl.cast(row0, tl.int64) * x_stride
    x_offset = tl.arange(0, N).to(OFFSET)[None, :] * x_stride + tl.arange(0, 32)[:, None]
    if SHIFT == "":
        shift_ptr = scales_ptr  # loaded with the scales, and then looked at by nobody
    # one scale a row waits for the end of the sum
    SCALED: tl.constexpr = GROUP != 0 or SHIFT == "offsets"

    units = tl.cdiv(n_in, 32 * PARTS)
    begin, end = split * units_a_split, tl.minimum((split + 1) * units_a_split, units)
    full = tl.minimum(end, n_in // (32 * PARTS)) if EDGE else end
    if not EDGE:  # else the branch around the loop sets acc while a product may be on its way, for all that ptxas
        tl.assume(begin < full)  # knows, which then waits for each product in front of the next (sm_90)
    acc = tl.zeros((M, N), tl.float32)
    s = load_parts(scales_ptr, begin, out0, n_out, n_groups, M, PARTS, GROUP)
    z = load_parts(shift_ptr, begin, out0, n_out, n_groups, M, PARTS, GROUP)
    for unit in range(begin, full):
        w = load_words(packed_ptr, unit, out0, n_out, M)
        if not SCALES_AHEAD:
            s = load_parts(scales_ptr, unit, out0, n_out, n_groups, M, PARTS, GROUP)
        if not SHIFT_AHEAD:
            z = load_parts(shift_ptr, unit, out0, n_out, n_groups, M, PARTS, GROUP)
        acc = add_unit(acc, w, s, z, x_ptr, scales_ptr, shift_ptr, unit, out0, n_out, n_groups, x_offset, in_rows,
                       n_in, M, PARTS, GROUP, False, FORMAT, SHIFT, SCALED, COMPUTE, PRECISION, PTX)  # fmt: skip
        if SCALES_AHEAD and GROUP != 0:  # of the next unit, which they reach while this one is multiplied
            s = load_parts(scales_ptr, unit + 1, out0, n_out, n_groups, M, PARTS, GROUP)
        if SHIFT_AHEAD and GROUP != 0:
            z = load_parts(shift_ptr, unit + 1, out0, n_out, n_groups, M, PARTS, GROUP)
    if EDGE:
        if full < end:
            w = load_words(packed_ptr, full, out0, n_out, M)
            s = load_parts(scales_ptr, full, out0, n_out, n_groups, M, PARTS, GROUP)
            z = load_parts(shift_ptr, full, out0, n_out, n_groups, M, PARTS, GROUP)
            acc = add_unit(acc, w, s, z, x_ptr, scales_ptr, shift_ptr, full, out0, n_out, n_groups, x_offset, in_rows,
                           n_in, M, PARTS, GROUP, True, FORMAT, SHIFT, SCALED, COMPUTE, PRECISION, PTX)  # fmt: skip

    outs = out0 + tl.arange(0, M)
    if not SCALED:
        acc *= tl.load(scales_ptr + outs, mask=outs < n_out, other=0.0).to(tl.float32)[:, None]
    if BIAS:
        acc += tl.load(bias_ptr + outs, mask=outs < n_out, other=0.0).to(tl.float32)[:, None]
    if SPLIT:
        y_ptr += tl.cast(split, tl.int64) * n_rows * n_out
    y_ptr += tl.cast(row0, tl.int64) * n_out + out0
    y_offset = tl.arange(0, N).to(OFFSET)[None, :] * n_out + tl.arange(0, M)[:, None]
    tl.store(y_ptr + y_offset, acc.to(y_ptr.dtype.element_ty), mask=in_rows & (outs < n_out)[:, None])


@triton.jit(do_not_specialize=["n_rows", "splits"])
def add_splits_kernel(parts_ptr, bias_ptr, y_ptr, n_rows, n_out, splits, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y (n_rows, n_out) = the sum of parts (splits, n_rows, n_out) in float32, in their order, + bias (n_out,)."""
    outs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_outs = outs < n_out
    row = tl.program_id(1).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        total += tl.load(parts_ptr + (tl.cast(split, tl.int64) * n_rows + row) * n_out + outs, mask=in_outs, other=0.0)
    if BIAS:
        total += tl.load(bias_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n_out + outs, total.to(y_ptr.dtype.element_ty), mask=in_outs)


# ------------------------------------------------------------------------------------------------------- dx = dy W


@triton.jit
def add_rows(acc, dy, w, scale, shift, scales_ptr, shift_ptr, unit, out0, n_out, n_groups, PART: tl.constexpr,
             M: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, SHIFT: tl.constexpr,
             COMPUTE: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """acc (N, 32) plus dy (N, M) times M rows of one part of a unit."""
    if GROUP % 16 != 0:
        scale = load_part(scales_ptr, unit, PART, out0, n_out, n_groups, M, PARTS, GROUP)
        shift = load_part(shift_ptr, unit, PART, out0, n_out, n_groups, M, PARTS, GROUP)
    q = weights(w, scale, shift, PART, M, FORMAT, SHIFT, True, COMPUTE, dy.dtype, PTX)
    return tl.dot(dy, q, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["n_rows"])
def quantized_matmul_dx_kernel(
    dy_ptr, packed_ptr, scales_ptr, shift_ptr, dx_ptr, n_rows, n_out, n_in, n_groups, dy_strides,
    M: tl.constexpr, N: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    SHIFT: tl.constexpr, COMPUTE: tl.constexpr, OFFSET: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """dx = dy W: N rows and one unit of columns a program, which walks through the rows of W, M at a time.

    dy: (n_rows, n_out), any strides; dx: (n_rows, n_in), contiguous.
    """
    units = tl.cdiv(n_in, 32 * PARTS)
    unit, row0 = tl.program_id(0) % units, tl.program_id(0) // units * N
    rows = row0 + tl.arange(0, N)
    in_rows = (rows < n_rows)[:, None]
    outs = tl.arange(0, M)
    dy_ptr += tl.cast(row0, tl.int64) * dy_strides[0]
    dy_offset = tl.arange(0, N).to(OFFSET)[:, None] * dy_strides[0] + outs.to(OFFSET)[None, :] * dy_strides[1]
    if SHIFT == "":
        shift_ptr = scales_ptr
    a = tl.zeros((N, 32), tl.float32)
    b, c, d = a, a, a
    for out0 in range(0, n_out, M):
        dy = tl.load(
            dy_ptr + tl.cast(out0, tl.int64) * dy_strides[1] + dy_offset,
            mask=in_rows & (out0 + outs < n_out)[None, :],
            other=0.0,
        )
        w = load_words(packed_ptr, unit, out0, n_out, M)
        s = parts_of(load_parts(scales_ptr, unit, out0, n_out, n_groups, M, PARTS, GROUP), M, PARTS, GROUP)
        z = parts_of(load_parts(shift_ptr, unit, out0, n_out, n_groups, M, PARTS, GROUP), M, PARTS, GROUP)
        n: tl.constexpr = len(s)
        a = add_rows(a, dy, w, s[0], z[0], scales_ptr, shift_ptr, unit, out0, n_out, n_groups, 0, M, PARTS, GROUP,
                     FORMAT, SHIFT, COMPUTE, PRECISION, PTX)  # fmt: skip
        b = add_rows(b, dy, w, s[1 % n], z[1 % n], scales_ptr, shift_ptr, unit, out0, n_out, n_groups, 1, M, PARTS,
                     GROUP, FORMAT, SHIFT, COMPUTE, PRECISION, PTX)  # fmt: skip
        if PARTS == 4:
            c = add_rows(c, dy, w, s[2 % n], z[2 % n], scales_ptr, shift_ptr, unit, out0, n_out, n_groups, 2, M, PARTS,
                         GROUP, FORMAT, SHIFT, COMPUTE, PRECISION, PTX)  # fmt: skip
            d = add_rows(d, dy, w, s[3 % n], z[3 % n], scales_ptr, shift_ptr, unit, out0, n_out, n_groups, 3, M, PARTS,
                         GROUP, FORMAT, SHIFT, COMPUTE, PRECISION, PTX)  # fmt: skip
    columns = unit * (32 * PARTS) + tl.arange(0, 32)
    store_part(dx_ptr, a, rows, columns, n_rows, n_in)
    store_part(dx_ptr, b, rows, columns + 32, n_rows, n_in)
    if PARTS == 4:
        store_part(dx_ptr, c, rows, columns + 64, n_rows, n_in)
        store_part(dx_ptr, d, rows, columns + 96, n_rows, n_in)


@triton.jit
def store_part(dx_ptr, part, rows, columns, n_rows, n_in):
    """32 columns of dx."""
    offset = rows.to(tl.int64)[:, None] * n_in + columns[None, :]
    tl.store(
        dx_ptr + offset, part.to(dx_ptr.dtype.element_ty), mask=(rows < n_rows)[:, None] & (columns < n_in)[None, :]
    )


# ------------------------------------------------------------------------------------------------------- rows of W


@triton.jit
def quantized_rows_kernel(
    index_ptr, packed_ptr, scales_ptr, shift_ptr, y_ptr, n_out, n_in,
    UNITS: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """y (n, n_in), contiguous = the rows index (n,) of W, dequantized in float32 and rounded once.

    A program takes UNITS units of one row. An index outside 0 .. n_out - 1 gives NaN.
    """
    index = tl.load(index_ptr + tl.program_id(0))
    in_rows = (index >= 0) & (index < n_out)
    row = tl.where(in_rows, index, 0).to(tl.int64)
    units = tl.program_id(1) * UNITS + tl.arange(0, UNITS)[:, None]
    place = tl.arange(0, 32)[None, :]
    w = tl.load(packed_ptr + (units.to(tl.int64) * n_out + row) * 32 + place, mask=units * (32 * PARTS) < n_in, other=0)
    word = place // 4 % 2 * 16 + place // 2 % 2 * 8 + place // 8 * 2 + place % 2
    y_ptr += tl.program_id(0).to(tl.int64) * n_in
    for PART in tl.static_range(PARTS):
        columns = units * (32 * PARTS) + 32 * PART + word
        inside = columns < n_in
        groups = columns // GROUP if GROUP else columns * 0
        at = groups.to(tl.int64) * n_out + row
        s = tl.load(scales_ptr + at, mask=inside, other=0.0).to(tl.float32)
        q = codes(w, PART, FORMAT, tl.float32, False)
        if SHIFT == "offsets":
            q = q * s + tl.load(shift_ptr + at, mask=inside, other=0.0).to(tl.float32)
        elif SHIFT == "zeros":
            q = (q - tl.load(shift_ptr + at, mask=inside, other=0).to(tl.float32)) * s
        elif FORMAT == "int4":
            q = (q - 8.0) * s
        elif FORMAT == "fp8":
            q = q * 1.329227995784916e36 * s
        else:
            q = q * s
        q = tl.where(in_rows, q, float("nan"))
        tl.store(y_ptr + columns, q.to(y_ptr.dtype.element_ty), mask=inside)
