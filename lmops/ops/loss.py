"""Losses over a vocabulary and their linear forms: schemas, launchers, CPU implementation, autograd, public functions.

A row's running statistics live in `state`, (planes, *rows) in float32: its loss, the maximum and sum of exponentials of
its logits, and, while chunks of the vocabulary still come, what else the next one needs. The kernels and the torch
functions beside them take logits as such chunks. A whole row is a single chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import backend, define_op, warp_size
from lmops.ops._rows import NO_FUSION, Geometry, Tile, geometry, softmax_tile
from lmops.ops._strides import row_layout
from lmops.ops.quantized_embedding import quantized_embedding_forward
from lmops.ops.quantized_matmul import Quantized
from lmops.ops.softmax import FLOATS, NEG_INF
from lmops.reference.loss import cross_entropy as cross_entropy_with_probabilities
from lmops.reference.quantization import row_chunks

TARGETS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")
# planes of `state`; the first three of cross entropy and five of the divergence stay for the backward
LOSS, MAX, SUM, TARGET, SMOOTH, SEEN = range(6)
TEACHER_MAX, TEACHER_SUM = 3, 4
# elements that the torch functions take at a time, so that their passes stay in the cache
BLOCK = 1 << 18
# elements of a tile of rows that do not fit one
LONG_TILE = 4_096
# what a linear form allocates at most beyond inputs, results and a few numbers a token, in bytes
BUDGET = 60_000_000
CPU_BUDGET = 16_000_000
# elements of a quantized weight that a CPU dequantizes at a time
PIECE = 1 << 16


class Options(NamedTuple):
    """What cross entropy computes. softcap: 0 is none."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    temperature: float


PLAIN = Options(-100, 0.0, 0.0, 0.0, 1.0)
OPTIONS = "int ignore_index, float label_smoothing, float z_loss, float softcap, float temperature"


class Chunk(NamedTuple):
    """Which columns of the vocabulary a chunk of logits holds, from `first` on, and what to do with them.

    forward: take them into the state, complete after the `last` chunk; otherwise the state is complete already.
    """

    first: int
    n_classes: int
    forward: bool = True
    last: bool = True


# --- the torch functions for chunks ---


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _statistics(x: Tensor, *shape: int) -> Tensor:
    """Memory for numbers a row, in the type that is computed in. To name that takes the host half as long again."""
    dtype = _compute(x.dtype)
    return x.new_empty(shape) if x.dtype == dtype else x.new_empty(shape, dtype=dtype)


def _finite(m: Tensor) -> Tensor:
    """Maxima to subtract: 0 for a row of nothing but -inf, so that -inf stays -inf."""
    return m.masked_fill(m == NEG_INF, 0)


def _moved(old: Tensor, new: Tensor) -> Tensor:
    """old - new, 0 where nothing was seen before."""
    return (old - new).masked_fill_(old == NEG_INF, 0)


def _in_blocks(
    run: Callable[..., None], full: Sequence[Tensor], dx: Tensor | None, per_row: Sequence[Tensor | None], state: Tensor
) -> None:
    """Call run(*full, dx, *per_row, state) on blocks of rows: (rows, columns), (rows,) and state (planes, rows)."""
    n_cols = full[0].shape[-1]
    flat = [t if t.ndim == 2 else t.reshape(-1, n_cols) for t in full]
    flat_rows = [None if t is None else t.reshape(-1) for t in per_row]
    # a gradient whose rows are no neighbours in memory is formed elsewhere
    out = None if dx is None else dx if dx.ndim == 2 else dx.reshape(-1, n_cols)
    state = state.view(state.shape[0], -1)
    step = max(1, BLOCK // n_cols)
    for start in range(0, flat[0].shape[0], step):
        rows = slice(start, start + step)
        of_rows = (None if t is None else t[rows] for t in (out, *flat_rows))
        run(*(t[rows] for t in flat), *of_rows, state[:, rows])
    if dx is not None and out is not None and out.data_ptr() != dx.data_ptr():
        dx.copy_(out.view(dx.shape))


def _cross_entropy_torch(
    x: Tensor, dx: Tensor | None, target: Tensor, weight: Tensor | None, weight_sum: Tensor | None,
    grad: Tensor | None, state: Tensor, o: Options, chunk: Chunk,
) -> None:  # fmt: skip
    """What `_cross_entropy_launch` does, in torch."""
    if chunk.forward and chunk.first == 0:
        _check_targets(target, o.ignore_index, chunk.n_classes)
    run = partial(_cross_entropy_rows, weight=weight, weight_sum=weight_sum, o=o, chunk=chunk)
    _in_blocks(run, [x], dx, [target, grad], state)


def _cross_entropy_rows(
    x: Tensor, dx: Tensor | None, target: Tensor, grad: Tensor | None, state: Tensor, *, weight: Tensor | None,
    weight_sum: Tensor | None, o: Options, chunk: Chunk,
) -> None:  # fmt: skip
    whole = chunk.forward and chunk.first == 0 and chunk.last
    if dx is not None and whole and weight is None and o == PLAIN._replace(ignore_index=o.ignore_index):
        return _plain_cross_entropy_rows(x, dx, target, grad, state, o.ignore_index)
    kept = target != o.ignore_index
    column = target.long() - chunk.first
    here = kept & (column >= 0) & (column < x.shape[-1])
    column = column.masked_fill_(~here, 0).unsqueeze(-1)
    w_y: Tensor | float = 1.0
    if weight is not None:
        w_y = weight[target.long().masked_fill(~kept, 0)].to(state.dtype)
        weight = weight[chunk.first : chunk.first + x.shape[-1]].to(state.dtype)
    u = x.to(state.dtype)
    if o.softcap:
        u = (u / o.softcap).tanh_().mul_(o.softcap).masked_fill_(u == NEG_INF, NEG_INF)

    first = chunk.first == 0
    if chunk.forward:
        before, peak = state[MAX].clone(), u.amax(-1)
        peak = peak if first else torch.maximum(peak, before)
        m = peak.masked_fill(peak == NEG_INF, 0)  # subtracted from a row of nothing but -inf, which it stays
        u_y = u.gather(-1, column).squeeze(-1)
    else:
        m = state[MAX]
    # where the logits are not needed behind it, the gradient is formed in its own memory, which may be theirs
    memory = dx if dx is not None and dx.dtype == u.dtype and not o.softcap else None
    below = torch.sub(u, m.unsqueeze(-1), out=memory)
    spread = o.label_smoothing / chunk.n_classes
    if chunk.forward and spread:
        smooth = (below if weight is None else below * weight).sum(-1)
        seen = torch.tensor(float(x.shape[-1])) if weight is None else weight.sum()
    e = (below if o.temperature == 1 else below.div_(o.temperature)).exp_()

    if chunk.forward:
        l = e.sum(-1)
        if not first:
            moved = (before - m).masked_fill_(before == NEG_INF, 0)
            l += state[SUM] * (moved / o.temperature).exp_()
            u_y = torch.where(here, u_y, state[TARGET])
            if spread:
                smooth += state[SMOOTH] + state[SEEN] * moved
                seen = seen + state[SEEN]
        state[MAX], state[SUM] = peak, l
        if not chunk.last:
            state[TARGET] = u_y
            if spread:
                state[SMOOTH], state[SEEN] = smooth, seen
        else:
            log_l = l.log()
            loss = (1 - o.label_smoothing) * w_y * (log_l + (m - u_y) / o.temperature)
            if spread:
                loss += spread * (seen * log_l - smooth / o.temperature)
            if o.z_loss:
                loss += o.z_loss * (log_l + m / o.temperature).square_()
            # what the backward then computes for a token that is ignored is finite, unless its logits are not
            state[LOSS] = loss.masked_fill_(~kept, 0)
            state[MAX], state[SUM] = m.masked_fill(~kept, 0), l.masked_fill(~kept, 1)
    if dx is None:
        return None

    assert grad is not None
    g = grad / o.temperature
    pull = (1 - o.label_smoothing) * w_y
    extra = spread * (chunk.n_classes if weight_sum is None else weight_sum)
    if o.z_loss:
        extra = extra + 2 * o.z_loss * (state[MAX] / o.temperature + state[SUM].log())
    # at the target 1 is subtracted before anything is multiplied, or a probability near 1 would lose its digits
    p_y = e.gather(-1, column).squeeze(-1) / state[SUM]
    at_target = (g * ((p_y - 1) * pull + p_y * extra)).unsqueeze(-1)
    e.mul_((g * (pull + extra) / state[SUM]).unsqueeze(-1))
    e.scatter_(-1, column, torch.where(here.unsqueeze(-1), at_target, e.gather(-1, column)))
    if spread:
        e.sub_((g * spread).unsqueeze(-1) * (1.0 if weight is None else weight))
    if o.softcap:
        e.mul_((1 - (u / o.softcap).square_()).masked_fill_(u == NEG_INF, 0))
    if not kept.all():
        e[~kept] = 0
    if memory is None:
        dx.copy_(e)
    return None


def _plain_cross_entropy_rows(
    x: Tensor, dx: Tensor, target: Tensor, grad: Tensor | None, state: Tensor, ignore_index: int
) -> None:
    """The same for the loss without options: torch's softmax is one pass, and has all that the gradient needs."""
    assert grad is not None
    kept = target != ignore_index
    column = target.long().masked_fill(~kept, 0).unsqueeze(-1)
    u = x.to(state.dtype)
    u_y = u.gather(-1, column).squeeze(-1)
    p = torch.softmax(u, -1)
    p_y = p.gather(-1, column).squeeze(-1)
    loss = -p_y.log()
    small = ~(p_y > 1e-30)  # the logarithm of such a number has no digits; also NaN
    if small.any():
        loss[small] = torch.logsumexp(x[small].to(state.dtype), -1) - x[small].to(state.dtype).gather(
            -1, column[small]
        ).squeeze(-1)
    state[LOSS] = loss.masked_fill_(~kept, 0)
    state[MAX], state[SUM] = (u_y + loss).masked_fill_(~kept, 0), 1
    p.scatter_add_(-1, column, -torch.ones_like(column, dtype=p.dtype))
    torch.mul(p, grad.unsqueeze(-1), out=dx)
    if not kept.all():
        dx[~kept] = 0


class Divergence(NamedTuple):
    """What the divergence computes: of the teacher from the student, or `reverse`."""

    temperature: float
    reverse: bool


def _kl_div_torch(
    x: Tensor, y: Tensor, dx: Tensor | None, mask: Tensor | None, grad: Tensor | None, state: Tensor, o: Divergence,
    chunk: Chunk,
) -> None:  # fmt: skip
    """What `_kl_div_launch` does, in torch."""
    _in_blocks(partial(_kl_div_rows, o=o, chunk=chunk), [x, y], dx, [mask, grad], state)


def _kl_div_rows(
    x: Tensor, y: Tensor, dx: Tensor | None, mask: Tensor | None, grad: Tensor | None, state: Tensor, *, o: Divergence,
    chunk: Chunk,
) -> None:  # fmt: skip
    def peaks(u: Tensor, plane: int) -> tuple[Tensor, Tensor, Tensor]:
        """The maximum so far, the one to subtract, and how far that one moved."""
        if not chunk.forward:
            return state[plane], state[plane], state[plane]
        before = torch.full_like(state[plane], NEG_INF) if chunk.first == 0 else state[plane].clone()
        peak = torch.maximum(u.amax(-1), before)
        m = peak.masked_fill(peak == NEG_INF, 0)
        return peak, m, (before - m).masked_fill_(before == NEG_INF, 0)

    s, t = x.to(state.dtype), y.to(state.dtype)
    s_peak, s_m, s_moved = peaks(s, MAX)
    t_peak, t_m, t_moved = peaks(t, TEACHER_MAX)
    s_below = (s - s_m.unsqueeze(-1)).div_(o.temperature)
    t_below = (t - t_m.unsqueeze(-1)).div_(o.temperature)
    s_e, t_e = s_below.exp(), t_below.exp()
    e, further = (s_e, s_below.sub(t_below)) if o.reverse else (t_e, t_below.sub(s_below))
    further.masked_fill_(e == 0, 0)
    if chunk.forward:
        total, s_l, t_l = (e * further).sum(-1), s_e.sum(-1), t_e.sum(-1)
        if chunk.first:
            s_shrink, t_shrink = (s_moved / o.temperature).exp_(), (t_moved / o.temperature).exp_()
            shrink, before = (s_shrink, state[SUM]) if o.reverse else (t_shrink, state[TEACHER_SUM])
            moved = (s_moved - t_moved if o.reverse else t_moved - s_moved) / o.temperature
            total += shrink * (state[LOSS] + before * moved)
            s_l += state[SUM] * s_shrink
            t_l += state[TEACHER_SUM] * t_shrink
        if chunk.last:
            s_peak, t_peak = s_m, t_m
            apart = (s_l / t_l).log()
            if chunk.first == 0:  # all of the row is here: term by term, which keeps the most digits
                log_ratio = further + (-apart if o.reverse else apart).unsqueeze(-1)
                total = (e * log_ratio.masked_fill_(e == 0, 0)).sum(-1) / (s_l if o.reverse else t_l)
            else:
                total = total / s_l - apart if o.reverse else total / t_l + apart
            if mask is not None:
                total = total.masked_fill_(~mask, 0)
        state[LOSS], state[MAX], state[SUM], state[TEACHER_MAX], state[TEACHER_SUM] = total, s_peak, s_l, t_peak, t_l
    if dx is None:
        return

    assert grad is not None
    g = grad / o.temperature
    if o.reverse:
        further -= (state[LOSS] + (state[SUM] / state[TEACHER_SUM]).log()).unsqueeze(-1)
        d = s_e.mul_((g / state[SUM]).unsqueeze(-1)).mul_(further)
    else:
        d = s_e.mul_((g / state[SUM]).unsqueeze(-1)).sub_(t_e.mul_((g / state[TEACHER_SUM]).unsqueeze(-1)))
    if mask is not None and not mask.all():
        d[~mask] = 0
    dx.copy_(d)


def _check_targets(target: Tensor, ignore_index: int, n_classes: int) -> None:
    bad = (target != ignore_index) & ((target < 0) | (target >= n_classes))
    if bad.any():
        raise ValueError(
            f"target must be from 0 to {n_classes - 1} or ignore_index ({ignore_index}), got {target[bad][0].item()}"
        )


# --- the launchers for chunks ---


def _geometry(full: Sequence[Tensor], per_row: Sequence[Tensor]) -> Geometry:
    """For tensors `full` (*rows, columns) and `per_row` (*rows); rows that are longer than a tile have several."""
    layout = row_layout(full, per_row)
    strides = layout.strides[0]
    tile = softmax_tile(full[0].shape[-1], layout.n_rows, 1, by_column=strides[-2] == 1 and strides[-1] > 1)
    if tile.rows * tile.cols > LONG_TILE:
        tile = Tile(tile.rows, LONG_TILE // tile.rows, False, 512)
    return geometry(full, layout, tile)


def _hold(walk: Geometry, x: Tensor, n_tensors: int, registers: int) -> tuple[Geometry, int]:
    """How many tiles of a row of logits stay in registers from the pass for the statistics to that for the gradient.

    As many as a thread has `registers` for, of n_tensors like x. 512 threads have 128 each; with how many of them held
    nothing spills was found with `python -m benchmarks.compile_report`.
    """
    tile = walk.tile
    packed = x.element_size() == 2 and walk.vec > 1  # two elements a register
    a_tile = n_tensors * tile.rows * tile.cols // tile.threads // (1 + packed)
    pieces = min(-(-x.shape[-1] // tile.cols), max(1, registers // a_tile))
    return replace(walk, tile=replace(tile, fits=pieces * tile.cols >= x.shape[-1])), pieces


@prepared
def _prepare_cross_entropy(
    o: Options, chunk: Chunk, x: Tensor, dx: Tensor | None, target: Tensor, weight: Tensor | None,
    weight_sum: Tensor | None, grad: Tensor | None, state: Tensor,
) -> Launch:  # fmt: skip
    """A launch whose leading arguments are the tensors, in this order."""
    from lmops.kernels.loss import cross_entropy_kernel

    full = [x] if dx is None else [x, dx]
    per_row = [state[LOSS], target] if grad is None else [state[LOSS], target, grad]
    walk = _geometry(full, per_row)
    registers = 80
    if o.label_smoothing or o.softcap:
        registers = 8 if o.label_smoothing and weight is not None else 32
    walk, pieces = _hold(walk, x, 1, registers)
    x_strides, *dx_strides = walk.layout.strides[: len(full)]
    state_strides, target_strides, *grad_strides = walk.layout.strides[len(full) :]
    return Launch(
        cross_entropy_kernel, walk.grid, walk.layout.outer_shape, walk.layout.n_rows, x.shape[-1],
        state.stride(0), chunk.first, chunk.n_classes, o.ignore_index, o.label_smoothing, o.z_loss, o.softcap,
        *_scales(o.temperature), x_strides, *(dx_strides or [(0,)]), target_strides, *(grad_strides or [(0,)]),
        state_strides, **walk.flags, **NO_FUSION, PIECES=pieces, FORWARD=chunk.forward, FIRST=chunk.first == 0,
        LAST=chunk.last, GRAD=dx is not None, WEIGHTED=weight is not None, SMOOTH=o.label_smoothing > 0,
        SOFTCAP=o.softcap > 0, BACKEND=backend(),
    )  # fmt: skip


def _cross_entropy_launch(
    x: Tensor, dx: Tensor | None, target: Tensor, weight: Tensor | None, weight_sum: Tensor | None,
    grad: Tensor | None, state: Tensor, o: Options, chunk: Chunk,
) -> None:  # fmt: skip
    """Take the logits x (*rows, columns) into the state (planes, *rows), or write their gradient to dx, or both."""
    tensors = x, dx, target, weight, weight_sum, grad, state
    _prepare_cross_entropy(o, chunk, *tensors)(*tensors)


def _scales(temperature: float) -> tuple[float, float]:
    """log2(e) / temperature and 1 / temperature, finite in float32."""
    return min(math.log2(math.e) / temperature, 1e38), min(1 / temperature, 1e38)


@prepared
def _prepare_kl_div(
    o: Divergence, chunk: Chunk, x: Tensor, y: Tensor, dx: Tensor | None, mask: Tensor | None, grad: Tensor | None,
    state: Tensor,
) -> Launch:  # fmt: skip
    """The same for the divergence."""
    from lmops.kernels.loss import kl_div_kernel

    full = [x, y] if dx is None else [x, y, dx]
    given = [t for t in (mask, grad) if t is not None]
    walk = _geometry(full, [state[LOSS], *given])
    row = x.shape[-1] * x.element_size()
    # longer rows need more beside, and rows with edges
    walk, pieces = _hold(walk, x, 2, 48 if row > 65_536 else 56 if walk.edge else 64)
    x_strides, y_strides, *dx_strides = walk.layout.strides[: len(full)]
    state_strides, *others = walk.layout.strides[len(full) :]
    strides = {id(t): s for t, s in zip(given, others, strict=True)}
    return Launch(
        kl_div_kernel, walk.grid, walk.layout.outer_shape, walk.layout.n_rows, x.shape[-1], state.stride(0),
        _scales(o.temperature)[0], o.temperature, x_strides, y_strides, *(dx_strides or [(0,)]),
        strides.get(id(mask), (0,)), strides.get(id(grad), (0,)), state_strides, **walk.flags, **NO_FUSION,
        PIECES=pieces, FORWARD=chunk.forward, FIRST=chunk.first == 0, LAST=chunk.last, GRAD=dx is not None,
        MASKED=mask is not None, REVERSE=o.reverse, BACKEND=backend(),
    )  # fmt: skip


def _kl_div_launch(
    x: Tensor, y: Tensor, dx: Tensor | None, mask: Tensor | None, grad: Tensor | None, state: Tensor, o: Divergence,
    chunk: Chunk,
) -> None:  # fmt: skip
    """The same for the divergence, from logits x of the student and y of the teacher."""
    tensors = x, y, dx, mask, grad, state
    _prepare_kl_div(o, chunk, *tensors)(*tensors)


# --- operators over rows ---


def _weight_sum(weight: Tensor | None, label_smoothing: float) -> Tensor | None:
    return None if weight is None or not label_smoothing else weight.sum(dtype=_compute(weight.dtype))


def _cross_entropy_forward(
    run: Callable[..., None], x: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor | None, dx: Tensor | None,
    *options: Any,
) -> Tensor:  # fmt: skip
    """The state; the gradient is written to dx where grad is given."""
    state = _cross_entropy_forward_fake(x)
    o = Options(*options)
    if x.numel():
        out = None if grad is None else dx
        run(x, out, target, weight, _weight_sum(weight, o.label_smoothing), grad, state, o, Chunk(0, x.shape[-1]))
    return state


def _cross_entropy_state(
    run: Callable[..., None], x: Tensor, target: Tensor, weight: Tensor | None, *options: Any
) -> Tensor:
    """The state alone."""
    return _cross_entropy_forward(run, x, target, weight, None, None, *options)


def _cross_entropy_forward_fake(x: Tensor, *_: Any) -> Tensor:
    return _statistics(x, 3, *x.shape[:-1])


def _cross_entropy_backward(
    run: Callable[..., None], x: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor, state: Tensor, dx: Tensor,
    *options: Any,
) -> None:  # fmt: skip
    o = Options(*options)
    if x.numel():
        chunk = Chunk(0, x.shape[-1], forward=False)
        run(x, dx, target, weight, _weight_sum(weight, o.label_smoothing), grad, state, o, chunk)


def _kl_div_forward(
    run: Callable[..., None], x: Tensor, y: Tensor, mask: Tensor | None, grad: Tensor | None, dx: Tensor | None,
    *options: Any,
) -> Tensor:  # fmt: skip
    """The state; the gradient is written to dx where grad is given."""
    state = _kl_div_forward_fake(x)
    if x.numel():
        run(x, y, None if grad is None else dx, mask, grad, state, Divergence(*options), Chunk(0, x.shape[-1]))
    return state


def _kl_div_state(run: Callable[..., None], x: Tensor, y: Tensor, mask: Tensor | None, *options: Any) -> Tensor:
    """The state alone."""
    return _kl_div_forward(run, x, y, mask, None, None, *options)


def _kl_div_forward_fake(x: Tensor, *_: Any) -> Tensor:
    return _statistics(x, 5, *x.shape[:-1])


def _kl_div_backward(
    run: Callable[..., None], x: Tensor, y: Tensor, mask: Tensor | None, grad: Tensor, state: Tensor, dx: Tensor,
    *options: Any,
) -> None:  # fmt: skip
    if x.numel():
        run(
            x,
            y,
            None if grad is None else dx,
            mask,
            grad,
            state,
            Divergence(*options),
            Chunk(0, x.shape[-1], forward=False),
        )


@prepared
def _prepare_scale(x: Tensor, factor: Tensor) -> Launch | None:
    """None where x has gaps, which are not ours."""
    from lmops.kernels.loss import scale_kernel

    if torch.empty_like(x, device="meta").stride() != x.stride():
        return None
    block = 16_384
    return Launch(scale_kernel, (-(-x.numel() // block),), x.numel(), BLOCK=block, num_warps=512 // warp_size())


def _scale_launch(x: Tensor, factor: Tensor) -> None:
    if not x.numel():
        return
    launch = _prepare_scale(x, factor)
    if launch is None:
        x.mul_(factor)
    else:
        launch(x, factor)


def _scale_torch(x: Tensor, factor: Tensor) -> None:
    if factor != 1:
        x.mul_(factor)


def _nothing(*_: Any) -> None:
    """The shape function of an operator that returns nothing."""


cross_entropy_state = define_op(
    "cross_entropy_state(Tensor x, Tensor target, Tensor? weight, " + OPTIONS + ") -> Tensor",
    triton=partial(_cross_entropy_state, _cross_entropy_launch),
    torch_cpu=partial(_cross_entropy_state, _cross_entropy_torch),
    fake=_cross_entropy_forward_fake,
)
cross_entropy_forward = define_op(
    "cross_entropy_forward(Tensor x, Tensor target, Tensor? weight, Tensor? grad, Tensor(a!) dx, " + OPTIONS + ")"
    " -> Tensor",
    triton=partial(_cross_entropy_forward, _cross_entropy_launch),
    torch_cpu=partial(_cross_entropy_forward, _cross_entropy_torch),
    fake=_cross_entropy_forward_fake,
)
cross_entropy_backward = define_op(
    "cross_entropy_backward(Tensor x, Tensor target, Tensor? weight, Tensor grad, Tensor state, Tensor(a!) dx, "
    + OPTIONS + ") -> ()",
    triton=partial(_cross_entropy_backward, _cross_entropy_launch),
    torch_cpu=partial(_cross_entropy_backward, _cross_entropy_torch),
    fake=_nothing,
)  # fmt: skip
kl_div_state = define_op(
    "kl_div_state(Tensor x, Tensor y, Tensor? mask, float temperature, bool reverse) -> Tensor",
    triton=partial(_kl_div_state, _kl_div_launch),
    torch_cpu=partial(_kl_div_state, _kl_div_torch),
    fake=_kl_div_forward_fake,
)
kl_div_forward = define_op(
    "kl_div_forward(Tensor x, Tensor y, Tensor? mask, Tensor? grad, Tensor(a!) dx, float temperature, bool reverse)"
    " -> Tensor",
    triton=partial(_kl_div_forward, _kl_div_launch),
    torch_cpu=partial(_kl_div_forward, _kl_div_torch),
    fake=_kl_div_forward_fake,
)
kl_div_backward = define_op(
    "kl_div_backward(Tensor x, Tensor y, Tensor? mask, Tensor grad, Tensor state, Tensor(a!) dx, float temperature,"
    " bool reverse) -> ()",
    triton=partial(_kl_div_backward, _kl_div_launch),
    torch_cpu=partial(_kl_div_backward, _kl_div_torch),
    fake=_nothing,
)
scale_unless_one = define_op(
    "scale_unless_one(Tensor(a!) x, Tensor factor) -> ()",
    triton=_scale_launch,
    torch_cpu=_scale_torch,
    fake=_nothing,
)


# --- autograd over rows ---


def _in_forward(x: Tensor, reduction: str) -> bool:
    """Whether the gradient is formed with the loss. Not where the backward multiplies each row by its own number; nor
    for float16, where it must have the scale of the loss in it before it is rounded, or small entries are lost."""
    return reduction != "none" and x.dtype != torch.float16


def _reduced(state: Tensor, total: Tensor | float | None, reduction: str) -> Tensor:
    if reduction == "none":
        return state[LOSS].clone()
    loss = state[LOSS].sum()
    return loss if total is None or (isinstance(total, float) and total == 1) else loss.div_(total)


def _row_gradient(dy: Tensor, total: Tensor | None, like: Tensor) -> Tensor:
    """Gradient of each row's loss, from that of the result."""
    return (dy if total is None else dy / total).to(like.dtype).expand(like.shape[1:])


def _ones(x: Tensor, total: Tensor | None) -> Tensor:
    """Gradient of each row's loss where that of the result is 1."""
    return torch.ones((), dtype=_compute(x.dtype), device=x.device) if total is None else total.reciprocal()


def _graph_is_kept() -> bool:
    """Whether what was saved is needed again, so that nobody may write to it."""
    return torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph()


def _times(dx: Tensor, dy: Tensor) -> Tensor:
    """The gradient from the forward times that of the loss, which mostly is 1: only the device knows."""
    if _graph_is_kept():
        return dx * dy
    scale_unless_one(dx, dy)
    return dx


def _memory(x: Tensor, inplace: bool) -> Tensor:
    """Where the gradient goes: new memory, or x's own, whose other users then get autograd's error."""
    if not inplace:
        return torch.empty_like(x)
    torch.autograd.graph.increment_version(x)
    return x.detach()


def _once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.autograd.function.once_differentiable`, also where the gradient of the loss is a constant, as mostly.

    torch's lets gradients through as constants then, and a penalty on them would have no effect without a word.
    """

    @wraps(backward)
    def call(ctx: Any, dy: Tensor) -> Any:
        with torch.no_grad():
            gradients = backward(ctx, dy)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return gradients
        refuse = torch._C._functions.DelayedError(
            b"trying to differentiate twice a loss of lmops, which is once_differentiable", 1
        )
        return tuple(None if g is None else refuse(g.detach().requires_grad_()) for g in gradients)

    return call


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, target, weight, total, reduction, inplace, options):
        ctx.arguments = inplace, options
        if _in_forward(x, reduction):
            dx = _memory(x, inplace)
            grad = _ones(x, total).expand(x.shape[:-1])
            state = cross_entropy_forward(x, target, weight, grad, dx, *options)
            ctx.save_for_backward(dx)
        else:
            state = cross_entropy_state(x, target, weight, *options)
            ctx.save_for_backward(x, target, weight, total, state)
        return _reduced(state, total, reduction)

    @staticmethod
    @_once_differentiable
    def backward(ctx, dy):
        nothing = (None,) * 6
        if len(ctx.saved_tensors) == 1:
            return _times(ctx.saved_tensors[0], dy), *nothing
        x, target, weight, total, state = ctx.saved_tensors
        inplace, options = ctx.arguments
        dx = _memory(x, inplace and not _graph_is_kept())
        cross_entropy_backward(x, target, weight, _row_gradient(dy, total, state), state, dx, *options)
        return dx, *nothing


class _KLDiv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, mask, total, reduction, inplace, options):
        ctx.arguments = inplace, options
        if _in_forward(x, reduction):
            dx = _memory(x, inplace)
            grad = _ones(x, total).expand(x.shape[:-1])
            state = kl_div_forward(x, y, mask, grad, dx, *options)
            ctx.save_for_backward(dx)
        else:
            state = kl_div_state(x, y, mask, *options)
            ctx.save_for_backward(x, y, mask, total, state)
        return _reduced(state, total, reduction)

    @staticmethod
    @_once_differentiable
    def backward(ctx, dy):
        nothing = (None,) * 6
        if len(ctx.saved_tensors) == 1:
            return _times(ctx.saved_tensors[0], dy), *nothing
        x, y, mask, total, state = ctx.saved_tensors
        inplace, options = ctx.arguments
        dx = _memory(x, inplace and not _graph_is_kept())
        kl_div_backward(x, y, mask, _row_gradient(dy, total, state), state, dx, *options)
        return dx, *nothing


# --- the linear forms ---


@dataclass(frozen=True)
class Blocks:
    """How many tokens and how many classes of the vocabulary have their logits in memory at a time."""

    tokens: int
    classes: int


@lru_cache(256)
def linear_blocks(
    n_tokens: int, n_classes: int, a_token: int, a_class: int, a_logit: int, budget: int = BUDGET
) -> Blocks:
    """The largest blocks of tokens, for at least 2,048 classes, that keep within `budget` bytes of memory.

    a_token, a_class, a_logit: bytes that each of them takes in such a block. Every block of tokens reads the weight,
    and adds to its gradient, once, so as many tokens as possible come first, in blocks of the same size.
    """
    classes = min(n_classes, 2_048)
    most = max(16, (budget - classes * a_class) // (a_token + classes * a_logit) // 16 * 16)
    tokens = -(-n_tokens // -(-n_tokens // most))
    tokens = min(n_tokens, -(-tokens // 16) * 16)
    left = (budget - tokens * a_token) // (tokens * a_logit + a_class)
    return Blocks(tokens, min(n_classes, max(classes, left // 256 * 256)))


class Packed(NamedTuple):
    """A quantized weight (V, d) as the operators take it: the fields of a `lmops.quantization.QuantizedTensor`."""

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    permutation: Tensor | None
    format: str
    group_size: int
    shape: tuple[int, int]


Weight = Tensor | Packed


def _weight(
    weight: Tensor, width: int, scales: Tensor | None = None, zeros: Tensor | None = None,
    offsets: Tensor | None = None, permutation: Tensor | None = None, format: str = "", group_size: int = 0,
) -> Weight:  # fmt: skip
    """The weight (V, width) that an operator's arguments stand for: with scales, `weight` is the packed codes of it."""
    if scales is None:
        return weight
    return Packed(weight, scales, zeros, offsets, permutation, format, group_size, (weight.shape[1], width))


def _arguments(weight: Tensor | Quantized) -> tuple[Tensor, tuple[Any, ...]]:
    """What an operator takes for a weight: its first tensor, and the `QUANTIZED` arguments."""
    if isinstance(weight, Tensor):
        return weight, (None, None, None, None, "", 0)
    parts = (weight.scales, weight.zeros, weight.offsets, weight.permutation)
    return weight.packed, (*parts, weight.format, weight.group_size)


def _is_converted(weight: Weight, dtype: torch.dtype) -> bool:
    """Whether chunks of the weight are copied to be multiplied in this type."""
    return not isinstance(weight, Tensor) or weight.dtype != dtype


class _Head:
    """Blocks of logits = hidden @ weight.T + bias, one at a time in the same memory."""

    def __init__(self, hidden: Tensor, weight: Weight, bias: Tensor | None, blocks: Blocks) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        one = blocks.tokens == hidden.shape[0] and blocks.classes == weight.shape[0]
        self.memory = None if one else hidden.new_empty(blocks.tokens, blocks.classes)
        self.chunk = None
        if _is_converted(weight, hidden.dtype):
            self.chunk = hidden.new_empty(blocks.classes, hidden.shape[1])

    def rows(self, classes: slice) -> Tensor:
        """Rows of the weight in the type to multiply with; in memory that the next ones overwrite."""
        weight, chunk = self.weight, self.chunk
        if chunk is None:
            assert isinstance(weight, Tensor)
            return _part(weight, classes)
        chunk = chunk[: classes.stop - classes.start]
        if isinstance(weight, Tensor):
            return chunk.copy_(weight[classes])
        *parts, _ = weight
        # a CPU forms a few copies of what it dequantizes, so it does that in small pieces
        pieces = PIECE if chunk.device.type == "cpu" else chunk.numel()
        for rows in row_chunks(chunk.shape[0], chunk.shape[1], pieces):
            ids = torch.arange(classes.start + rows.start, classes.start + rows.stop, device=chunk.device)
            chunk[rows] = quantized_embedding_forward(ids, *parts, chunk.shape[1], chunk.dtype)
        return chunk

    def logits(self, tokens: slice, classes: slice) -> tuple[Tensor, Tensor]:
        """A block of logits, and the rows of the weight that it comes from."""
        rows = self.rows(classes)
        bias = None if self.bias is None else _part(self.bias, classes).to(self.hidden.dtype)
        if self.memory is None:
            return nn.functional.linear(self.hidden, rows, bias), rows
        h = self.hidden[tokens]
        logits = self.memory[: h.shape[0], : rows.shape[0]]
        if bias is None:
            return torch.mm(h, rows.t(), out=logits), rows
        return torch.addmm(bias, h, rows.t(), out=logits), rows


class _HeadGradient:
    """Adds up the gradients of a head from blocks of dlogits; only those that are wanted exist."""

    def __init__(self, head: _Head, tokens: int, wanted: Sequence[bool]) -> None:
        hidden, weight, bias = head.hidden, head.weight, head.bias
        self.head = head
        self.dhidden = torch.empty_like(hidden) if wanted[0] else None
        self.dweight = torch.empty_like(weight) if wanted[1] and isinstance(weight, Tensor) else None
        self.dbias = hidden.new_zeros(weight.shape[0], dtype=_compute(hidden.dtype)) if wanted[2] else None
        self.bias_dtype = bias.dtype if bias is not None else hidden.dtype
        # float32 sums for a block of tokens, and a product that goes into them; float32 itself needs neither
        self.sums = self.product = None
        if wanted[0] and hidden.dtype != _compute(hidden.dtype):
            self.sums = hidden.new_empty(tokens, hidden.shape[1], dtype=torch.float32)
            self.product = hidden.new_empty(tokens, hidden.shape[1])

    def add(self, tokens: slice, classes: slice, dlogits: Tensor, rows: Tensor) -> None:
        h = self.head.hidden[tokens]
        if self.dbias is not None:
            self.dbias[classes] += dlogits.sum(0, dtype=self.dbias.dtype)
        if self.dweight is not None:
            _add_product(self.dweight[classes], dlogits.t(), h, first=tokens.start == 0)
        if self.dhidden is None:
            return
        if self.sums is None or self.product is None:
            _add_product(self.dhidden[tokens], dlogits, rows, first=classes.start == 0)
        else:
            sums, product = self.sums[: h.shape[0]], self.product[: h.shape[0]]
            torch.mm(dlogits, rows, out=product)
            if classes.start == 0:
                sums.copy_(product)
            else:
                sums += product
            if classes.stop == self.head.weight.shape[0]:
                self.dhidden[tokens] = sums

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        nothing = self.head.hidden.new_empty(0)
        return (
            nothing if self.dhidden is None else self.dhidden,
            self.head.hidden.new_empty(0) if self.dweight is None else self.dweight,
            self.head.hidden.new_empty(0) if self.dbias is None else self.dbias.to(self.bias_dtype),
        )


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b at first, then out += a @ b; a and b may have less precision than out."""
    if out.dtype != a.dtype:
        product = torch.mm(a, b)
        if first:
            out.copy_(product)
        else:
            out += product
    elif first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def _part(t: Tensor, part: slice, dim: int = 0) -> Tensor:
    """A part of a dimension; t itself where that is all of it, since a view takes the host longer than to see that."""
    n = part.stop - part.start
    return t if n == t.shape[dim] else t.narrow(dim, part.start, n)


@lru_cache(256)
def _slices(n: int, step: int) -> tuple[slice, ...]:
    return tuple(slice(i, min(i + step, n)) for i in range(0, n, step))


@lru_cache(256)
def _chunks(n_classes: int, step: int, forward: bool = True) -> tuple[tuple[slice, Chunk], ...]:
    return tuple(
        (part, Chunk(part.start, n_classes, forward, not forward or part.stop == n_classes))
        for part in _slices(n_classes, step)
    )


def _head_blocks(heads: Sequence[tuple[Tensor, Weight]], wanted: Sequence[bool] = (False,) * 3) -> Blocks:
    """Blocks for heads of (hidden, weight), of which the first has the gradients `wanted`."""
    hidden, weight = heads[0]
    width, size = hidden.shape[1], hidden.element_size()
    narrow = hidden.dtype != _compute(hidden.dtype)
    a_token = width * (4 + size) if wanted[0] and narrow else 0
    a_class = width * size if wanted[1] and _is_converted(weight, hidden.dtype) else 0
    a_logit = 0
    for h, w in heads:
        a_logit += h.element_size()
        if _is_converted(w, h.dtype):
            a_class += h.shape[1] * h.element_size()
    budget = CPU_BUDGET if hidden.device.type == "cpu" else BUDGET
    return linear_blocks(hidden.shape[0], weight.shape[0], a_token, a_class, a_logit, budget)


def _linear_cross_entropy_forward(
    run: Callable[..., None], hidden: Tensor, first: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, ignore_index: int, label_smoothing: float, z_loss: float, softcap: float,
    temperature: float, *quantized: Any,
) -> Tensor:  # fmt: skip
    o = Options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    weight = _weight(first, hidden.shape[1], *quantized)
    n_classes = weight.shape[0]
    if not hidden.shape[0]:
        return _linear_cross_entropy_forward_fake(hidden)
    blocks = _head_blocks([(hidden, weight)])
    # three planes more go from one chunk of classes to the next
    planes = 3 if blocks.classes == n_classes else 6
    state = _statistics(hidden, planes, hidden.shape[0])
    head, weight_sum = _Head(hidden, weight, bias, blocks), _weight_sum(class_weight, o.label_smoothing)
    for tokens in _slices(hidden.shape[0], blocks.tokens):
        targets, states = _part(target, tokens), _part(state, tokens, 1)
        for classes, chunk in _chunks(n_classes, blocks.classes):
            x, _ = head.logits(tokens, classes)
            run(x, None, targets, class_weight, weight_sum, None, states, o, chunk)
    return state if planes == 3 else state[:3].clone()


def _linear_cross_entropy_forward_fake(hidden: Tensor, *_: Any) -> Tensor:
    return _statistics(hidden, 3, hidden.shape[0])


def _linear_cross_entropy_backward(
    run: Callable[..., None], hidden: Tensor, first: Tensor, bias: Tensor | None, target: Tensor,
    class_weight: Tensor | None, grad: Tensor, state: Tensor, wanted: Sequence[bool], ignore_index: int,
    label_smoothing: float, z_loss: float, softcap: float, temperature: float, *quantized: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not hidden.shape[0]:
        return _zeros_of_head(hidden, first, bias, wanted)
    o = Options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    weight = _weight(first, hidden.shape[1], *quantized)
    n_classes = weight.shape[0]
    blocks = _head_blocks([(hidden, weight)], wanted)
    head, weight_sum = _Head(hidden, weight, bias, blocks), _weight_sum(class_weight, o.label_smoothing)
    gradient = _HeadGradient(head, blocks.tokens, wanted)
    for tokens in _slices(hidden.shape[0], blocks.tokens):
        targets, grads, states = _part(target, tokens), _part(grad, tokens), _part(state, tokens, 1)
        for classes, chunk in _chunks(n_classes, blocks.classes, forward=False):
            x, rows = head.logits(tokens, classes)
            run(x, x, targets, class_weight, weight_sum, grads, states, o, chunk)
            gradient.add(tokens, classes, x, rows)
    return gradient.result()


def _zeros_of_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    like = (hidden, weight, hidden if bias is None else bias)
    first, second, third = (
        torch.zeros_like(t) if need else hidden.new_empty(0) for t, need in zip(like, wanted, strict=True)
    )
    return first, second, third


def _linear_cross_entropy_backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None, grad: Tensor,
    state: Tensor, wanted: Sequence[bool], *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _zeros_of_head(hidden, weight, bias, wanted)


QUANTIZED = (
    "Tensor? scales=None, Tensor? zeros=None, Tensor? offsets=None, Tensor? permutation=None,"
    ' str format="", int group_size=0'
)
linear_cross_entropy_forward = define_op(
    "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    + f"{OPTIONS}, {QUANTIZED}) -> Tensor",
    triton=partial(_linear_cross_entropy_forward, _cross_entropy_launch),
    torch_cpu=partial(_linear_cross_entropy_forward, _cross_entropy_torch),
    fake=_linear_cross_entropy_forward_fake,
)  # fmt: skip
linear_cross_entropy_backward = define_op(
    "linear_cross_entropy_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight,"
    " Tensor grad, Tensor state, bool[] wanted, " + f"{OPTIONS}, {QUANTIZED}) -> (Tensor, Tensor, Tensor)",
    triton=partial(_linear_cross_entropy_backward, _cross_entropy_launch),
    torch_cpu=partial(_linear_cross_entropy_backward, _cross_entropy_torch),
    fake=_linear_cross_entropy_backward_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, class_weight, total, reduction, options, *quantized):
        inputs = hidden, weight, bias, target, class_weight
        state = linear_cross_entropy_forward(*inputs, *options, *quantized)
        ctx.save_for_backward(*inputs, total, state, *quantized[:4])
        ctx.arguments = options, quantized[4:]
        return _reduced(state, total, reduction)

    @staticmethod
    @_once_differentiable
    def backward(ctx, dy):
        *inputs, total, state = ctx.saved_tensors[:7]
        options, kind = ctx.arguments
        wanted = list(ctx.needs_input_grad[:3])
        grad = _row_gradient(dy, total, state)
        quantized = *ctx.saved_tensors[7:], *kind
        gradients = linear_cross_entropy_backward(*inputs, grad, state, wanted, *options, *quantized)
        return *(g if need else None for g, need in zip(gradients, wanted, strict=True)), *(None,) * 11


def _linear_kl_div_forward(
    run: Callable[..., None], hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, mask: Tensor | None, temperature: float, reverse: bool,
    *quantized: Any,
) -> Tensor:  # fmt: skip
    o = Divergence(temperature, reverse)
    student_head = _weight(weight, hidden.shape[1], *quantized[:6])
    teacher_head = _weight(teacher_weight, teacher_hidden.shape[1], *quantized[6:])
    n_classes = student_head.shape[0]
    state = _linear_kl_div_forward_fake(hidden)
    if hidden.shape[0]:
        blocks = _head_blocks([(hidden, student_head), (teacher_hidden, teacher_head)])
        head = _Head(hidden, student_head, bias, blocks)
        teacher = _Head(teacher_hidden, teacher_head, teacher_bias, blocks)
        for tokens in _slices(hidden.shape[0], blocks.tokens):
            some, states = None if mask is None else _part(mask, tokens), _part(state, tokens, 1)
            for classes, chunk in _chunks(n_classes, blocks.classes):
                (x, _), (y, _) = head.logits(tokens, classes), teacher.logits(tokens, classes)
                run(x, y, None, some, None, states, o, chunk)
    return state


def _linear_kl_div_forward_fake(hidden: Tensor, *_: Any) -> Tensor:
    return _statistics(hidden, 5, hidden.shape[0])


def _linear_kl_div_backward(
    run: Callable[..., None], hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor,
    teacher_weight: Tensor, teacher_bias: Tensor | None, mask: Tensor | None, grad: Tensor, state: Tensor,
    wanted: Sequence[bool], temperature: float, reverse: bool,
    *quantized: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if not hidden.shape[0]:
        return _zeros_of_head(hidden, weight, bias, wanted)
    o = Divergence(temperature, reverse)
    student_head = _weight(weight, hidden.shape[1], *quantized[:6])
    teacher_head = _weight(teacher_weight, teacher_hidden.shape[1], *quantized[6:])
    n_classes = student_head.shape[0]
    blocks = _head_blocks([(hidden, student_head), (teacher_hidden, teacher_head)], wanted)
    head = _Head(hidden, student_head, bias, blocks)
    teacher = _Head(teacher_hidden, teacher_head, teacher_bias, blocks)
    gradient = _HeadGradient(head, blocks.tokens, wanted)
    for tokens in _slices(hidden.shape[0], blocks.tokens):
        some, grads, states = (
            None if mask is None else _part(mask, tokens),
            _part(grad, tokens),
            _part(state, tokens, 1),
        )
        for classes, chunk in _chunks(n_classes, blocks.classes, forward=False):
            (x, rows), (y, _) = head.logits(tokens, classes), teacher.logits(tokens, classes)
            run(x, y, x, some, grads, states, o, chunk)
            gradient.add(tokens, classes, x, rows)
    return gradient.result()


def _linear_kl_div_backward_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher_hidden: Tensor, teacher_weight: Tensor,
    teacher_bias: Tensor | None, mask: Tensor | None, grad: Tensor, state: Tensor, wanted: Sequence[bool],
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _zeros_of_head(hidden, weight, bias, wanted)


HEADS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias,"
    " Tensor? mask"
)
QUANTIZED_HEADS = QUANTIZED + (
    ", Tensor? teacher_scales=None, Tensor? teacher_zeros=None, Tensor? teacher_offsets=None,"
    ' Tensor? teacher_permutation=None, str teacher_format="", int teacher_group_size=0'
)
linear_kl_div_forward = define_op(
    f"linear_kl_div_forward({HEADS}, float temperature, bool reverse, {QUANTIZED_HEADS}) -> Tensor",
    triton=partial(_linear_kl_div_forward, _kl_div_launch),
    torch_cpu=partial(_linear_kl_div_forward, _kl_div_torch),
    fake=_linear_kl_div_forward_fake,
)
linear_kl_div_backward = define_op(
    f"linear_kl_div_backward({HEADS}, Tensor grad, Tensor state, bool[] wanted, float temperature, bool reverse,"
    f" {QUANTIZED_HEADS}) -> (Tensor, Tensor, Tensor)",
    triton=partial(_linear_kl_div_backward, _kl_div_launch),
    torch_cpu=partial(_linear_kl_div_backward, _kl_div_torch),
    fake=_linear_kl_div_backward_fake,
)


class _LinearKLDiv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask, total, reduction, options,
        *quantized,
    ):  # fmt: skip
        inputs = hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, mask
        state = linear_kl_div_forward(*inputs, *options, *quantized)
        ctx.save_for_backward(*inputs, total, state, *quantized[:4], *quantized[6:10])
        ctx.arguments = options, quantized[4:6], quantized[10:]
        return _reduced(state, total, reduction)

    @staticmethod
    @_once_differentiable
    def backward(ctx, dy):
        *inputs, total, state = ctx.saved_tensors[:9]
        options, kind, teacher_kind = ctx.arguments
        quantized = *ctx.saved_tensors[9:13], *kind, *ctx.saved_tensors[13:], *teacher_kind
        wanted = list(ctx.needs_input_grad[:3])
        grad = _row_gradient(dy, total, state)
        gradients = linear_kl_div_backward(*inputs, grad, state, wanted, *options, *quantized)
        return *(g if need else None for g, need in zip(gradients, wanted, strict=True)), *(None,) * 19


# --- public functions ---


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    inplace_backward: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Cross entropy of logits with targets: `torch.nn.functional.cross_entropy`, and more, in one pass over the logits.

    input: logits (C,), (N, C) or (N, C, d1, ...), any strides; float16, bfloat16, float32, on the CPU also float64.
    target: class indices of an integer type, of the shape of input without C; or probabilities, of a floating-point
        type and the shape of input. Those take plain torch in float32, which holds several tensors of that shape.
    weight: (C,), a factor a class. Not differentiable.
    ignore_index: tokens with this target take no part: loss 0, gradient 0, and their logits are not read.
    reduction: "none", "sum", or "mean", which divides the sum by that of the weights of the targets that take part.
        Without any that is NaN, as in torch. size_average, reduce: torch's deprecated names for it.
    label_smoothing: from 0 to 1, the share of the target that is spread evenly over the classes.
    z_loss: adds z_loss * lse^2 to every token that takes part, lse the logarithm of the sum of exponentials of its
        logits (PaLM, arXiv 2204.02311). It is reduced with the rest.
    softcap: the logits are softcap * tanh(input / softcap) (Gemma 2, arXiv 2408.00118), where -inf stays -inf.
    temperature: they are divided by it after that. A finite number above 0.
    inplace_backward: the gradient overwrites input, which saves memory of its size. What else saved input for its own
        backward then raises autograd's error about an in-place change. Only for an input that is not a leaf, and
        without effect under torch.compile, which plans memory itself.
    dtype: of the result, by default input's (under torch.autocast float32, as torch). Losses are computed in float32
        (float64: in float64), so dtype=torch.float32 is the better choice for training in bfloat16.

    Logits of -inf have probability 0. A target out of range raises ValueError on the CPU; on a GPU that would stall
    the stream, so there the loss and the gradient of its row are NaN, and nothing outside the tensors is read.
    The gradient is computed with the loss, and kept in place of the logits; where the gradient of a sum or mean is 1,
    as in `loss.backward()`, the backward only looks at that number. For reduction "none", and in float16, where it must
    not be rounded before the scale of the loss is in it, the backward reads the logits once more instead.
    Differentiable once, with respect to input (with probabilities: and target, any number of times).
    Raises TypeError or ValueError for bad types, shapes or numbers.
    """
    if size_average is not None or reduce is not None:
        reduction = nn._reduction.legacy_get_string(size_average, reduce)
    _check_float("input", input)
    if input.ndim == 0 or input.shape[0 if input.ndim == 1 else 1] == 0:
        raise ValueError(f"input must be (C,) or (N, C, ...) with at least one class, got {tuple(input.shape)}")
    x = input if input.ndim <= 2 else input.movedim(1, -1)
    _check_class_weight("weight", weight, x)
    options = _options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    _check_reduction(reduction, REDUCTIONS)
    dtype = _result_dtype(dtype, input)
    if target.is_floating_point():
        if target.shape != input.shape:
            raise ValueError(
                f"target of probabilities must be {tuple(input.shape)} as input, got {tuple(target.shape)}"
            )
        _check_device("target", target, input)
        return cross_entropy_with_probabilities(
            input, target, weight, reduction=reduction, label_smoothing=label_smoothing, z_loss=z_loss,
            softcap=softcap, temperature=temperature, dtype=dtype,
        )  # fmt: skip
    _check_target(target, x.shape[:-1], input)
    total = _sum_of_weights(target, weight, x.shape[-1], ignore_index, x.dtype) if reduction == "mean" else None
    if input.requires_grad and torch.is_grad_enabled():
        inplace = inplace_backward and not torch.compiler.is_compiling()
        if inplace:
            _check_not_a_leaf("input", input)
        loss = _CrossEntropy.apply(x, target, weight, total, reduction, inplace, options)
    else:
        loss = _reduced(cross_entropy_state(x, target, weight, *options), total, reduction)
    return loss if loss.dtype == dtype else loss.to(dtype)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Quantized,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`cross_entropy(hidden @ weight.T + bias, target)`, without the logits (tokens, V) in memory, also backward.

    hidden: (..., d), usually (N, d) or (B, T, d). weight: (V, d), such as a tied embedding. bias: (V,).
    target: class indices of the shape of hidden without d. class_weight: (V,), the `weight` of cross_entropy.
    dtype: of the result, float32 by default (float64 for float64 hidden).
    Other arguments and errors: as `cross_entropy`.

    Logits exist for a block of tokens and a chunk of the vocabulary at a time, rounded to the type of hidden as a
    linear layer rounds them. The backward computes them again: a fourth product of matrices beside three. Memory beyond
    inputs, gradients and results stays under 64 MB (`linear_blocks`) plus a few numbers a token.
    weight may be of another type than hidden, float32 for training in mixed precision: it is cast a chunk at a time.
    It may be quantized, a `lmops.quantization.QuantizedTensor` or the weight of a `QuantLinear`: it is dequantized a
    chunk at a time to the type of hidden, and is a constant.
    Under torch.autocast hidden is cast to its type.
    """
    weight = _of_layer(weight)
    hidden, rows = _check_head("hidden", hidden, "weight", weight, "bias", bias)
    _check_class_weight("class_weight", class_weight, hidden, weight.shape[0])
    _check_target(target, hidden.shape[:-1], hidden)
    options = _options(ignore_index, label_smoothing, z_loss, softcap, temperature)
    _check_reduction(reduction, REDUCTIONS)
    total = None
    if reduction == "mean":
        total = _sum_of_weights(target, class_weight, weight.shape[0], ignore_index, hidden.dtype)
    codes, quantized = _arguments(weight)
    inputs = rows, codes, bias, target if target.ndim == 1 else target.reshape(-1), class_weight
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, codes, bias)):
        loss = _LinearCrossEntropy.apply(*inputs, total, reduction, options, *quantized)
    else:
        # what is a default is left out: each argument costs the host time
        dense = quantized[0] is None
        state = linear_cross_entropy_forward(*inputs, *options, *(() if dense else quantized))
        loss = _reduced(state, total, reduction)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return loss if dtype is None else loss.to(_result_dtype(dtype, hidden))


KL_REDUCTIONS = ("batchmean", "mean", "sum", "none")


def kl_div(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    reverse: bool = False,
    inplace_backward: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """KL(p || q) of p = softmax(teacher / temperature) and q = softmax(student / temperature), to distil a model.

    student_logits, teacher_logits: (..., V), any strides; float16, bfloat16, float32, on the CPU also float64.
    temperature: a finite number above 0. Gradients shrink with its square: beside a loss on hard labels, multiply the
        result by temperature^2 (Hinton, Vinyals and Dean, arXiv 1503.02531). It is not done here.
    mask: bool (...), False for rows that do not count: value 0, gradient 0, and their logits are not read.
    reduction: "none" one value a row, "sum", "batchmean" the sum over the size of the first dimension, as torch, "mean"
        the sum over the number of rows that count (torch divides by the number of logits).
    reverse: KL(q || p) in place of KL(p || q).
    inplace_backward, dtype: as `cross_entropy`; the gradient overwrites student_logits.

    0 log 0 is 0, so logits of -inf in both take no part. Differentiable once, with respect to student_logits; the
    teacher gets no gradient. Each tensor is read once, and the gradient computed with the value, as in
    `cross_entropy`.
    Raises TypeError or ValueError for bad types, shapes or numbers.
    """
    _check_float("student_logits", student_logits)
    _check_float("teacher_logits", teacher_logits)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher_logits must be {tuple(student_logits.shape)} as student_logits, got {tuple(teacher_logits.shape)}"
        )
    _check_device("teacher_logits", teacher_logits, student_logits)
    if student_logits.ndim == 0 or student_logits.shape[-1] == 0:
        raise ValueError(f"student_logits must be (..., V) with V > 0, got {tuple(student_logits.shape)}")
    options = _divergence(temperature, reverse)
    _check_mask(mask, student_logits)
    dtype = _result_dtype(dtype, student_logits)
    x, y = student_logits, _constant(teacher_logits)
    total = _sum_of_rows(mask, reduction, x)
    reduction = "mean" if reduction == "batchmean" else reduction
    if x.requires_grad and torch.is_grad_enabled():
        inplace = inplace_backward and not torch.compiler.is_compiling()
        if inplace:
            _check_not_a_leaf("student_logits", x)
        loss = _KLDiv.apply(x, y, mask, _as_tensor(total, x), reduction, inplace, options)
    else:
        loss = _reduced(kl_div_state(x, y, mask, *options), total, reduction)
    return loss if loss.dtype == dtype else loss.to(dtype)


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor | Quantized,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | Quantized,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
    reduction: str = "batchmean",
    reverse: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`kl_div` of the logits student_hidden @ student_weight.T and teacher_hidden @ teacher_weight.T, without them.

    student_hidden: (..., d). student_weight: (V, d). student_bias: (V,). The teacher's: the same, with a d of its own.
    dtype: of the result, float32 by default (float64 for float64). Other arguments and errors: as `kl_div`; blocks,
    memory and types as `linear_cross_entropy`. Gradients for the student only.
    """
    student_weight, teacher_weight = _of_layer(student_weight), _of_layer(teacher_weight)
    student_hidden, rows = _check_head(
        "student_hidden", student_hidden, "student_weight", student_weight, "student_bias", student_bias
    )
    teacher_hidden, teacher_rows = _check_head(
        "teacher_hidden", teacher_hidden, "teacher_weight", teacher_weight, "teacher_bias", teacher_bias
    )
    shape = student_hidden.shape[:-1]
    if shape != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"teacher_hidden must be {tuple(shape)} x d as student_hidden, got {tuple(teacher_hidden.shape)}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"teacher_weight must have {student_weight.shape[0]} rows as student_weight, got {teacher_weight.shape[0]}"
        )
    _check_device("teacher_hidden", teacher_hidden, student_hidden)
    options = _divergence(temperature, reverse)
    _check_mask(mask, student_hidden)
    total = _sum_of_rows(mask, reduction, student_hidden)
    reduction = "mean" if reduction == "batchmean" else reduction
    codes, student = _arguments(student_weight)
    teacher_codes, teacher = _arguments(teacher_weight)
    inputs = (
        rows, codes, student_bias, *map(_constant, (teacher_rows, teacher_codes, teacher_bias)),
        mask if mask is None or mask.ndim == 1 else mask.reshape(-1),
    )  # fmt: skip
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:3]):
        loss = _LinearKLDiv.apply(*inputs, _as_tensor(total, student_hidden), reduction, options, *student, *teacher)
    else:
        dense = student[0] is None and teacher[0] is None
        state = linear_kl_div_forward(*inputs, *options, *(() if dense else (*student, *teacher)))
        loss = _reduced(state, total, reduction)
    loss = loss.view(shape) if reduction == "none" else loss
    return loss if dtype is None else loss.to(_result_dtype(dtype, student_hidden))


# --- checks ---


def _check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS or (x.dtype == torch.float64 and x.device.type == "cuda"):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or, on the CPU, float64, got {x.dtype}")


def _check_device(name: str, x: Tensor, like: Tensor) -> None:
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the logits, got {x.device}")


def _check_target(target: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if target.dtype not in TARGETS:
        raise TypeError(f"target must be of an integer type, got {target.dtype}")
    if target.shape != shape:
        raise ValueError(f"target must be {tuple(shape)}, one class a token, got {tuple(target.shape)}")
    _check_device("target", target, like)


def _check_class_weight(name: str, weight: Tensor | None, x: Tensor, n_classes: int | None = None) -> None:
    if weight is None:
        return
    n_classes = x.shape[-1] if n_classes is None else n_classes
    _check_float(name, weight)
    if weight.shape != (n_classes,):
        raise ValueError(f"{name} must be ({n_classes},), one value a class, got {tuple(weight.shape)}")
    _check_device(name, weight, x)
    if weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{name} has no gradient here, but requires one: pass {name}.detach()")


def _of_layer(weight: Tensor | Quantized) -> Tensor | Quantized:
    """The weight, where it is that of a `QuantLinear` the quantized tensor which it stands for."""
    return getattr(weight, "quantized", weight)


def _check_head(
    name: str, hidden: Tensor, weight_name: str, weight: Tensor | Quantized, bias_name: str, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """hidden, as autocast wants it, and as rows (N, d)."""
    _check_float(name, hidden)
    if isinstance(weight, Tensor):
        _check_float(weight_name, weight)
    elif not hasattr(weight, "packed"):
        raise TypeError(
            f"{weight_name} must be a tensor or a lmops.quantization.QuantizedTensor, got {type(weight).__name__}"
        )
    shape = tuple(weight.shape)
    if len(shape) != 2 or hidden.ndim == 0 or hidden.shape[-1] != shape[1] or 0 in shape:
        shapes = f"got {tuple(hidden.shape)} and {shape}"
        raise ValueError(f"{name} must be (..., d) and {weight_name} (V, d), neither V nor d 0, {shapes}")
    _check_device(weight_name, weight if isinstance(weight, Tensor) else weight.packed, hidden)
    if bias is not None:
        _check_float(bias_name, bias)
        if tuple(bias.shape) != shape[:1]:
            raise ValueError(f"{bias_name} must be ({weight.shape[0]},), got {tuple(bias.shape)}")
        _check_device(bias_name, bias, hidden)
    kind = hidden.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    return hidden, hidden if hidden.ndim == 2 else hidden.reshape(-1, hidden.shape[-1])


def _constant(t: Tensor | None) -> Any:
    return t.detach() if t is not None and t.requires_grad else t


def _check_mask(mask: Tensor | None, x: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.shape != x.shape[:-1]:
        raise ValueError(f"mask must be {tuple(x.shape[:-1])}, one value a row, got {tuple(mask.shape)}")
    _check_device("mask", mask, x)


def _check_not_a_leaf(name: str, x: Tensor) -> None:
    if x.is_leaf or (x._base is not None and x._base.is_leaf):
        raise ValueError(f"inplace_backward would overwrite {name}, a leaf that requires a gradient, or a view of one")
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"inplace_backward needs {name} to have memory for each entry, got strides {x.stride()}")


def _check_reduction(reduction: str, allowed: Sequence[str]) -> None:
    if reduction not in allowed:
        raise ValueError(f"reduction must be one of {', '.join(allowed)}, got {reduction!r}")


def _check_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be finite and above 0, got {temperature}")
    return float(temperature)


def _options(
    ignore_index: int, label_smoothing: float, z_loss: float, softcap: float | None, temperature: float
) -> Options:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be from 0 to 1, got {label_smoothing}")
    if not math.isfinite(z_loss):
        raise ValueError(f"z_loss must be finite, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be finite and above 0, or None, got {softcap}")
    temperature = _check_temperature(temperature)
    return Options(ignore_index, float(label_smoothing), float(z_loss), float(softcap or 0.0), temperature)


def _divergence(temperature: float, reverse: bool) -> Divergence:
    return Divergence(_check_temperature(temperature), bool(reverse))


def _result_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    kind = x.device.type
    if dtype is None and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        return _compute(x.dtype)
    return dtype or x.dtype


def _sum_of_weights(
    target: Tensor, weight: Tensor | None, n_classes: int, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """What "mean" divides by, computed on the device; without weights an integer."""
    kept = target != ignore_index
    if weight is None:
        return kept.count_nonzero()
    # a target out of range makes the sum of losses NaN, whatever it weighs
    return torch.where(kept, weight.to(_compute(dtype))[target.long().clamp(0, n_classes - 1)], 0).sum()


def _as_tensor(total: Tensor | float | None, x: Tensor) -> Tensor | None:
    return x.new_full((), total, dtype=_compute(x.dtype)) if isinstance(total, float) else total


def _sum_of_rows(mask: Tensor | None, reduction: str, x: Tensor) -> Tensor | float | None:
    _check_reduction(reduction, KL_REDUCTIONS)
    if reduction in ("sum", "none"):
        return None
    if reduction == "mean" and mask is not None:
        return mask.sum().to(_compute(x.dtype))
    rows = x.shape[:-1]
    return float(math.prod(rows) if reduction == "mean" else rows[0] if rows else 1)
