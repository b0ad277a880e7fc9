"""Gated activations, forward and backward: y = act(gate) up, elementwise, of tensors of any strides.

ACTIVATION: "silu", gate sigmoid(gate); "gelu", gate Phi(gate) with the normal distribution's Phi; "gelu_tanh", gate
sigmoid(2 u) with u = sqrt(2 / pi) (gate + 0.044715 gate^3): that is (1 + tanh(u)) / 2, without its cancellation.
Nothing but gate and up is kept for the backward, which computes the activation again.
"""

import triton
import triton.language as tl

from .common import LOG2E, row_offset
from .softmax import align, edge_tile, main_mask

ROOT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
INVERSE_ROOT_TWO_PI: tl.constexpr = tl.constexpr(0.3989422804014327)
ROOT_EIGHT_OVER_PI: tl.constexpr = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)


@triton.jit
def share(x, ACTIVATION: tl.constexpr):
    """s = act(x) / x, what the gate lets through, and d s / d x. So d act(x) / d x = s + x d s / d x."""
    if ACTIVATION == "gelu":
        s = 0.5 + 0.5 * tl.erf(x * ROOT_HALF)
        ds = tl.exp2(x * x * (-0.5 * LOG2E)) * INVERSE_ROOT_TWO_PI
    else:
        z, dz = x, 1.0
        if ACTIVATION == "gelu_tanh":
            z = x * (ROOT_EIGHT_OVER_PI + ROOT_EIGHT_OVER_PI * 0.044715 * (x * x))
            dz = ROOT_EIGHT_OVER_PI + 3 * ROOT_EIGHT_OVER_PI * 0.044715 * (x * x)
        # the sigmoid of z, and its derivative s (1 - s) without the difference
        e = tl.exp2(tl.abs(z) * (-LOG2E))
        s = tl.where(z >= 0, 1.0, e) / (1 + e)
        ds = e / ((1 + e) * (1 + e)) * dz
    return s, ds


@triton.jit
def tile_of_program(n_rows, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr):
    """Outer index, rows (ROWS,), the first position of the tile, and whether it is the first of its rows."""
    across = tl.cdiv(n_cols + (VEC - 1 if EDGE else 0), COLS)
    block = tl.program_id(0) // across
    start = tl.program_id(0) % across * COLS
    down = tl.cdiv(n_rows, ROWS)
    return block // down, block % down * ROWS + tl.arange(0, ROWS), start, start == 0


@triton.jit
def forward_tile(gate_ptr, up_ptr, y_ptr, gate_at, up_at, y_at, mask, ACTIVATION: tl.constexpr, ACC: tl.constexpr):
    gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(ACC)
    s, _ = share(gate, ACTIVATION)
    tl.store(y_ptr + y_at, gate * s * up, mask=mask)


@triton.jit
def gated_forward_kernel(
    gate_ptr, up_ptr, y_ptr, outer_shape, n_rows, n_cols, gate_strides, up_strides, y_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y = act(gate) up; all (*outer, n_rows, n_cols), any strides. Positions and edges are those of softmax.py."""
    outer, rows, start, first = tile_of_program(n_rows, n_cols, ROWS, COLS, VEC, EDGE)
    in_rows = (rows < n_rows)[:, None]
    gate_row, shift = align(row_offset(outer, rows, outer_shape, gate_strides), VEC)
    up_row, _ = align(row_offset(outer, rows, outer_shape, up_strides), VEC)
    y_row, _ = align(row_offset(outer, rows, outer_shape, y_strides), VEC)
    gate_col, up_col = gate_strides[len(gate_strides) - 1], up_strides[len(up_strides) - 1]
    y_col = y_strides[len(y_strides) - 1]
    if not EDGE:
        shift = 0
    p = start + tl.arange(0, COLS)[None, :]
    inside = in_rows & main_mask(p, shift, n_cols, n_cols, VEC)
    p = p.to(tl.int64)
    forward_tile(
        gate_ptr, up_ptr, y_ptr, gate_row + p * gate_col, up_row + p * up_col, y_row + p * y_col, inside,
        ACTIVATION, ACC,
    )  # fmt: skip
    if EDGE:
        if first:
            e, in_edge = edge_tile(shift, n_cols, VEC, EDGE)
            forward_tile(
                gate_ptr, up_ptr, y_ptr, gate_row + e, up_row + e, y_row + e, in_edge & in_rows, ACTIVATION, ACC
            )


@triton.jit
def backward_tile(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, gate_at, up_at, dy_at, dgate_at, dup_at, mask,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0).to(ACC)
    up = tl.load(up_ptr + up_at, mask=mask, other=0.0).to(ACC)
    dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0).to(ACC)
    s, ds = share(gate, ACTIVATION)
    tl.store(dup_ptr + dup_at, dy * (gate * s), mask=mask)
    tl.store(dgate_ptr + dgate_at, dy * up * (s + gate * ds), mask=mask)


@triton.jit
def gated_backward_kernel(
    gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, outer_shape, n_rows, n_cols,
    gate_strides, up_strides, dy_strides, dgate_strides, dup_strides,
    ROWS: tl.constexpr, COLS: tl.constexpr, VEC: tl.constexpr, EDGE: tl.constexpr,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dup = dy act(gate) and dgate = dy up act'(gate); all (*outer, n_rows, n_cols), any strides."""
    outer, rows, start, first = tile_of_program(n_rows, n_cols, ROWS, COLS, VEC, EDGE)
    in_rows = (rows < n_rows)[:, None]
    gate_row, shift = align(row_offset(outer, rows, outer_shape, gate_strides), VEC)
    up_row, _ = align(row_offset(outer, rows, outer_shape, up_strides), VEC)
    dy_row, _ = align(row_offset(outer, rows, outer_shape, dy_strides), VEC)
    dgate_row, _ = align(row_offset(outer, rows, outer_shape, dgate_strides), VEC)
    dup_row, _ = align(row_offset(outer, rows, outer_shape, dup_strides), VEC)
    gate_col, up_col = gate_strides[len(gate_strides) - 1], up_strides[len(up_strides) - 1]
    dy_col = dy_strides[len(dy_strides) - 1]
    dgate_col, dup_col = dgate_strides[len(dgate_strides) - 1], dup_strides[len(dup_strides) - 1]
    if not EDGE:
        shift = 0
    p = start + tl.arange(0, COLS)[None, :]
    inside = in_rows & main_mask(p, shift, n_cols, n_cols, VEC)
    p = p.to(tl.int64)
    backward_tile(
        gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, gate_row + p * gate_col, up_row + p * up_col,
        dy_row + p * dy_col, dgate_row + p * dgate_col, dup_row + p * dup_col, inside, ACTIVATION, ACC,
    )  # fmt: skip
    if EDGE:
        if first:
            e, in_edge = edge_tile(shift, n_cols, VEC, EDGE)
            backward_tile(
                gate_ptr, up_ptr, dy_ptr, dgate_ptr, dup_ptr, gate_row + e, up_row + e, dy_row + e,
                dgate_row + e, dup_row + e, in_edge & in_rows, ACTIVATION, ACC,
            )  # fmt: skip
