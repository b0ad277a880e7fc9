"""Layers of torch, and its functions in the forward of any module, over the operators of lmops."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmops.integrations.edits import ATTENTION, LOSS, NORM, SOFTMAX, Work
from lmops.modules.norm import default_eps
from lmops.ops.attention import attention as attend
from lmops.ops.attention import scaled_dot_product_attention
from lmops.ops.loss import cross_entropy
from lmops.ops.norm import layer_norm, rms_norm
from lmops.ops.softmax import FLOATS, log_softmax
from lmops.ops.softmax import softmax as softmax_


def torch_module(work: Work, name: str, module: nn.Module, kinds: set[str]) -> None:
    own = type(module).forward
    if own is nn.MultiheadAttention.forward and "attention" in kinds:
        assert isinstance(module, nn.MultiheadAttention)
        if module.bias_k is not None or module.add_zero_attn:
            return work.keep(name, module, "add_bias_kv and add_zero_attn are not supported")
        return work.replace_forward(name, module, _mha_forward, "attention, where weights are not asked for", ATTENTION)
    if isinstance(module, nn.TransformerEncoderLayer) and "attention" in kinds:
        work.set(module, "activation_relu_or_gelu", 0)  # which is how it leaves torch's fused layer for inference
    elif isinstance(module, nn.TransformerEncoder) and "attention" in kinds:
        work.set(module, "use_nested_tensor", False)  # which only the fused layer takes
    elif own is nn.Softmax.forward and "softmax" in kinds:
        work.replace_forward(name, module, _softmax_forward, "softmax", SOFTMAX)
    elif own is nn.LogSoftmax.forward and "softmax" in kinds:
        work.replace_forward(name, module, _log_softmax_forward, "log_softmax", SOFTMAX)
    elif own in (nn.LayerNorm.forward, nn.RMSNorm.forward) and "norm" in kinds:
        if len(module.normalized_shape) > 1:  # type: ignore[arg-type]
            return work.keep(name, module, "normalizes over several dimensions")
        forward, what = (
            (_layer_norm_forward, "layer_norm") if own is nn.LayerNorm.forward else (_rms_norm_forward, "rms_norm")
        )
        work.replace_forward(name, module, forward, what, NORM)
    elif own is nn.CrossEntropyLoss.forward and "loss" in kinds:
        work.replace_forward(name, module, _cross_entropy_forward, "cross_entropy", LOSS)
    elif not type(module).__module__.startswith(("torch.", "transformers.", "lmops.")):
        _functions(work, name, module, kinds)
    return None


def named_forward(function: Any) -> Any:
    """A bound method is pickled by its name: a pickled model comes back with its class's forward, and works."""
    function.__name__ = "forward"
    return function


@named_forward
def _softmax_forward(self: Any, input: Tensor) -> Tensor:
    dim = self.dim if self.dim is not None else 0 if input.ndim in (0, 1, 3) else 1
    return softmax_(input, dim=dim)


@named_forward
def _log_softmax_forward(self: Any, input: Tensor) -> Tensor:
    dim = self.dim if self.dim is not None else 0 if input.ndim in (0, 1, 3) else 1
    return log_softmax(input, dim=dim)


@named_forward
def _layer_norm_forward(self: Any, input: Tensor) -> Any:
    return _redirected_layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


@named_forward
def _rms_norm_forward(self: Any, x: Tensor) -> Any:
    return _redirected_rms_norm(x, self.normalized_shape, self.weight, self.eps)


@named_forward
def _cross_entropy_forward(self: Any, input: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(
        input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
        label_smoothing=self.label_smoothing,
    )  # fmt: skip


@named_forward
def _mha_forward(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.MultiheadAttention.forward; with need_weights the layer's own."""
    if need_weights or query.is_nested:
        return type(self).forward(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")  # as torch says it
    batched = query.ndim == 3
    same = query is key is value
    if self._qkv_same_embed_dim:
        weights = self.in_proj_weight.chunk(3)
    else:
        weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
    if same and self._qkv_same_embed_dim:
        q, k, v = nn.functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
    else:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = map(nn.functional.linear, (query, key, value), weights, biases)

    def heads(x: Tensor) -> Tensor:  # (batch, heads, length, head_dim)
        x = x.unflatten(-1, (self.num_heads, -1))
        x = x[None] if not batched else x if self.batch_first else x.transpose(0, 1)
        return x.transpose(1, 2)

    q, k, v = map(heads, (q, k, v))
    masks = []
    if attn_mask is not None:  # (queries, keys), or one of those a head of each sequence
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, self.num_heads)))
    if key_padding_mask is not None:
        masks.append(key_padding_mask.view(len(k), 1, 1, k.shape[2]))
    if all(mask.dtype == torch.bool for mask in masks):  # True hides
        bias = None if not masks else ~masks[0] if len(masks) == 1 else ~(masks[0] | masks[1])
    else:
        added = [q.new_zeros(m.shape).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m for m in masks]
        bias = sum(added[1:], added[0])
    y, _ = attend(q, k, v, bias=bias, dropout_p=self.dropout if self.training else 0.0)
    y = y.transpose(1, 2).flatten(2)
    y = self.out_proj(y)
    return (y[0] if not batched else y if self.batch_first else y.transpose(0, 1)), None


def _redirected_softmax(ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(input: Tensor, dim: Any = None, *rest: Any, **kw: Any) -> Tensor:
        # _stacklevel is of the warning about a missing dim; what else there may be, such as names, is torch's
        if isinstance(dim, int) and input.dtype in FLOATS and not rest and kw.keys() <= {"_stacklevel", "dtype"}:
            return ours(input, dim=dim, dtype=kw.get("dtype"))
        return theirs(input, dim, *rest, **kw)

    return call


def _redirected_attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **kw: Any) -> Any:
    """Nested tensors and heads too wide for a gradient are torch's; it broadcasts batches and heads, so we do."""
    tensors = query, key, value
    if any(t.is_nested or t.ndim < 2 or t.shape[-1] > 256 for t in tensors):
        return nn.functional.scaled_dot_product_attention(*tensors, *rest, **kw)
    if not kw.get("enable_gqa") and len({t.shape[:-2] for t in tensors}) > 1:
        shape = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
        query, key, value = (t.expand(*shape, *t.shape[-2:]) for t in tensors)
    return scaled_dot_product_attention(query, key, value, *rest, **kw)


def _redirected_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    if len(normalized_shape) == 1 and tuple(normalized_shape) == input.shape[-1:] and input.dtype in FLOATS:
        return layer_norm(input, weight, bias, eps)
    return nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)


def _redirected_rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Any:
    if len(normalized_shape) == 1 and tuple(normalized_shape) == input.shape[-1:] and input.dtype in FLOATS:
        return rms_norm(input, weight, default_eps(input) if eps is None else eps)
    return nn.functional.rms_norm(input, normalized_shape, weight, eps)


# what code calls -> the kind it is of, and what takes its place
FUNCTIONS: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    nn.functional.scaled_dot_product_attention: ("attention", _redirected_attention),
    nn.functional.cross_entropy: ("loss", cross_entropy),
    nn.functional.layer_norm: ("norm", _redirected_layer_norm),
    nn.functional.rms_norm: ("norm", _redirected_rms_norm),
    **{
        f: ("softmax", _redirected_softmax(softmax_, f)) for f in (nn.functional.softmax, torch.softmax, Tensor.softmax)
    },
    **{
        f: ("softmax", _redirected_softmax(log_softmax, f))
        for f in (nn.functional.log_softmax, torch.log_softmax, Tensor.log_softmax)
    },
}
FUNCTION_KINDS = {f.__name__: kind for f, (kind, _) in FUNCTIONS.items()}
OPERATORS_OF = {"attention": ATTENTION, "softmax": SOFTMAX, "norm": NORM, "loss": LOSS}


class _Redirect(TorchFunctionMode):
    """Inside, calls of torch's functions of these kinds are calls of lmops's."""

    def __init__(self, kinds: tuple[str, ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind, ours = FUNCTIONS.get(func, ("", func))
        return (ours if kind in self.kinds else func)(*args, **(kwargs or {}))


@named_forward
def _redirected_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _Redirect(self._lmops_redirects):
        return type(self).forward(self, *args, **kwargs)


def _functions(work: Work, name: str, module: nn.Module, kinds: set[str]) -> None:
    """Redirect the functions that the code of a module's forward names."""
    names = [n for n in names_in(type(module)) if not isinstance(getattr(module, n, None), nn.Module)]
    found = tuple(sorted({FUNCTION_KINDS[n] for n in names if FUNCTION_KINDS.get(n) in kinds}))
    if not found:
        return None
    inside = [n for n, _ in module.named_modules(prefix=name) if n != name and work.skipped(n)]
    inside = [
        n for n in inside if {FUNCTION_KINDS.get(f) for f in names_in(type(work.model.get_submodule(n)))} & {*found}
    ]
    if inside:
        return work.keep(name, module, f"it calls {', '.join(found)} functions, but so does {inside[0]} inside it")
    called = [n for n in dict.fromkeys(names) if FUNCTION_KINDS.get(n) in found]
    work.set(module, "_lmops_redirects", found)
    operators = tuple(o for kind in found for o in OPERATORS_OF[kind])
    return work.replace_forward(name, module, _redirected_forward, f"{', '.join(called)} in its forward", operators)


def names_in(kind: type) -> Iterator[str]:
    """Names in the code of a class's forward, and of the functions of its module and the methods that this calls."""
    start = inspect.unwrap(kind.forward)  # type: ignore[attr-defined]
    seen, waiting = set(), [start]
    while waiting:
        function = waiting.pop()
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        codes = [code]
        while codes:
            code = codes.pop()
            codes += [c for c in code.co_consts if hasattr(c, "co_names")]  # functions inside functions
            yield from code.co_names
            for called in code.co_names:
                helper = function.__globals__.get(called, getattr(kind, called, None))
                if isinstance(helper, FunctionType) and helper.__module__ == start.__module__:
                    waiting.append(helper)
