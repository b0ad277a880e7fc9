"""Attention layers with their projections; both can be made from a torch.nn.MultiheadAttention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmops.ops.attention import _check_bias, attention, check_window

if TYPE_CHECKING:
    from typing_extensions import Self


def alibi_slopes(n_heads: int, device: torch.device | str | None = None) -> Tensor:
    """ALiBi's slopes (arXiv 2108.12409), (n_heads,) float32: 2^(-8 h / n), h = 1 .. n, where n_heads is a power n of 2.

    Of others, n is the power below, and the rest are every second slope of 2n heads.
    """
    n = 1 << (n_heads.bit_length() - 1)
    head = torch.arange(n_heads, device=device).float()
    return torch.exp2(torch.where(head < n, head + 1, head - n + 0.5) * (-8 / n))


class _Attention(nn.Module):
    """What the layers share: settings, masks, the call of the operator, and the way from torch's layer."""

    projections: tuple[str, ...]  # the Linear layers before attention; each letter is a part of its rows
    slopes: Tensor | None

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        window: Sequence[int | None] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        alibi: bool | Tensor | Sequence[float] = False,
        sinks: bool = False,
        dropout: float = 0.0,
        qk_norm: bool = False,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        for name, size in (("d_model", d_model), ("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
            if size < 1:
                raise ValueError(f"{name} is {size}; it must be at least 1")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads is {n_kv_heads}; it must divide n_heads={n_heads}")
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model is {d_model}; without head_dim, n_heads={n_heads} must divide it")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim is {head_dim}; it must be at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be in [0, 1)")
        if softcap is not None and not 0 <= softcap < math.inf:
            raise ValueError(f"softcap is {softcap}; it must be positive, or None or 0 for none")
        self.d_model, self.n_heads, self.n_kv_heads = d_model, n_heads, n_kv_heads
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.causal = causal
        self.left, self.right = check_window(window, "window")
        self.scale = scale
        self.softcap = softcap
        self.dropout = dropout
        self.batch_first = batch_first
        self.alibi = alibi is not False
        # Slopes that follow from the number of heads are computed where they are used: a cast cannot round them.
        given = None if isinstance(alibi, bool) else torch.as_tensor(alibi, dtype=torch.float32, device=device)
        if given is not None and given.shape != (n_heads,):
            raise ValueError(f"alibi has shape {tuple(given.shape)}; it must be True, or {n_heads} slopes, one a head")
        self.register_buffer("slopes", given)
        self.sinks = nn.Parameter(torch.zeros(n_heads, device=device, dtype=dtype)) if sinks else None
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6, device=device, dtype=dtype) if qk_norm else None

    def reset_parameters(self) -> None:
        """New weights, as `torch.nn.Linear` draws them; sinks 0. Slopes that were given stay."""
        for layer in self.children():
            layer.reset_parameters()  # type: ignore[operator]
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    @classmethod
    def from_torch(
        cls, mha: nn.MultiheadAttention, *, causal: bool = False, window: Sequence[int | None] | None = None
    ) -> Self:
        """A layer that computes what `mha` computes, with a copy of its weights.

        Taken over: sizes, bias, dropout, batch_first, device, dtype, training mode, which weights are frozen.
        causal, window: for what the callers of `mha` gave as a mask.
        Raises TypeError where mha is another module; ValueError for widths (kdim, vdim) that the layer cannot have;
        NotImplementedError for add_bias_kv and add_zero_attn.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
        if mha.bias_k is not None or mha.bias_v is not None:
            raise NotImplementedError("mha has add_bias_kv=True; only add_bias_kv=False is supported")
        if mha.add_zero_attn:
            raise NotImplementedError("mha has add_zero_attn=True; only add_zero_attn=False is supported")
        options = cls._widths(mha) | {"bias": mha.in_proj_bias is not None, "batch_first": mha.batch_first}
        layer = cls(
            mha.embed_dim, mha.num_heads, dropout=mha.dropout, causal=causal, window=window, device="meta", **options
        )
        weights = (
            (mha.q_proj_weight, mha.k_proj_weight, mha.v_proj_weight)
            if mha.in_proj_weight is None
            else mha.in_proj_weight.chunk(3)
        )
        of = {"weight": dict(zip("qkv", weights, strict=True))}
        if mha.in_proj_bias is not None:
            of["bias"] = dict(zip("qkv", mha.in_proj_bias.chunk(3), strict=True))
        with torch.enable_grad():  # so that a merged tensor knows whether it is to be trained
            state = {
                f"{name}.{kind}": torch.cat([parts[letter] for letter in name])
                for name in cls.projections
                for kind, parts in of.items()
            }
        state |= {f"out.{kind}": t for kind, t in mha.out_proj.named_parameters()}
        layer.load_state_dict({name: t.detach().clone() for name, t in state.items()}, assign=True)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(state[name].requires_grad)
        return layer.train(mha.training)

    @classmethod
    def _widths(cls, mha: nn.MultiheadAttention) -> dict[str, Any]:
        """The arguments of the constructor that follow from kdim and vdim."""
        raise NotImplementedError

    def _heads(self, x: Tensor, n_heads: int) -> Tensor:
        """(B, n_heads, T, D) of a projection in the caller's layout: (B, T, n_heads D), (T, B, ..) or (T, ..)."""
        x = x.unflatten(-1, (n_heads, self.head_dim))
        x = x[None] if x.ndim == 3 else x if self.batch_first else x.transpose(0, 1)
        return x.transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, ndim: int, attn_mask: Tensor | None, key_padding: Tensor | None,
        cu_q: Tensor | None, cu_k: Tensor | None, max_q: int | None, max_k: int | None,
    ) -> Tensor:  # fmt: skip
        """Attention of (B, H, T, D), in the caller's layout of `ndim` dimensions, (B, T, H D)."""
        if cu_q is not None and (attn_mask is not None or key_padding is not None):
            name = "key_padding" if attn_mask is None else "attn_mask"
            raise ValueError(f"{name} cannot be combined with cu_seqlens: packed sequences have no padding")
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # on a GPU autocast norms to float32
        if key_padding is not None:
            shape = (k.shape[0], k.shape[2])[3 - ndim :]
            if key_padding.dtype != torch.bool or key_padding.shape != shape or key_padding.device != k.device:
                raise ValueError(
                    f"key_padding must be boolean (True is a token) of shape {shape} on {k.device},"
                    f" got {key_padding.dtype} of shape {tuple(key_padding.shape)} on {key_padding.device}"
                )
            visible = key_padding.reshape(k.shape[0], 1, 1, k.shape[2])
            if attn_mask is None:
                attn_mask = visible
            elif (attn_mask := _check_bias(attn_mask, q, k)).dtype == torch.bool:
                attn_mask = attn_mask & visible
            else:
                attn_mask = attn_mask.masked_fill(~visible, float("-inf"))
        slopes = alibi_slopes(self.n_heads, q.device) if self.alibi and self.slopes is None else self.slopes
        o, _ = attention(
            q, k, v, bias=attn_mask, scale=self.scale, left=self.left, right=0 if self.causal else self.right,
            softcap=self.softcap, alibi_slopes=slopes, sinks=self.sinks,
            dropout_p=self.dropout if self.training else 0.0,
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        )  # fmt: skip
        o = o.transpose(1, 2).flatten(2)  # (B, T, H D)
        return o[0] if ndim == 2 else o if self.batch_first else o.transpose(0, 1)

    def _check_input(self, name: str, x: Tensor, width: int) -> None:
        if x.ndim not in (2, 3) or x.shape[-1] != width:
            batched = "B, T" if self.batch_first else "T, B"
            raise ValueError(f"{name} must be ({batched}, {width}) or (T, {width}), got shape {tuple(x.shape)}")

    def extra_repr(self) -> str:
        window = None if self.left is None and self.right is None else (self.left, self.right)
        options: dict[str, Any] = {
            "causal": self.causal, "window": window, "scale": self.scale, "softcap": self.softcap,
            "alibi": self.alibi, "sinks": self.sinks is not None, "dropout": self.dropout,
        }  # fmt: skip
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in ("d_model", "n_heads", "n_kv_heads", "head_dim"))
        set_ = "".join(f", {name}={value}" for name, value in options.items() if value)
        return sizes + set_ + ("" if self.batch_first else ", batch_first=False")


class SelfAttention(_Attention):
    """Self-attention with its projections: out(softmax(q k^T scale) v) of q, k, v = qkv(x).

    d_model: of x and the result. n_heads: query heads; n_kv_heads (GQA, MQA): key/value heads, which divide them, by
    default equally many. head_dim: d_model / n_heads by default; at most 256 with gradients.
    bias: of both projections. causal: a token sees itself and those before it. window: (left, right), how many keys
    before and after it a token sees; None or -1 for no bound. scale, softcap: see `lmops.ops.attention.attention`.
    alibi: True for the slopes of the paper, or a slope a head. sinks: learn a further score a head, with value 0.
    dropout: of the probabilities, in training. qk_norm: RMSNorm of each query and key head before the scores.
    batch_first: False for x of (T, B, d_model).

    `qkv.weight` holds the rows of the query heads, of the key heads, then of the value heads, as `in_proj_weight` of
    torch.nn.MultiheadAttention and `c_attn` of nanoGPT do. `from_torch` copies the former, whose calls differ: they
    return a pair, a boolean mask is True where it hides, and a token that sees nothing gets NaN.

    Raises ValueError for settings without meaning.
    """

    projections = ("qkv",)

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, n_heads, device=device, dtype=dtype, **options)
        width = self.n_heads * self.head_dim
        kv_width = self.n_kv_heads * self.head_dim
        self.qkv = nn.Linear(d_model, width + 2 * kv_width, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(width, d_model, bias=bias, device=device, dtype=dtype)

    @classmethod
    def _widths(cls, mha: nn.MultiheadAttention) -> dict[str, Any]:
        if not mha.kdim == mha.vdim == mha.embed_dim:
            raise ValueError(
                f"mha has kdim={mha.kdim} and vdim={mha.vdim};"
                f" self-attention needs both to be embed_dim={mha.embed_dim}"
            )
        return {}

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        key_padding: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """x (B, T, d_model), or (T, d_model) without a batch -> the same shape, in the dtype of the projections.

        attn_mask: broadcasts to (B, n_heads, T, T); boolean (True takes part) or added to the scores.
        key_padding: (B, T) boolean, True for a token, False for padding; without a batch (T,).
        cu_seqlens: (N + 1,) int32: x holds N sequences one behind the other (B = 1), where each begins, then T.
            max_seqlen: the longest; give it on a GPU, where finding it waits.
        A token that sees nothing gets the bias of `out`. Raises ValueError or TypeError for shapes and dtypes that do
        not fit, and where cu_seqlens comes with a mask.
        """
        self._check_input("x", x, self.d_model)
        heads = (self.n_heads, self.n_kv_heads, self.n_kv_heads)
        q, k, v = self._heads(self.qkv(x), sum(heads)).split(heads, dim=1)
        o = self._attend(q, k, v, x.ndim, attn_mask, key_padding, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return self.out(o)


class CrossAttention(_Attention):
    """Attention of x to a memory, with its projections: out(softmax(q k^T scale) v) of q = q(x) and k, v = kv(memory).

    d_memory: the width of memory, by default d_model. Everything else is as in `SelfAttention`; distances (causal,
    window, alibi) are between a query and the key of the same number. `kv.weight` holds the rows of the key heads,
    then of the value heads. `from_torch` copies a torch.nn.MultiheadAttention whose kdim and vdim are equal.
    """

    projections = ("q", "kv")

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        d_memory: int | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(d_model, n_heads, device=device, dtype=dtype, **options)
        self.d_memory = d_model if d_memory is None else d_memory
        if self.d_memory < 1:
            raise ValueError(f"d_memory is {d_memory}; it must be at least 1")
        width = self.n_heads * self.head_dim
        self.q = nn.Linear(d_model, width, bias=bias, device=device, dtype=dtype)
        self.kv = nn.Linear(self.d_memory, 2 * self.n_kv_heads * self.head_dim, bias=bias, device=device, dtype=dtype)
        self.out = nn.Linear(width, d_model, bias=bias, device=device, dtype=dtype)

    @classmethod
    def _widths(cls, mha: nn.MultiheadAttention) -> dict[str, Any]:
        if mha.kdim != mha.vdim:
            raise ValueError(
                f"mha has kdim={mha.kdim} and vdim={mha.vdim};"
                " they must be equal, since keys and values come from one memory"
            )
        return {"d_memory": mha.kdim}

    def forward(
        self,
        x: Tensor,
        memory: Tensor,
        attn_mask: Tensor | None = None,
        key_padding: Tensor | None = None,
        *,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_memory: Tensor | None = None,
        max_seqlen: int | None = None,
        max_seqlen_memory: int | None = None,
    ) -> Tensor:
        """x (B, Tq, d_model) and memory (B, Tk, d_memory), or both without a batch -> x's shape.

        attn_mask: broadcasts to (B, n_heads, Tq, Tk); boolean (True takes part) or added to the scores.
        key_padding: (B, Tk) boolean, True for a token of memory, False for padding; without a batch (Tk,).
        cu_seqlens, cu_seqlens_memory, max_seqlen, max_seqlen_memory: of packed sequences, see `SelfAttention.forward`;
            sequence n of x attends to sequence n of memory.
        Raises ValueError or TypeError for shapes and dtypes that do not fit, and where cu_seqlens comes with a mask.
        """
        self._check_input("x", x, self.d_model)
        self._check_input("memory", memory, self.d_memory)
        q = self._heads(self.q(x), self.n_heads)
        k, v = self._heads(self.kv(memory), 2 * self.n_kv_heads).chunk(2, dim=1)
        if len(q) != len(k):
            raise ValueError(f"memory must have the batch of x, {tuple(x.shape)}, got shape {tuple(memory.shape)}")
        o = self._attend(
            q, k, v, x.ndim, attn_mask, key_padding, cu_seqlens, cu_seqlens_memory, max_seqlen, max_seqlen_memory
        )  # fmt: skip
        return self.out(o)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, d_memory={self.d_memory}"
