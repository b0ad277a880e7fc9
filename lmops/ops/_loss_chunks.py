"""Cross entropy and the divergence of a chunk of logits: what the operators of whole rows and the linear forms run.

A row's running statistics live in `state`, (planes, *rows) in float32: its loss, the maximum and sum of exponentials of
its logits, and, while chunks of the vocabulary still come, what else the next one needs. The kernels and the torch
functions beside them take logits as such chunks. A whole row is a single chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import backend
from lmops.ops._rows import NO_FUSION, Geometry, Tile, geometry, softmax_tile
from lmops.ops._strides import row_layout
from lmops.ops.softmax import NEG_INF

# planes of `state`; the first three of cross entropy and five of the divergence stay for the backward
LOSS, MAX, SUM, TARGET, SMOOTH, SEEN = range(6)
TEACHER_MAX, TEACHER_SUM = 3, 4
# elements that the torch functions take at a time, so that their passes stay in the cache
BLOCK = 1 << 19
# elements of a tile of rows that do not fit one
LONG_TILE = 4_096


class Options(NamedTuple):
    """What cross entropy computes. softcap: 0 is none."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    temperature: float


PLAIN = Options(-100, 0.0, 0.0, 0.0, 1.0)


class Chunk(NamedTuple):
    """Which columns of the vocabulary a chunk of logits holds, from `first` on, and what to do with them.

    forward: take them into the state, complete after the `last` chunk; otherwise the state is complete already.
    """

    first: int
    n_classes: int
    forward: bool = True
    last: bool = True


# --- the torch functions for chunks ---


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(x: Tensor, *shape: int) -> Tensor:
    """Memory for numbers a row, in the type that is computed in. To name that takes the host half as long again."""
    dtype = compute_dtype(x.dtype)
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


def cross_entropy_torch(
    x: Tensor, dx: Tensor | None, target: Tensor, weight: Tensor | None, weight_sum: Tensor | None,
    grad: Tensor | None, state: Tensor, o: Options, chunk: Chunk,
) -> None:  # fmt: skip
    """What `cross_entropy_launch` does, in torch."""
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


def kl_div_torch(
    x: Tensor, y: Tensor, dx: Tensor | None, mask: Tensor | None, grad: Tensor | None, state: Tensor, o: Divergence,
    chunk: Chunk,
) -> None:  # fmt: skip
    """What `kl_div_launch` does, in torch."""
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
        registers = 16 if o.label_smoothing and weight is not None else 48 if o.label_smoothing and o.softcap else 52
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


def cross_entropy_launch(
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


def kl_div_launch(
    x: Tensor, y: Tensor, dx: Tensor | None, mask: Tensor | None, grad: Tensor | None, state: Tensor, o: Divergence,
    chunk: Chunk,
) -> None:  # fmt: skip
    """The same for the divergence, from logits x of the student and y of the teacher."""
    tensors = x, y, dx, mask, grad, state
    _prepare_kl_div(o, chunk, *tensors)(*tensors)
