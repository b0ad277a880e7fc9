"""x times a quantized weight transposed: schema, launcher, CPU implementation, autograd, public function."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmops.ops._register import define_op
from lmops.reference.quantization import dequantize, row_chunks

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Quantized(Protocol):
    """What the operators read of a `lmops.quantization.QuantizedTensor`, where the fields are explained."""

    @property
    def packed(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def zeros(self) -> Tensor | None: ...
    @property
    def offsets(self) -> Tensor | None: ...
    @property
    def permutation(self) -> Tensor | None: ...
    @property
    def format(self) -> str: ...
    @property
    def group_size(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...


def _chunks(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None, permutation: Tensor | None,
    format: str, group_size: int, n_in: int, dtype: torch.dtype,
) -> Any:  # fmt: skip
    """Slices of the weight's rows with these rows dequantized, a few MB at a time."""
    for rows in row_chunks(packed.shape[1], n_in):
        z, o = (None if t is None else t[:, rows] for t in (zeros, offsets))
        yield rows, dequantize(packed[:, rows], scales[:, rows], z, o, permutation, format, group_size, n_in, dtype)


def _forward_fake(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, bias: Tensor | None, format: str, group_size: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], packed.shape[1])


def _forward_cpu(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, bias: Tensor | None, format: str, group_size: int,
) -> Tensor:  # fmt: skip
    compute = torch.promote_types(x.dtype, torch.float32)
    rows_of_x = x.reshape(-1, x.shape[-1]).to(compute)
    y = torch.empty(len(rows_of_x), packed.shape[1], dtype=compute)
    for rows, w in _chunks(packed, scales, zeros, offsets, permutation, format, group_size, x.shape[-1], compute):
        y[:, rows] = rows_of_x @ w.T
    if bias is not None:
        y += bias
    return y.to(x.dtype).view(*x.shape[:-1], y.shape[1])


def _backward_fake(
    dy: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, format: str, group_size: int, n_in: int,
) -> Tensor:  # fmt: skip
    return dy.new_empty(*dy.shape[:-1], n_in)


def _backward_cpu(
    dy: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, format: str, group_size: int, n_in: int,
) -> Tensor:  # fmt: skip
    compute = torch.promote_types(dy.dtype, torch.float32)
    rows_of_dy = dy.reshape(-1, dy.shape[-1]).to(compute)
    dx = torch.zeros(len(rows_of_dy), n_in, dtype=compute)
    for rows, w in _chunks(packed, scales, zeros, offsets, permutation, format, group_size, n_in, compute):
        dx.addmm_(rows_of_dy[:, rows], w)
    return dx.to(dy.dtype).view(*dy.shape[:-1], n_in)


quantized_matmul_forward = define_op(
    "quantized_matmul_forward(Tensor x, Tensor packed, Tensor scales, Tensor? zeros, Tensor? offsets,"
    " Tensor? permutation, Tensor? bias, str format, int group_size) -> Tensor",
    triton=_forward_cpu,
    torch_cpu=_forward_cpu,
    fake=_forward_fake,
)
quantized_matmul_backward = define_op(
    "quantized_matmul_backward(Tensor dy, Tensor packed, Tensor scales, Tensor? zeros, Tensor? offsets,"
    " Tensor? permutation, str format, int group_size, int n_in) -> Tensor",
    triton=_backward_cpu,
    torch_cpu=_backward_cpu,
    fake=_backward_fake,
)


class _QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, scales, zeros, offsets, permutation, bias, format, group_size):
        weight = packed, scales, zeros, offsets, permutation
        ctx.save_for_backward(*weight)
        ctx.arguments = format, group_size, x.shape[-1]
        ctx.bias_dtype = None if bias is None else bias.dtype
        return quantized_matmul_forward(x, *weight, bias, format, group_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = quantized_matmul_backward(dy, *ctx.saved_tensors, *ctx.arguments) if ctx.needs_input_grad[0] else None
        db = dy.reshape(-1, dy.shape[-1]).sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[6] else None
        return dx, None, None, None, None, None, db, None, None


def quantized_matmul(x: Tensor, w: Quantized, bias: Tensor | None = None) -> Tensor:
    """x dequantize(w)^T + bias, without the dequantized weight in memory.

    x: (..., n_in) float16, bfloat16 or float32 (on a CPU also float64), any strides.
    w: a `lmops.quantization.QuantizedTensor` (n_out, n_in) on x's device.
    bias: (n_out,) floating point, or None.
    Returns (..., n_out) in x's dtype, added up in float32. On a GPU the weight is rounded to x's dtype before it is
    multiplied, as if it had been dequantized to it. Differentiable once with respect to x and bias; w is a constant.
    Raises TypeError or ValueError for another dtype, width, shape of bias, or device.
    """
    if not hasattr(w, "packed"):
        raise TypeError(f"w must be a lmops.quantization.QuantizedTensor, got {type(w).__name__}")
    if x.dtype not in FLOATS and (x.dtype != torch.float64 or x.device.type == "cuda"):
        raise TypeError(f"x must be float16, bfloat16 or float32 (on a CPU also float64), got {x.dtype}")
    n_out, n_in = w.shape
    if x.ndim == 0 or x.shape[-1] != n_in:
        raise ValueError(f"x must be (..., {n_in}) for a weight of shape {(n_out, n_in)}, got {tuple(x.shape)}")
    if bias is not None and (bias.shape != (n_out,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be ({n_out},) floating point, got {tuple(bias.shape)} {bias.dtype}")
    for what, t in (("w", w.packed), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{what} must be on {x.device} like x, got {t.device}")
    arguments = (x, w.packed, w.scales, w.zeros, w.offsets, w.permutation, bias, w.format, w.group_size)
    needs_grad = x.requires_grad or (bias is not None and bias.requires_grad)
    run = _QuantizedMatmul.apply if needs_grad and torch.is_grad_enabled() else quantized_matmul_forward
    return run(*arguments)
