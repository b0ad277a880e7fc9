"""Pages of keys and values in plain torch: rows of 8 and 4 bits, rotated keys, and where a token's row goes.

A page is a block of `block_size` slots; slot s is (s // block_size, s % block_size) of tensors (n_blocks, block_size,
kv_heads, D). A row is what a token has for a head. Quantized pages have a scale a row:

    int8    x = scale q               scale = max |x| / 127, q = x / scale rounded half to even, -127 .. 127
    fp8     x = scale q               scale = max |x| / 448, q = x / scale rounded half to even to e4m3, -448 .. 448
    int4    x = scale q + minimum     scale = (max x - min x) / 15, q = (x - minimum) / scale rounded, 0 .. 15;
                                      byte i of a row has element 2 i in its low bits and 2 i + 1 in its high ones

Scales and minima are rounded to their type before codes are formed, so codes make up for that. A scale of 0 divides as
1 does: a row of zeros is read as zeros. Scales and minima that float16 cannot hold are cut to +-65,504, so that nothing
becomes infinite: elements beyond 127 x 65,504 (fp8: 448 x) are read as that. A row with NaN or infinity has scale NaN
and is read as NaN throughout.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_rows(x: Tensor, format: str, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows (..., D) as codes, int8, float8_e4m3fn or for int4 uint8 (..., D / 2), and their scales.

    Computed in float32. Scales are (...) of scale_dtype, for int4 (..., 2): scale and minimum.
    """
    x, nan = x.float(), float("nan")
    bound = torch.finfo(scale_dtype).max
    if format == "int4":
        low, high = x.aminmax(dim=-1, keepdim=True)
        good = (low > -torch.inf) & (high < torch.inf)  # not for NaN
        x, low, high = x.where(good, 0), low.where(good, 0), high.where(good, 0)
        scales = torch.cat([(high * 0.5 - low * 0.5) / 7.5, low], -1)  # the difference itself may be infinite
    else:
        largest = x.abs().amax(-1, keepdim=True)
        good = largest < torch.inf
        x, scales = x.where(good, 0), largest.where(good, 0) / (448.0 if format == "fp8" else 127.0)
    scales = scales.clamp(-bound, bound).to(scale_dtype)
    stored, scales = scales.where(good, nan), scales.float()
    step = scales[..., :1]
    step = step.where(step != 0, 1)
    if format == "int4":
        q = ((x - scales[..., 1:]) / step).round().clamp(0, 15).to(torch.uint8)
        return q[..., ::2] | q[..., 1::2] << 4, stored
    if format == "fp8":
        return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn), stored.squeeze(-1)
    return (x / step).round().clamp(-127, 127).to(torch.int8), stored.squeeze(-1)


def dequantize_rows(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The inverse of `quantize_rows`, computed in promote_types(dtype, float32) and rounded once.

    codes: (..., D), or uint8 (..., D / 2); scales: as there, None for codes that are the numbers themselves.
    """
    if scales is None:
        return codes.to(dtype)
    compute = torch.promote_types(dtype, torch.float32)
    scales = scales.to(compute)
    if codes.dtype == torch.uint8:
        q = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        return (q.to(compute) * scales[..., :1] + scales[..., 1:]).to(dtype)
    return (codes.to(compute) * scales[..., None]).to(dtype)


def append_slots(
    lengths: Tensor, block_table: Tensor, n_new: int, n_queries: int, block_size: int, moving: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where n_new tokens behind the `lengths` (S,) of each sequence go; `ops.paged_cache.append_slots` has the results.

    Token j of sequence s has position lengths[s] + j, which is in block block_table[s, position // block_size].
    """
    first = lengths.long()[:, None]
    positions = first + torch.arange(n_new, device=first.device)
    places = first + torch.arange(n_queries, device=first.device) * int(moving)
    width = block_table.shape[1]
    inside = (positions >= 0) & (positions < width * block_size)
    entry = (positions // block_size).clamp(0, max(0, width - 1))
    block = block_table.long().gather(1, entry) if width else torch.full_like(positions, -1)
    slots = torch.where(inside & (block >= 0), block * block_size + positions % block_size, -1)
    return slots.flatten(), positions.flatten(), places, lengths + n_new


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE (Su et al., 2021) of rows (T, heads, D) by angles with cos and sin (T, rope_dim / 2).

    Pairs are (x[i], x[i + rope_dim / 2]), or (x[2 i], x[2 i + 1]) if interleaved; elements from rope_dim on stay.
    Returns promote_types(x.dtype, float32).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    x, cos, sin = x.to(compute), cos.to(compute)[:, None], sin.to(compute)[:, None]
    half = cos.shape[-1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.split(half, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)
    return torch.cat([turned, rest], -1)


def store_rows(x: Tensor, pages: Tensor, scales: Tensor | None, slot_mapping: Tensor) -> None:
    """Writes rows x (T, heads, D), quantized if there are scales, to their slots; those of slot -1 nowhere."""
    kept = slot_mapping >= 0
    slots = slot_mapping[kept]
    block, offset = slots // pages.shape[1], slots % pages.shape[1]
    if scales is None:
        pages[block, offset] = x[kept].to(pages.dtype)
        return
    format = {torch.int8: "int8", torch.uint8: "int4"}.get(pages.dtype, "fp8")
    codes, new_scales = quantize_rows(x[kept], format, scales.dtype)
    pages.view(torch.uint8)[block, offset] = codes.view(torch.uint8)
    scales[block, offset] = new_scales
