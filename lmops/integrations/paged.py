"""transformers: `PagedCache`, the paged KV cache for `model.generate(past_key_values=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.cache_utils import Cache, CacheLayerMixin

from lmops.cache.allocator import PagedSequence
from lmops.cache.paged import PagedBatch, PagedKVCache
from lmops.ops.paged_attention import paged_attention_of_tokens
from lmops.ops.paged_cache import Format, KVPages, store_kv
from lmops.reference.paged_cache import dequantize_rows


@dataclass
class _Step:
    """What a call of the model needs of the cache, for all layers.

    n_new, n_tokens: tokens of a row, padding included: new ones, and all. pads: (B,), how many of all are padding at
    the start; None where none are. real: of the B n_new new tokens those that are not padding; None for all.
    """

    batch: PagedBatch
    n_new: int
    n_tokens: int
    pads: Tensor | None
    real: Tensor | None
    agrees: dict[tuple[int, int | None], tuple[Tensor, bool]] = field(default_factory=dict)  # the mask keeps its id

    def says_the_same(self, mask: Tensor, left: int | None) -> bool:
        """Whether a mask hides what a causal one with this window and padding does; looked at once a mask."""
        key = (id(mask), left)
        if key not in self.agrees:
            if mask.dtype != torch.bool or self.pads is None:
                return False
            keys = torch.arange(self.n_tokens, device=mask.device)
            queries = keys[self.n_tokens - self.n_new :, None]
            expected = (keys <= queries) & (keys >= self.pads[:, None, None, None])
            if left is not None:
                expected &= queries - keys <= left
            self.agrees[key] = mask, expected.shape == mask.shape and bool((expected == mask).all())
        return self.agrees[key][1]


class PagedStates(Tensor):
    """What a layer gets back from the cache: stands for keys or values (B, KV, tokens, D) without holding them.

    Attention of lmops reads the pages; anything else that computes with it makes a dense copy first.
    """

    step: _Step
    pages: KVPages
    is_key: bool

    @staticmethod
    def __new__(cls, step: _Step, pages: KVPages, is_key: bool, dtype: torch.dtype) -> PagedStates:
        dim = pages.head_dim if is_key else pages.value_dim
        shape = (len(step.batch.context_lens), pages.n_kv_heads, step.n_tokens, dim)
        states = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=pages.k.device)
        states.step, states.pages, states.is_key = step, pages, is_key
        return states

    def __init__(self, *args: Any) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PagedStates({tuple(self.shape)}, {self.dtype}, {self.device})"

    def dense(self) -> Tensor:
        """The keys or values themselves, copied from the pages; 0 for padding."""
        step, pages = self.step, self.pages
        places = torch.arange(step.n_tokens, device=self.device).expand(len(step.batch.context_lens), -1)
        if step.pads is not None:
            places = places - step.pads[:, None]
        at = places.clamp(min=0)
        blocks, slots = step.batch.block_table.long().gather(1, at // pages.block_size), at % pages.block_size
        codes, scales = (pages.k, pages.k_scale) if self.is_key else (pages.v, pages.v_scale)
        rows = dequantize_rows(codes[blocks, slots], None if scales is None else scales[blocks, slots], self.dtype)
        return rows.masked_fill((places < 0)[..., None, None], 0).transpose(1, 2)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(PagedStates, lambda states: states.dense(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def attend(
        self, query: Tensor, scale: float | None, causal: bool, left: int | None, softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attention of query (B, H, n_new, D) over the pages, (B, n_new, H, Dv); 0 for padding."""
        step, batch = self.step, self.step.batch
        rows = query.transpose(1, 2).flatten(0, 1)
        if self.pages.k_scale is None and rows.dtype != self.pages.k.dtype:  # under autocast
            rows = rows.float()
        out, _ = paged_attention_of_tokens(
            rows if step.real is None else rows[step.real], self.pages, batch.block_table, batch.context_lens,
            cu_q=None if step.real is None else batch.cu_seqlens_q,
            max_q=step.n_new if step.real is None else batch.max_seqlen_q,
            scale=scale, causal=causal, window=(left, None), softcap=softcap, sinks=sinks,
        )  # fmt: skip
        if step.real is not None:
            out = out.new_zeros(len(rows), *out.shape[1:]).index_copy_(0, step.real, out)
        return out.view(query.shape[0], query.shape[2], query.shape[1], -1).to(query.dtype)


class _Layer(CacheLayerMixin):
    """A layer's end of a `PagedCache`, in the interface of transformers."""

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: PagedCache, index: int) -> None:
        super().__init__()
        self.cache, self.index, self.n_tokens = cache, index, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        pass

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.cache.store(self, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_tokens + query_length, 0

    def get_seq_length(self) -> int:
        return self.n_tokens

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """Keys and values of `model.generate` in blocks of a fixed pool, which grow as tokens come and are shared by beams.

        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="lmops")
        cache = PagedCache(model, n_tokens=4096, attention_mask=inputs["attention_mask"])
        model.generate(**inputs, past_key_values=cache)

    model: of transformers, a decoder. n_tokens: what the pool holds, of all rows together.
    attention_mask: (B, T) of prompts that are padded on the left: their padding takes no memory. block_size: tokens a
    block. pages: "native", in the model's dtype, or "int8", "fp8" or "int4".

    Attention of lmops (attn_implementation="lmops", or after `lmops.optimize`) reads the pages in place where a row
    sees all that came before, or a window of it, and no padding but that given here. Other masks, and other
    implementations of attention, get dense copies, which is right and slow. Layers with a window keep all tokens.
    Without gradients only.
    Raises lmops.cache.OutOfBlocksError where the pool is full, with nothing changed; ValueError for a model of unknown
    sizes, another padding, or a batch of another size than the cache's.
    """

    layers: list[_Layer]  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        n_tokens: int,
        *,
        attention_mask: Tensor | None = None,
        block_size: int = 16,
        pages: Format = "native",
    ) -> None:
        config: Any = model.config
        config = config.get_text_config(decoder=True)
        n_heads = getattr(config, "num_attention_heads", None)
        if n_heads is None or getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model must be a decoder with num_attention_heads, got {type(model).__name__}")
        self._given_pads = [] if attention_mask is None else _left_padding(attention_mask)
        parameter = next(p for p in model.parameters() if p.is_floating_point())
        self._dtype = parameter.dtype
        self.paged = PagedKVCache(
            -(-n_tokens // block_size), n_layers=config.num_hidden_layers,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // n_heads, block_size=block_size,
            dtype=parameter.dtype, pages=pages, device=parameter.device, prefix_caching=False,
        )  # fmt: skip
        self.sequences: list[PagedSequence] = []
        self.pads: list[int] = []  # of each sequence
        self.step: _Step | None = None
        super().__init__(layers=[_Layer(self, i) for i in range(config.num_hidden_layers)])

    def store(self, layer: _Layer, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values (B, KV, T, D) of a layer; what stands for all of them."""
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise NotImplementedError("a PagedCache has no gradient: call the model under torch.no_grad()")
        n_rows, _, n_new, _ = keys.shape
        if self.sequences and len(self.sequences) != n_rows:
            raise ValueError(f"the cache has {len(self.sequences)} sequences, the batch {n_rows}: reset() it first")
        if self.step is None or layer.n_tokens == self.step.n_tokens:  # the first layer of a call of the model
            self.step = self._begin(n_rows, n_new, layer.n_tokens)
        elif layer.n_tokens + n_new != self.step.n_tokens:
            raise ValueError(
                f"layer {layer.index} has {layer.n_tokens} tokens and gets {n_new}, others have {self.step.n_tokens}"
            )
        layer.n_tokens += n_new
        step, pages = self.step, self.paged.layers[layer.index]
        k, v = (t.transpose(1, 2).flatten(0, 1).to(self._dtype) for t in (keys, values))  # under autocast they differ
        if step.real is not None:
            k, v = k[step.real], v[step.real]
        store_kv(k, v, pages, step.batch.slot_mapping)
        return PagedStates(step, pages, True, keys.dtype), PagedStates(step, pages, False, values.dtype)

    def _begin(self, n_rows: int, n_new: int, n_before: int) -> _Step:
        """Room for the new tokens of all rows."""
        sequences, pads = self.sequences, self.pads
        if not sequences:
            pads = self._given_pads or [0] * n_rows
            if n_rows % len(pads):
                raise ValueError(
                    f"attention_mask has {len(pads)} rows, the batch {n_rows}, which is no multiple of them"
                )
            pads = [pad for pad in pads for _ in range(n_rows // len(pads))]  # several samples of each prompt
            sequences = [self.paged.new_sequence() for _ in range(n_rows)]
        n_tokens = n_before + n_new
        new = [max(0, n_tokens - pad) - max(0, n_before - pad) for pad in pads]
        try:
            batch = self.paged.append(sequences, new)
        except BaseException:
            for sequence in sequences if not self.sequences else ():
                self.paged.free(sequence)
            raise
        self.sequences, self.pads = sequences, pads
        real = None
        if min(new) < n_new:
            places = [row * n_new + i for row, n in enumerate(new) for i in range(n_new - n, n_new)]
            real = torch.tensor(places, device=self.paged.device)
        hidden = torch.tensor(pads, device=self.paged.device) if any(pads) else None
        return _Step(batch, n_new, n_tokens, hidden, real)

    def _take(self, rows: Sequence[int]) -> None:
        """Copies of these rows in place of those that there are."""
        taken = [self.paged.fork(self.sequences[row]) for row in rows]
        for old in self.sequences:
            self.paged.free(old)
        self.sequences, self.pads = taken, [self.pads[row] for row in rows]

    def reset(self) -> None:
        """Free all blocks."""
        self._take(())
        self.step = None
        for layer in self.layers:
            layer.n_tokens = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; rows of the same past share its blocks until they are written to."""
        self._take(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self._take((indices.nonzero().flatten() if indices.dtype == torch.bool else indices).tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row several times."""
        self._take([row for row in range(len(self.sequences)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens of every row. ValueError for a positive number."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative, so many tokens are removed, got {tokens_to_remove}")
        keep = max(0, self.get_seq_length() + tokens_to_remove)
        for sequence, pad in zip(self.sequences, self.pads, strict=True):
            self.paged.truncate(sequence, max(0, keep - pad))
        self.step = None
        for layer in self.layers:
            layer.n_tokens = keep


def _left_padding(attention_mask: Tensor) -> list[int]:
    """How many tokens of each row are padding, which must all stand before the others."""
    mask = attention_mask.bool()
    pads = (mask.cumsum(-1) == 0).sum(-1)
    if mask.ndim != 2 or not mask.numel() or (pads + mask.sum(-1) != mask.shape[-1]).any():
        raise ValueError(
            "attention_mask must be (batch, tokens) with the padding of each row on the left, got shape "
            f"{tuple(attention_mask.shape)}" + (" with padding elsewhere" if mask.ndim == 2 and mask.numel() else "")
        )
    return pads.tolist()
