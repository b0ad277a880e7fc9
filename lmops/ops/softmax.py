"""softmax and log_softmax with a temperature: schema, launcher, CPU implementation, autograd, public functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, differentiated
from lmops.ops._rows import NO_FUSION, geometry, softmax_tile
from lmops.ops._strides import row_layout

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NEG_INF = float("-inf")


@prepared
def _prepare(n_full: int, greedy: bool, log: bool, causal: bool, *tensors: Tensor) -> Launch:
    """A launch over n_full tensors (..., n_cols), of which the last is written, and temperatures and more (...).

    Its leading arguments are those that the kernel begins with: the forward kernel's for 2, the backward's for 3.
    """
    import triton.language as tl

    from lmops.kernels.softmax import softmax_backward_kernel, softmax_forward_kernel

    full, per_row = tensors[:n_full], tensors[n_full:]
    n_cols = full[0].shape[-1]
    layout = row_layout(full, per_row, keep_last=causal)
    strides = layout.strides[0]
    # a value a tensor that is read, and one for the first maximum's search or the temperature's gradient; float64
    # takes pairs, and as much again to compute with
    registers = sum(4 if t.element_size() == 8 else 1 for t in full[:-1]) + (bool(per_row) or greedy)
    tile = softmax_tile(n_cols, layout.n_rows, registers, by_column=strides[-2] == 1 and strides[-1] > 1)

    walk = geometry(full, layout, tile)
    # without temperatures a row the kernels still take their strides, and look at none of them
    row_strides = layout.strides[n_full:] or ((0,),) * (n_full - 1)
    flags = {"GREEDY": greedy} if n_full == 2 else NO_FUSION
    return Launch(
        softmax_forward_kernel if n_full == 2 else softmax_backward_kernel, walk.grid,
        layout.outer_shape, layout.n_rows, n_cols, *layout.strides[:n_full], *row_strides,
        **walk.flags, PER_ROW=bool(per_row), ACC=tl.float64 if full[0].dtype == torch.float64 else tl.float32,
        CAUSAL=causal, LOG=log, **flags,
    )  # fmt: skip


def _forward_triton(
    x: Tensor, temperatures: Tensor | None, temperature: float, log: bool, causal: bool, dtype: torch.dtype
) -> Tensor:
    y = torch.empty_like(x, dtype=dtype)
    if temperatures is not None and x.numel():
        _prepare(2, True, log, causal, x, y, temperatures)(x, y, temperatures)
    elif x.numel():
        _prepare(2, temperature == 0, log, causal, x, y)(x, y, temperature)
    return y


def _backward_triton(
    dy: Tensor, y: Tensor, temperatures: Tensor | None, temperature: float, log: bool, causal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dx, dt = _backward_fake(dy, y, temperatures, temperature, log, causal, dtype)
    if temperatures is not None and y.numel():
        _prepare(3, True, log, causal, y, dy, dx, temperatures, dt)(y, dy, dx, temperatures, dt)
    elif y.numel():
        _prepare(3, temperature == 0, log, causal, y, dy, dx)(y, dy, dx, temperature, None)
    return dx, dt


def _forward_fake(
    x: Tensor, temperatures: Tensor | None, temperature: float, log: bool, causal: bool, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _backward_fake(
    dy: Tensor, y: Tensor, temperatures: Tensor | None, temperature: float, log: bool, causal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    dt = y.new_empty(0) if temperatures is None else y.new_empty(temperatures.shape, dtype=temperatures.dtype)
    return torch.empty_like(y, dtype=dtype), dt


def _forward_cpu(
    x: Tensor, temperatures: Tensor | None, temperature: float, log: bool, causal: bool, dtype: torch.dtype
) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x, dtype=dtype)
    as_it_is = temperatures is None and temperature == 1 and not causal and x.dtype == dtype
    z = x if as_it_is else x.to(torch.promote_types(x.dtype, torch.float32))
    if causal:
        n_rows, n_cols = z.shape[-2:]
        z = z.masked_fill(torch.ones(n_rows, n_cols, dtype=torch.bool).triu(1 + n_cols - n_rows), NEG_INF)
    if temperatures is None and temperature == 0:
        return _like(_one_hot(z, log), x, dtype)
    t = temperature if temperatures is None else _check_values(temperatures).to(z.dtype).unsqueeze(-1)
    y = (torch.log_softmax if log else torch.softmax)(z if as_it_is else z / t, -1)
    # an overflow, a row of -inf, a temperature of 0 and a NaN show in all entries of their row
    if y[..., 0].isnan().any():
        y = _careful(z, t, log)
    return _like(y, x, dtype)


def _like(y: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """y in `dtype` and in the layout that the operators promise for their results: x's."""
    out = torch.empty_like(x, dtype=dtype)
    return y if y.dtype == dtype and y.stride() == out.stride() else out.copy_(y)


def _careful(z: Tensor, temperature: Tensor | float, log: bool) -> Tensor:
    """Softmax of z / temperature with all its special cases."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    t = torch.as_tensor(temperature, dtype=z.dtype)
    peak = z.amax(-1, keepdim=True)
    # the maximum goes first, so that no score overflows in the division
    z_from_peak = (z - peak.masked_fill(peak == NEG_INF, 0)) / t.masked_fill(t == 0, 1)
    y = torch.log_softmax(z_from_peak, -1) if log else torch.softmax(z_from_peak, -1)
    y = torch.where(t == 0, _one_hot(z, log), y)
    return y.masked_fill_(peak == NEG_INF, NEG_INF if log else 0.0)


def _one_hot(z: Tensor, log: bool) -> Tensor:
    peak, first = z.max(-1, keepdim=True)
    y = torch.zeros_like(z).scatter_(-1, first, (peak > NEG_INF).to(z.dtype)).masked_fill_(peak.isnan(), float("nan"))
    return y.log_() if log else y


def _backward_cpu(
    dy: Tensor, y: Tensor, temperatures: Tensor | None, temperature: float, log: bool, causal: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if y.numel() == 0:
        return _backward_fake(dy, y, temperatures, temperature, log, causal, dtype)
    backward = torch._log_softmax_backward_data if log else torch._softmax_backward_data
    g = backward(dy, y, -1, y.dtype)
    if (log and y.amin() == NEG_INF) or g[..., 0].isnan().any():  # what is masked takes no part, whatever its dy is
        g = backward(dy.masked_fill(y == (NEG_INF if log else 0.0), 0), y, -1, y.dtype)
    if temperatures is None:
        if temperature != 1:
            g = g.div_(temperature) if temperature else g.zero_()
        return _like(g, y, dtype), y.new_empty(0)
    compute = torch.promote_types(y.dtype, torch.float32)
    t = temperatures.to(compute).unsqueeze(-1)
    g = (g.to(compute) / t).masked_fill_(t == 0, 0)
    log_p = y.to(compute) if log else y.to(compute).log()
    dt = (g * log_p.masked_fill(log_p == NEG_INF, 0)).sum(-1).neg_()
    return _like(g, y, dtype), dt.to(temperatures.dtype)


def _check_values(temperatures: Tensor) -> Tensor:
    good = temperatures.isfinite() & (temperatures >= 0)
    if not good.all():
        raise ValueError(
            f"temperature must be finite and at least 0, got {temperatures[~good][0].item()} in its tensor"
        )
    return temperatures


softmax_forward = define_op(
    "softmax_forward(Tensor x, Tensor? temperatures, float temperature, bool log, bool causal, ScalarType dtype)"
    " -> Tensor",
    triton=_forward_triton,
    torch_cpu=_forward_cpu,
    fake=_forward_fake,
)
softmax_backward = define_op(
    "softmax_backward(Tensor dy, Tensor y, Tensor? temperatures, float temperature, bool log, bool causal,"
    " ScalarType dtype) -> (Tensor, Tensor)",
    triton=_backward_triton,
    torch_cpu=_backward_cpu,
    fake=_backward_fake,
)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, temperatures, temperature, log, causal, dtype):
        y = softmax_forward(x, temperatures, temperature, log, causal, dtype)
        ctx.save_for_backward(y, temperatures)
        ctx.arguments = temperature, log, causal, x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, temperatures = ctx.saved_tensors
        dx, dt = softmax_backward(dy, y, temperatures, *ctx.arguments)
        return dx, None if temperatures is None else dt, None, None, None, None


def softmax(
    x: Tensor,
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    *,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """softmax(x / temperature) over one dimension.

    x: any shape and strides; float16, bfloat16, float32 or float64. Accumulated in float32 (float64: in float64).
    temperature: a number, or a floating-point tensor with one value a row: of the shape of x without dim, or with 1 in
        its place, or any that broadcasts to it. It must be finite and at least 0. At 0 the result is the one-hot of the
        row's first maximum. A tensor's values are checked on the CPU; on a GPU that would stall the stream, so there a
        row with a bad temperature is NaN throughout.
    causal: x is (..., n_rows, n_cols), dim its last: row i sees the columns 0 .. i + n_cols - n_rows, so the last row
        sees all. Hidden entries are 0 and not read.
    dtype: of the result, x's by default.

    Entries of -inf get 0 and no gradient, and a row of nothing but -inf is 0 throughout. Differentiable once, with
    respect to x and to a tensor temperature; the layout in memory is that of x.
    Raises ValueError or TypeError for a bad temperature, dim, dtype or shape.
    """
    return _softmax(x, temperature, dim, causal, dtype, log=False)


def log_softmax(
    x: Tensor,
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    *,
    causal: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Natural logarithm of `softmax(x, temperature, dim)`, without forming it; arguments and errors as there.

    Entries of -inf and hidden ones are -inf, as is a row of nothing else; their gradients are 0. At temperature 0 the
    first maximum of a row gives 0, the rest -inf.
    """
    return _softmax(x, temperature, dim, causal, dtype, log=True)


def _softmax(
    x: Tensor, temperature: float | Tensor, dim: int, causal: bool, dtype: torch.dtype | None, log: bool
) -> Tensor:
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    ndim = max(x.ndim, 1)
    if not -ndim <= dim < ndim:
        raise ValueError(f"dim must be from {-ndim} to {ndim - 1} for x of shape {tuple(x.shape)}, got {dim}")
    last = dim in (-1, ndim - 1)
    if causal and (x.ndim < 2 or not last):
        raise ValueError(f"causal needs x of shape (..., rows, columns) and dim -1, got {tuple(x.shape)} and dim {dim}")
    scalar = x.ndim == 0
    rows_last = x.unsqueeze(0) if scalar else x if last else x.movedim(dim, -1)
    if isinstance(temperature, Tensor):
        temperatures, number = _per_row(temperature, rows_last, dim % ndim), 1.0
    else:
        temperatures, number = None, float(temperature)
        if not (0 <= number < math.inf):
            raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    run = _Softmax.apply if differentiated(x, temperatures) else softmax_forward
    y = run(rows_last, temperatures, number, log, causal, dtype or x.dtype)
    return y.squeeze(0) if scalar else y if last else y.movedim(-1, dim)


def _per_row(temperature: Tensor, x: Tensor, dim: int) -> Tensor:
    """The temperature expanded to x's shape without its last dimension, which was `dim` in the caller's tensor."""
    if not temperature.is_floating_point():
        raise TypeError(f"temperature must be a float or a floating-point tensor, got {temperature.dtype}")
    if temperature.device != x.device and temperature.ndim > 0:
        raise ValueError(f"temperature must be on {x.device} like x, got {temperature.device}")
    rows = x.shape[:-1]
    t = temperature.to(x.device)
    try:
        return (t.squeeze(dim) if t.ndim == x.ndim and t.shape[dim] == 1 else t).expand(rows)
    except RuntimeError:
        raise ValueError(
            f"temperature must have one value a row, a shape that broadcasts to {tuple(rows)}, got {tuple(t.shape)}"
        ) from None
