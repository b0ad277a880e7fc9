"""Weights as other programs store them, as `QuantizedTensor`: GPTQ, AWQ, compressed-tensors, GGUF's blocks.

The numbers stay what they are: codes are taken out of their words and packed again, a few rows at a time, and the
weight itself is never computed. Sources: AutoGPTQ's and GPTQModel's `QuantLinear.pack`, AutoAWQ's `WQLinear_GEMM`,
compressed-tensors' `pack_to_int32`, ggml's `block_q8_0`, `block_q4_0` and `block_q4_1`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lmops.quantization.tensor import QuantizedTensor

GGUF_BLOCKS = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}  # bytes of a block of 32 weights
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble, counted from the lowest, that holds each of 8 outputs


def from_gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None,
    *, bits: int, group_size: int, version: int, symmetric: bool, name: str,
) -> QuantizedTensor:  # fmt: skip
    """w = scale (code - zero), several codes an int32 word, the first in its lowest bits.

    qweight: (n_in * bits / 32, n_out), words along the inputs. qzeros: (groups, n_out * bits / 32), along the outputs.
    scales: (groups, n_out). g_idx: (n_in,), the group of each input, or None for neighbours.
    version: 1 stores zero - 1, 2 stores zero. symmetric: every zero must be 2^(bits - 1), and is not kept.
    Raises ValueError where these don't fit each other.
    """
    n_out, n_in = qweight.shape[1], qweight.shape[0] * 32 // bits
    zeros = _fields(qzeros, bits).flatten(1).T.to(torch.int16) + (1 if version == 1 else 0)
    if symmetric and bool((zeros != 1 << (bits - 1)).any()):
        wrong = int(zeros[zeros != 1 << (bits - 1)][0])
        raise ValueError(
            f"qzeros of {name} hold a zero point of {wrong}, but a symmetric weight has {1 << (bits - 1)} (stored "
            f"{'less one' if version == 1 else 'as it is'} by this version of the format)"
        )

    def codes(rows: slice) -> Tensor:
        return _fields(qweight[:, rows].T, bits).flatten(1)

    return _in_chunks(codes, (n_out, n_in), scales.T, None if symmetric else zeros, bits, group_size, g_idx, name)


def from_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group_size: int, name: str) -> QuantizedTensor:
    """AWQ's GEMM layout, 4 bits: w = scale (code - zero), eight outputs a word in the order 0 2 4 6 1 3 5 7.

    qweight: (n_in, n_out / 8). qzeros: (groups, n_out / 8). scales: (groups, n_out).
    """
    order = list(_AWQ_ORDER)

    def codes(rows: slice) -> Tensor:
        words = qweight[:, rows.start // 8 : -(-rows.stop // 8)]
        return _fields(words, 4)[..., order].flatten(1).T[rows.start % 8 :][: rows.stop - rows.start]

    shape = (qweight.shape[1] * 8, qweight.shape[0])
    zeros = _fields(qzeros, 4)[..., order].flatten(1).T
    return _in_chunks(codes, shape, scales.T, zeros, 4, group_size, None, name)


def from_compressed_tensors(
    weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, weight_g_idx: Tensor | None,
    *, shape: tuple[int, int], bits: int, group_size: int, symmetric: bool, name: str,
) -> QuantizedTensor:  # fmt: skip
    """compressed-tensors' "pack-quantized": w = scale (q - zero), signed, stored with 2^(bits - 1) added.

    weight_packed: (n_out, n_in * bits / 32 rounded up), words along the inputs. weight_scale: (n_out, groups), (n_out,)
    or one number. weight_zero_point: (n_out, groups) int8, or (n_out * bits / 32 rounded up, groups) int32, words along
    the outputs; None where it is 0. shape: (n_out, n_in). symmetric: every zero must be 0, and is not kept.
    Raises ValueError where these don't fit each other.
    """
    n_out, n_in = shape
    scales = weight_scale if weight_scale.ndim == 2 else weight_scale.reshape(-1, 1)
    scales = scales.expand(n_out, -1)
    zeros = None
    if weight_zero_point is not None:
        if weight_zero_point.dtype == torch.int32:
            zeros = _fields(weight_zero_point.T, bits).flatten(1)[:, :n_out].T
        else:
            zeros = weight_zero_point.to(torch.int16) + (1 << (bits - 1))
        if symmetric:
            if bool((zeros != 1 << (bits - 1)).any()):
                raise ValueError(f"weight_zero_point of {name} is not 0, which a symmetric weight has")
            zeros = None

    def codes(rows: slice) -> Tensor:
        return _fields(weight_packed[rows], bits).flatten(1)[:, :n_in]

    return _in_chunks(codes, shape, scales, zeros, bits, group_size, weight_g_idx, name)


def from_gguf(raw: Tensor, kind: str, shape: tuple[int, int], name: str) -> QuantizedTensor:
    """Blocks of 32 weights of a row, raw bytes: float16 d (and m), then the codes.

    Q8_0: w = d q, 32 int8. Q4_0: w = d (q - 8), and Q4_1: w = d q + m, 16 bytes whose low nibbles are the codes of the
    first 16 weights and whose high nibbles those of the others.
    """
    blocks = raw.view(*shape[:-1], shape[-1] // 32, GGUF_BLOCKS[kind])
    head = 4 if kind == "Q4_1" else 2
    numbers = blocks[..., :head].contiguous().view(torch.float16)  # (n_out, groups, 1 or 2)
    offsets = numbers[..., 1] if kind == "Q4_1" else None

    def codes(rows: slice) -> Tensor:
        bytes_ = blocks[rows, :, head:]
        if kind == "Q8_0":
            return bytes_.contiguous().view(torch.int8).flatten(1)
        return torch.cat((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1)

    bits = 8 if kind == "Q8_0" else 4
    return _in_chunks(codes, shape, numbers[..., 0], None, bits, 32, None, name, offsets, signed=True)


def _fields(words: Tensor, bits: int) -> Tensor:
    """The 32 / bits codes of each int32 word, lowest first, in a new last dimension."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8)


def _in_chunks(
    codes: Callable[[slice], Tensor], shape: tuple[int, int], scales: Tensor, zeros: Tensor | None, bits: int,
    group_size: int, group_index: Tensor | None, name: str, offsets: Tensor | None = None, signed: bool = False,
) -> QuantizedTensor:  # fmt: skip
    """Pack codes (n_out, n_in), which `codes` gives for some rows, without ever having all of them unpacked.

    Codes and zeros of 8 bits are unsigned here but where `signed`; a `QuantizedTensor` has both 128 lower.
    """
    n_out, n_in = shape
    shift = 128 if bits == 8 and not signed else 0
    step = max(1, (1 << 19) // max(1, n_in))
    parts = []
    for start in range(0, max(1, n_out), step):
        rows = slice(start, min(start + step, n_out))
        u = codes(rows)
        z = None if zeros is None else zeros[rows].to(torch.int16) - shift
        part = QuantizedTensor.from_codes(
            u.to(torch.int16) - shift if shift else u, scales[rows], z, None if offsets is None else offsets[rows],
            bits=bits, group_size=group_size, group_index=group_index, name=name,
        )  # fmt: skip
        parts.append(part)
    joined = join_rows(parts)
    assert joined is not None
    return joined


def join_rows(weights: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """One weight with the rows of all, which have as many columns; None where their formats differ.

    Formats differ in bits, groups, scale type, zero points or offsets, and act-order: one permutation serves all rows.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    for other in weights[1:]:
        same = (first.format, first.group_size, first.scales.dtype) == (
            other.format, other.group_size, other.scales.dtype,
        )  # fmt: skip
        if not same or first.parts().keys() != other.parts().keys():
            return None
        if first.permutation is not None and not torch.equal(first.permutation, other.permutation):  # type: ignore[arg-type]
            return None
    parts = _by_rows(first, lambda name: torch.cat([getattr(w, name) for w in weights], dim=1))
    return replace(first, **parts, shape=(sum(w.shape[0] for w in weights), first.shape[1]))


def reorder_rows(weight: QuantizedTensor, order: Tensor) -> QuantizedTensor:
    """The weight with row order[i] as its row i."""
    return replace(weight, **_by_rows(weight, lambda name: getattr(weight, name)[:, order]))


def _by_rows(weight: QuantizedTensor, change: Callable[[str], Tensor]) -> dict[str, Any]:
    """Those tensors of a weight that have its rows, their second dimension, changed."""
    return {name: change(name) for name in weight.parts() if name != "permutation"}
