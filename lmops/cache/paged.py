"""A paged KV cache with its tensors: allocator and pages in step."""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from lmops.cache.allocator import BlockAllocator, PagedSequence, SwappedSequence
from lmops.cache.plan import CachePlan, plan_cache
from lmops.cache.prefix import PrefixCache
from lmops.ops._register import OPERATORS
from lmops.ops.paged_attention import paged_attention_of_tokens
from lmops.ops.paged_cache import FLOATS, Format, KVPages, copy_blocks, store_kv, swap_blocks

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": torch.uint8}


@dataclass(frozen=True)
class PagedBatch:
    """Where the new tokens of some sequences go, and where their context is: made once a step, for all layers.

        for i in range(n_layers):
            q, k, v = ...                     # of the new tokens: (T, H, D), (T, KV, D), (T, KV, D)
            y = batch.attend(i, q, k, v)      # (T, H, D); k and v are in the cache

    The new tokens of the S sequences stand one after another, T in all. Everything is on the cache's device.

    Attributes:
        block_table: (S, max_blocks) int32. Token i of sequence s is in block block_table[s, i // block_size]. -1 behind
            the last block, and where a block was released.
        context_lens: (S,) int32, tokens of each sequence, the new ones included.
        cu_seqlens_q: (S + 1,) int32, where the new tokens of each sequence begin among the T, and T.
        max_seqlen_q: the most new tokens of a sequence.
        max_context: the largest of context_lens.
        slot_mapping: (T,) int64, the slot of each new token, for `store_kv`.
        positions: (T,) int64, the place of each new token in its sequence.
        layers, window: the cache's.
        rows: of sequences with one new token each, on a CPU, what they read and write in memory; or None.
    """

    block_table: Tensor
    context_lens: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    max_context: int
    slot_mapping: Tensor
    positions: Tensor
    layers: Sequence[KVPages] = field(repr=False)
    window: int | None
    rows: Sequence[_Row] | None = field(default=None, repr=False)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """Stores key (T, KV, D) and value (T, KV, Dv) of the new tokens, and gives attention of query (T, H, D).

        options: of `lmops.ops.paged_attention.paged_attention_of_tokens`: scale, softcap, slopes, sinks and more.
        Returns (T, H, Dv).
        """
        pages = self.layers[layer]
        if self.rows is not None and not options and not torch.is_grad_enabled() and self._one_each(query, key, value):
            return self._attend_rows(layer, query, key, value)
        store_kv(key, value, pages, self.slot_mapping)
        # equally many new tokens of each sequence need no list of where they begin
        ragged = len(query) != len(self.context_lens) * self.max_seqlen_q
        out, _ = paged_attention_of_tokens(
            query, pages, self.block_table, self.context_lens, cu_q=self.cu_seqlens_q if ragged else None,
            max_q=self.max_seqlen_q, window=(None if self.window is None else self.window - 1, None), **options,
        )  # fmt: skip
        return out

    def _one_each(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether these are what `_attend_rows` takes, which checks nothing; for others there are the operators."""
        pages = self.layers[0]
        shape = (len(self.context_lens), pages.n_kv_heads, pages.head_dim)
        return (
            key.shape == value.shape == shape
            and query.shape[::2] == shape[::2]
            and query.shape[1] % shape[1] == 0
            and query.dtype == key.dtype == value.dtype == pages.k.dtype
        )

    def _attend_rows(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The same by torch's attention alone: what the operators check and look up a layer has been done a step."""
        assert self.rows is not None
        new, outs = (query.unsqueeze(2), key, value), []
        parts = [(t,) for t in new] if len(self.rows) == 1 else [t.split(1) for t in new]
        for row, q, k, v in zip(self.rows, *parts, strict=True):
            row.key[layer].copy_(k)
            row.value[layer].copy_(v)
            outs.append(torch._scaled_dot_product_flash_attention_for_cpu(q, row.keys[layer], row.values[layer])[0])
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).view(query.shape)


@dataclass(frozen=True)
class _Row:
    """Views of a sequence's memory in each layer: of its last token (1, KV, D), and of all visible (1, KV, n, D)."""

    key: Sequence[Tensor]
    value: Sequence[Tensor]
    keys: Sequence[Tensor]
    values: Sequence[Tensor]


@dataclass(frozen=True)
class SwappedPages:
    """A sequence that was swapped out: what the allocator knew of it, and its blocks in host memory, all layers'."""

    record: SwappedSequence
    pages: KVPages


class PagedKVCache:
    """Keys and values of many sequences in blocks of a fixed pool, in all layers.

    Its methods keep the allocator's tables and the tensors in step; sequences are to be changed by them alone.

        cache = PagedKVCache(512, n_layers=30, n_kv_heads=3, head_dim=64)
        seq = cache.new_sequence(prompt)                      # finds what is cached of it
        batch = cache.append([seq], [len(prompt) - seq.n_tokens])
        for layer in range(30):
            y = batch.attend(layer, q, k, v)                  # stores k and v, and attends to all that is there
        cache.register(seq, prompt)                           # so that others find it

    Attributes:
        layers: the pages of each layer. Of a head all blocks lie one after another in memory, so blocks in a row are
            one piece of (tokens, head_dim).
        pages: the same as pages of one layer that has all layers' heads: layer l has the heads from l * n_kv_heads on.
        allocator: which block belongs to whom.
        prefix: finds what is cached, or None.
        plan: how many tokens fit; str(cache) says it.
        window: how many tokens back a query sees, itself included, in every layer; None: all of them. Blocks that no
            later token will see are released by `append`.
    """

    def __init__(
        self,
        n_blocks: int,
        *,
        n_layers: int,
        n_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        block_size: int = 16,
        dtype: torch.dtype = torch.float16,
        pages: Format = "native",
        device: torch.device | str | None = None,
        prefix_caching: bool = True,
        window: int | None = None,
    ) -> None:
        """n_blocks blocks of block_size tokens (1 to 256).

        value_dim: elements of a value, head_dim by default. dtype: of the model, float16, bfloat16 or float32.
        pages: "native", in dtype; "int8", "fp8" or "int4", with scales in float16, or float32 where dtype is that.
        Memory is taken and not filled. Raises ValueError and TypeError for what is not possible.
        """
        self.allocator = BlockAllocator(n_blocks, block_size)
        block_plan = _plan(0, n_layers, n_kv_heads, head_dim, value_dim, block_size, dtype, pages)
        budget = n_blocks * block_plan.block_bytes
        self.plan = CachePlan(n_blocks, block_size, block_plan.block_bytes, budget)
        if window is not None and (not isinstance(window, int) or window < 1):
            raise ValueError(f"window must be at least 1 token, or None, got {window}")
        self.window = window
        self.prefix = PrefixCache(self.allocator) if prefix_caching else None

        def memory(dtype: torch.dtype, *columns: int) -> Tensor:
            shape = (n_layers, n_kv_heads, n_blocks, block_size, *columns)
            return torch.empty(shape, dtype=dtype, device=device)

        value_dim = head_dim if value_dim is None else value_dim
        if pages == "native":
            stored = [memory(dtype, head_dim), memory(dtype, value_dim)]
        else:
            per_byte, columns = (2, (2,)) if pages == "int4" else (1, ())
            stored = [memory(CODES[pages], dim // per_byte) for dim in (head_dim, value_dim)]
            stored += [memory(_scale_dtype(dtype), *columns) for _ in range(2)]
        # (heads, n_blocks, block_size, ...) as (n_blocks, block_size, heads, ...)
        self.pages = KVPages(*(t.flatten(0, 1).movedim(0, 2) for t in stored))
        self.layers = [KVPages(*(t[layer].movedim(0, 2) for t in stored)) for layer in range(n_layers)]
        # (n_layers, 1, heads, slots, columns), where torch's attention on a CPU can read it as it stands
        plain = pages == "native" and value_dim == head_dim and _by_torch(self.device)
        self._slots = [t.flatten(2, 3).unsqueeze(1) for t in stored] if plain else None

    @classmethod
    def for_memory(
        cls,
        n_bytes: int,
        config: Any,
        *,
        value_dim: int | None = None,
        block_size: int = 16,
        dtype: torch.dtype = torch.float16,
        pages: Format = "native",
        device: torch.device | str | None = None,
        prefix_caching: bool = True,
        window: int | None = None,
    ) -> PagedKVCache:
        """A cache with as many blocks as fit n_bytes.

        config: has n_layers, n_kv_heads and head_dim, such as `lmops.GPTConfig`, whose attention_window is the window
            unless one is given; or is one of transformers' configurations.
        The others are those of PagedKVCache. ValueError if not one block fits, or for a config without these sizes.
        """
        # of a model of text and images, the part that has this cache
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        n_layers = _first_of(config, "n_layers", "num_hidden_layers")
        n_kv_heads = _first_of(config, "n_kv_heads", "num_key_value_heads", "num_attention_heads")
        head_dim = getattr(config, "head_dim", None)
        if head_dim is None:
            head_dim = _first_of(config, "hidden_size") // _first_of(config, "num_attention_heads")
        plan = _plan(n_bytes, n_layers, n_kv_heads, head_dim, value_dim, block_size, dtype, pages)
        if plan.n_blocks == 0:
            raise ValueError(f"n_bytes must be at least {plan.block_bytes}, which a block takes, got {n_bytes}")
        cache = cls(
            plan.n_blocks, n_layers=n_layers, n_kv_heads=n_kv_heads, head_dim=head_dim, value_dim=value_dim,
            block_size=block_size, dtype=dtype, pages=pages, device=device, prefix_caching=prefix_caching,
            window=getattr(config, "attention_window", None) if window is None else window,
        )  # fmt: skip
        cache.plan = plan
        return cache

    def __str__(self) -> str:
        return str(self.plan)

    @property
    def device(self) -> torch.device:
        return self.pages.k.device

    def new_sequence(self, tokens: Sequence[int] | None = None, salt: Hashable = None) -> PagedSequence:
        """A new sequence, without tokens, or with those first ones of a prompt that are cached.

        tokens: of the prompt. At least the last one is left to compute: seq.n_tokens of them are there.
        salt: whose it is, e.g. of an adapter or a tenant; salts that differ never share.
        """
        if tokens is None or self.prefix is None:
            return self.allocator.allocate(0, salt=salt)
        return self.prefix.allocate(tokens, salt, max_new=0)

    def append(self, seqs: Sequence[PagedSequence], n_tokens: Sequence[int]) -> PagedBatch:
        """Slots for n_tokens[i] more tokens of each seqs[i], and where everything is.

        Blocks that are shared and will be written to are copied. OutOfBlocksError if there are not enough blocks for
        all; nothing is changed then. ValueError for sequences that are not the cache's, or given twice.
        """
        starts = [seq.n_tokens for seq in seqs]
        copies = [copy for appended in self.allocator.append_all(seqs, n_tokens) for copy in appended.copies]
        copy_blocks(self.pages, copies)
        if self.window is not None:  # after the copies, which may read what is released
            for seq, start in zip(seqs, starts, strict=True):
                self.allocator.release_before(seq, max(0, start - self.window + 1))
        return self._batch(seqs, starts)

    def _batch(self, seqs: Sequence[PagedSequence], starts: Sequence[int]) -> PagedBatch:
        width = max((len(seq.blocks) for seq in seqs), default=0)
        table, slots, positions = array("i", [-1]) * (width * len(seqs)), array("q"), array("q")
        ends, most = [0], 0
        for i, (seq, start) in enumerate(zip(seqs, starts, strict=True)):
            table[i * width : i * width + len(seq.blocks)] = array("i", seq.blocks)
            slots.extend(self.allocator.slots(seq, start))
            positions.extend(range(start, seq.n_tokens))
            ends.append(len(slots))
            most = max(most, seq.n_tokens - start)
        lengths = [seq.n_tokens for seq in seqs]
        one_each = self._slots is not None and most == 1 and len(slots) == len(seqs)
        found = [self._row(seq) for seq in seqs] if one_each else []
        rows = [row for row in found if row is not None]
        return PagedBatch(
            block_table=self._tensor(table, torch.int32).view(len(seqs), width),
            context_lens=self._tensor(array("i", lengths), torch.int32),
            cu_seqlens_q=self._tensor(array("i", ends), torch.int32),
            max_seqlen_q=most,
            max_context=max(lengths, default=0),
            slot_mapping=self._tensor(slots, torch.int64),
            positions=self._tensor(positions, torch.int64),
            layers=self.layers,
            window=self.window,
            rows=rows if rows and len(rows) == len(seqs) else None,
        )

    def _row(self, seq: PagedSequence) -> _Row | None:
        """None where the blocks do not follow one another."""
        first = 0 if self.window is None else max(0, seq.n_tokens - self.window)
        size = self.allocator.block_size
        blocks = seq.blocks[first // size :]
        start = blocks[0]
        if blocks != list(range(start, start + len(blocks))):
            return None
        begin, n = start * size + first % size, seq.n_tokens - first
        assert self._slots is not None
        key, value = (t.narrow(3, begin + n - 1, 1).transpose(2, 3)[:, 0].unbind() for t in self._slots)
        keys, values = (t.narrow(3, begin, n).unbind() for t in self._slots)
        return _Row(key, value, keys, values)

    def _tensor(self, numbers: array, dtype: torch.dtype) -> Tensor:
        if not numbers:
            return torch.empty(0, dtype=dtype, device=self.device)
        # to a GPU: the numbers are taken at once, and the copy waits for nothing
        return torch.frombuffer(numbers, dtype=dtype).to(self.device, non_blocking=True)

    def register(self, seq: PagedSequence, tokens: Sequence[int]) -> None:
        """Makes the full blocks of the sequence's first tokens findable, whose keys and values have been written.

        tokens: the sequence's from its start. Does nothing without a prefix cache.
        """
        if self.prefix is not None:
            self.prefix.register(seq, tokens)

    def fork(self, seq: PagedSequence) -> PagedSequence:
        """A second sequence with the same tokens, which shares blocks until one of the two is appended to."""
        return self.allocator.fork(seq)

    def free(self, seq: PagedSequence) -> None:
        """Ends the sequence. Its registered blocks stay findable until they are needed."""
        self.allocator.free(seq)

    def truncate(self, seq: PagedSequence, n_tokens: int) -> None:
        """Keeps the first n_tokens tokens. ValueError for more than there are, or an end behind the window."""
        self.allocator.truncate(seq, n_tokens)

    def release_before(self, seq: PagedSequence, position: int) -> int:
        """Gives up the blocks whose tokens all stand before `position`, and says how many."""
        return self.allocator.release_before(seq, position)

    def swap_out(self, seq: PagedSequence) -> SwappedPages:
        """Frees the sequence, and keeps its blocks in host memory, pinned where the cache is on a GPU.

        There the copy is asynchronous: the stream is to be synchronized before the host reads it; `swap_in` on the
        same stream needs none.
        """
        self.allocator.slots(seq, seq.n_tokens)  # a sequence of this cache
        blocks = seq.blocks[seq.n_released :]

        def host(t: Tensor | None) -> Tensor | None:
            shape = None if t is None else (len(blocks), *t.shape[1:])
            return None if t is None else torch.empty(shape, dtype=t.dtype, pin_memory=t.is_cuda)  # type: ignore[arg-type]

        p = self.pages
        saved = KVPages(host(p.k), host(p.v), host(p.k_scale), host(p.v_scale))  # type: ignore[arg-type]
        swap_blocks(p, saved, list(zip(blocks, range(len(blocks)), strict=True)))
        return SwappedPages(self.allocator.swap_out(seq)[1], saved)

    def swap_in(self, swapped: SwappedPages) -> PagedSequence:
        """The sequence again. OutOfBlocksError if there are not enough blocks; ValueError for one of another cache.

        `swapped` stays good, also for a second sequence.
        """
        swap_blocks(swapped.pages, self.pages, [])  # the same geometry
        seq, pairs = self.allocator.swap_in(swapped.record)
        swap_blocks(swapped.pages, self.pages, pairs)
        return seq

    def check_integrity(self) -> None:
        """RuntimeError if the allocator's state is inconsistent. Reads everything: for tests."""
        self.allocator.check_integrity()


def _by_torch(device: torch.device) -> bool:
    return device.type == "cpu" and OPERATORS["paged_attention"].implementation("cpu")[0] == "torch"


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float32 else torch.float16


def _plan(
    n_bytes: int, n_layers: int, n_kv_heads: int, head_dim: int, value_dim: int | None, block_size: int,
    dtype: torch.dtype, pages: str,
) -> CachePlan:  # fmt: skip
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if pages not in get_args(Format):
        raise ValueError(f"pages must be one of {', '.join(get_args(Format))}, got {pages!r}")
    width = {"native": dtype.itemsize, "int8": 1, "fp8": 1, "int4": 0.5}[pages]
    n_scales = {"native": 0, "int8": 1, "fp8": 1, "int4": 2}[pages]
    return plan_cache(
        n_bytes, n_layers=n_layers, n_kv_heads=n_kv_heads, head_dim=head_dim, value_dim=value_dim,
        block_size=block_size, bytes_per_element=width, scale_bytes=n_scales * _scale_dtype(dtype).itemsize,
    )  # fmt: skip


def _first_of(config: Any, *names: str) -> int:
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            return value
    raise ValueError(f"config must have {' or '.join(names)}, got {type(config).__name__} without")
