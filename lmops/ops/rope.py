"""Rotary position embedding: schemas, launcher, CPU implementation, autograd, public function."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, differentiated, distinct, warp_size
from lmops.ops.softmax import FLOATS


@dataclass(frozen=True)
class Tile:
    """What a program takes: tokens, heads one after another, pairs of dimensions (a power of 2); its threads."""

    tokens: int
    heads: int
    block: int
    threads: int


def rope_tile(n_tokens: int, n_sequences: int, q_heads: int, k_heads: int, half: int) -> Tile:
    """The tile for n_sequences times n_tokens tokens of q_heads and k_heads heads with `half` pairs each.

    8 pairs a thread, for types of 2 bytes two accesses of 16. As many heads as still leave about 1,024 programs.
    """
    block = max(16, 1 << max(0, half - 1).bit_length())
    tokens = min(1 << max(0, n_tokens - 1).bit_length(), max(1, 1_024 // block))
    blocks = n_sequences * -(-n_tokens // tokens)
    heads = min(max(q_heads, k_heads), max(1, blocks * (q_heads + k_heads) // 1_024))
    return Tile(tokens, heads, block, max(32, tokens * block // 8))


@prepared
def _prepare(
    q: Tensor, k: Tensor | None, q_out: Tensor, k_out: Tensor | None, cos: Tensor, sin: Tensor,
    positions: Tensor | None, inplace: bool, interleaved: bool, inverse: bool,
) -> Launch:  # fmt: skip
    """A launch whose leading arguments are the tensors, in this order."""
    import triton.language as tl

    from lmops.kernels.rope import rope_kernel

    shape = q.shape[:-2]
    dims = [d for d, size in enumerate(shape) if size != 1] or [0]
    outer_shape = tuple(shape[d] for d in dims[:-1]) or (1,)

    def strides(t: Tensor, own: int) -> tuple[int, ...]:
        """Those of t over the tokens, outer ones first, then over its `own` last dimensions."""
        s = t.stride()
        return ((0,) if len(dims) == 1 else ()) + tuple(s[d] for d in dims) + s[len(s) - own :]

    n_tokens, (q_heads, dim), half = shape[dims[-1]], q.shape[-2:], cos.shape[-1]
    k_heads = 0 if k is None else k.shape[-2]
    tile = rope_tile(n_tokens, math.prod(outer_shape), q_heads, k_heads, half)
    q_blocks, k_blocks = -(-q_heads // tile.heads), -(-k_heads // tile.heads)
    rest = 0 if inplace else dim - 2 * half
    q_strides, q_out_strides = strides(q, 2), strides(q_out, 2)
    blocks = math.prod(outer_shape) * -(-n_tokens // tile.tokens)
    return Launch(
        rope_kernel, (blocks, q_blocks + k_blocks), outer_shape, n_tokens, q_heads, k_heads, tile.heads, q_blocks,
        cos.shape[0], q_strides, q_strides if k is None else strides(k, 2), q_out_strides,
        q_out_strides if k_out is None else strides(k_out, 2),
        *((t.stride() if positions is not None else strides(t, 1)) for t in (cos, sin)),
        (0,) if positions is None else strides(positions, 0),
        TOKENS=tile.tokens, HALF=half, BLOCK=tile.block, REST=rest, REST_BLOCK=1 << max(0, rest - 1).bit_length(),
        KEYS=k is not None, POSITIONS=positions is not None, INTERLEAVED=interleaved, INVERSE=inverse,
        ACC=tl.float64 if q.dtype == torch.float64 else tl.float32, num_warps=max(1, tile.threads // warp_size()),
    )  # fmt: skip


def _rope_triton(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    q_out, k_out = _rope_fake(q, k, cos, sin, positions, interleaved, inverse)
    if q.numel() or k_out.numel():
        tensors = (q, k, q_out, None if k is None else k_out, cos, sin, positions)
        _prepare(*tensors, False, interleaved, inverse)(*tensors)
    return q_out, k_out


def _rope_inplace_triton(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    if q.numel() or (k is not None and k.numel()):
        tensors = (q, k, q, k, cos, sin, positions)
        _prepare(*tensors, True, interleaved, inverse)(*tensors)


def _rope_fake(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(0) if k is None else torch.empty_like(k)


def _rope_inplace_fake(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    return None


def _rope_cpu(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    c, s = _tables(cos, sin, positions, interleaved, inverse)

    def rotate(x: Tensor) -> Tensor:
        part = x[..., : c.shape[-1]]
        y = torch.addcmul(part * c, _partners(part, interleaved), s)
        out = torch.empty_like(x)
        if part.shape == x.shape and y.dtype == x.dtype and y.stride() == out.stride():
            return y
        out[..., : c.shape[-1]] = y
        out[..., c.shape[-1] :] = x[..., c.shape[-1] :]
        return out

    return rotate(q), q.new_empty(0) if k is None else rotate(k)


def _rope_inplace_cpu(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> None:
    c, s = _tables(cos, sin, positions, interleaved, inverse)
    for x in (q, k):
        if x is not None:
            part = x[..., : c.shape[-1]]
            part.copy_(torch.addcmul(part * c, _partners(part, interleaved), s))


def _tables(
    cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """What each dimension of a pair and its partner are multiplied by, (*tokens, 1, 2 r).

    Raises ValueError for a position outside the tables.
    """
    if positions is not None:
        if positions.numel() and (positions.min() < 0 or positions.max() >= cos.shape[0]):
            bad = positions[(positions < 0) | (positions >= cos.shape[0])][0].item()
            raise ValueError(f"positions must be from 0 to {cos.shape[0] - 1}, the rows of cos, got {bad}")
        cos, sin = cos[positions], sin[positions]
    signed = (sin, -sin) if inverse else (-sin, sin)
    if interleaved:
        c, s = (torch.stack(t, -1).flatten(-2) for t in ((cos, cos), signed))
    else:
        c, s = torch.cat((cos, cos), -1), torch.cat(signed, -1)
    return c.unsqueeze(-2), s.unsqueeze(-2)


def _partners(x: Tensor, interleaved: bool) -> Tensor:
    """x with the two numbers of every pair exchanged."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(x.shape[-1] // 2, -1)


_ARGUMENTS = "Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse"
rope_forward = define_op(
    f"rope(Tensor q, Tensor? k, {_ARGUMENTS}) -> (Tensor, Tensor)",
    triton=_rope_triton,
    torch_cpu=_rope_cpu,
    fake=_rope_fake,
)
rope_inplace = define_op(
    f"rope_(Tensor(a!) q, Tensor(b!)? k, {_ARGUMENTS}) -> ()",
    triton=_rope_inplace_triton,
    torch_cpu=_rope_inplace_cpu,
    fake=_rope_inplace_fake,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        q, keys = rope_forward(q, k, cos, sin, positions, interleaved, False)
        return q, None if k is None else keys

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        arguments = (*ctx.saved_tensors, ctx.interleaved, True)
        if dq is None:
            dq, dk = None, rope_forward(dk, None, *arguments)[0]
        else:
            dq, keys = rope_forward(dq, dk, *arguments)
            dk = None if dk is None else keys
        return dq, dk, None, None, None, None


class _RopeInplace(torch.autograd.Function):
    """Of one tensor: with more than one result, autograd would refuse views, which queries and keys mostly are."""

    @staticmethod
    def forward(ctx, x, cos, sin, positions, interleaved):
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved = interleaved
        rope_inplace(x, None, cos, sin, positions, interleaved, False)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return rope_forward(dx, None, *ctx.saved_tensors, ctx.interleaved, True)[0], None, None, None, None


def rope(
    q: Tensor,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    positions: Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Queries and keys with pairs of their dimensions rotated by each token's angles (RoPE, arXiv 2104.09864).

    q: (*tokens, heads, D), such as (T, H, D) or (B, T, H, D), any strides: of (B, H, T, D) pass q.transpose(1, 2), and
        the result transposes back without a copy. k: the same with any number of heads, or None.
    cos, sin: (*tokens, r), or any shape that broadcasts to it, such as (T, r); 2 r is at most D. With positions: tables
        (n_positions, r), of which positions, integers (*tokens) or broadcast to it, choose rows. On the CPU a
        position outside the tables is a ValueError. On a GPU reading it back would stall the stream, so there the
        token becomes NaN.
    interleaved: pairs are (2 i, 2 i + 1), i < r, instead of (i, i + r). What lies behind the pairs stays. (The tables
        of transformers hold each angle twice: pass cos[..., :r].)
    inplace: write to q and k, which are then returned. Where a gradient is needed that is a launch each.

    float16, bfloat16, float32 or float64, computed in float32 at least. Differentiable once with respect to q and k;
    the backward is the rotation back, and needs neither of them. Returns (q, k), k None where it was.
    Raises TypeError, ValueError or NotImplementedError for what it cannot take.
    """
    if q.dtype not in FLOATS:
        raise TypeError(f"q must be float16, bfloat16, float32 or float64, got {q.dtype}")
    if q.ndim < 3:
        raise ValueError(f"q must have shape (*tokens, heads, D), got {tuple(q.shape)}")
    tokens = q.shape[:-2]
    if k is not None and (k.shape[:-2] != tokens or k.shape[-1] != q.shape[-1] or k.dtype != q.dtype):
        raise ValueError(
            f"k must be {q.dtype} of shape {(*tokens, 'heads', q.shape[-1])} beside q of shape {tuple(q.shape)},"
            f" got {k.dtype} of shape {tuple(k.shape)}"
        )
    if cos.dtype not in FLOATS or sin.dtype not in FLOATS:
        raise TypeError(f"cos and sin must be float16, bfloat16, float32 or float64, got {cos.dtype} and {sin.dtype}")
    if cos.shape != sin.shape or not 0 < 2 * cos.shape[-1] <= q.shape[-1]:
        raise ValueError(
            f"cos and sin must have one shape (..., r) with 2 r from 2 to D = {q.shape[-1]},"
            f" got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for name, t in (("k", k), ("cos", cos), ("sin", sin), ("positions", positions)):
        if t is not None and t.device != q.device:
            raise ValueError(f"{name} must be on {q.device} like q, got {t.device}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise NotImplementedError("cos and sin require gradients; rope has none for them")
    cos, sin, positions = _broadcast(cos, sin, positions, tokens)
    if inplace:
        for name, x in (("q", q), ("k", k)):
            if x is not None and any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True)):
                raise ValueError(f"{name} shares memory between its elements (strides {x.stride()}): not inplace")
    if differentiated(q, k):
        if not inplace:
            return _Rope.apply(*distinct(q, k, cos, sin), positions, interleaved)
        q = _RopeInplace.apply(q, cos, sin, positions, interleaved)
        return q, None if k is None else _RopeInplace.apply(k, cos, sin, positions, interleaved)
    if inplace:
        rope_inplace(q, k, cos, sin, positions, interleaved, False)
        return q, k
    q, keys = rope_forward(q, k, cos, sin, positions, interleaved, False)
    return q, None if k is None else keys


def _broadcast(
    cos: Tensor, sin: Tensor, positions: Tensor | None, tokens: torch.Size
) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin of every token, or tables and the positions of every token."""
    if positions is None:
        shape = (*tokens, cos.shape[-1])
        if cos.shape == shape:
            return cos, sin, None
        try:
            return cos.expand(shape), sin.expand(shape), None
        except RuntimeError:
            raise ValueError(
                f"cos and sin must broadcast to {shape} for these tokens, got {tuple(cos.shape)}"
            ) from None
    if positions.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"positions must be int64 or int32, got {positions.dtype}")
    if cos.ndim != 2:
        raise ValueError(f"cos and sin must be (n_positions, r) with positions, got {tuple(cos.shape)}")
    try:
        return cos, sin, positions.expand(tokens)
    except RuntimeError:
        raise ValueError(
            f"positions must broadcast to the tokens {tuple(tokens)}, got {tuple(positions.shape)}"
        ) from None
