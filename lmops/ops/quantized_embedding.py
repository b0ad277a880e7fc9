"""Rows of a quantized table: schema, launcher, CPU implementation, public function."""

from __future__ import annotations

import torch
from torch import Tensor

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op
from lmops.ops.quantized_matmul import FLOATS, Quantized
from lmops.reference.quantization import dequantize, unit_columns

INTS = (torch.int32, torch.int64)


def _fake(
    tokens: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, format: str, group_size: int, n_in: int, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    shape = (*tokens.shape, n_in)
    return scales.new_empty(shape) if dtype is None else scales.new_empty(shape, dtype=dtype)


@prepared
def _prepare(
    tokens: Tensor, packed: Tensor, scales: Tensor, shift: Tensor | None, kind: str, format: str, group_size: int,
    n_in: int, dtype: torch.dtype | None,
) -> Launch:  # fmt: skip
    """A launch whose leading arguments are tokens, the table's tensors, and the rows."""
    from lmops.kernels.quantized_matmul import quantized_rows_kernel

    units = 16
    return Launch(
        quantized_rows_kernel, (tokens.numel(), -(-packed.shape[0] // units)), packed.shape[1], n_in,
        UNITS=units, PARTS=unit_columns(format) // 32, GROUP=max(0, group_size), FORMAT=format,
        SHIFT=kind, num_warps=4,
    )  # fmt: skip


def _triton(
    tokens: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, format: str, group_size: int, n_in: int, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    y = _fake(tokens, packed, scales, zeros, offsets, permutation, format, group_size, n_in, dtype)
    if y.numel() == 0:
        return y
    tokens = tokens if tokens.is_contiguous() else tokens.contiguous()
    shift = zeros if offsets is None else offsets
    kind = "zeros" if zeros is not None else "offsets" if offsets is not None else ""
    _prepare(tokens, packed, scales, shift, kind, format, group_size, n_in, dtype)(tokens, packed, scales, shift, y)
    return y if permutation is None else torch.empty_like(y).index_copy_(-1, permutation.long(), y)


def _cpu(
    tokens: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None, offsets: Tensor | None,
    permutation: Tensor | None, format: str, group_size: int, n_in: int, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    flat, n_out = tokens.reshape(-1), packed.shape[1]
    if flat.numel() and not 0 <= flat.min() <= flat.max() < n_out:
        raise ValueError(f"tokens must be 0 to {n_out - 1}, got {int(flat.min())} to {int(flat.max())}")
    some = [None if t is None else t.index_select(1, flat) for t in (packed, scales, zeros, offsets)]
    assert some[0] is not None
    assert some[1] is not None
    w = dequantize(some[0], some[1], some[2], some[3], permutation, format, group_size, n_in, dtype or scales.dtype)
    return w.view(*tokens.shape, n_in)


quantized_embedding_forward = define_op(
    "quantized_embedding_forward(Tensor tokens, Tensor packed, Tensor scales, Tensor? zeros, Tensor? offsets,"
    " Tensor? permutation, str format, int group_size, int n_in, ScalarType? dtype=None) -> Tensor",
    triton=_triton,
    torch_cpu=_cpu,
    fake=_fake,
)


def quantized_embedding(tokens: Tensor, w: Quantized, dtype: torch.dtype | None = None) -> Tensor:
    """Rows of an int4, int8 or fp8 table, dequantized: F.embedding(tokens, dequantize(w)), without that in memory.

    tokens: any shape, int32 or int64. w: a `lmops.quantization.QuantizedTensor` (vocabulary, width) on tokens' device.
    dtype: of the result, float16, bfloat16 or float32; by default that of w's scales.
    Returns (*tokens.shape, width), computed in float32 and rounded once; it has no gradient. A token outside of the
    table raises ValueError on a CPU and gives NaN on a GPU, where looking would stall the stream.
    Raises TypeError for other types, ValueError for another device.
    """
    if not hasattr(w, "packed"):
        raise TypeError(f"w must be a lmops.quantization.QuantizedTensor, got {type(w).__name__}")
    if tokens.dtype not in INTS:
        raise TypeError(f"tokens must be int32 or int64, got {tokens.dtype}")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    packed, scales = w.packed, w.scales
    if tokens.device != packed.device:
        raise ValueError(f"w must be on {tokens.device} like tokens, got {packed.device}")
    arguments = tokens, packed, scales, w.zeros, w.offsets, w.permutation, w.format, w.group_size, w.shape[1]
    # to name a type takes the host a tenth of the call
    if dtype is None or dtype == scales.dtype:
        return quantized_embedding_forward(*arguments)
    return quantized_embedding_forward(*arguments, dtype)
