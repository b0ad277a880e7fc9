"""A quantized weight as torch's own packed kernels take it on a CPU: what a layer keeps, made once, not in a call.

    one row of x    an embedding bag (fbgemm) whose table is the transposed weight, codes as they are: a bag is a group,
                    its rows the group's columns, their weights x. It reads 4 or 8 bits a weight and adds in float32;
                    scales and offsets follow on its (groups, n_out) sums:
                        y_n = sum_g s_gn (sum_{k in g} x_k (u_kn - c)) + sum_g o_gn (sum_{k in g} x_k)
    more rows       fbgemm's product of float32 x with a float16 weight, added in float32.

The first has the rounding errors of a float32 product. The second also rounds the weight to float16: 2^-12 relative,
3e-8 absolute under 6e-5; a weight that is larger or smaller than float16 as a whole is held as a multiple. torch's
other packed products (int4pack, int8pack) compute in bfloat16 and move the logits of a 30-layer model by 1 to 2 %,
twenty times as much; docs/results/cpu-smollm2.md has the figures.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lmops.ops._register import OPERATORS, differentiated
from lmops.ops.quantized_matmul import FLOATS, Quantized, _chunks
from lmops.reference.quantization import unpack

_BAG = {"int4": "embedding_bag_4bit_rowwise_offsets", "int8": "embedding_bag_byte_rowwise_offsets"}
_BAG_COLUMNS = 64
_SUMS = 1 << 17  # what is written before scales are applied, in numbers: half of a usual second-level cache
_HALF_RANGE = 2.0**-8, torch.finfo(torch.float16).max  # of the largest magnitude of a weight held as it is
_native = (
    "fbgemm" in torch.backends.quantized.supported_engines
    and not OPERATORS["quantized_matmul_forward"].cpu_uses_triton
)  # fmt: skip


def cpu_weight_helps(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether `CPUWeight` can take the place of `quantized_matmul(x, w, bias)`, of which `w` is the packed tensor.

    It can't where a gradient is wanted, where torch.compile looks on, for float64, and where tensors on the CPU are
    the Triton kernel's.
    """
    if not (_native and x.is_cpu and w.is_cpu) or torch.compiler.is_compiling() or x.numel() == 0:
        return False
    return x.dtype in FLOATS and not differentiated(x, bias)


class CPUWeight:
    """One weight in both forms; each is made when the first x with so many rows comes.

    With groups of 32 the first takes 6 bits a weight of 4 bits and 9 to 10 of 8 bits, the second 16. w is read when a
    form is made, never changed and not kept by them, so a changed w needs a new `CPUWeight`.
    """

    def __init__(self, w: Quantized) -> None:
        self.w = w
        self.shape = w.shape
        self._bags: _Bags | None = None
        self._half: torch.ScriptObject | None = None
        self._factor = 1.0  # the weight is this times the one in float16

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`quantized_matmul(x, w, bias)` without gradients, computed in float32 for any dtype of x."""
        n_out, n_in = self.shape
        if x.ndim == 0 or x.shape[-1] != n_in:
            raise ValueError(f"x must be (..., {n_in}) for a weight of shape {(n_out, n_in)}, got {tuple(x.shape)}")
        rows = x if x.dtype == torch.float32 else x.float()
        if x.numel() == n_in and (self._bags is not None or self.w.format in _BAG):
            if self._bags is None:
                self._bags = _Bags(self.w)
            y = self._bags(rows.reshape(n_in).contiguous()).view(*x.shape[:-1], n_out)
        else:
            if self._half is None:
                self._half, self._factor = _half(self.w)
            y = torch.ops.quantized.linear_dynamic_fp16.default(rows, self._half)
            if self._factor != 1:
                y *= self._factor
        if bias is not None:
            y += bias
        return y if x.dtype == torch.float32 else y.to(x.dtype)


def _half(w: Quantized) -> tuple[torch.ScriptObject, float]:
    """The weight over a power of 2 as fbgemm wants it in float16, and that power: 1 for weights of usual magnitudes."""
    n_out, n_in = w.shape
    weight = torch.empty(n_out, n_in)
    parts = (w.packed, w.scales, w.zeros, w.offsets, w.permutation, w.format, w.group_size, n_in, torch.float32)
    for rows, chunk in _chunks(*parts):
        weight[rows] = chunk
    low, high = (float(v) for v in weight.aminmax())
    largest, factor = max(-low, high), 1.0
    if largest and not _HALF_RANGE[0] <= largest <= _HALF_RANGE[1]:
        factor = 2.0 ** min(max(math.frexp(largest)[1], -126), 127)
        weight /= factor
    return torch.ops.quantized.linear_prepack_fp16(weight, None), factor


class _Bags:
    """The form for one row of x."""

    def __init__(self, w: Quantized) -> None:
        n_out, n_in = w.shape
        size = n_in if w.group_size == -1 else w.group_size
        self.run = getattr(torch.ops.quantized, _BAG[w.format]).default
        self.permutation = None if w.permutation is None else w.permutation.long()
        self.columns = torch.arange(n_in, dtype=torch.int32)
        # a long group is several bags: a bag's sum is one chain of additions, whose errors grow with its length
        starts = [k for group in range(0, n_in, size) for k in range(group, min(group + size, n_in), _BAG_COLUMNS)]
        self.bounds = torch.tensor(starts, dtype=torch.int32)
        scales = w.scales.float()
        offsets = w.offsets if w.zeros is None else -scales * w.zeros
        self.offsets = None if offsets is None else offsets.float().T
        self.group_size, self.ragged = size, n_in % size
        scales = scales if len(starts) == len(scales) else scales[self.bounds // size]
        center = 8 if w.format == "int4" and offsets is None else 0
        width = max(64, _SUMS // max(1, len(starts)) // 64 * 64)
        slices = [slice(first, min(first + width, n_out)) for first in range(0, max(1, n_out), width)]
        self.parts = [(_table(w, center, rows), scales[:, rows].contiguous()) for rows in slices]

    def __call__(self, x: Tensor) -> Tensor:
        if self.permutation is not None:
            x = x[self.permutation]
        ys = []
        for table, scales in self.parts:
            sums = self.run(table, self.columns, self.bounds, False, 0, False, x, None, False)
            if sums.shape[1] != scales.shape[1]:
                sums = sums[:, : scales.shape[1]]  # 4 bits are stored in pairs
            ys.append(sums.mul_(scales).sum(0))
        y = ys[0] if len(ys) == 1 else torch.cat(ys)
        if self.offsets is None:
            return y
        if self.ragged:
            x = torch.nn.functional.pad(x, (0, self.group_size - self.ragged))
        return torch.addmv(y, self.offsets, x.view(-1, self.group_size).sum(1))


def _table(w: Quantized, center: int, rows: slice) -> Tensor:
    """The codes of these rows of w, transposed: a quantized embedding table with scale 1 and bias -center in each row.

    4 bits: two codes a byte, then scale and bias as float16. 8 bits: a code a byte, unsigned, then both as float32.
    """
    n_out, n_in, packed = rows.stop - rows.start, w.shape[1], w.packed[:, rows]
    four = w.format == "int4"
    bias = -center if four else -center - 128
    tail = torch.tensor([1, bias], dtype=torch.float16 if four else torch.float32).view(torch.uint8)
    width = -(-n_out // 2) if four else n_out
    table = torch.empty(n_in, width + len(tail), dtype=torch.uint8)
    table[:, width:] = tail
    step = 2 * max(1, (1 << 19) // n_in)  # rows of the weight at a time, an even number of them
    for start in range(0, n_out, step):
        codes = unpack(packed[:, start : start + step], w.format, n_in)
        if four:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, len(codes) % 2))
            codes = codes[::2] | codes[1::2] << 4
            start //= 2
        else:
            codes = codes.view(torch.uint8) ^ 128
        table[:, start : start + len(codes)] = codes.T
    return table
