"""Rotary position embedding of queries and keys in one launch, in place or not (arXiv 2104.09864).

A program takes TOKENS tokens and some of the heads of q or of k, one head after another: cosines and sines stay in
registers. The backward is the rotation by the opposite angle, the same kernel with INVERSE.
"""

import triton
import triton.language as tl

from .common import row_offset


@triton.jit
def rotate_head(
    x_ptr, y_ptr, x_token, y_token, x_dim, y_dim, cos, sin, in_tokens,
    HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """One head of the tokens: x_ptr and y_ptr point to it, x_token and y_token (TOKENS, 1) are the tokens' offsets."""
    i = tl.arange(0, BLOCK)[None, :]
    if INTERLEAVED:
        d = tl.arange(0, 2 * BLOCK)[None, :]
        inside = in_tokens & (d < 2 * HALF)
        pairs = tl.load(x_ptr + x_token + d * x_dim, mask=inside, other=0.0).to(cos.dtype)
        a, b = tl.split(pairs.reshape(cos.shape[0], BLOCK, 2))
        rotated = tl.join(a * cos - b * sin, b * cos + a * sin).reshape(cos.shape[0], 2 * BLOCK)
        tl.store(y_ptr + y_token + d * y_dim, rotated, mask=inside)
    else:
        inside = in_tokens & (i < HALF)
        a = tl.load(x_ptr + x_token + i * x_dim, mask=inside, other=0.0).to(cos.dtype)
        b = tl.load(x_ptr + x_token + (i + HALF) * x_dim, mask=inside, other=0.0).to(cos.dtype)
        tl.store(y_ptr + y_token + i * y_dim, a * cos - b * sin, mask=inside)
        tl.store(y_ptr + y_token + (i + HALF) * y_dim, b * cos + a * sin, mask=inside)
    if REST:
        r = tl.arange(0, REST_BLOCK)[None, :]
        inside = in_tokens & (r < REST)
        rest = tl.load(x_ptr + x_token + (r + 2 * HALF) * x_dim, mask=inside, other=0.0)
        tl.store(y_ptr + y_token + (r + 2 * HALF) * y_dim, rest, mask=inside)


@triton.jit
def rotate_heads(
    x_ptr, y_ptr, outer, rows, outer_shape, x_strides, y_strides, first, n_heads, heads, cos, sin, in_tokens,
    HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Heads first .. first + heads - 1 of n_heads, of the program's tokens."""
    x_token = row_offset(outer, rows, outer_shape, x_strides)[:, None]
    y_token = row_offset(outer, rows, outer_shape, y_strides)[:, None]
    last: tl.constexpr = len(x_strides) - 1
    for head in range(first, tl.minimum(first + heads, n_heads)):
        rotate_head(
            x_ptr + tl.cast(head, tl.int64) * x_strides[last - 1],
            y_ptr + tl.cast(head, tl.int64) * y_strides[last - 1],
            x_token, y_token, x_strides[last], y_strides[last], cos, sin, in_tokens,
            HALF, BLOCK, REST, REST_BLOCK, INTERLEAVED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "q_heads", "k_heads", "heads", "q_blocks", "n_positions"])
def rope_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, cos_ptr, sin_ptr, positions_ptr, outer_shape, n_tokens, q_heads, k_heads,
    heads, q_blocks, n_positions, q_strides, k_strides, q_out_strides, k_out_strides, cos_strides, sin_strides,
    position_strides,
    TOKENS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, REST_BLOCK: tl.constexpr,
    KEYS: tl.constexpr, POSITIONS: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_a = x_a cos - x_b sin, y_b = x_b cos + x_a sin for the pairs (a, b) of a head's dimensions, INVERSE -sin.

    q, q_out: (*outer, n_tokens, q_heads, D), k, k_out: (*outer, n_tokens, k_heads, D), any strides; may be the same.
    a, b: (i, i + HALF), INTERLEAVED (2 i, 2 i + 1), i < HALF. The REST dimensions behind the pairs are copied.
    cos, sin: (*outer, n_tokens, HALF); with POSITIONS (n_positions, HALF), and positions (*outer, n_tokens) says which
    row. A position that is none makes its token NaN. Program (i, j) takes the i-th TOKENS tokens and the j-th `heads`
    heads, of k from j = q_blocks on.
    """
    blocks = tl.cdiv(n_tokens, TOKENS)
    outer = tl.program_id(0) // blocks
    rows = tl.program_id(0) % blocks * TOKENS + tl.arange(0, TOKENS)
    in_tokens = (rows < n_tokens)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    known = in_tokens
    if POSITIONS:
        at = row_offset(outer, rows, outer_shape, position_strides)
        position = tl.load(positions_ptr + at, mask=rows < n_tokens, other=0).to(tl.int64)[:, None]
        known = in_tokens & (position >= 0) & (position < n_positions)
        cos_row, sin_row = position * cos_strides[0], position * sin_strides[0]
    else:
        cos_row = row_offset(outer, rows, outer_shape, cos_strides)[:, None]
        sin_row = row_offset(outer, rows, outer_shape, sin_strides)[:, None]
    inside = known & (i < HALF)
    cos = tl.load(cos_ptr + cos_row + i * cos_strides[len(cos_strides) - 1], mask=inside, other=float("nan")).to(ACC)
    sin = tl.load(sin_ptr + sin_row + i * sin_strides[len(sin_strides) - 1], mask=inside, other=float("nan")).to(ACC)
    if INVERSE:
        sin = -sin
    j = tl.program_id(1)
    if j < q_blocks:
        rotate_heads(
            q_ptr, q_out_ptr, outer, rows, outer_shape, q_strides, q_out_strides, j * heads, q_heads, heads,
            cos, sin, in_tokens, HALF, BLOCK, REST, REST_BLOCK, INTERLEAVED,
        )  # fmt: skip
    else:
        if KEYS:
            rotate_heads(
                k_ptr, k_out_ptr, outer, rows, outer_shape, k_strides, k_out_strides, (j - q_blocks) * heads, k_heads,
                heads, cos, sin, in_tokens, HALF, BLOCK, REST, REST_BLOCK, INTERLEAVED,
            )  # fmt: skip
