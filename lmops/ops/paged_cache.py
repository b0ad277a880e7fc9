"""Pages of keys and values, and what writes them: schema, launchers, CPU implementation, public functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import define_op, warp_size
from lmops.reference.paged_cache import append_slots as append_slots_of_reference
from lmops.reference.paged_cache import quantize_rows, rotate

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}
Format = Literal["native", "int8", "fp8", "int4"]


@dataclass(frozen=True)
class KVPages:
    """The pages of one layer: n_blocks blocks of block_size slots, of one token each. Slot s is [s // size, s % size].

    k: (n_blocks, block_size, kv_heads, head_dim), any strides. float16, bfloat16 or float32, which is format "native";
        int8; float8_e4m3fn, "fp8"; uint8, "int4": (..., head_dim / 2), byte i holds element 2 i in its low bits and
        2 i + 1 in its high ones.
    v: likewise, of the same dtype; value_dim need not be head_dim.
    k_scale, v_scale: float16 or float32, None for "native". int8 and fp8: (n_blocks, block_size, kv_heads), an element
        is value * scale. int4: (..., 2), a scale and a minimum: an element is value * scale + minimum.
    Raises TypeError or ValueError if these do not fit together.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        k, v = self.k, self.v
        if k.dtype not in FLOATS and k.dtype not in FORMATS:
            raise TypeError(f"k must be float16, bfloat16, float32, int8, float8_e4m3fn or uint8 (int4), got {k.dtype}")
        if v.dtype != k.dtype:
            raise TypeError(f"v must be {k.dtype} like k, got {v.dtype}")
        if k.ndim != 4:
            raise ValueError(f"k must be (n_blocks, block_size, kv_heads, head_dim), got {tuple(k.shape)}")
        if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
            raise ValueError(f"v must be ({', '.join(map(str, k.shape[:3]))}, value_dim) like k, got {tuple(v.shape)}")
        shape = None if self.format == "native" else (*k.shape[:3], 2) if self.format == "int4" else k.shape[:3]
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if shape is None:
                if scale is not None:
                    raise ValueError(f"{name} must be None for pages of {k.dtype}, got {tuple(scale.shape)}")
                continue
            if scale is None or scale.shape != shape:
                got = None if scale is None else tuple(scale.shape)
                raise ValueError(f"{name} must be {tuple(shape)} for pages of {k.dtype}, got {got}")
            if scale.dtype not in (torch.float16, torch.float32):
                raise TypeError(f"{name} must be float16 or float32, got {scale.dtype}")
            if self.k_scale is not None and scale.dtype != self.k_scale.dtype:
                raise TypeError(f"{name} must be {self.k_scale.dtype} like k_scale, got {scale.dtype}")
        for name, tensor in (("v", v), ("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if tensor is not None and tensor.device != k.device:
                raise ValueError(f"{name} must be on {k.device} like k, got {tensor.device}")

    @property
    def format(self) -> Format:
        """How elements are stored: as they are ("native"), or as "int8", "fp8" or "int4"."""
        return FORMATS.get(self.k.dtype, "native")  # type: ignore[return-value]

    @property
    def n_blocks(self) -> int:
        return self.k.shape[0]

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.k.shape[1]

    @property
    def n_kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Elements of a key."""
        return self.k.shape[3] * (2 if self.format == "int4" else 1)

    @property
    def value_dim(self) -> int:
        """Elements of a value."""
        return self.v.shape[3] * (2 if self.format == "int4" else 1)


@dataclass(frozen=True)
class Tile:
    """Heads of a token that a program stores, and its threads."""

    rows: int
    threads: int


def store_tile(n_heads: int, width: int, part: int, bits: int) -> Tile:
    """The tile for rows of `width` elements (the wider of keys and values), stored with `bits` bits an element.

    part: elements of the narrowest part that a row is held in, half a key where keys are rotated. At most about 1,024
    elements a tile, which is 4 KB read of keys and values; a thread stores 16 bytes of a part, or several times that.
    """
    rows = min(_next_power_of_2(n_heads), max(1, 1_024 // _next_power_of_2(width)))
    return Tile(rows, max(32, min(256, rows * _next_power_of_2(part) * bits // 128)))


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _unit(*tensors: Tensor) -> int:
    """The largest power of 2 up to 32 that divides all strides but the last dimensions'."""
    return math.gcd(32, *(s for t in tensors for s, n in zip(t.stride()[:-1], t.shape, strict=False) if n > 1))


def _in_units(tensor: Tensor, unit: int) -> tuple[int, ...]:
    *outer, column = tensor.stride()
    return (*(s // unit for s in outer), column)


def _with_column(scale: Tensor | None, format: str) -> tuple[int, ...]:
    """Strides of scales as if all had a dimension for scale and minimum."""
    if scale is None:
        return (0, 0, 0, 0)
    return scale.stride() if format == "int4" else (*scale.stride(), 0)


@prepared
def _prepare_store(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    slot_mapping: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, interleaved: bool,
) -> Launch:  # fmt: skip
    """A launch whose leading arguments are the tensors."""
    from lmops.kernels.paged_cache import store_kv_kernel

    n_tokens, n_heads, head_dim = k.shape
    format = FORMATS.get(k_pages.dtype, "native")
    half = 0 if cos is None else cos.shape[1]
    parts = [head_dim, v.shape[2]] + ([] if not half else [2 * half] if interleaved else [half])
    tile = store_tile(n_heads, max(parts), min(parts), 4 if format == "int4" else 8 * k_pages.element_size())
    unit = _unit(k, v, k_pages, v_pages)
    # without contraction of products the rotation rounds as torch does, so that codes are the same
    return Launch(
        store_kv_kernel, (n_tokens, -(-n_heads // tile.rows)),
        k_pages.shape[0] * k_pages.shape[1], 0 if cos is None else cos.shape[0],
        _in_units(k, unit), _in_units(v, unit), _in_units(k_pages, unit), _in_units(v_pages, unit),
        _with_column(k_scale, format), _with_column(v_scale, format),
        ROWS=tile.rows, HEADS=n_heads, D=head_dim, DV=v.shape[2], BLOCK_SIZE=k_pages.shape[1], HALF=half,
        INTERLEAVED=interleaved, VEC=unit, FORMAT=format, num_warps=max(1, tile.threads // warp_size()),
        enable_fp_fusion=False,
    )  # fmt: skip


def _store_triton(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    slot_mapping: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    if k.numel() == 0:
        return
    if cos is not None and sin is not None and positions is not None:
        cos, sin, positions = cos.contiguous(), sin.contiguous(), positions.contiguous()
    others = (k_scale, v_scale, slot_mapping.contiguous(), cos, sin, positions)
    launch = _prepare_store(k, v, k_pages, v_pages, *others, interleaved)
    launch(k, v, as_bytes(k_pages), as_bytes(v_pages), *others)


def as_bytes(pages: Tensor) -> Tensor:
    """fp8 as its bytes: not all targets of Triton have the type."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def _store_cpu(
    k: Tensor, v: Tensor, k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
    slot_mapping: Tensor, cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, interleaved: bool,
) -> None:  # fmt: skip
    slots = slot_mapping.tolist()
    if not slots:
        return
    n_blocks, block_size = k_pages.shape[:2]
    first: int | None = slots[0]
    end, n_slots = slots[0] + len(slots), n_blocks * block_size
    if slots[0] < 0 or end > n_slots or slots != list(range(slots[0], end)):
        first = None  # not one after another
        used = [slot for slot in slots if slot != -1] if -1 in slots else slots
        if used and not 0 <= min(used) <= max(used) < n_slots:
            raise ValueError(f"slot_mapping must be -1 to {n_slots - 1}, got {min(used)} to {max(used)}")
        if len(set(used)) < len(used):
            twice = next(slot for slot, n in Counter(used).items() if n > 1)
            raise ValueError(f"slot_mapping must have each slot once, got {twice} more than once")
        if used is not slots:
            tokens = (slot_mapping != -1).nonzero()[:, 0]
            k, v, slot_mapping = k[tokens], v[tokens], slot_mapping[tokens]
            positions = positions if positions is None else positions[tokens]
    if cos is not None and sin is not None and positions is not None:
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(cos):
            got = f"{int(positions.min())} to {int(positions.max())}"
            raise ValueError(f"positions must be 0 to {len(cos) - 1}, the rows of cos, got {got}")
        k = rotate(k, cos[positions], sin[positions], interleaved)
    if k_scale is None or v_scale is None:
        _put(k_pages, k, first, slot_mapping)
        _put(v_pages, v, first, slot_mapping)
        return
    format, rows = FORMATS[k_pages.dtype], [k, v]
    # both at once where they are alike: half the operations
    rows = [torch.stack(rows)] if k.shape == v.shape and k.dtype == v.dtype else rows
    quantized = [quantize_rows(x, format, k_scale.dtype) for x in rows]
    codes, scales = (x[0].unbind(0) if len(rows) == 1 else x for x in zip(*quantized, strict=True))
    for pages, new in ((k_pages, codes[0]), (v_pages, codes[1]), (k_scale, scales[0]), (v_scale, scales[1])):
        fp8 = pages.dtype == torch.float8_e4m3fn
        _put(pages.view(torch.uint8) if fp8 else pages, new.view(torch.uint8) if fp8 else new, first, slot_mapping)


def _put(pages: Tensor, rows: Tensor, first: int | None, slots: Tensor) -> None:
    """Rows to slots; to those from `first` on if that is a number."""
    size = pages.shape[1]
    if first is not None and first % size + len(rows) <= size:
        pages[first // size, first % size : first % size + len(rows)] = rows
    elif pages.stride(0) != size * pages.stride(1):
        pages[slots // size, slots % size] = rows.to(pages.dtype)
    elif first is None:
        pages.flatten(0, 1).index_copy_(0, slots, rows.to(pages.dtype))
    else:
        pages.flatten(0, 1)[first : first + len(rows)] = rows


def _no_result(*arguments: Any) -> None:
    pass


store_kv_forward = define_op(
    "store_kv(Tensor k, Tensor v, Tensor(a!) k_pages, Tensor(b!) v_pages, Tensor(c!)? k_scale, Tensor(d!)? v_scale,"
    " Tensor slot_mapping, Tensor? cos, Tensor? sin, Tensor? positions, bool interleaved) -> ()",
    triton=_store_triton,
    torch_cpu=_store_cpu,
    fake=_no_result,
)


def store_kv(
    k: Tensor,
    v: Tensor,
    pages: KVPages,
    slot_mapping: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Writes keys and values of tokens to their slots, quantized as the pages are, keys rotated if cos is given.

    k: (tokens, kv_heads, head_dim), v: (tokens, kv_heads, value_dim); float16, bfloat16 or float32, any strides. They
        are rounded once to the type of native pages.
    pages: of one layer; written in place. lmops/reference/paged_cache.py says what quantized rows are.
    slot_mapping: (tokens,) int64. Slot s is offset s % block_size of block s // block_size; -1 is padding, which is
        not read.
    cos, sin: (n_positions, rope_dim / 2) floating point, rope_dim at most head_dim, and positions: (tokens,) int64.
        Keys are rotated in float32 by the angles of their positions: pairs (i, i + rope_dim / 2), or (2 i, 2 i + 1) if
        interleaved (Su et al., 2021, arXiv 2104.09864).

    On a CPU slots and positions that are not there, and slots that are given twice, raise ValueError before anything is
    written. On a GPU looking would stall the stream: such slots are not written to, of a slot given twice either row
    may stay, and a position that is not there makes the key NaN. No gradient flows through the pages.
    Raises TypeError and ValueError for tensors that do not fit together.
    """
    heads = pages.n_kv_heads
    if k.dtype not in FLOATS:
        raise TypeError(f"k must be float16, bfloat16 or float32, got {k.dtype}")
    if v.dtype != k.dtype:
        raise TypeError(f"v must be {k.dtype} like k, got {v.dtype}")
    if k.ndim != 3 or k.shape[1] != heads or k.shape[2] != pages.head_dim:
        raise ValueError(f"k must be (tokens, {heads}, {pages.head_dim}) for these pages, got {tuple(k.shape)}")
    if v.ndim != 3 or v.shape[0] != k.shape[0] or v.shape[1] != heads or v.shape[2] != pages.value_dim:
        raise ValueError(
            f"v must be ({k.shape[0]}, {heads}, {pages.value_dim}) for these k and pages, got {tuple(v.shape)}"
        )
    _check_tokens("slot_mapping", slot_mapping, k)
    if cos is not None or sin is not None or positions is not None:
        cos, sin = _check_rope(cos, sin, positions, interleaved, k, pages)
    if v.device != k.device or pages.k.device != k.device:
        name, got = ("v", v.device) if v.device != k.device else ("pages", pages.k.device)
        raise ValueError(f"{name} must be on {k.device} like k, got {got}")
    if k.requires_grad or v.requires_grad:  # pages must not keep a graph
        k, v = k.detach(), v.detach()
    store_kv_forward(
        k, v, pages.k, pages.v, pages.k_scale, pages.v_scale, slot_mapping, cos, sin, positions, interleaved
    )


def _check_tokens(name: str, numbers: Tensor, k: Tensor) -> None:
    if numbers.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {numbers.dtype}")
    if numbers.ndim != 1 or numbers.shape[0] != k.shape[0]:
        raise ValueError(f"{name} must be ({k.shape[0]},), a number a token of k, got {tuple(numbers.shape)}")
    if numbers.device != k.device:
        raise ValueError(f"{name} must be on {k.device} like k, got {numbers.device}")


def _check_rope(
    cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, interleaved: bool, k: Tensor, pages: KVPages
) -> tuple[Tensor, Tensor]:
    """cos and sin, without a gradient."""
    if cos is None or sin is None or positions is None:
        given = [name for name, t in (("cos", cos), ("sin", sin), ("positions", positions)) if t is not None]
        raise ValueError(f"cos, sin and positions must be given together, got {' and '.join(given)}")
    for name, t in (("cos", cos), ("sin", sin)):
        if not t.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {t.dtype}")
        if t.ndim != 2 or t.shape != cos.shape or not 0 < 2 * t.shape[1] <= pages.head_dim:
            raise ValueError(
                f"{name} must be (n_positions, rope_dim / 2), the same for cos and sin, with rope_dim from 2 to the "
                f"head_dim {pages.head_dim}, got {tuple(t.shape)}"
            )
        if t.device != k.device:
            raise ValueError(f"{name} must be on {k.device} like k, got {t.device}")
    if pages.format == "int4" and not interleaved and cos.shape[1] % 2:
        raise ValueError(f"rope_dim must be a multiple of 4 for int4 pages, got cos of shape {tuple(cos.shape)}")
    _check_tokens("positions", positions, k)
    return cos.detach(), sin.detach()


@prepared
def _prepare_append(
    lengths: Tensor, block_table: Tensor, n_new: int, n_queries: int, block_size: int, moving: bool
) -> Launch:
    """A launch whose leading arguments are lengths, block_table and the results."""
    from lmops.kernels.paged_cache import append_slots_kernel

    n_seqs, block = lengths.shape[0], 128
    return Launch(
        append_slots_kernel, (-(-n_seqs * max(n_new, n_queries, 1) // block),), n_seqs, n_new, n_queries,
        block_table.shape[1], block_size, lengths.stride(0), block_table.stride(), MOVING=moving, BLOCK=block,
        num_warps=4,
    )  # fmt: skip


def _append_triton(
    lengths: Tensor, block_table: Tensor, n_new: int, n_queries: int, block_size: int, moving: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    results = _append_fake(lengths, block_table, n_new, n_queries, block_size, moving)
    if lengths.shape[0]:
        launch = _prepare_append(lengths, block_table, n_new, n_queries, block_size, moving)
        launch(lengths, block_table, *results)
    return results


def _append_fake(
    lengths: Tensor, block_table: Tensor, n_new: int, n_queries: int, block_size: int, moving: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_seqs = lengths.shape[0]
    slots = lengths.new_empty(n_seqs * n_new, dtype=torch.int64)
    places = slots.new_empty(n_seqs, n_queries)
    return slots, slots.new_empty(n_seqs * n_new), places, lengths.new_empty(n_seqs)


def _append_cpu(
    lengths: Tensor, block_table: Tensor, n_new: int, n_queries: int, block_size: int, moving: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    room = block_table.shape[1] * block_size
    if lengths.numel() and not 0 <= lengths.min() <= lengths.max() <= room - n_new:
        raise ValueError(
            f"cache_seqlens with the tokens of k must be at most {room}, what the cache has room for, and not negative,"
            f" got {lengths.tolist()} and {n_new} tokens"
        )
    return append_slots_of_reference(lengths, block_table, n_new, n_queries, block_size, moving)


append_slots_forward = define_op(
    "append_slots(Tensor cache_seqlens, Tensor block_table, SymInt n_new, SymInt n_queries, SymInt block_size,"
    " bool moving) -> (Tensor, Tensor, Tensor, Tensor)",
    triton=_append_triton,
    torch_cpu=_append_cpu,
    fake=_append_fake,
)


def append_slots(
    cache_seqlens: Tensor, block_table: Tensor, n_new: int, n_queries: int, block_size: int, *, moving: bool = True
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where n_new tokens go that are appended to each of the sequences of a block table, in one launch.

    cache_seqlens: (S,) int32, the tokens that are there. block_table: (S, width) int32, of blocks of block_size slots.
    Returns slots and positions of the new tokens, (S n_new,) int64, as `store_kv` takes them; positions of n_queries
    queries, (S, n_queries) int64, cache_seqlens[s] + i, or all cache_seqlens[s] if not moving; and the numbers of
    tokens that are there then, (S,) int32.

    A token has slot -1 where the table ends before it or has a number below 0. On a CPU one that the table ends before
    raises ValueError; on a GPU looking would stall the stream.
    Raises TypeError and ValueError for tensors that do not fit together.
    """
    for name, t, ndim in (("cache_seqlens", cache_seqlens, 1), ("block_table", block_table, 2)):
        if t.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {t.dtype}")
        if t.ndim != ndim or t.shape[0] != cache_seqlens.shape[0] or t.device != cache_seqlens.device:
            raise ValueError(
                "cache_seqlens must be (sequences,) and block_table (sequences, blocks) on one device, got"
                f" {tuple(cache_seqlens.shape)} on {cache_seqlens.device} and {tuple(block_table.shape)} on"
                f" {block_table.device}"
            )
    return append_slots_forward(cache_seqlens, block_table, n_new, n_queries, block_size, moving)


@prepared
def _prepare_copy(k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, copies: Tensor) -> Launch:
    """A launch whose leading arguments are the tensors."""
    from lmops.kernels.paged_cache import copy_blocks_kernel

    n_blocks, block_size, n_heads, width = k.shape
    format = FORMATS.get(k.dtype, "native")
    unit = _unit(k, v)
    per_row = max(1, _next_power_of_2(max(width, v.shape[3])) * k.element_size() // 16)
    slots = max(1, min(_next_power_of_2(block_size), 128 // per_row))
    return Launch(
        copy_blocks_kernel, (copies.shape[0], n_heads), n_blocks, _in_units(k, unit), _in_units(v, unit),
        _with_column(k_scale, format), _with_column(v_scale, format),
        D=width, DV=v.shape[3], SCALES=0 if k_scale is None else 2 if format == "int4" else 1, BLOCK_SIZE=block_size,
        COUNTS=copies.shape[1] == 3, SLOTS=slots, VEC=unit,
        num_warps=max(1, min(4, slots * per_row // warp_size())),
    )  # fmt: skip


def _copy_triton(k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, copies: Tensor) -> None:
    if copies.shape[0] == 0 or k.shape[2] == 0:
        return
    copies = copies.contiguous()
    launch = _prepare_copy(k, v, k_scale, v_scale, copies)
    # as integers, which are copied as they are
    k, v = (t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[t.element_size()]) for t in (k, v))
    launch(k, v, k_scale, v_scale, copies)


def _copy_cpu(k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, copies: Tensor) -> None:
    n_blocks, block_size = k.shape[:2]
    _check_copies(copies.tolist(), n_blocks, block_size)
    offset = torch.arange(block_size)
    which, offset = (
        (offset < (copies[:, 2:] if copies.shape[1] == 3 else block_size))
        .expand(len(copies), block_size)
        .nonzero(as_tuple=True)
    )
    src, dst = copies[which, 0], copies[which, 1]
    for t in (k, v, k_scale, v_scale):
        if t is not None:
            t = t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t
            t[dst, offset] = t[src, offset]


def _check_copies(copies: Sequence[Sequence[int]], n_blocks: int, block_size: int) -> None:
    blocks = [block for src, dst, *_ in copies for block in (src, dst)]
    if blocks and not 0 <= min(blocks) <= max(blocks) < n_blocks:
        raise ValueError(f"copies must be of blocks 0 to {n_blocks - 1}, got {min(blocks)} to {max(blocks)}")
    counts = [n for _, _, *count in copies for n in count]
    if counts and not 0 <= min(counts) <= max(counts) <= block_size:
        raise ValueError(f"copies must be of 0 to {block_size} tokens, got {min(counts)} to {max(counts)}")
    sources, targets = set(blocks[::2]), blocks[1::2]
    for block, n in Counter(targets).items():
        if n > 1 or block in sources:
            role = "copied to more than once" if n > 1 else "both copied and copied to"
            raise ValueError(f"copies must be of blocks that are written once and not read, got block {block} {role}")


copy_blocks_forward = define_op(
    "copy_blocks(Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor copies) -> ()",
    triton=_copy_triton,
    torch_cpu=_copy_cpu,
    fake=_no_result,
)


def copy_blocks(pages: KVPages, copies: Tensor | Sequence[Sequence[int]]) -> None:
    """Copies blocks of pages to others, all in one launch: keys, values and scales.

    pages: of one layer, or of several as heads: `PagedKVCache.pages` are those of all layers.
    copies: (n, 2) int64 on the pages' device, src and dst, or (n, 3), and how many slots of the block, the others of
        dst being left as they are; or a sequence of such tuples, such as `lmops.cache.BlockCopy`. They are made at the
        same time: a dst may be there once, and as no src.

    ValueError for blocks and counts that are not there and for a dst given twice or as a src, before anything is
    written; of a tensor on a GPU, where looking would stall the stream, blocks that are not there are left out.
    TypeError for other types.
    """
    if not isinstance(copies, Tensor):
        rows = [tuple(copy) for copy in copies]
        if not rows:
            return
        if {len(row) for row in rows} not in ({2}, {3}):
            raise ValueError(f"copies must be tuples (src, dst) or (src, dst, n_tokens), got {rows[0]}")
        if not all(isinstance(number, int) for row in rows for number in row):
            raise TypeError(f"copies must be tuples of int, got {rows[0]}")
        _check_copies(rows, pages.n_blocks, pages.block_size)
        copies = torch.tensor(rows, dtype=torch.int64).to(pages.k.device, non_blocking=True)
    if copies.dtype != torch.int64:
        raise TypeError(f"copies must be int64, got {copies.dtype}")
    if copies.ndim != 2 or copies.shape[1] not in (2, 3):
        raise ValueError(f"copies must be (n, 2) or (n, 3), got {tuple(copies.shape)}")
    if copies.device != pages.k.device:
        raise ValueError(f"copies must be on {pages.k.device} like the pages, got {copies.device}")
    copy_blocks_forward(pages.k, pages.v, pages.k_scale, pages.v_scale, copies)


def swap_blocks(src_pages: KVPages, dst_pages: KVPages, pairs: Sequence[tuple[int, int]]) -> None:
    """Copies whole blocks between pages on different devices, or of different caches: keys, values and scales.

    pairs: (block of src_pages, block of dst_pages). A gather, a copy and a scatter a tensor, without the gather or the
    scatter where the blocks are all of the pages in order. To such pages in pinned memory the copy from a GPU is
    asynchronous, as it is from them: the stream is to be synchronized before the host reads or writes them.
    ValueError for pages of another geometry or format, for blocks that are not there, and for one written twice.
    """
    both = list(zip(_tensors(src_pages), _tensors(dst_pages), strict=False))
    for name, a, b in zip(("k", "v", "k_scale", "v_scale"), *zip(*both, strict=True), strict=False):
        if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
            raise ValueError(
                f"dst_pages must be like src_pages: {name} of shape (blocks, {', '.join(map(str, a.shape[1:]))}) and "
                f"{a.dtype}, got {tuple(b.shape)} and {b.dtype}"
            )
    sources, targets = [src for src, _ in pairs], [dst for _, dst in pairs]
    for numbers, pages, side in ((sources, src_pages, "src_pages"), (targets, dst_pages, "dst_pages")):
        if numbers and not 0 <= min(numbers) <= max(numbers) < pages.n_blocks:
            raise ValueError(
                f"pairs must be of blocks 0 to {pages.n_blocks - 1} of {side}, got {min(numbers)} to {max(numbers)}"
            )
    if len(set(targets)) < len(targets):
        raise ValueError(f"pairs must have each block of dst_pages once, got {targets}")
    if not pairs:
        return
    src_index = torch.tensor(sources).to(src_pages.k.device, non_blocking=True)
    dst_index = torch.tensor(targets).to(dst_pages.k.device, non_blocking=True)
    whole_src, whole_dst = sources == list(range(src_pages.n_blocks)), targets == list(range(dst_pages.n_blocks))
    for src, dst in both:
        rows = src if whole_src else src.index_select(0, src_index)
        if whole_dst:
            dst.copy_(rows, non_blocking=True)
        else:
            dst.index_copy_(0, dst_index, rows.to(dst.device, non_blocking=dst.is_cuda))


def _tensors(pages: KVPages) -> list[Tensor]:
    """The tensors of pages, fp8 as bytes."""
    tensors = [t for t in (pages.k, pages.v, pages.k_scale, pages.v_scale) if t is not None]
    return [t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t for t in tensors]
