"""transformers: importing this registers attention, masks and a quantizer under the name "lmops".

    from lmops.integrations.transformers import LmopsConfig
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="lmops", quantization_config=LmopsConfig(4))

`lmops.optimize(model)` does the same to a model that is there already, and more. Tested with transformers 5.23.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lmops.ops.attention import attention
from lmops.ops.loss import cross_entropy
from lmops.ops.paged_attention import paged_attention
from lmops.ops.paged_cache import KVPages, store_kv

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import prepare_padding_mask, sdpa_mask

    from lmops.integrations.paged import PagedCache, PagedStates
    from lmops.integrations.quantizer import LmopsConfig, LmopsQuantizer
except ImportError as error:
    if not (error.name or "").startswith("transformers"):
        raise
    raise ImportError(
        f"transformers {transformers.__version__} lacks a hook that lmops uses (registries of attention functions, "
        f"masks and quantizers, layers of caches; tested with 5.23): {error}"
    ) from error

NAME = "lmops"
BATCHING_NAME = "lmops_flash"
__all__ = [
    "BATCHING_NAME",
    "NAME",
    "LmopsConfig",
    "LmopsQuantizer",
    "PagedCache",
    "attention_forward",
    "attention_mask",
    "batching_forward",
    "continuous_batching",
]


# -------------------------------------------------------------------------------------------------------- attention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query (B, H, Tq, D), key and value (B, KV, Tk, D) -> (B, Tq, H, D) and None.

    attention_mask: None, or (B or 1, H or 1, Tq, Tk), boolean (True takes part) or added to the scores; it holds all
        that is masked. Without one the layer's own `is_causal` and sliding_window count: the i-th query sees the keys
        up to the i-th, a single one all of them; this is what `attention_mask` below leaves out.
    s_aux: (H,), sinks. position_bias: added to the scores, broadcasts to them, has a gradient.
    Attention weights are never formed, so None takes their place. Raises ValueError for a mask of another rank.
    """
    if attention_mask is not None and attention_mask.ndim != 4:
        raise ValueError(
            f"attention_mask must be (batch, heads or 1, queries, keys) when it gets to attention, got shape "
            f"{tuple(attention_mask.shape)}"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    left = right = None
    bias = attention_mask
    if is_causal:
        left, right = None if sliding_window is None else sliding_window - 1, 0
    if (
        isinstance(key, PagedStates)
        and position_bias is None
        and not dropout
        and (attention_mask is None or (is_causal and key.step.says_the_same(attention_mask, left)))
    ):
        return key.attend(query, scaling, bool(is_causal), left, softcap, s_aux), None
    if attention_mask is not None:
        left = right = None
    if position_bias is not None:
        bias = position_bias
        if attention_mask is not None:
            boolean = attention_mask.dtype == torch.bool
            bias = bias.masked_fill(~attention_mask, float("-inf")) if boolean else bias + attention_mask
    if len(query) != len(key):  # learned queries are given once for all
        query = query.expand(len(key), -1, -1, -1)
    out, _ = attention(
        query, key, value, bias=bias, scale=scaling, left=left, right=right, bottom_right=query.shape[2] == 1,
        softcap=softcap, sinks=s_aux, dropout_p=dropout,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that goes with `attention_forward`: boolean (B, 1, q_length, kv_length), or None where flags say it all.

    None: no padding, and causal, causal with a sliding window, or bidirectional over everything. Arguments as those of
    transformers' `sdpa_mask`. Raises ValueError for a padding mask that is not (batch, keys), and NotImplementedError
    for a model whose layers do not take their attention from the registry: it would misread the mask.
    """
    if attention_mask is not None and attention_mask.ndim != 2:
        raise ValueError(
            "attention_mask must be (batch, keys), 1 for a token and 0 for padding, or a mask of all scores (batch, 1, "
            f"queries, keys); got shape {tuple(attention_mask.shape)}"
        )
    if not torch.compiler.is_compiling():
        source = _model_source(config)
        if _own_attention(source):
            raise NotImplementedError(
                f"{type(config).__name__}: the layers of this model compute their attention themselves, not through "
                'transformers\' AttentionInterface, so attn_implementation="lmops" cannot work; load it with "eager" '
                "(lmops.optimize then replaces what it can and reports the rest)"
            )
        windowed = (  # chunks of local_size look the same from here
            allow_is_causal_skip
            and local_size is not None
            and local_size == getattr(config, "sliding_window", None)
            and local_size != getattr(config, "attention_chunk_size", None)
            and "sliding_window=" in source
        )
        if (
            windowed
            and isinstance(q_offset, int)
            and q_length in (1, kv_length)
            and q_offset + q_length == kv_offset + kv_length
        ):
            padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
            if padding is None or padding[:, kv_offset : kv_offset + kv_length].all():
                return None
    return sdpa_mask(
        batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask=attention_mask, local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip, config=config, **kwargs,
    )  # fmt: skip


_sources: dict[type, str] = {}  # read once: the text of a loaded module does not change


def _model_source(config: Any) -> str:
    """The source of the modeling file that belongs to a config; "" where there is none to be found."""
    kind = type(config)
    if kind not in _sources:
        module = sys.modules.get(kind.__module__.replace("configuration_", "modeling_"))
        try:
            _sources[kind] = inspect.getsource(module) if module is not None else ""
        except (OSError, TypeError):
            _sources[kind] = ""
    return _sources[kind]


def _own_attention(source: str) -> bool:
    """Whether there are attention layers that do not ask the registry; how transformers itself finds out."""
    return "get_interface(" not in source and bool(re.search(r"^class \w*Attention\w*\(nn\.Module\):", source, re.M))


def batching_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' continuous batching: tokens of all sequences in a row, (1, H, T, D) -> (1, T, H, D).

    cache: theirs. Where it gives a block table (one token a sequence), keys and values are stored and read in its pages
    by `paged_attention`; else it stores them and returns those of all sequences in a row.
    Raises ValueError outside of continuous batching.
    """
    if cache is None or cu_seq_lens_q is None:
        raise ValueError(f'attn_implementation="{BATCHING_NAME}" is for continuous batching only; use "{NAME}"')
    left = None if sliding_window is None else sliding_window - 1
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    cu_k: Tensor = kwargs["cu_seq_lens_k"]
    if kwargs.get("block_table") is not None:
        pages, table = KVPages(kwargs["k_cache"], kwargs["v_cache"]), kwargs["block_table"].int()
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        lengths = (cu_k[1 : len(q) + 1] - cu_k[: len(q)]).int()
        at = (lengths.long() - 1).clamp(min=0)  # of the new token; a sequence of no tokens is padding
        blocks = table.gather(1, (at // pages.block_size)[:, None])[:, 0]
        store_kv(k, v, pages, torch.where(lengths > 0, blocks * pages.block_size + at % pages.block_size, -1))
        window = None if left is None else (left, None)
        out = paged_attention(q, pages, table, lengths, scale=scaling, window=window, softcap=softcap, sinks=s_aux)
        assert isinstance(out, Tensor)
        return out[None], None
    out, _ = attention(
        query, key, value, scale=scaling, left=left, right=0, bottom_right=True, softcap=softcap, sinks=s_aux,
        cu_seqlens_q=cu_seq_lens_q.int(), cu_seqlens_k=cu_k.int(), max_seqlen_q=max_length_q,
        max_seqlen_k=kwargs["max_length_k"],
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


@contextmanager
def continuous_batching(model: Any) -> Iterator[None]:
    """Inside the block the model's `generate_batch` and `init_continuous_batching` use this package's attention.

        with continuous_batching(model):
            outputs = model.generate_batch(prompts, generation_config=config)

    transformers takes for continuous batching an attention function whose name says "flash", which it then gives packed
    sequences and no mask; `set_attn_implementation` would look for a package of that name, so the name is written
    into the model's configuration, and taken back at the end. Raises NotImplementedError where transformers has no
    continuous batching, or the model's layers do not take their attention from the registry.
    """
    if not hasattr(model, "generate_batch"):
        raise NotImplementedError(
            f"{type(model).__name__} has no generate_batch in transformers {transformers.__version__}; tested with 5.23"
        )
    if _own_attention(_model_source(model.config)):
        raise NotImplementedError(
            f"{type(model).__name__}: its layers compute their attention themselves, not through transformers'"
            " AttentionInterface, and cannot be given another"
        )
    before = model.config._attn_implementation
    model.config._attn_implementation = BATCHING_NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
AttentionInterface.register(BATCHING_NAME, batching_forward)
AttentionMaskInterface.register(BATCHING_NAME, lambda *arguments, **kwargs: None)


# --------------------------------------------------------------------------------- what `optimize` puts into instances


def bloom_attention(
    self: Any,
    hidden_states: Tensor,
    residual: Tensor,
    alibi: Tensor,
    attention_mask: Tensor | None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """BloomAttention.forward over `attention`: ALiBi comes as a bias (B H, 1, Tk) that depends on the padding."""
    query, key, value = self._reshape(self.query_key_value(hidden_states))
    if layer_past is not None:
        key, value = layer_past.update(key, value, self.layer_idx)
    bias = alibi.view(len(query), self.num_heads, 1, -1)
    if attention_mask is not None:
        bias = bias + attention_mask
    dropout = self.attention_dropout.p if self.training else 0.0
    out, _ = attention(query, key, value, bias=bias, scale=self.inv_norm_factor, dropout_p=dropout)
    y = self.dense(out.transpose(1, 2).flatten(2))
    return residual + nn.functional.dropout(y, self.hidden_dropout, self.training), None


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForCausalLMLoss without the copy of the logits in float32: the sums are formed in it anyway."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return masked_lm_loss(logits, shift_labels, vocab_size, num_items_in_batch, ignore_index)


def masked_lm_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs: Any,
) -> Tensor:
    """transformers' ForMaskedLMLoss, likewise."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = cross_entropy(
        logits.reshape(-1, vocab_size), labels.reshape(-1).to(logits.device), ignore_index=ignore_index,
        reduction=reduction, dtype=torch.promote_types(logits.dtype, torch.float32),
    )  # fmt: skip
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss if num_items_in_batch is None else loss / num_items_in_batch
