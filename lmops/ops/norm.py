"""RMSNorm and LayerNorm with a residual: schemas, launchers, CPU implementations, autograd, public functions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, differentiated, distinct, warp_size
from lmops.ops._rows import NO_FUSION, Geometry, Tile, geometry, softmax_tile
from lmops.ops._strides import aligned_alike, row_layout
from lmops.ops.softmax import FLOATS

# Rows and columns that a program takes at a time to sum the parameters' gradients of rows that do not fit.
LONG_ROWS, LONG_COLS = 2, 1_024


def _compute(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def norm_tile(n_cols: int, n_rows: int, held: int, by_column: bool = False) -> Tile:
    """The tile for rows of which `held` registers of 4 bytes an element are held; they fit up to 32,768 of them.

    Longer rows are streamed in tiles of 1,024 columns, 8 a thread.
    """
    tile = softmax_tile(n_cols, n_rows, held, by_column)
    return tile if tile.fits else softmax_tile(max(n_cols, 32_769), n_rows, 8, by_column)


def n_programs(walk: Geometry, processors: int) -> int:
    """How many programs share the rows, each of which leaves a row of partial sums for every parameter.

    As many as `processors` of 1,024 threads run at once; fewer, but for one a processor, where they would get less
    than 8 blocks of rows each, so that writing and adding up the sums stays a small part of the work.
    """
    at_once = processors * max(1, 1_024 // (32 * walk.num_warps))
    return min(walk.n_blocks, max(processors, min(at_once, walk.n_blocks // 8)))


def _processors(x: Tensor) -> int:
    """Of x's GPU; CPU tensors, which an interpreter or a simulator has, are given those of an H100."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 132


def _by_column(strides: tuple[int, ...]) -> bool:
    """Whether a tensor's rows, not its columns, are neighbours in memory."""
    return strides[-2] == 1 and strides[-1] > 1


def _held(x: Tensor, numbers: int) -> int:
    """Registers of 4 bytes that so many numbers of the type computed in take."""
    return numbers * (2 if x.dtype == torch.float64 else 1)


def _acc(x: Tensor) -> Any:
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _stats(x: Tensor, centred: bool) -> Tensor:
    """(planes, *rows): 1 / sqrt(var + eps), and the mean if centred."""
    return x.new_empty((1 + centred, *x.shape[:-1]), dtype=_compute(x.dtype))


@prepared
def _prepare_forward(
    x: Tensor, residual: Tensor | None, h: Tensor | None, y: Tensor, stats: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, weight_offset: float, centred: bool,
) -> Launch:  # fmt: skip
    """A launch whose leading arguments are x, residual, h, y, weight, bias and stats."""
    from lmops.kernels.norm import norm_forward_kernel

    full = [x, y] if residual is None or h is None else [x, y, residual, h]
    layout = row_layout(full, [] if stats is None else [stats[0]])
    by_column = _by_column(layout.strides[0])
    walk = geometry(full, layout, norm_tile(x.shape[-1], layout.n_rows, _held(x, 1), by_column))
    if walk.edge or by_column:  # which take registers themselves
        walk = geometry(full, layout, norm_tile(x.shape[-1], layout.n_rows, _held(x, 2), by_column))
    x_strides, y_strides, *others = layout.strides[: len(full)]
    residual_strides, h_strides = others or (x_strides, x_strides)
    return Launch(
        norm_forward_kernel, walk.grid, layout.outer_shape, layout.n_rows, x.shape[-1],
        0 if stats is None else stats.stride(0), eps, weight_offset, x_strides, residual_strides, h_strides, y_strides,
        (0,) if stats is None else layout.strides[-1], **walk.flags, **NO_FUSION, CENTRED=centred,
        RESIDUAL=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None,
        STATS=stats is not None, ACC=_acc(x),
    )  # fmt: skip


def _dense(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _norm_triton(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, centred: bool
) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        weight, bias = _dense(weight), _dense(bias)
        launch = _prepare_forward(x, None, None, y, None, weight, bias, eps, weight_offset, centred)
        launch(x, None, None, y, weight, bias, None)
    return y


def _forward_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, stats = _forward_fake(x, residual, weight, bias, eps, weight_offset, centred)
    if x.numel():
        weight, bias = _dense(weight), _dense(bias)
        launch = _prepare_forward(x, residual, h, y, stats, weight, bias, eps, weight_offset, centred)
        launch(x, residual, h, y, weight, bias, stats)
    return y, h, stats


@dataclass(frozen=True)
class _Backward:
    """dx by one launch, which leaves the sums of as many programs for the parameters, or has `sums` do that."""

    dx: Launch
    programs: int
    sums: Launch | None


@prepared
def _prepare_backward(
    dy: Tensor, dh: Tensor | None, dx: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, weight_offset: float,
    centred: bool, dweight: bool, dbias: bool,
) -> _Backward:  # fmt: skip
    """Leading arguments: of dx x, dy, dh, dx, weight, partial sums, stats; of sums x, dy, partial sums, stats."""
    from lmops.kernels.norm import norm_backward_kernel

    n_cols, n_sums = x.shape[-1], dweight + dbias
    full = [x, dy, dx] if dh is None else [x, dy, dx, dh]
    layout = row_layout(full, [stats[0]])
    held, by_column = 4 if n_sums else 2, _by_column(layout.strides[0])
    walk = geometry(full, layout, norm_tile(n_cols, layout.n_rows, _held(x, held), by_column), edges=False)
    if walk.vec == 1 and not by_column:  # an address for every element
        walk = geometry(full, layout, norm_tile(n_cols, layout.n_rows, _held(x, 2 * held)), edges=False)
        walk = replace(walk, num_warps=min(2 * walk.num_warps, 1_024 // warp_size()))
    sum_here = n_sums > 0 and walk.tile.fits
    programs = n_programs(walk, _processors(x)) if sum_here else walk.n_blocks
    x_strides, dy_strides, dx_strides, *others = layout.strides[: len(full)]
    flags = {name: value for name, value in walk.flags.items() if name != "EDGE"}
    launch = Launch(
        norm_backward_kernel, (programs,), layout.outer_shape, layout.n_rows, n_cols, walk.n_blocks, stats.stride(0),
        weight_offset, x_strides, dy_strides, others[0] if others else dx_strides, dx_strides, layout.strides[-1],
        **flags, **NO_FUSION, CENTRED=centred, WEIGHT=weight is not None, RESIDUAL=dh is not None,
        DWEIGHT=sum_here and dweight, DBIAS=sum_here and dbias, ACC=_acc(x),
    )  # fmt: skip
    if n_sums and not sum_here:
        return _Backward(launch, *_long_sums(dy, x, stats, centred, dweight, dbias))
    return _Backward(launch, programs if sum_here else 0, None)


def _backward_triton(
    dy: Tensor, dh: Tensor | None, x: Tensor, stats: Tensor, weight: Tensor | None, weight_offset: float,
    centred: bool, dweight: bool, dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dx, n_cols, n_sums = torch.empty_like(x), x.shape[-1], dweight + dbias
    if not x.numel():
        return dx, stats.new_zeros(n_sums, n_cols)
    weight = _dense(weight)
    plan = _prepare_backward(dy, dh, dx, x, stats, weight, weight_offset, centred, dweight, dbias)
    partial = stats.new_empty(plan.programs, n_sums, n_cols) if n_sums else None
    plan.dx(x, dy, dh, dx, weight, partial if plan.sums is None else None, stats)
    if plan.sums is not None:
        plan.sums(x, dy, partial, stats)
    return dx, stats.new_empty(0, n_cols) if partial is None else partial.sum(0)


def _long_sums(dy: Tensor, x: Tensor, stats: Tensor, centred: bool, dweight: bool, dbias: bool) -> tuple[int, Launch]:
    """What sums for the parameters of rows that do not fit: its programs, each with (parameters, n_cols) sums."""
    from lmops.kernels.norm import norm_parameters_kernel

    layout = row_layout([x, dy], [stats[0]])
    n_cols = x.shape[-1]
    vec = 16 // x.element_size()
    whole = n_cols % vec == 0 and all(s % vec == 0 for s in layout.strides[0][:-1])
    vec = vec if whole and aligned_alike([x, dy], layout, vec) else 1
    rows, cols = (64, 32) if _by_column(layout.strides[0]) else (LONG_ROWS, LONG_COLS)
    n_blocks = layout.n_outer * -(-layout.n_rows // rows)
    columns = -(-n_cols // cols)
    programs = min(n_blocks, -(-8 * _processors(x) // columns))
    x_strides, dy_strides, stats_strides = layout.strides
    return programs, Launch(
        norm_parameters_kernel, (columns, programs), layout.outer_shape, layout.n_rows, n_cols, n_blocks,
        stats.stride(0), x_strides, dy_strides, stats_strides, ROWS=rows, COLS=cols, VEC=vec, CENTRED=centred,
        DWEIGHT=dweight, DBIAS=dbias, ACC=_acc(x), num_warps=128 // warp_size(),
    )  # fmt: skip


def _norm_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, centred: bool
) -> Tensor:
    return torch.empty_like(x)


def _forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    h = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), h, _stats(x, centred)


def _backward_fake(
    dy: Tensor, dh: Tensor | None, x: Tensor, stats: Tensor, weight: Tensor | None, weight_offset: float,
    centred: bool, dweight: bool, dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x), stats.new_empty(dweight + dbias, x.shape[-1])


def _norm_cpu(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, centred: bool
) -> Tensor:
    plain = not weight_offset and x.is_contiguous() and x.numel() and (weight is None or weight.dtype == x.dtype)
    if plain and centred and (bias is None or bias.dtype == x.dtype):
        return torch.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # torch's rms_norm is six operators: of few numbers it saves their calls, of many it makes more passes over memory
    if plain and not centred and bias is None and x.numel() <= 4_096:
        return torch.rms_norm(x, x.shape[-1:], weight, eps)
    return _forward_cpu_of(x, weight, bias, eps, weight_offset, centred)[0]


def _forward_cpu(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    h = x if residual is None else torch.add(x, residual, out=torch.empty_like(x))
    y, rstd, mean = _forward_cpu_of(h, weight, bias, eps, weight_offset, centred)
    stats = _stats(x, centred)
    stats[0] = rstd.squeeze(-1)
    if centred:
        stats[1] = mean.squeeze(-1)
    return y, x.new_empty(0) if residual is None else h, stats


def _forward_cpu_of(
    h: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, weight_offset: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y in h's layout, and (..., 1) 1 / sqrt(var + eps) and the mean (without `centred` anything)."""
    compute, n_cols = _compute(h.dtype), h.shape[-1]
    if not h.numel():
        nothing = h.new_empty((*h.shape[:-1], 1), dtype=compute)
        return torch.empty_like(h), nothing, nothing
    z = h.to(compute)
    if weight is not None:
        weight = weight.to(compute)
        weight = weight + weight_offset if weight_offset else weight
    if centred:
        y, mean, rstd = torch.native_layer_norm(z, (n_cols,), weight, None if bias is None else bias.to(compute), eps)
        mean = mean.to(compute)
    else:
        # as torch's rms_norm does it, with one tensor less. A norm of vectors is faster, but adds up in sequence
        y = z.square()
        mean = rstd = y.mean(-1, keepdim=True).add_(eps).rsqrt_()
        torch.mul(z, rstd, out=y)
        if weight is not None:
            y.mul_(weight)
    if y.dtype != h.dtype or y.stride() != h.stride():
        y = torch.empty_like(h).copy_(y)
    return y, rstd, mean


def _backward_cpu(
    dy: Tensor, dh: Tensor | None, x: Tensor, stats: Tensor, weight: Tensor | None, weight_offset: float,
    centred: bool, dweight: bool, dbias: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    compute, n_cols = stats.dtype, x.shape[-1]
    z, g = x.to(compute), dy.to(compute)
    sums = stats.new_zeros(dweight + dbias, n_cols)
    if not x.numel():
        return torch.empty_like(x), sums
    rstd = stats[0].unsqueeze(-1)
    if centred and n_cols > 1:  # of one number, its own mean, torch's leaves a difference of rounding errors
        w = None if weight is None else weight.to(compute) + weight_offset
        b = z.new_zeros(n_cols) if dbias else None  # its values take no part, but without one there is no gradient
        d, *of_parameters = torch.ops.aten.native_layer_norm_backward(
            g, z, (n_cols,), stats[1].unsqueeze(-1), rstd, w, b, (True, dweight, dbias)
        )
        for into, parameter in zip(sums, [p for p in of_parameters if p is not None], strict=True):
            into.copy_(parameter)
        return torch.empty_like(x).copy_(d if dh is None else d + dh), sums
    if centred:
        z = z - stats[1].unsqueeze(-1)
    z = z * rstd
    if dweight:
        sums[0] = (g * z).flatten(0, -2).sum(0) if x.ndim > 1 else g * z
    if dbias:
        sums[-1] = g.flatten(0, -2).sum(0) if x.ndim > 1 else g
    if weight is not None:
        g = g * (weight.to(compute) + weight_offset)
    d = torch.addcmul(g, z, (g * z).mean(-1, keepdim=True), value=-1)
    if centred:
        d -= g.mean(-1, keepdim=True)
    d *= rstd
    if dh is not None:
        d += dh
    return torch.empty_like(x).copy_(d), sums


norm = define_op(
    "norm(Tensor x, Tensor? weight, Tensor? bias, float eps, float weight_offset, bool centred) -> Tensor",
    triton=_norm_triton,
    torch_cpu=_norm_cpu,
    fake=_norm_fake,
)
norm_forward = define_op(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float weight_offset,"
    " bool centred) -> (Tensor, Tensor, Tensor)",
    triton=_forward_triton,
    torch_cpu=_forward_cpu,
    fake=_forward_fake,
)
norm_backward = define_op(
    "norm_backward(Tensor dy, Tensor? dh, Tensor x, Tensor stats, Tensor? weight, float weight_offset, bool centred,"
    " bool dweight, bool dbias) -> (Tensor, Tensor)",
    triton=_backward_triton,
    torch_cpu=_backward_cpu,
    fake=_backward_fake,
)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, weight_offset, centred):
        ctx.set_materialize_grads(False)
        y, h, stats = norm_forward(x, residual, weight, bias, eps, weight_offset, centred)
        ctx.save_for_backward(x if residual is None else h, stats, weight)
        ctx.arguments = weight_offset, centred
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y if residual is None else (y, h)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dh=None):
        x, stats, weight = ctx.saved_tensors
        if dy is None:  # only h was used
            return dh, dh, None, None, None, None, None
        _, _, dweight, dbias = ctx.needs_input_grad[:4]
        dx, sums = norm_backward(dy, dh, x, stats, weight, *ctx.arguments, dweight, dbias)
        return (
            dx,
            dx if ctx.needs_input_grad[1] else None,
            sums[0].to(weight.dtype) if dweight else None,
            sums[-1].to(ctx.bias_dtype) if dbias else None,
            None,
            None,
            None,
        )


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = x / sqrt(mean(x^2) + eps) (weight + weight_offset) over the last dimension (arXiv 1910.07467).

    x: (..., n), any strides; float16, bfloat16, float32 or float64. weight: (n,), of any of these types.
    eps: at least 0. weight_offset: 1 for Gemma's norms, whose weights are kept as differences from 1.
    residual: like x. Then the result is (y, h): h = x + residual, rounded to x's dtype, takes the place of x in y.

    Computed in float32 (float64 for float64) and rounded to x's dtype once, at the end, as torch.nn.RMSNorm does.
    (Llama in transformers rounds x / sqrt(..) before it is multiplied by the weight: one rounding more.)
    Differentiable once with respect to x, residual and weight; gradients are the same bitwise in every run.
    Raises TypeError or ValueError for a bad dtype, shape, device or eps.
    """
    return _norm(x, weight, None, eps, residual, weight_offset, False)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (x - mean(x)) / sqrt(var(x) + eps) weight + bias over the last dimension (arXiv 1607.06450).

    var: the mean of (x - mean(x))^2. bias: (n,). Other arguments, the result with a residual, rounding, gradients and
    errors are those of `rms_norm`.
    """
    return _norm(x, weight, bias, eps, residual, 0.0, True)


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, weight_offset: float,
    centred: bool,
) -> Any:  # fmt: skip
    if x.dtype not in FLOATS or x.ndim == 0:
        _refuse(x)
    if weight is not None and (weight.shape != x.shape[-1:] or weight.dtype not in FLOATS or weight.device != x.device):
        _refuse_parameter("weight", weight, x)
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype not in FLOATS or bias.device != x.device):
        _refuse_parameter("bias", bias, x)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"residual must be {x.dtype} of shape {tuple(x.shape)} like x,"
            f" got {residual.dtype} of shape {tuple(residual.shape)}"
        )
    if residual is not None and residual.device != x.device:
        raise ValueError(f"residual must be on {x.device} like x, got {residual.device}")
    if differentiated(x, weight, bias, residual):
        return _Norm.apply(*distinct(x, residual, weight, bias), eps, weight_offset, centred)
    if residual is None:
        return norm(x, weight, bias, eps, weight_offset, centred)
    return norm_forward(x, residual, weight, bias, eps, weight_offset, centred)[:2]


def _refuse(x: Tensor) -> None:
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    raise ValueError("x must have at least one dimension, got a scalar")


def _refuse_parameter(name: str, parameter: Tensor, x: Tensor) -> None:
    if parameter.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {parameter.dtype}")
    if parameter.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x, got {parameter.device}")
    raise ValueError(
        f"{name} must have shape ({x.shape[-1]},) for x of shape {tuple(x.shape)}, got {tuple(parameter.shape)}"
    )
