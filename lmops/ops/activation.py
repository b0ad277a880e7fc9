"""Gated activations: schemas, launchers, CPU implementations, autograd, public functions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, differentiated, distinct
from lmops.ops._rows import Tile, geometry
from lmops.ops._strides import row_layout
from lmops.ops.softmax import FLOATS

# Elements that a program takes at a time, and its threads: 8 elements a thread, 16 bytes of types of 2 bytes.
ELEMENTS, THREADS = 1_024, 128


def gated_tile(n_cols: int, by_column: bool = False) -> Tile:
    """The tile for rows of n_cols columns. by_column: rows, not columns, are neighbours in memory."""
    width = 1 << max(0, n_cols - 1).bit_length()
    cols = max(16, min(width, ELEMENTS // 64 if by_column else ELEMENTS))
    return Tile(ELEMENTS // cols, cols, n_cols <= cols, THREADS)


@prepared
def _prepare(activation: str, *tensors: Tensor) -> Launch:
    """A launch over tensors of one shape, its leading arguments: 3 for the forward kernel, 5 for the backward's."""
    import triton.language as tl

    from lmops.kernels.activation import gated_backward_kernel, gated_forward_kernel

    kernel = gated_forward_kernel if len(tensors) == 3 else gated_backward_kernel
    if tensors[0].numel() < 1 << 30 and all(t.is_contiguous() for t in tensors):
        tensors = tuple(t.view(1, -1) for t in tensors)
    elif tensors[0].ndim == 1:
        tensors = tuple(t[None] for t in tensors)
    n_cols = tensors[0].shape[-1]
    layout = row_layout(tensors)
    strides = layout.strides[0]
    walk = geometry(tensors, layout, gated_tile(n_cols, by_column=strides[-2] == 1 and strides[-1] > 1))
    tile = walk.tile
    across = -(-(n_cols + (walk.vec - 1 if walk.edge else 0)) // tile.cols)
    return Launch(
        kernel, (walk.n_blocks * across,), layout.outer_shape, layout.n_rows, n_cols, *layout.strides,
        ROWS=tile.rows, COLS=tile.cols, VEC=walk.vec, EDGE=walk.edge, ACTIVATION=activation,
        ACC=tl.float64 if tensors[0].dtype == torch.float64 else tl.float32, num_warps=walk.num_warps,
    )  # fmt: skip


def _halves(x: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """gate and up; without `up`, x holds both side by side."""
    if up is not None:
        return x, up
    n = x.shape[-1] // 2
    return x.narrow(-1, 0, n), x.narrow(-1, n, n)


def _forward_triton(x: Tensor, up: Tensor | None, activation: str) -> Tensor:
    gate, up = _halves(x, up)
    y = torch.empty_like(gate)
    if y.numel():
        _prepare(activation, gate, up, y)(gate, up, y)
    return y


def _backward_triton(dy: Tensor, x: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    dx, dup = _backward_fake(dy, x, up, activation)
    if dy.numel():
        tensors = (*_halves(x, up), dy, *_halves(dx, None if up is None else dup))
        _prepare(activation, *tensors)(*tensors)
    return dx, dup


def _forward_fake(x: Tensor, up: Tensor | None, activation: str) -> Tensor:
    return torch.empty_like(_halves(x, up)[0])


def _backward_fake(dy: Tensor, x: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(0) if up is None else torch.empty_like(up)


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none")


def _forward_cpu(x: Tensor, up: Tensor | None, activation: str) -> Tensor:
    gate, up = _halves(x, up)
    y = _activate(gate, activation).mul_(up)
    out = torch.empty_like(gate)
    return y if y.stride() == out.stride() else out.copy_(y)


def _backward_cpu(dy: Tensor, x: Tensor, up: Tensor | None, activation: str) -> tuple[Tensor, Tensor]:
    dx, dup = _backward_fake(dy, x, up, activation)
    gate, up_half = _halves(x, up)
    to_gate, to_up = _halves(dx, None if up is None else dup)
    compute = torch.promote_types(x.dtype, torch.float32)
    gate, up_half, dy = gate.to(compute), up_half.to(compute), dy.to(compute)
    torch.mul(dy, _activate(gate, activation), out=to_up)
    # torch writes elsewhere what is not of the type computed in
    into = to_gate if x.dtype == compute else torch.empty_like(gate)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dy * up_half, gate, grad_input=into)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        torch.ops.aten.gelu_backward.grad_input(dy * up_half, gate, approximate=approximate, grad_input=into)
    if into is not to_gate:
        to_gate.copy_(into)
    return dx, dup


gated_forward = define_op(
    "gated_forward(Tensor x, Tensor? up, str activation) -> Tensor",
    triton=_forward_triton,
    torch_cpu=_forward_cpu,
    fake=_forward_fake,
)
gated_backward = define_op(
    "gated_backward(Tensor dy, Tensor x, Tensor? up, str activation) -> (Tensor, Tensor)",
    triton=_backward_triton,
    torch_cpu=_backward_cpu,
    fake=_backward_fake,
)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, up, activation):
        ctx.save_for_backward(x, up)
        ctx.activation = activation
        return gated_forward(x, up, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, up = ctx.saved_tensors
        dx, dup = gated_backward(dy, x, up, ctx.activation)
        return dx, None if up is None else dup, None


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up, with silu(x) = x sigmoid(x) (SwiGLU, arXiv 2002.05202).

    gate, up: of one shape and dtype, any strides; float16, bfloat16, float32 or float64. Without `up`, gate is
    (..., 2 n) and holds both side by side, the gate first; the result is (..., n), and the gradient one tensor.

    Computed in float32 (float64 for float64) and rounded once (by torch on the CPU, after each of the two steps).
    Differentiable once; gate and up are all that is kept for the backward.
    Raises TypeError or ValueError for a bad dtype, shape or device.
    """
    return _gated(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor | None = None, *, approximate: str = "tanh") -> Tensor:
    """gelu(gate) * up (GeGLU, arXiv 2002.05202); arguments, the packed form and errors as of `swiglu`.

    approximate: "tanh", x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, as in Gemma; "none", x Phi(x), exact.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f'approximate must be "tanh" or "none", got {approximate!r}')
    return _gated(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def _gated(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    if gate.dtype not in FLOATS:
        raise TypeError(f"gate must be float16, bfloat16, float32 or float64, got {gate.dtype}")
    if up is None:
        if gate.ndim == 0 or gate.shape[-1] % 2:
            raise ValueError(f"gate without up must have shape (..., 2 n), got {tuple(gate.shape)}")
    elif up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"up must be {gate.dtype} of shape {tuple(gate.shape)} like gate, got {up.dtype} of shape {tuple(up.shape)}"
        )
    elif up.device != gate.device:
        raise ValueError(f"up must be on {gate.device} like gate, got {up.device}")
    if differentiated(gate, up):
        return _Gated.apply(*distinct(gate, up), activation)
    return gated_forward(gate, up, activation)
