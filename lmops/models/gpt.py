"""GPT: one decoder that is GPT-2, GPT-3, Llama, Mistral, Qwen2, Qwen3 or SmolLM, depending on its `GPTConfig`.

    tokens -> embedding (+ positions) -> n_layers x [ x + attention(norm(x));  x + mlp(norm(x)) ] -> norm -> logits

That residual stream is common to all of them. What ten years changed, and the configuration names, is small: where
the position enters (added to the embedding, or rotating queries and keys), the norm (LayerNorm, RMSNorm), the MLP
(GELU, or SiLU gated), and how many key/value heads the query heads share (grouped-query attention).

    model = GPT(GPTConfig.gpt2())
    logits = model(tokens)                            # (B, T) -> (B, T, vocab_size)
    model(tokens, targets).backward()                 # training: the mean loss, without all those logits in memory

    cache = model.new_cache(batch_size=1, capacity=64)
    logits = model(prompt, cache=cache, last_only=True)  # inference: (1, T) -> (1, 1, vocab_size)
    logits = model(next_token, cache=cache)           # (1, 1) -> (1, 1, vocab_size)

    cache = PagedKVCache.for_memory(1 << 30, model.config)  # of lmops.cache, for sequences that come and go
    batch = cache.append([seq, other], [7, 1])           # slots for 7 new tokens of one and 1 of another
    logits = model(tokens, cache=batch, last_only=True)  # (1, 8), one behind the other -> (2, 1, vocab_size)

Shapes in comments: B sequences, T new tokens, S keys visible to them (cached and new), H query heads, KV key/value
heads, D head_dim. A model has no buffers: position tables are computed from the positions where they are used, so
a model built on the meta device, moved or cast can never hold wrong ones.

Papers: GPT-2 (Radford et al. 2019), GPT-3 (arXiv 2005.14165), Llama (2302.13971), GQA (2305.13245).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from lmops.cache import PagedBatch
from lmops.models.config import GPTConfig, RopeScaling
from lmops.ops.attention import attention
from lmops.ops.linear_loss import linear_cross_entropy

__all__ = ["GPT", "GPTConfig", "KVCache", "RopeScaling"]

Rope = tuple[Tensor, Tensor] | None  # cos and sin for `apply_rope`
Cache: TypeAlias = "KVCache | PagedBatch"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


# -------------------------------------------------------------------------------------------------------- positions


def sinusoids(positions: Tensor, d_model: int) -> Tensor:
    """sin and cos interleaved, wavelengths 2 pi to 10000 x 2 pi: (B, T) -> (B, T, d_model); arXiv 1706.03762, 3.5."""
    frequencies = 10000.0 ** (-torch.arange(0, d_model, 2, device=positions.device).float() / d_model)
    angles = positions[..., None] * frequencies  # (B, T, d_model / 2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def rope_frequencies(config: GPTConfig, positions: Tensor, row_lengths: Tensor | None = None) -> tuple[Tensor, float]:
    """The angles of RoPE for one step of position, and the factor on cos and sin. fp32.

    positions: (B, T). row_lengths: (B, 1), by default up to the last position.
    The result is (rope_dim / 2,), or (B, rope_dim / 2) where it depends on each row's length.
    `RopeScaling` says what the kinds are; the formulas are those of transformers' `ROPE_INIT_FUNCTIONS`.
    """
    dim, base, scaling, device = config.rope_dim, config.rope_base, config.rope_scaling, positions.device
    exponents = torch.arange(0, dim, 2, device=device).float() / dim
    frequencies = 1.0 / base**exponents
    if scaling is None:
        return frequencies, 1.0
    factor, original = scaling.factor, scaling.original_context_length or config.context_length
    row_lengths = positions[:, -1:] + 1 if row_lengths is None else row_lengths  # (B, 1)

    if scaling.kind == "linear":
        return frequencies / factor, 1.0

    if scaling.kind == "dynamic":
        stretch = factor * row_lengths.clamp(min=original) / original - (factor - 1)
        return 1.0 / (base * stretch ** (dim / (dim - 2))) ** exponents, 1.0

    if scaling.kind == "llama3":
        slow, fast = scaling.low_freq_factor, scaling.high_freq_factor
        rotations = original * frequencies / (2 * math.pi)  # of each pair over the original context
        keep = ((rotations - slow) / (fast - slow)).clamp(0, 1)
        return frequencies * keep + frequencies / factor * (1 - keep), 1.0

    if scaling.kind == "yarn":

        def pair(rotations: float) -> float:
            """The (fractional) pair of dimensions that makes so many rotations over the original context."""
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        ramp = (torch.arange(dim // 2, device=device).float() - first) / (last - first or 0.001)
        keep = 1 - ramp.clamp(0, 1)
        frequencies = frequencies * keep + frequencies / factor * (1 - keep)
        recommended = 0.1 * math.log(factor) + 1
    else:  # longrope
        short, long = (
            torch.tensor(divisors, device=device) for divisors in (scaling.short_factor, scaling.long_factor)
        )
        frequencies = frequencies / torch.where(row_lengths > original, long, short)
        recommended = math.sqrt(1 + math.log(factor) / math.log(original))
    return frequencies, recommended if scaling.attention_factor is None else scaling.attention_factor


def rope_tables(
    config: GPTConfig, positions: Tensor, dtype: torch.dtype, row_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and signed sin for `apply_rope`, (B, 1, T, rope_dim) each: computed in fp32, cast at the end."""
    frequencies, factor = rope_frequencies(config, positions, row_lengths)
    angles = positions[..., None].float() * frequencies.unsqueeze(-2)  # (B, T, rope_dim / 2)
    cos, sin = angles.cos() * factor, angles.sin() * factor
    cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return cos.unsqueeze(1).to(dtype), sin.unsqueeze(1).to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + rope_dim / 2]) by its angle (arXiv 2104.09864, in Hugging Face's pairing).

    x: (B, heads, T, D), or (T, heads, D) with tables (T, 1, rope_dim). The sign of the rotation is in `sin`, so
    exchanging the halves is one roll.
    """
    dim = cos.shape[-1]
    if dim < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :dim], cos, sin), x[..., dim:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(dim // 2, dims=-1), sin)


# ------------------------------------------------------------------------------------------------------------ cache


class KVCache:
    """Keys and values of the tokens seen so far, (n_layers, B, KV, capacity, D) each, written in place.

    Rows of unequal length are padded on the left, so that all their last tokens share one column:

        padding 2:  . . a b c          `padding[b]` columns of row b hold nothing; no query of that row sees them,
        padding 0:  p q r s t          and its positions start behind them.

    `length` columns are filled. Setting it to less forgets the columns behind it.
    """

    def __init__(
        self, config: GPTConfig, batch_size: int, capacity: int, *, padding: Sequence[int] | None = None,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> None:  # fmt: skip
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; it must be at least 1")
        if padding is not None and (len(padding) != batch_size or min(padding) < 0):
            raise ValueError(f"padding is {list(padding)}; it must be one number >= 0 for each of {batch_size} rows")
        shape = (config.n_layers, batch_size, config.n_kv_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.window = config.attention_window
        self.length = 0
        self.min_padding = min(padding) if padding else 0
        # An unpadded batch keeps None: it needs no mask at all to decode.
        self.padding = torch.tensor(padding, device=device) if padding and any(padding) else None  # (B,)

    @property
    def batch_size(self) -> int:
        return self.keys.shape[1]

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    @property
    def first_visible(self) -> int:
        """The first column that the next token may see: 0 but for a sliding window."""
        return 0 if self.window is None else max(0, self.length + 1 - self.window)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, KV, T, D) behind the filled columns; the visible keys and values, (B, KV, S, D), as views.

        `length` stays as it is: every layer writes the same columns, and the model advances it after the last one.
        """
        T, first = k.shape[2], self.first_visible
        keys, values = self.keys[layer], self.values[layer]  # (B, KV, capacity, D)
        keys.narrow(2, self.length, T).copy_(k)
        values.narrow(2, self.length, T).copy_(v)
        S = self.length + T - first
        return keys.narrow(2, first, S), values.narrow(2, first, S)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, left: int | None, mask: Tensor | None) -> Tensor:
        """Append k and v, then attention of q (B, H, T, D) to all that is visible: (B, H, T, D)."""
        k, v = self.append(layer, k, v)  # (B, KV, S, D)
        return attention(q.to(v.dtype), k, v, left=left, right=0, bottom_right=True, bias=mask)[0]

    def repeat_rows(self, n: int) -> KVCache:
        """A cache that holds each row n times, one after another, and shares no memory with this one."""
        other = copy.copy(self)
        other.keys, other.values = self.keys.repeat_interleave(n, 1), self.values.repeat_interleave(n, 1)
        other.padding = None if self.padding is None else self.padding.repeat_interleave(n)
        return other


# ------------------------------------------------------------------------------------------------------------ model


class Linear(nn.Linear):
    """torch.nn.Linear that uses all CPU threads also for few rows, which is what decoding is.

    MKL's product of one row runs on one thread, and with a few rows gains little from two, so more cores would read the
    weights no faster. A batched product of the weight's blocks of rows, a block a thread, does.
    """

    def forward(self, x: Tensor) -> Tensor:
        n = x.numel() // self.in_features
        if n > 16 or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        threads = torch.get_num_threads()
        block, rest = divmod(self.out_features, threads)
        if threads == 1 or not n or not block or x.dtype != torch.float32 or not torch.backends.mkl.is_available():
            return super().forward(x)
        rows = x.reshape(n, self.in_features).expand(threads, n, -1)
        blocks = (self.weight[:-rest] if rest else self.weight).view(threads, block, self.in_features)
        y = torch.bmm(rows, blocks.mT).transpose(0, 1).reshape(*x.shape[:-1], -1)
        if rest:
            y = torch.cat((y, F.linear(x, self.weight[-rest:])), dim=-1)
        return y if self.bias is None else y + self.bias


class Attention(nn.Module):
    """Causal multi-head attention with grouped key/value heads: softmax(q k^T / sqrt(D)) v.

    The last query belongs to the last key, so queries behind a cache, and a window, need no mask: the operator counts
    the distance from there. A mask is for padding alone.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.n_heads, config.n_kv_heads)
        self.head_dim = config.head_dim
        self.left = None if config.attention_window is None else config.attention_window - 1
        self.dropout = config.dropout
        total_heads = config.n_heads + 2 * config.n_kv_heads
        self.qkv = Linear(config.d_model, total_heads * config.head_dim, bias=config.qkv_bias)
        self.out = Linear(config.n_heads * config.head_dim, config.d_model, bias=config.bias)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        B, T, _ = x.shape
        H, KV = self.heads
        # Queries and keys stay one tensor while both are rotated: at batch 1 decoding costs operators, not arithmetic.
        # Heads are the second dimension: (B, heads, T, D), or of sequences one behind the other (T, heads, D).
        qkv = self.qkv(x).view(B, T, H + 2 * KV, self.head_dim)
        qkv = qkv[0] if isinstance(cache, PagedBatch) else qkv.transpose(1, 2)
        qk, v = qkv.split((H + KV, KV), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((H, KV), dim=1)
            qk = torch.cat((self.q_norm(q), self.k_norm(k)), dim=1)
        if rope is not None:
            qk = apply_rope(qk, *rope)
        q, k = qk.split((H, KV), dim=1)  # (B, H, T, D), (B, KV, T, D)
        if isinstance(cache, KVCache):
            y = cache.attend(self.layer, q, k, v, self.left, mask)
        elif cache is not None:
            y = cache.attend(self.layer, q.to(v.dtype), k.to(v.dtype), v)  # (T, H, D)
            return self.out(y.view(B, T, H * self.head_dim))
        else:
            q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast the rotated ones are in float32
            y, _ = attention(
                q, k, v, left=self.left, right=0, bottom_right=True,
                dropout_p=self.dropout if self.training else 0.0,
            )  # fmt: skip
        return self.out(y.transpose(1, 2).reshape(B, T, H * self.head_dim))


class MLP(nn.Module):
    """down(activation(up(x))), or gated: down(activation(gate(x)) * up(x)) with gate and up in one matrix."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        self.activation = ACTIVATIONS[config.activation]
        self.up = Linear(config.d_model, config.d_ff * (2 if config.gated_mlp else 1), bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        if self.gated:
            gate, x = x.chunk(2, dim=-1)
            gate = self.activation(gate)
            return self.down(gate * x if torch.is_grad_enabled() else gate.mul_(x))
        return self.down(self.activation(x))


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm that takes three operators rather than eight for one row on a CPU, which is what decoding is."""

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[-1]
        one_row = x.numel() == n and x.is_cpu and x.dtype == torch.float32
        if not one_row or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return super().forward(x)
        row = x.reshape(n)
        assert self.eps is not None
        return x * (torch.dot(row, row).item() / n + self.eps) ** -0.5 * self.weight


def make_norm(config: GPTConfig) -> nn.RMSNorm | nn.LayerNorm:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout that is no operator at all where it does nothing."""
    return F.dropout(x, p) if training and p else x


class Block(nn.Module):
    """One layer of the residual stream: attention moves information between tokens, the MLP works on each."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = make_norm(config)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None) -> Tensor:
        x = x + drop(self.attn(self.attn_norm(x), rope, mask, cache), self.dropout, self.training)
        return x + drop(self.mlp(self.mlp_norm(x)), self.dropout, self.training)


class GPT(nn.Module):
    """The language model of a `GPTConfig`; see the top of this file.

    New weights are random, as GPT-2's were. Parameters are in the default dtype and on the default device:
    `with torch.device("meta"): GPT(config)` makes a model of any size at once, to be filled by
    `load_state_dict(..., assign=True)`, or by `to_empty(device=...)` and `init_weights()`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.context_length, config.d_model) if learned else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.tie_weights()
        self.register_load_state_dict_post_hook(_tie_after_loading)
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), and what is added to the residual stream smaller the deeper it is."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(("attn.out", "mlp.down"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.n_layers) if residual else 0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's Parameter, if the configuration says so."""
        quantized = not isinstance(self.head.weight, nn.Parameter) or not isinstance(self.embed, nn.Embedding)
        if self.config.tie_embeddings and not quantized:
            self.head.weight = self.embed.weight

    def _apply(self, fn, recurse=True):
        # to(), to_empty() and so on may replace Parameters one by one, which would separate the tied pair.
        super()._apply(fn, recurse)
        self.tie_weights()
        return self

    def new_cache(self, batch_size: int, capacity: int, padding: Sequence[int] | None = None) -> KVCache:
        """An empty `KVCache` for this model, in the dtype and on the device of its weights."""
        weight = self.norm.weight
        return KVCache(self.config, batch_size, capacity, padding=padding, dtype=weight.dtype, device=weight.device)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, cache: Cache | None = None, last_only: bool = False
    ) -> Tensor:
        """Logits of the next token at every position; with targets the mean cross-entropy instead.

        tokens: (B, T) int64. With a `KVCache` they follow the tokens in it, and are added to it; with a `PagedBatch`
            they are (1, T), the new tokens of its sequences one behind the other.
        targets: (B, T) int64, the token that follows each of them; -100 where none counts. The loss is a scalar, by
            `lmops.linear_cross_entropy`: the (B, T, vocab_size) logits never exist in memory, nor does their gradient.
        last_only: compute the logits of the last position only, of a `PagedBatch` of each sequence's; a prompt needs no
            others. A sequence without a new token gets those of whatever stands before it.
        Returns (B, T, vocab_size), or (B, 1, vocab_size), in the dtype of the weights; with targets a scalar. Of a
            `PagedBatch` of S sequences (1, T, vocab_size), or (S, 1, vocab_size).
        Raises ValueError where tokens do not fit the context or the cache, and for targets of another shape.
        """
        self._check(tokens, cache)
        if targets is not None and (targets.shape != tokens.shape or last_only):
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; it must be that of tokens, {tuple(tokens.shape)}, and "
                "last_only must be False"
            )
        T, paged = tokens.shape[1], isinstance(cache, PagedBatch)
        positions = self._positions(T, cache, tokens.device)
        x = self.embed(tokens)  # (B, T, d_model)
        rope: Rope = None
        if self.positions is not None:
            x = x + self.positions(positions)
        elif self.config.positions == "sinusoidal":
            x = x * math.sqrt(self.config.d_model) + sinusoids(positions, self.config.d_model).to(x.dtype)
        elif self.config.positions == "rope" and paged:
            # each token is a row of its own, since with some scalings angles depend on the length of its sequence
            lengths = cache.context_lens.repeat_interleave(cache.cu_seqlens_q.diff(), output_size=T)  # type: ignore
            cos, sin = rope_tables(self.config, positions.t(), x.dtype, lengths[:, None])
            rope = cos[:, 0], sin[:, 0]  # (T, 1, rope_dim)
        elif self.config.positions == "rope":
            rope = rope_tables(self.config, positions, x.dtype)
        x = drop(x, self.config.dropout, self.training)

        mask = self._mask(T, cache, tokens.device) if isinstance(cache, KVCache) else None
        for block in self.blocks:
            x = block(x, rope, mask, cache)
        if isinstance(cache, KVCache):
            cache.length += T
        if last_only:
            x = x[:, -1:] if cache is None or not paged else x[0, cache.cu_seqlens_q[1:] - 1, None]  # type: ignore
        x = self.norm(x)
        return self.head(x) if targets is None else linear_cross_entropy(x, self.head.weight, targets)

    def _positions(self, T: int, cache: Cache | None, device: torch.device) -> Tensor:
        """(B or 1, T)."""
        if isinstance(cache, PagedBatch):
            return cache.positions[None]
        start = 0 if cache is None else cache.length
        positions = torch.arange(start, start + T, device=device)[None]  # (1, T)
        if cache is not None and cache.padding is not None:
            positions = (positions - cache.padding[:, None]).clamp(min=0)  # (B, T)
        return positions

    def _mask(self, T: int, cache: KVCache, device: torch.device) -> Tensor | None:
        """(B, 1, 1, S), True where a key is a token; None where no row is padded."""
        if cache.padding is None:
            return None
        columns = torch.arange(cache.first_visible, cache.length + T, device=device)  # (S,)
        return (columns >= cache.padding[:, None])[:, None, None]

    def _check(self, tokens: Tensor, cache: Cache | None) -> None:
        if tokens.dim() != 2:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; it must be (batch, tokens)")
        batch_size, length = tokens.shape
        if isinstance(cache, PagedBatch):
            if tokens.shape != (1, len(cache.positions)):
                raise ValueError(f"tokens has shape {tuple(tokens.shape)}; the batch has (1, {len(cache.positions)})")
            pages = cache.layers[0]
            found, own = [
                (len(cache.layers), pages.n_kv_heads, pages.head_dim, cache.window),
                (self.config.n_layers, self.config.n_kv_heads, self.config.head_dim, self.config.attention_window),
            ]
            if found != own:
                raise ValueError(
                    "the cache has another geometry than the model: layers, key/value heads, head_dim and window are "
                    f"{found}, must be {own}"
                )
            length = cache.max_context
        elif cache is not None:
            if batch_size != cache.batch_size:
                raise ValueError(f"tokens has {batch_size} rows; the cache was made for {cache.batch_size}")
            if cache.length + length > cache.capacity:
                raise ValueError(
                    f"the cache is full: {cache.length} of {cache.capacity} columns are taken, {length} more came"
                )
            length += cache.length - cache.min_padding
        if length > self.config.context_length:
            raise ValueError(f"the sequence has {length} tokens; context_length is {self.config.context_length}")


def _tie_after_loading(model: nn.Module, incompatible_keys) -> None:
    """A checkpoint of a tied model need not have `head.weight`; with assign=True the pair must be tied again."""
    assert isinstance(model, GPT)
    model.tie_weights()
    if model.config.tie_embeddings and "head.weight" in incompatible_keys.missing_keys:
        incompatible_keys.missing_keys.remove("head.weight")
