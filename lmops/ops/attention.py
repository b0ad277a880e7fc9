"""Flash attention: tiles, launchers, CPU implementation, schema, autograd, public functions."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, differentiated, distinct, target_name
from lmops.reference.attention import attention as reference
from lmops.reference.attention import backward as backward_reference
from lmops.reference.attention import dropout_keep

# the binding that eager code calls; through torch.ops.aten the same call takes 5 microseconds more
_torch_forward: Any = torch._scaled_dot_product_flash_attention_for_cpu
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
NEG_INF = float("-inf")
LOG2E = math.log2(math.e)
CPU_BLOCK = 256  # queries
CPU_CAUSAL_BLOCK = 64


@dataclass(frozen=True)
class Options:
    """What shapes the scores, as the operators take it; see `attention`. Tensors in the order of the schema first."""

    bias: Tensor | None
    slopes: Tensor | None
    sinks: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None
    max_q: int
    max_k: int
    scale: float
    left: int | None
    right: int | None
    bottom_right: bool
    softcap: float
    dropout_p: float


OPTIONS = (
    "Tensor? bias, Tensor? slopes, Tensor? sinks, Tensor? cu_q, Tensor? cu_k, Tensor? seed, SymInt max_q, SymInt max_k,"
    " float scale, SymInt? left, SymInt? right, bool bottom_right, float softcap, float dropout_p"
)


# ------------------------------------------------------------------------------------------------ results, by shape


def _empty_like_query(query: Tensor, dim: int) -> Tensor:
    """(B, H, S, dim) in the query's dtype, with the order of its heads and positions in memory."""
    n_batch, n_heads, length, _ = query.shape
    if query.stride(1) < query.stride(2):
        return query.new_empty(n_batch, length, n_heads, dim).transpose(1, 2)
    return query.new_empty(n_batch, n_heads, length, dim)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, for_backward: bool, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and, for a backward, the LSE as that of the same implementation takes it: two numbers to add up."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    return _empty_like_query(q, v.shape[-1]), lse, lse.new_empty((*lse.shape, 2) if for_backward else 0)


def _backward_fake(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, base: Tensor, bias_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    bias, _, sinks = options[:3]
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format) if bias_grad else q.new_empty(0)
    dsinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    dq, dk, dv = (_empty_like_query(t, t.shape[-1]) for t in (q, k, v))
    return dq, dk, dv, dbias, dsinks


def _without_scores(grads: tuple[Tensor, ...], dlse: Tensor | None) -> Any:
    """The gradients where there are no queries or no keys: only a sink is left for the LSE to depend on."""
    for grad in grads:
        grad.zero_()
    if dlse is not None and dlse.numel() and grads[4].numel():
        grads[4].copy_(dlse.sum((0, 2)))
    return grads


# -------------------------------------------------------------------------------------------------------------- CPU


def _forward_cpu(q: Tensor, k: Tensor, v: Tensor, for_backward: bool, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = attention_cpu(q, k, v, *options)
    return out, lse, torch.stack((lse, torch.zeros_like(lse)), -1) if for_backward else lse.new_empty(0)


def attention_cpu(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    if _is_plain(q, k, v, options):  # which decoding a token is, where microseconds count
        out, lse = _torch_forward(q, k, v, 0.0, False, attn_mask=None, scale=options[8])
        if not _hides_nan(q, k, lse):
            return out, lse
    opts = Options(*options)
    out, lse, _ = _forward_fake(q, k, v, False)
    if out.numel() == 0:
        return out, lse.fill_(NEG_INF)
    if opts.cu_q is not None:
        for at_q, at_k, one in _sequences(opts):
            o, l = attention_cpu(q[:, :, at_q], k[:, :, at_k], v[:, :, at_k], *one)
            out[:, :, at_q], lse[:, :, at_q] = o, l
        return out, lse
    if not _torch_can(opts) or k.shape[2] == 0:
        o, l = reference(q, k, v, **_reference_options(q, k, opts))
        return out.copy_(o), lse.copy_(l)
    q_len, k_len = q.shape[2], k.shape[2]
    shift = k_len - q_len if opts.bottom_right else 0
    if opts.left is not None and opts.right == 0 and shift + q_len <= k_len and q_len > CPU_BLOCK and opts.bias is None:
        # of a sliding window only the band is computed: blocks of queries over the keys that they see
        for start in range(0, q_len, CPU_BLOCK):
            stop = min(start + CPU_BLOCK, q_len)
            at_q, at_k = slice(start, stop), slice(max(0, start + shift - opts.left), max(0, stop + shift))
            block = vars(opts) | {"max_q": stop - start, "max_k": at_k.stop - at_k.start, "bottom_right": True}
            o, l = attention_cpu(q[:, :, at_q], k[:, :, at_k], v[:, :, at_k], *block.values())
            out[:, :, at_q], lse[:, :, at_q] = o, l
        return out, lse
    if (
        opts.left is None
        and opts.right == 0
        and 0 <= shift <= k_len - q_len
        and q_len > CPU_CAUSAL_BLOCK
        and opts.bias is None
        and opts.slopes is None
    ):
        causal, mask = True, None
        o, l = _causal(_same_dim(q, k, v), shift, opts.scale)
    else:
        causal, mask = _torch_mask(q, k, opts)
        o, l = _torch_forward(*_same_dim(q, k, v), 0.0, causal, attn_mask=mask, scale=opts.scale)
    o = o[..., : v.shape[-1]]
    if ((causal or mask is not None) and o.sum().isnan()) or _hides_nan(q, k, l):  # what is masked may hold NaN
        o, l = reference(q, k, v, **_reference_options(q, k, opts))
    elif mask is not None:
        l = l.masked_fill((mask == NEG_INF).all(-1), NEG_INF)
    return o if o.stride() == out.stride() else out.copy_(o), l.contiguous()


def _hides_nan(q: Tensor, k: Tensor, lse: Tensor) -> bool:
    """Whether torch gave 0 for NaN: to a row all of whose scores are NaN it gives 0, and as its LSE too."""
    return not lse.all() and not (q.isfinite().all() and k.isfinite().all())


def _causal(tensors: Sequence[Tensor], shift: int, scale: float) -> tuple[Tensor, Tensor]:
    """Query i sees keys 0 .. i + shift. Blocks of queries over the keys that they see: torch's own causal attention
    computes keys by 512, seen or not."""
    q, k, v = tensors
    q_len = q.shape[2]
    rows = min(CPU_CAUSAL_BLOCK, q_len)
    # the last rows of the mask, and as many of its last columns as a block sees, are its mask
    mask = q.new_zeros(rows, shift + q_len, dtype=torch.promote_types(q.dtype, torch.float32))
    mask[:, -rows:] = mask.new_full((rows, rows), NEG_INF).triu_(1)
    out, lses = q.new_empty(q.shape[0], q_len, q.shape[1], v.shape[3]).transpose(1, 2), []
    for start in range(0, q_len, rows):
        stop = min(start + rows, q_len)
        seen = shift + stop
        hidden = mask[start - stop :, shift + q_len - seen :].expand(q.shape[0], q.shape[1], -1, -1)
        out[:, :, start:stop], lse = _torch_forward(
            q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], 0.0, False, attn_mask=hidden, scale=scale
        )
        lses.append(lse)
    return out, torch.cat(lses, 2)


def _is_plain(q: Tensor, k: Tensor, v: Tensor, options: tuple[Any, ...]) -> bool:
    """Whether a call is one of torch's flash attention for CPUs as it stands, with its layout of the result."""
    *tensors, _, _, _, left, right, _, softcap, dropout_p = options
    return (
        all(t is None for t in tensors)
        and left is None
        and right is None
        and not softcap
        and not dropout_p
        and q.shape[3] == v.shape[3]
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and q.shape[2] == 1
        and q.numel() > 0
        and k.shape[2] > 0
    )


def _backward_cpu(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, base: Tensor, bias_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    opts = Options(*options)
    grads = _backward_fake(do, dlse, q, k, v, o, base, bias_grad, *options)
    dq, dk, dv, dbias, dsinks = grads
    if opts.cu_q is not None:
        dsinks.zero_()
        for at_q, at_k, one in _sequences(opts):
            of_one = _backward_cpu(
                do[:, :, at_q], None if dlse is None else dlse[:, :, at_q], q[:, :, at_q], k[:, :, at_k], v[:, :, at_k],
                o[:, :, at_q], base[:, :, at_q], bias_grad, *one,
            )  # fmt: skip
            for whole, at, part in zip((dq, dk, dv), (at_q, at_k, at_k), of_one, strict=False):
                whole[:, :, at] = part
            dsinks += of_one[4]
        return grads
    if q.numel() == 0 or k.shape[2] == 0:
        return _without_scores(grads, dlse)
    lse = base[..., 0]
    if _torch_can(opts) and dlse is None and not bias_grad:
        causal, mask = _torch_mask(q, k, opts)
        of_torch = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_same_dim(do, q, k, v, o), lse.masked_fill(lse == NEG_INF, 0), 0.0, causal,
            attn_mask=mask, scale=opts.scale,
        )  # fmt: skip
        if not of_torch[0].sum().isnan():
            for grad, g in zip((dq, dk, dv), of_torch, strict=True):
                grad.copy_(g[..., : grad.shape[-1]])
            return grads
    found = backward_reference(do, dlse, q, k, v, lse, **_reference_options(q, k, opts))
    for grad, g in zip((dq, dk, dv, dsinks), (*found[:3], found[4]), strict=True):
        if g is not None:
            grad.copy_(g)
    if bias_grad:
        dbias.copy_(found[3].sum_to_size(dbias.shape))
    return grads


def _sequences(opts: Options) -> Any:
    """Of a packed call: the slices of queries and keys of each sequence, and its options alone."""
    assert opts.cu_q is not None
    assert opts.cu_k is not None
    ends_q, ends_k = opts.cu_q.tolist(), opts.cu_k.tolist()
    for b, ((q0, q1), (k0, k1)) in enumerate(zip(pairwise(ends_q), pairwise(ends_k), strict=True)):
        values = vars(opts) | {"cu_q": None, "cu_k": None, "max_q": q1 - q0, "max_k": k1 - k0}
        if opts.slopes is not None and opts.slopes.ndim == 2:
            values["slopes"] = opts.slopes[b]
        if opts.seed is not None:  # a third word: which sequence this is
            values["seed"] = torch.cat((opts.seed[:1], torch.tensor([b])))
        yield slice(q0, q1), slice(k0, k1), tuple(values.values())


def _torch_can(opts: Options) -> bool:
    """Whether torch's own flash attention for CPUs can express the call."""
    return opts.softcap == 0 and opts.sinks is None and opts.dropout_p == 0


def _torch_mask(q: Tensor, k: Tensor, opts: Options) -> tuple[bool, Tensor | None]:
    """The call in torch's terms: causal, or else an additive mask, no less precise than float32."""
    q_len, k_len = q.shape[2], k.shape[2]
    bounded = opts.left is not None or opts.right is not None
    plain = opts.bias is None and opts.slopes is None
    if plain and (
        not bounded or (opts.left is None and opts.right == 0 and not (opts.bottom_right and q_len != k_len))
    ):
        return bounded, None
    compute = torch.promote_types(q.dtype, torch.float32)
    mask = q.new_zeros(1, 1, q_len, k_len)
    if bounded or opts.slopes is not None:
        distance = torch.arange(q_len)[:, None] + (k_len - q_len if opts.bottom_right else 0) - torch.arange(k_len)
        if opts.slopes is not None:
            slopes = opts.slopes.view(-1, q.shape[1], 1, 1)
            mask = -slopes.to(compute) * distance.abs()
        if opts.left is not None:
            mask = mask.masked_fill(distance > opts.left, NEG_INF)
        if opts.right is not None:
            mask = mask.masked_fill(distance < -opts.right, NEG_INF)
    if opts.bias is not None:
        mask = mask.masked_fill(~opts.bias, NEG_INF) if opts.bias.dtype == torch.bool else mask + opts.bias
    return False, mask.expand(q.shape[0], q.shape[1], q_len, k_len)


def _same_dim(*tensors: Tensor) -> list[Tensor]:
    """The tensors with their last dimension contiguous and as long as the longest, by zeros."""
    dim = max(t.shape[-1] for t in tensors)
    return [
        torch.nn.functional.pad(t, (0, dim - t.shape[-1])) if t.shape[-1] < dim
        else t if t.stride(-1) == 1 else t.contiguous()
        for t in tensors
    ]  # fmt: skip


def _reference_options(q: Tensor, k: Tensor, opts: Options) -> dict[str, Any]:
    keep = None
    if opts.dropout_p:
        assert opts.seed is not None
        seed, *sequence = opts.seed.tolist()
        first = sequence[0] if sequence else 0
        keep = dropout_keep(seed, opts.dropout_p, first + q.shape[0], q.shape[1], q.shape[2], k.shape[2])[first:]
    return {
        "bias": opts.bias, "scale": opts.scale, "left": opts.left, "right": opts.right,
        "bottom_right": opts.bottom_right, "softcap": opts.softcap, "alibi_slopes": opts.slopes, "sinks": opts.sinks,
        "dropout_p": opts.dropout_p, "keep": keep,
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time: queries x keys, with so many warps and stages of the pipeline of loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_column(kernel: str, opts: Options, group: int, target: str) -> int:
    """The column of TILES: what a program has to keep in registers beside the tiles of the products."""
    if opts.bias is not None:
        return 2
    if opts.slopes is not None or opts.softcap or opts.dropout_p:
        return 1
    if kernel == "forward":  # a gfx942 has too few scalar registers for the masks of a window, or of a causal sink
        return int(target.startswith("gfx") and (opts.sinks is not None or opts.left is not None))
    # the loop over the query heads of a group takes registers beside dk and dv; sm_90 spills without bounds as well
    unbounded = opts.left is None and opts.right is None
    return int(kernel == "dkv" and (group > 1 or (unbounded and target == "sm_90")))


def attention_tile(kernel: str, dim: int, element_size: int, rows: int, target: str, column: int) -> Tile:
    """The tile of `kernel` ("forward", "dq", "dkv", "bias") on `target` ("sm_80", "sm_90", "sm_100", "gfx942").

    dim: the longer head_dim, as a power of 2; rows: of the dimension that the grid is over; column: `tile_column`.
    """
    bucket = next(most for most in (64, 128, 256, 512) if dim <= most)
    if element_size == 4:
        columns, column = WIDE_TILES[kernel, bucket], int(target.startswith("gfx"))
    else:
        columns = TILES.get(target, TILES["sm_80"])[kernel, bucket]
        if target in ("sm_86", "sm_89", "sm_120"):  # 99 KiB of shared memory a block, where sm_80 has 163
            columns = SMALL_TILES.get((kernel, bucket), columns[-1:])
    tile = Tile(*columns[min(column, len(columns) - 1)])
    if kernel == "forward" and rows < tile.block_m:
        # few queries: no more rows than there are, as tensor cores allow. Fewer than 4 warps could not hold the keys,
        # and at a long head_dim 4 cannot hold the output
        block_m = max(16, 1 << (rows - 1).bit_length())
        most_warps = 8 if bucket == 512 or block_m * bucket > 64 * 128 else 4
        return Tile(block_m, tile.block_n, min(tile.num_warps, most_warps), tile.num_stages)
    return tile


# (queries, keys, warps, stages) by kernel and head_dim up to. Columns, see `tile_column`: plain | ALiBi, softcap,
# dropout, in dkv grouped heads | bias; where one is missing, the one before it. From
# `python -m benchmarks.compile_report`: the largest tile that does not spill. What is computed a score takes registers,
# hence smaller tiles to the right; a bias most of all, whose addresses are one a score.
# wgmma (sm_90) wants 64 rows a group of 4 warps: of queries, in dkv of keys.
TILES = {
    "sm_80": {
        ("forward", 64): ((128, 64, 4, 2), (128, 64, 8, 2)),
        ("forward", 128): ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2)),
        ("forward", 256): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        ("forward", 512): ((32, 32, 8, 2),),
        ("dq", 64): ((128, 64, 8, 2),),
        ("dq", 128): ((128, 64, 8, 2), (128, 32, 8, 2)),
        ("dq", 256): ((64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
        ("dkv", 64): ((64, 128, 8, 2), (32, 128, 8, 2)),
        ("dkv", 128): ((128, 64, 8, 2), (64, 64, 8, 2)),
        ("dkv", 256): ((32, 64, 8, 2), (32, 32, 8, 2)),
        ("bias", 64): ((64, 32, 4, 2),),
        ("bias", 128): ((64, 32, 8, 2),),
        ("bias", 256): ((32, 32, 8, 2),),
    },
    "sm_90": {
        ("forward", 64): ((128, 128, 8, 2), (128, 64, 8, 2)),
        ("forward", 128): ((128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        ("forward", 256): ((128, 32, 8, 2), (128, 32, 8, 2), (128, 16, 8, 2)),
        ("forward", 512): ((32, 32, 8, 2),),
        ("dq", 64): ((128, 128, 8, 2), (128, 64, 8, 2)),
        ("dq", 128): ((128, 128, 8, 2), (128, 32, 8, 2)),
        ("dq", 256): ((128, 16, 8, 2), (64, 32, 8, 2)),
        ("dkv", 64): ((64, 128, 8, 2),),
        ("dkv", 128): ((64, 128, 8, 2), (32, 128, 8, 2)),
        ("dkv", 256): ((32, 64, 8, 2), (16, 64, 8, 2)),
        ("bias", 64): ((64, 64, 4, 2),),
        ("bias", 128): ((64, 64, 8, 2),),
        ("bias", 256): ((64, 32, 8, 1),),
    },
    "sm_100": {
        ("forward", 64): ((128, 128, 8, 2), (128, 64, 8, 2)),
        ("forward", 128): ((128, 128, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        ("forward", 256): ((128, 32, 8, 2),),
        ("forward", 512): ((32, 32, 8, 2),),
        ("dq", 64): ((128, 64, 8, 2),),
        ("dq", 128): ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2)),
        ("dq", 256): ((64, 64, 8, 2),),
        ("dkv", 64): ((64, 128, 8, 2),),
        ("dkv", 128): ((64, 128, 8, 2), (32, 128, 8, 1), (32, 128, 8, 2)),
        ("dkv", 256): ((32, 64, 8, 2),),
        ("bias", 64): ((64, 64, 4, 2),),
        ("bias", 128): ((64, 64, 8, 2),),
        ("bias", 256): ((64, 32, 8, 1),),
    },
    "gfx942": {
        ("forward", 64): ((128, 32, 8, 1), (128, 16, 4, 1), (64, 16, 4, 1)),
        ("forward", 128): ((128, 32, 8, 1), (128, 16, 8, 1), (64, 16, 4, 1)),
        ("forward", 256): ((64, 32, 4, 1), (64, 16, 4, 1)),
        ("forward", 512): ((64, 16, 8, 1), (64, 16, 8, 1), (32, 16, 4, 1)),
        ("dq", 64): ((64, 32, 4, 1),),
        ("dq", 128): ((64, 32, 4, 1), (64, 32, 4, 1), (64, 16, 4, 1)),
        ("dq", 256): ((64, 16, 4, 1),),
        ("dkv", 64): ((16, 64, 4, 1),),
        ("dkv", 128): ((32, 64, 8, 1), (16, 64, 4, 1)),
        ("dkv", 256): ((16, 64, 8, 1),),
        ("bias", 64): ((32, 32, 4, 1),),
        ("bias", 128): ((32, 32, 4, 1),),
        ("bias", 256): ((16, 32, 4, 1),),
    },
}
# where the last column of sm_80 does not fit 99 KiB
SMALL_TILES = {("dq", 256): ((32, 32, 8, 2),)}
# float32: twice the bytes, and unless torch is told otherwise products without tensor cores, which keep whole rows of
# both operands in registers. Columns: NVIDIA | AMD
WIDE_TILES = {
    ("forward", 64): ((32, 32, 4, 1),),
    ("forward", 128): ((32, 16, 8, 1),),
    ("forward", 256): ((16, 16, 8, 1),),
    ("forward", 512): ((16, 16, 8, 1),),
    ("dq", 64): ((32, 32, 8, 1),),
    ("dq", 128): ((16, 16, 8, 1),),
    ("dq", 256): ((16, 16, 8, 1),),
    ("dkv", 64): ((32, 32, 8, 1),),
    ("dkv", 128): ((32, 16, 8, 1),),
    ("dkv", 256): ((16, 16, 8, 1), (16, 16, 4, 2)),
    ("bias", 64): ((32, 32, 4, 1),),
    ("bias", 128): ((16, 16, 4, 1),),
    ("bias", 256): ((16, 16, 8, 1),),
}


def block_dim(dim: int) -> int:
    """A head_dim in the kernels: the next power of 2, at least the 16 that a tensor core takes."""
    return max(16, 1 << (dim - 1).bit_length())


def _arguments(q: Tensor, k: Tensor, v: Tensor, opts: Options, target: str, precision: str) -> dict[str, Any]:
    """What all the kernels take beside their tensors."""
    bias = "" if opts.bias is None else "mask" if opts.bias.dtype == torch.bool else "add"
    # the maximum of the products is that of the scores only if all that lies between them is a positive factor
    scaled = opts.softcap != 0 or opts.slopes is not None or bias == "add" or opts.scale <= 0
    return {
        "q_strides": q.stride(), "k_strides": k.stride(), "v_strides": v.stride(),
        "bias_strides": _broadcast_strides(opts.bias),
        "slopes_stride": opts.slopes.shape[-1] if opts.slopes is not None and opts.slopes.ndim == 2 else 0,
        "n_heads": q.shape[1], "q_total": q.shape[2], "k_total": k.shape[2],
        "scale": opts.scale, "factor": LOG2E if scaled else opts.scale * LOG2E,
        "left": opts.left or 0, "right": opts.right or 0, "softcap": opts.softcap, "dropout_p": opts.dropout_p,
        "HEAD_DIM": q.shape[3], "VALUE_DIM": v.shape[3], "GROUP": q.shape[1] // k.shape[1],
        "PACKED": opts.cu_q is not None, "LEFT": opts.left is not None, "RIGHT": opts.right is not None,
        "BOTTOM_RIGHT": opts.bottom_right, "BIAS": bias, "ALIBI": opts.slopes is not None,
        "SOFTCAP": opts.softcap != 0, "DROPOUT": opts.dropout_p != 0, "SCALED": scaled,
        "PRECISION": "ieee" if precision == "highest" else "tf32",
        "PTX": target.startswith("sm_"),
        "BLOCK_D": block_dim(q.shape[3]), "BLOCK_E": block_dim(v.shape[3]),
    }  # fmt: skip


def _broadcast_strides(bias: Tensor | None) -> tuple[int, ...]:
    return (
        (0, 0, 0, 0)
        if bias is None
        else tuple(0 if n == 1 else s for n, s in zip(bias.shape, bias.stride(), strict=True))
    )


def _of_tile(tile: Tile, *tensors: Tensor) -> dict[str, Any]:
    """The launch options of a tile that walks through `tensors`."""
    import triton.language as tl

    most = max(tile.block_m, tile.block_n) * max(t.stride(2) for t in tensors) + max(
        t.stride(3) * t.shape[3] for t in tensors
    )
    return {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "num_warps": tile.num_warps, "num_stages": tile.num_stages,
        "OFFSET": tl.int32 if most < 2**31 else tl.int64,
        # tensors that lie alike share their offsets, and so registers
        "ALIKE": len({(t.shape[3], *t.stride()[2:]) for t in tensors}) == 1,
    }  # fmt: skip


def _suit_descriptors(target: str, *tensors: Tensor) -> bool:
    """Whether there is a TMA unit to load tiles, and the tensors are as it wants them."""
    if target not in ("sm_90", "sm_100") or tensors[0].element_size() == 4:
        return False  # float32 products go through registers, where a tile of the TMA unit would only take a detour
    multiple = 16 // tensors[0].element_size()
    return all(
        t.data_ptr() % 16 == 0
        and t.stride(3) == 1
        and t.numel() > 0
        and not any(t.stride(d) % multiple or not t.stride(d) for d in range(3) if t.shape[d] > 1)
        for t in tensors
    )


def _form(t: Tensor, rows: int) -> Any:
    """What the TMA unit loads tiles of so many rows by, of tensors that lie as t does."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [t.stride(d) if t.shape[d] > 1 else max(16, t.shape[3]) for d in range(3)]
    form = TensorDescriptor(t, list(t.shape), [*strides, 1], [1, 1, rows, block_dim(t.shape[3])])
    form.base = None  # its memory is not kept
    return form


def _descriptor(form: Any, t: Tensor) -> Any:
    """The form of a descriptor for t. Not made afresh: checking what has been checked takes longer than a launch."""
    if form is None:
        return None
    descriptor = object.__new__(type(form))
    descriptor.__dict__.update(form.__dict__)
    descriptor.base = t
    return descriptor


MAX_GRID = 65_535  # blocks in the second and third dimension of a grid


def _launches(kernel: Any, grid: tuple[int, int, int], **arguments: Any) -> tuple[Launch, ...]:
    """Over (tiles, heads, batch); a larger batch than a grid holds takes several. Pointers are leading arguments."""
    tiles, heads, n_batch = grid
    return tuple(
        Launch(kernel, (tiles, heads, min(MAX_GRID, n_batch - first)), FIRST_BATCH=first, **arguments)
        for first in range(0, n_batch, MAX_GRID)
    )


@prepared
def _prepare_forward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, for_backward: bool, precision: str, *options: Any
) -> tuple[tuple[Launch, ...], Any, Any]:
    """The launches, and the forms of descriptors of k and v, or None."""
    from lmops.kernels.attention import attention_forward_kernel

    opts, target = Options(*options), target_name()
    arguments = _arguments(q, k, v, opts, target, precision)
    group, n_batch = arguments["GROUP"], q.shape[0] if opts.cu_q is None else opts.cu_q.numel() - 1
    # few queries: the query heads of a key head share a tile, and its keys are read once
    pack = group if opts.max_q * group <= 64 else 1
    rows = opts.max_q * pack
    dim = max(arguments["BLOCK_D"], arguments["BLOCK_E"])
    tile = attention_tile("forward", dim, q.element_size(), rows, target, tile_column("forward", opts, group, target))
    descriptors = _suit_descriptors(target, k, v)
    launches = _launches(
        attention_forward_kernel, (-(-rows // tile.block_m), q.shape[1] // pack, n_batch), o_strides=out.stride(),
        PACK=pack, SINKS=opts.sinks is not None, BASE=for_backward, DESCRIPTOR=descriptors, **arguments,
        **_of_tile(tile, k, v),
    )  # fmt: skip
    k_form, v_form = (_form(t, tile.block_n) if descriptors else None for t in (k, v))
    return launches, k_form, v_form


def _forward_triton(
    q: Tensor, k: Tensor, v: Tensor, for_backward: bool, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, base = _forward_fake(q, k, v, for_backward)
    if out.numel() == 0:
        return out, lse.fill_(NEG_INF), base.zero_()  # nothing is computed from base
    precision = torch.get_float32_matmul_precision()
    launches, k_form, v_form = _prepare_forward(q, k, v, out, for_backward, precision, *options)
    k_desc, v_desc = _descriptor(k_form, k), _descriptor(v_form, v)
    for launch in launches:
        launch(q, k, v, k_desc, v_desc, out, lse, base if for_backward else None, *options[:6])
    return out, lse, base


@dataclass(frozen=True)
class _Backward:
    """The launches of a backward, and the forms of descriptors, or None: of k, v for dq, of q, k, v, do for dkv."""

    dq: tuple[Launch, ...]
    dq_forms: tuple[Any, ...]
    dkv: tuple[Launch, ...]
    dkv_forms: tuple[Any, ...]
    bias: Launch | None


@prepared
def _prepare_backward(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    dbias: Tensor | None, precision: str, *options: Any,
) -> _Backward:  # fmt: skip
    import triton

    from lmops.kernels.attention import (
        attention_backward_bias_kernel,
        attention_backward_dkv_kernel,
        attention_backward_dq_kernel,
    )

    opts, target = Options(*options), target_name()
    arguments = _arguments(q, k, v, opts, target, precision) | {"WIDE": q.dtype == torch.float32}
    dim, size = max(arguments["BLOCK_D"], arguments["BLOCK_E"]), q.element_size()
    n_heads, kv_heads, n_batch = q.shape[1], k.shape[1], q.shape[0] if opts.cu_q is None else opts.cu_q.numel() - 1
    group = arguments["GROUP"]
    tile = attention_tile("dq", dim, size, opts.max_q, target, tile_column("dq", opts, group, target))
    triton_3_6 = triton.__version__.startswith("3.6.")
    if (target, dim, tile.block_n) == ("sm_90", 128, 128) and triton_3_6:
        tile = replace(tile, block_n=64)  # of 128 keys its assembler serializes the products (C7515)
    descriptors = _suit_descriptors(target, k, v)
    dq_forms = tuple(_form(t, tile.block_n) if descriptors else None for t in (k, v))
    to_dq = _launches(
        attention_backward_dq_kernel, (-(-opts.max_q // tile.block_m), n_heads, n_batch), o_strides=o.stride(),
        do_strides=do.stride(), dq_strides=dq.stride(), dlse_strides=(0, 0, 0) if dlse is None else dlse.stride(),
        DLSE=dlse is not None, DESCRIPTOR=descriptors, **arguments, **_of_tile(tile, k, v),
    )  # fmt: skip
    tile = attention_tile("dkv", dim, size, opts.max_k, target, tile_column("dkv", opts, group, target))
    # 64 columns take fewer instructions by plain loads. Of packed sequences the next one would lie behind the last
    # query, in the place of zeros. With a mask or dropout the kernel spills on 3.6
    spilling = triton_3_6 and (opts.bias is not None or opts.dropout_p > 0)
    descriptors = dim > 64 and opts.cu_q is None and not spilling and _suit_descriptors(target, q, k, v, do)
    # two stages at the edges pay only where there are many, and spill on 3.6
    edge_stages = None if (opts.left is not None or opts.right is not None) and not triton_3_6 else 1
    rows = (tile.block_m, tile.block_n, tile.block_n, tile.block_m)
    dkv_forms = tuple(_form(t, n) if descriptors else None for t, n in zip((q, k, v, do), rows, strict=True))
    to_dkv = _launches(
        attention_backward_dkv_kernel, (-(-opts.max_k // tile.block_n), kv_heads, n_batch), do_strides=do.stride(),
        dk_strides=dk.stride(), dv_strides=dv.stride(), DESCRIPTOR=descriptors,
        EDGE_STAGES=edge_stages, **arguments, **_of_tile(tile, q, do),
    )  # fmt: skip
    if dbias is None or opts.bias is None:
        return _Backward(to_dq, dq_forms, to_dkv, dkv_forms, None)
    tile = attention_tile("bias", dim, size, opts.max_q, target, tile_column("bias", opts, group, target))
    summed = tuple(
        b == 1 and n != 1
        for b, n in zip(opts.bias.shape, (n_batch, n_heads, *q.shape[2:3], *k.shape[2:3]), strict=True)
    )
    blocks = (n_batch, n_heads, -(-q.shape[2] // tile.block_m), -(-k.shape[2] // tile.block_n))
    own = {name: value for name, value in arguments.items() if name in attention_backward_bias_kernel.arg_names}
    to_bias = Launch(
        attention_backward_bias_kernel, (math.prod(1 if s else n for s, n in zip(summed, blocks, strict=True)),),
        do_strides=do.stride(), dbias_strides=_broadcast_strides(dbias), n_batch=n_batch, SUM=summed,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, num_warps=tile.num_warps, num_stages=tile.num_stages, **own,
    )  # fmt: skip
    return _Backward(to_dq, dq_forms, to_dkv, dkv_forms, to_bias)


def _backward_triton(
    do: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, base: Tensor, bias_grad: bool,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv, dbias, dsinks = grads = _backward_fake(do, dlse, q, k, v, o, base, bias_grad, *options)
    if q.numel() == 0 or k.shape[2] == 0:
        return _without_scores(grads, dlse)
    bias, slopes, sinks, cu_q, cu_k, seed = options[:6]
    stats = base.new_empty(*base.shape[:3], 3 if q.dtype == torch.float32 else 2)
    precision = torch.get_float32_matmul_precision()
    plan = _prepare_backward(do, dlse, q, k, v, o, dq, dk, dv, dbias if bias_grad else None, precision, *options)
    descriptors = tuple(map(_descriptor, plan.dq_forms, (k, v)))
    for launch in plan.dq:
        launch(q, k, v, *descriptors, o, do, dq, base, dlse, stats, bias, slopes, cu_q, cu_k, seed)
    descriptors = tuple(map(_descriptor, plan.dkv_forms, (q, k, v, do)))
    for launch in plan.dkv:
        launch(q, k, v, do, *descriptors, dk, dv, stats, bias, slopes, cu_q, cu_k, seed)
    if plan.bias is not None:
        plan.bias(q, k, v, do, dbias, stats, bias, slopes, seed)
    if sinks is not None:  # a score whose value is 0: ds = p (0 - delta)
        p = torch.exp2(sinks.float()[:, None] * LOG2E - base[..., 0] - base[..., 1])
        dsinks.copy_(-(p * stats[..., 1]).sum((0, 2)))
    return grads


attention_forward = define_op(
    f"attention_forward(Tensor q, Tensor k, Tensor v, bool for_backward, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
    triton=_forward_triton,
    torch_cpu=_forward_cpu,
    fake=_forward_fake,
)
attention_backward = define_op(
    "attention_backward(Tensor do, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor o, Tensor base, bool bias_grad,"
    f" {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    triton=_backward_triton,
    torch_cpu=_backward_cpu,
    fake=_backward_fake,
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, slopes, sinks, cu_q, cu_k, seed, *numbers):
        out, lse, base = attention_forward(q, k, v, True, bias, slopes, sinks, cu_q, cu_k, seed, *numbers)
        ctx.save_for_backward(q, k, v, out, base, bias, slopes, sinks, cu_q, cu_k, seed)
        ctx.numbers = numbers
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, out, base, *tensors = ctx.saved_tensors
        if do is None:
            do = torch.zeros_like(out)
        bias_grad = ctx.needs_input_grad[3]
        grads = attention_backward(do, dlse, q, k, v, out, base, bias_grad, *tensors, *ctx.numbers)
        dq, dk, dv, dbias, dsinks = grads
        wanted = [dq, dk, dv, dbias, None, dsinks, None, None, None, *[None] * len(ctx.numbers)]
        return tuple(g if need else None for g, need in zip(wanted, ctx.needs_input_grad, strict=True))


# ------------------------------------------------------------------------------------------------- public functions


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float | None = None,
    left: int | None = None,
    right: int | None = None,
    bottom_right: bool = False,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scores) value, and the logarithm of the softmax's sum: what all the interfaces to attention call.

    query (B, H, Sq, D), key (B, KV, Sk, D), value (B, KV, Sk, Dv), any strides; float16, bfloat16 or float32 (on the
    CPU also float64), accumulated in float32. D and Dv up to 256, without gradients 512. Query head h takes key head
    h // (H / KV). With i and j the numbers of a query and a key, and distance = i + shift - j where shift is Sk - Sq
    if bottom_right and 0 otherwise,

        scores = softcap(scale query key^T) - alibi_slope |distance| + bias    where -right <= distance <= left,

    and -inf elsewhere. scale: 1 / sqrt(D) by default. left, right: None for no bound; right=0 is causal.
    softcap: softcap(x) = softcap tanh(x / softcap); None or 0 for none. alibi_slopes: (H,) or (B, H).
    bias: broadcasts to (B, H, Sq, Sk); added, or where boolean, False masks. Its gradient is computed where it
    requires one, summed over what was broadcast.
    sinks: (H,), a further score a head, with value 0 (arXiv 2309.17453; learned in gpt-oss); has a gradient.
    dropout_p: each probability is dropped with dropout_p and the others divided by 1 - dropout_p; the draw follows
    torch's generator of the device (`torch.manual_seed`), and depends on the position in (B, H, Sq, Sk) alone.

    Packed sequences: B = 1, and cu_seqlens_q, cu_seqlens_k (N + 1,) int32 hold where each begins, then the total:
    sequence n is query[:, :, cu_seqlens_q[n] : cu_seqlens_q[n + 1]] over its own keys, and the batch of alibi_slopes
    and dropout is n. max_seqlen_q and max_seqlen_k are the longest lengths; on a GPU they should be given, since
    finding them waits for the GPU. Their values are checked on the CPU; on a GPU that would wait too, so there
    offsets are cut to the tensors, and queries beyond max_seqlen_q are not computed.

    Returns (B, H, Sq, Dv) in the query's dtype and (B, H, Sq) in float32, natural logarithm, sink included.
    Under torch.autocast query, key and value are cast to its dtype (not float64).
    A row that sees no key gives 0 and -inf (or the sink), and no gradient. NaN and inf in keys and values that a row
    does not see do not reach it; NaN in those that it sees makes it NaN.
    The method is FlashAttention-2 (arXiv 2307.08691): memory is linear in Sq and Sk. No atomics: repeatable bitwise.
    Raises ValueError or TypeError for arguments that do not fit together.
    """
    kind = query.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        autocast = torch.get_autocast_dtype(kind)
        query, key, value = (t.to(autocast) if t.dtype in FLOATS else t for t in (query, key, value))
    n_batch, n_heads = _check_tensors(query, key, value)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        n_batch, max_q, max_k = _check_packed(query, key, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    else:
        max_q, max_k = query.shape[2], key.shape[2]
    if bias is not None:
        bias = _check_bias(bias, query, key)
    if alibi_slopes is not None:
        check_a_head("alibi_slopes", alibi_slopes, query, [(n_heads,), (n_batch, n_heads)])
        alibi_slopes = alibi_slopes.detach().float().contiguous()
    if sinks is not None:
        check_a_head("sinks", sinks, query, [(n_heads,)])
    for name, bound in (("left", left), ("right", right)):
        if bound is not None and bound < 0:
            raise ValueError(f"{name} must be at least 0 or None, got {bound}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
    if softcap is not None and not 0 <= softcap < math.inf:
        raise ValueError(f"softcap must be positive, or None or 0 for none, got {softcap}")
    scale = 1 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    if not -math.inf < scale < math.inf:  # torch.compile has no isfinite of a number that varies
        raise ValueError(f"scale must be finite, got {scale}")
    if packed:  # of sequences of any length up to the longest
        left, right = (None if bound is None or bound >= max_q + max_k else bound for bound in (left, right))
    else:
        left, right = _binding(left, right, max_k - max_q if bottom_right else 0, max_q, max_k)
    seed = torch.randint(2**62, (1,), device=query.device) if dropout_p else None
    options = (
        bias, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k, seed,
        max_q, max_k, scale, left, right, bottom_right, float(softcap or 0), float(dropout_p),
    )  # fmt: skip
    if not differentiated(query, key, value, bias, sinks):
        return attention_forward(query, key, value, False, *options)[:2]
    if max(query.shape[3], value.shape[3]) > 256 and kind != "cpu":
        raise NotImplementedError(
            f"head_dim must be at most 256 where gradients are computed, got {query.shape[3]} and {value.shape[3]};"
            " use torch.no_grad() for inference"
        )
    return _Attention.apply(*distinct(query, key, value, *options))


def _binding(left: int | None, right: int | None, shift: int, q_len: int, k_len: int) -> tuple[int | None, int | None]:
    """The bounds without those that hide nothing: distances lie in shift - (k_len - 1) .. shift + q_len - 1."""
    if left is not None and shift + q_len - 1 <= left:
        left = None
    if right is not None and shift - (k_len - 1) >= -right:
        right = None
    return left, right


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, int]:
    dtype, device = query.dtype, query.device
    if not (query.ndim == key.ndim == value.ndim == 4 and key.dtype == value.dtype == dtype
            and key.device == value.device == device):  # fmt: skip
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t.ndim != 4:
                raise ValueError(f"{name} must be (batch, heads, length, head_dim), got shape {tuple(t.shape)}")
            if t.dtype != dtype or t.device != device:
                raise TypeError(f"{name} must be {dtype} on {device} like query, got {t.dtype} on {t.device}")
    if dtype not in FLOATS and not (dtype == torch.float64 and device.type == "cpu"):
        raise TypeError(f"query must be float16, bfloat16 or float32 (on the CPU also float64), got {query.dtype}")
    (n_batch, n_heads, _, dim), (_, kv_heads, k_len, _) = query.shape, key.shape
    if key.shape != (n_batch, kv_heads, k_len, dim):
        raise ValueError(
            f"key must be (batch, heads, length, head_dim) with query's batch {n_batch} and head_dim {dim},"
            f" got shape {tuple(key.shape)}"
        )
    if value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"value must have key's batch, heads and length {tuple(key.shape[:3])}, got {tuple(value.shape)}"
        )
    if kv_heads == 0 or n_heads % kv_heads:
        raise ValueError(f"query's heads must be a multiple of key's: got {n_heads} and {kv_heads}")
    for name, n in (("query", dim), ("value", value.shape[3])):
        if not 1 <= n <= 512:
            raise ValueError(f"{name}'s head_dim must be 1 to 512, got {n}")
    return n_batch, n_heads


def _check_packed(
    query: Tensor, key: Tensor, bias: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    max_q: int | None, max_k: int | None,
) -> tuple[int, int, int]:  # fmt: skip
    if bias is not None:
        raise ValueError("bias cannot be combined with cu_seqlens_q and cu_seqlens_k: packed sequences mask each other")
    if query.shape[0] != 1:
        raise ValueError(f"packed sequences come as a batch of 1, got a batch of {query.shape[0]}")
    longest = []
    given = (("q", cu_q, max_q, query.shape[2]), ("k", cu_k, max_k, key.shape[2]))
    for name, cu, most, total in given:
        if cu is None:
            raise ValueError(f"cu_seqlens_q and cu_seqlens_k go together, cu_seqlens_{name} is missing")
        if cu.ndim != 1 or cu.numel() < 2 or cu.dtype != torch.int32 or cu.device != query.device:
            raise ValueError(
                f"cu_seqlens_{name} must be int32 of shape (sequences + 1,) on {query.device},"
                f" got {cu.dtype} of shape {tuple(cu.shape)} on {cu.device}"
            )
        if most is None or (cu.device.type == "cpu" and not torch.compiler.is_compiling()):
            ends = cu.tolist()
            longest_of = max(map(operator.sub, ends[1:], ends))
            if ends[0] != 0 or ends[-1] != total or ends != sorted(ends):
                raise ValueError(
                    f"cu_seqlens_{name} must start at 0, not decrease, and end at the {total} tokens given, got {ends}"
                )
            if most is not None and most < longest_of:
                raise ValueError(f"max_seqlen_{name} is {most}, the longest sequence of cu_seqlens_{name} {longest_of}")
            most = longest_of if most is None else most
        longest.append(int(most))
    assert cu_q is not None
    assert cu_k is not None
    if cu_q.numel() != cu_k.numel():
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be of equal length, got {cu_q.numel()} and {cu_k.numel()}"
        )
    return cu_q.numel() - 1, longest[0], longest[1]


def _check_bias(bias: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The bias as 4-D: each size 1 or that of the scores."""
    full = (*query.shape[:3], key.shape[2])
    if bias.dtype not in (torch.bool, query.dtype, *FLOATS):
        raise TypeError(
            f"attn_mask must be boolean (True is visible), float16, bfloat16, float32 or {query.dtype} like query,"
            f" got {bias.dtype}"
        )
    if bias.device != query.device:
        raise TypeError(f"attn_mask must be on {query.device} like query, got {bias.device}")
    if bias.ndim > 4 or any(b not in (1, n) for b, n in zip(bias.shape[::-1], full[::-1], strict=False)):
        raise ValueError(f"attn_mask must broadcast to {full}, got shape {tuple(bias.shape)}")
    return bias[(None,) * (4 - bias.ndim)]


def check_a_head(name: str, t: Tensor, query: Tensor, shapes: Sequence[tuple[int, ...]]) -> None:
    if not t.is_floating_point() or t.device != query.device:
        raise TypeError(f"{name} must be floating-point on {query.device}, got {t.dtype} on {t.device}")
    if tuple(t.shape) not in shapes:
        raise ValueError(f"{name} must have the shape {' or '.join(map(str, shapes))}, got {tuple(t.shape)}")


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention, in place of `torch.nn.functional.scaled_dot_product_attention`: the same arguments, by position too.

    query (..., H, Sq, D), key (..., KV, Sk, D), value (..., KV, Sk, Dv); KV divides H, and equals it unless enable_gqa.
    attn_mask: broadcasts to (..., H, Sq, Sk); boolean (True takes part) or added to the scores.
    is_causal: query i sees the keys 0 .. i, aligned at the top left like torch's; may be combined with attn_mask.
    window: (left, right): query i sees the keys i - left .. i + right; None or -1 for no bound.
    softcap, alibi_slopes, sinks: see `lmops.ops.attention.attention`, as for dtypes, limits, NaN and dropout.
    deterministic: taken for flash-attn's sake; results are always the same bitwise.
    return_lse: return also the logarithm of the softmax's sum, (..., H, Sq) in float32, with its gradient.

    Rows that see no key give 0. Raises ValueError or TypeError for arguments that do not fit together.
    """
    if query.ndim < 2:
        raise ValueError(f"query must be (..., heads, length, head_dim), got shape {tuple(query.shape)}")
    if key.ndim != query.ndim or value.ndim != query.ndim:
        raise ValueError(
            f"query, key and value must have equally many dimensions, got {query.ndim}, {key.ndim} and {value.ndim}"
        )
    shape = query.shape[:-1]
    if query.ndim != 4:
        if attn_mask is not None and attn_mask.ndim > min(query.ndim, 3):
            full = (*query.shape[:-1], key.shape[-2])
            if attn_mask.ndim > query.ndim or any(
                b not in (1, n) for b, n in zip(attn_mask.shape[::-1], full[::-1], strict=False)
            ):
                raise ValueError(f"attn_mask must broadcast to {full}, got shape {tuple(attn_mask.shape)}")
            attn_mask = attn_mask.expand(*query.shape[:-3], *attn_mask.shape[-3:]).flatten(0, -4)
        query, key, value = (t.flatten(0, -4) if t.ndim > 4 else t[(None,) * (4 - t.ndim)] for t in (query, key, value))
    if not enable_gqa and key.ndim == 4 and key.shape[1] != query.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} heads and query {query.shape[1]}: they must be equal unless enable_gqa=True"
        )
    left, right = check_window(window, "window")
    out, lse = attention(
        query, key, value, bias=attn_mask, scale=scale, left=left, right=0 if is_causal else right, softcap=softcap,
        alibi_slopes=alibi_slopes, sinks=sinks, dropout_p=dropout_p,
    )  # fmt: skip
    if len(shape) != 3:
        out, lse = out.reshape(*shape, out.shape[-1]), lse.reshape(shape)
    return (out, lse) if return_lse else out


def check_window(window: Sequence[int | None] | None, name: str) -> tuple[int | None, int | None]:
    """(left, right) with None for no bound, from a pair in which -1 also means none."""
    if window is None:
        return None, None
    try:
        left, right = (None if w is None or operator.index(w) == -1 else operator.index(w) for w in window)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a pair (left, right) of integers, -1 for no bound, got {window!r}") from None
    if (left or 0) < 0 or (right or 0) < 0:
        raise ValueError(f"{name} must hold numbers of keys at least 0, or -1 for no bound, got {window!r}")
    return left, right
