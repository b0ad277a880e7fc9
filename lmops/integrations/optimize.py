"""`lmops.optimize`: one line for a model that is there already; `lmops.restore` takes it back.

Only the instance changes. A layer keeps its class, name, parameters and hooks; it gets a `forward` of its own, which
`restore` deletes. Linear layers alone are replaced, by quantized ones.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lmops.ops._register import OPERATORS
from lmops.ops.activation import geglu, swiglu
from lmops.ops.attention import attention as attend
from lmops.ops.attention import scaled_dot_product_attention
from lmops.ops.loss import cross_entropy
from lmops.ops.norm import layer_norm, rms_norm
from lmops.ops.rope import rope
from lmops.ops.softmax import FLOATS, log_softmax
from lmops.ops.softmax import softmax as softmax_
from lmops.quantization.linear import QuantLinear
from lmops.quantization.quantize import _evaluating, _find_layers, quantize_model
from lmops.quantization.rounding import check_weight, float_weight
from lmops.quantization.tensor import QuantizedTensor
from lmops.quantization.w8a8 import W8A8Linear
from lmops.testing import assert_accurate

LINEAR = ("int8", "int4", "w8a8", "fp8")
HEADS = ("lm_head", "head")
EDITS = "_lmops_edits"  # the attribute of a model that has what to undo
# what the operators of each kind are called
ATTENTION = ("attention_forward", "attention_backward")
SOFTMAX = ("softmax_forward", "softmax_backward")
NORM = ("norm", "norm_forward", "norm_backward")
GATED = ("gated_forward", "gated_backward")
LOSS = ("cross_entropy_state", "cross_entropy_forward", "cross_entropy_backward")


class VerificationError(ValueError):
    """The optimized model's results differ by more than the accuracy rule allows. The model is as it was."""


class NothingToReplaceError(ValueError):
    """The model has nothing that `optimize` was asked to replace. report: what was looked at, and why it stayed."""

    def __init__(self, report: Report) -> None:
        super().__init__(f"model has nothing to replace\n{report}")
        self.report = report


# ----------------------------------------------------------------------------------------------------------- reports


@dataclass(frozen=True)
class Item:
    """A module: its name and class, what it uses now or why it stayed as it was, and the operators that it calls."""

    name: str
    kind: str
    what: str
    operators: tuple[str, ...] = ()


@dataclass
class Report:
    """What `optimize` did; `print` shows it as a table.

    replaced, kept: modules that changed, and candidates that did not, with the reason. bytes_before, bytes_after: of
    parameters and buffers, memory that is shared counted once. implementations: which implementation ("triton" or
    "torch") every operator in use has on the model's devices, and why. verified: whether `verify` was given.
    kl_divergence, agreement: with verify and linear, the mean over positions of KL(before || after) in nats, and the
    share of positions whose largest entry is the same.
    """

    replaced: list[Item] = field(default_factory=list)
    kept: list[Item] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    implementations: dict[str, str] = field(default_factory=dict)
    verified: bool = False
    kl_divergence: float | None = None
    agreement: float | None = None

    def __str__(self) -> str:
        rows = [("module", "class", "now"), *_grouped(self.replaced)]
        rows += [(name, kind, f"unchanged: {what}") for name, kind, what in _grouped(self.kept)]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{name:{widths[0]}}  {kind:{widths[1]}}  {what}" for name, kind, what in rows]
        lines.append(f"parameters and buffers: {self.bytes_before:,} bytes before, {self.bytes_after:,} after")
        lines += [f"{name}: {how}" for name, how in self.implementations.items()]
        if self.verified:
            lines.append("verified: as accurate as before, by the rule of lmops.testing.assert_accurate")
        if self.kl_divergence is not None and self.agreement is not None:
            lines.append(
                f"quantized: KL divergence {self.kl_divergence:.2e}, the largest entry is the same at "
                f"{100 * self.agreement:.1f} % of positions"
            )
        return "\n".join(lines)


def _grouped(items: Sequence[Item]) -> list[tuple[str, str, str]]:
    """A row for all that differ in a number alone: h.0.attn, h.1.attn, ... are h.*.attn (12)."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for item in items:
        pattern = ".".join("*" if part.isdigit() else part for part in item.name.split("."))
        groups.setdefault((pattern, item.kind, item.what), []).append(item.name)
    return [
        (names[0] or "(the model)" if len(names) == 1 else f"{pattern} ({len(names)})", kind, what)
        for (pattern, kind, what), names in groups.items()
    ]


# ------------------------------------------------------------------------------------------------------- what changes


@dataclass
class Edit:
    """An entry of an instance's `__dict__`, and what it was. Data alone, so that a model with edits can be copied."""

    owner: nn.Module
    name: str
    existed: bool
    old: Any

    def undo(self) -> None:
        if self.existed:
            self.owner.__dict__[self.name] = self.old
        else:
            self.owner.__dict__.pop(self.name, None)


class _Work:
    """A model that is being changed: what was asked for, what has been done."""

    def __init__(self, model: nn.Module, skip: Sequence[str]) -> None:
        self.model, self.skip = model, skip
        size = _bytes(model)
        self.report = Report(bytes_before=size, bytes_after=size)
        self.edits: list[Edit] = []
        self.children = [(module, dict(module._modules)) for module in model.modules()]
        self.claimed: set[int] = set()  # modules that have been decided on

    def skipped(self, name: str) -> bool:
        return any(f".{pattern}." in f".{name}." or fnmatchcase(name, pattern) for pattern in self.skip)

    def set(self, owner: nn.Module, name: str, value: Any) -> None:
        self.edits.append(Edit(owner, name, name in owner.__dict__, owner.__dict__.get(name)))
        owner.__dict__[name] = value

    def replace_forward(
        self, name: str, module: nn.Module, forward: Callable[..., Any], what: str, operators: tuple[str, ...]
    ) -> None:
        self.claimed.add(id(module))
        if "forward" in module.__dict__:
            return self.keep(name, module, "its forward has been replaced before")
        self.set(module, "forward", MethodType(forward, module))
        return self.replaced(name, module, what, operators)

    def replaced(self, name: str, module: nn.Module, what: str, operators: tuple[str, ...]) -> None:
        self.report.replaced.append(Item(name, type(module).__name__, what, operators))

    def keep(self, name: str, module: nn.Module, why: str) -> None:
        self.claimed.add(id(module))
        self.report.kept.append(Item(name, type(module).__name__, why))

    def undo(self) -> None:
        for edit in reversed(self.edits):
            edit.undo()
        for module, children in self.children:
            module._modules.update(children)


def optimize(
    model: nn.Module,
    *,
    attention: bool = True,
    softmax: bool = True,
    linear: str | None = None,
    group_size: int = 128,
    norm: bool = True,
    loss: bool = True,
    skip: Sequence[str] = (),
    verify: Any = None,
) -> Report:
    """Make a model use the operators of lmops, in place, and say what was done.

        report = lmops.optimize(model, linear="int4", verify=inputs)
        print(report)
        lmops.restore(model)

    model: any torch.nn.Module. This instance changes, and nothing else: no class, and no other model, also not one that
        shares its transformers config, of which this one gets a copy.
    attention: of transformers models, through their registry of attention functions (BLOOM's layers one by one); of
        torch.nn.MultiheadAttention where weights are not asked for; and torch's scaled_dot_product_attention in the
        forward of other modules.
    softmax: torch.nn.Softmax and LogSoftmax, and the functions in the forward of other modules.
    norm: torch.nn.LayerNorm and RMSNorm, in transformers RMSNorms and the gated activations of MLPs (SwiGLU, GeGLU)
        and RoPE where a trial gives the same result, the sum before a norm in layers built as Llama's are, and the
        functions in the forward of other modules.
    loss: torch.nn.CrossEntropyLoss, the losses of transformers' causal and masked language models, and cross_entropy in
        the forward of other modules.
    linear: "int4" or "int8" weights, with a scale and a zero point for every group_size columns; "fp8", with a scale a
        row; "w8a8", int8 with a scale a row, and inputs rounded to 8 bits too. None leaves linear layers alone. Weights
        are rounded to nearest; `lmops.quantization.quantize_model` has better ways. This cannot be undone.
        The head, a layer called "lm_head" or "head", becomes int8 with a scale a row for "int4" and "int8", which moves
        logits by less than their layers do, and stays for the others. An embedding that shares its weight keeps it.
    skip: names to leave alone: a whole name, part of one between its dots ("lm_head", "layers.0"), or with wildcards.
    verify: inputs of the model: a mapping of arguments, a tuple of them, or the only one. The model runs before and
        after, in evaluation mode, and in the next higher precision as the truth, for which it is copied. Where linear
        is given, what quantization did is measured and reported.

    "The functions in the forward of other modules": where the code of a module's forward, or a function it calls, names
    one of them, calls of it are redirected while this instance runs, submodules included.

    Raises, with the model as it was: NothingToReplaceError; VerificationError; ValueError for an unknown `linear`, a
    model that is quantized already, skip that names some of the attention layers of a transformers model, and layers
    that cannot be quantized, with their names; TypeError for a model or skip of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names, got the string {skip!r}")
    if linear is not None and linear not in LINEAR:
        raise ValueError(f"linear must be None or one of {', '.join(LINEAR)}, got {linear!r}")
    if linear is not None:
        quantized = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
        if quantized:
            raise ValueError(f"model is quantized already: {quantized[0]} is one of {len(quantized)} QuantLinears")
    before = None if verify is None else _run(model, verify)
    truth = None if verify is None else _truth(model, verify)
    work = _Work(model, skip)
    try:
        wanted = {"attention": attention, "softmax": softmax, "norm": norm, "loss": loss}
        kinds = {kind for kind, on in wanted.items() if on}
        _transformers(work, kinds)
        for name, module in list(model.named_modules()):
            if id(module) not in work.claimed and not work.skipped(name):
                _torch_module(work, name, module, kinds)
        if before is not None and truth is not None and work.edits:
            _verify(before, truth, _run(model, verify))
        if linear is not None:
            _quantize(work, linear, group_size)
        if not work.report.replaced:
            raise NothingToReplaceError(work.report)
        if before is not None:
            work.report.verified = bool(work.edits)
            if linear is not None:
                _compare(work.report, before, _run(model, verify))
    except BaseException:
        work.undo()
        raise
    model.__dict__.setdefault(EDITS, []).extend(work.edits)
    work.report.bytes_after = _bytes(model)
    devices = sorted({t.device.type for t in (*model.parameters(), *model.buffers())} or {"cpu"})
    for name in dict.fromkeys(name for item in work.report.replaced for name in item.operators):
        found = [OPERATORS[name].implementation(device) for device in devices]
        work.report.implementations[name] = "; ".join(f"{kind} ({why})" for kind, why in found)
    return work.report


def restore(model: nn.Module) -> list[str]:
    """Undo what `optimize` did to a model, or to modules in it, but for quantization; the names of what changed.

    Raises ValueError for a model that has not been optimized.
    """
    optimized = [module for module in model.modules() if EDITS in module.__dict__]
    if not optimized:
        raise ValueError("model has not been optimized: lmops.optimize was never called on it, or has been undone")
    owners: set[int] = set()
    for module in optimized:
        for edit in reversed(module.__dict__.pop(EDITS)):
            edit.undo()
            owners.add(id(edit.owner))
    return [name for name, module in model.named_modules() if id(module) in owners]


# -------------------------------------------------------------------------------------------------- torch's own layers


def _torch_module(work: _Work, name: str, module: nn.Module, kinds: set[str]) -> None:
    own = type(module).forward
    if own is nn.MultiheadAttention.forward and "attention" in kinds:
        assert isinstance(module, nn.MultiheadAttention)
        if module.bias_k is not None or module.add_zero_attn:
            return work.keep(name, module, "add_bias_kv and add_zero_attn are not supported")
        return work.replace_forward(name, module, _mha_forward, "attention, where weights are not asked for", ATTENTION)
    if isinstance(module, nn.TransformerEncoderLayer) and "attention" in kinds:
        work.set(module, "activation_relu_or_gelu", 0)  # which is how it leaves torch's fused layer for inference
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


def _named_forward(function: Any) -> Any:
    """A bound method is pickled by its name: a pickled model comes back with its class's forward, and works."""
    function.__name__ = "forward"
    return function


@_named_forward
def _softmax_forward(self: Any, input: Tensor) -> Tensor:
    dim = self.dim if self.dim is not None else 0 if input.ndim in (0, 1, 3) else 1
    return softmax_(input, dim=dim)


@_named_forward
def _log_softmax_forward(self: Any, input: Tensor) -> Tensor:
    dim = self.dim if self.dim is not None else 0 if input.ndim in (0, 1, 3) else 1
    return log_softmax(input, dim=dim)


@_named_forward
def _layer_norm_forward(self: Any, input: Tensor) -> Any:
    return layer_norm(input, self.weight, self.bias, self.eps)


@_named_forward
def _rms_norm_forward(self: Any, x: Tensor) -> Any:
    return rms_norm(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


@_named_forward
def _cross_entropy_forward(self: Any, input: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(
        input, target, self.weight, ignore_index=self.ignore_index, reduction=self.reduction,
        label_smoothing=self.label_smoothing,
    )  # fmt: skip


@_named_forward
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


# ------------------------------------------------------------------------------- functions in the forward of a module


def _redirected_softmax(ours: Callable[..., Tensor], theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(input: Tensor, dim: Any = None, *rest: Any, dtype: torch.dtype | None = None, **kw: Any) -> Tensor:
        # _stacklevel is of the warning about a missing dim; what else there may be, such as names, is torch's
        if isinstance(dim, int) and input.dtype in FLOATS and not rest and kw.keys() <= {"_stacklevel"}:
            return ours(input, dim=dim, dtype=dtype)
        return theirs(input, dim, *rest, dtype=dtype, **kw)

    return call


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
        return rms_norm(input, weight, torch.finfo(input.dtype).eps if eps is None else eps)
    return nn.functional.rms_norm(input, normalized_shape, weight, eps)


# what code calls -> the kind it is of, and what takes its place
FUNCTIONS: dict[Callable[..., Any], tuple[str, Callable[..., Any]]] = {
    nn.functional.scaled_dot_product_attention: ("attention", scaled_dot_product_attention),
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


@_named_forward
def _redirected_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    with _Redirect(self._lmops_redirects):
        return type(self).forward(self, *args, **kwargs)


def _functions(work: _Work, name: str, module: nn.Module, kinds: set[str]) -> None:
    """Redirect the functions that the code of a module's forward names."""
    names = [n for n in _names_in(type(module)) if not isinstance(getattr(module, n, None), nn.Module)]
    found = tuple(sorted({FUNCTION_KINDS[n] for n in names if FUNCTION_KINDS.get(n) in kinds}))
    if not found:
        return None
    inside = [n for n, _ in module.named_modules(prefix=name) if n != name and work.skipped(n)]
    inside = [
        n for n in inside if {FUNCTION_KINDS.get(f) for f in _names_in(type(work.model.get_submodule(n)))} & {*found}
    ]
    if inside:
        return work.keep(name, module, f"it calls {', '.join(found)} functions, but so does {inside[0]} inside it")
    called = [n for n in dict.fromkeys(names) if FUNCTION_KINDS.get(n) in found]
    work.set(module, "_lmops_redirects", found)
    operators = tuple(o for kind in found for o in OPERATORS_OF[kind])
    return work.replace_forward(name, module, _redirected_forward, f"{', '.join(called)} in its forward", operators)


def _names_in(kind: type) -> Iterator[str]:
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


# -------------------------------------------------------------------------------------------------------- transformers


def _transformers(work: _Work, kinds: set[str]) -> None:
    """The transformers models among the modules: attention through the registry, losses, BLOOM."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    inside: set[int] = set()
    for name, module in work.model.named_modules():
        if isinstance(module, PreTrainedModel) and id(module) not in inside:
            inside.update(id(m) for m in module.modules())
            if "attention" in kinds and not work.skipped(name):
                _transformers_attention(work, name, module)
            if "loss" in kinds and not work.skipped(name):
                _transformers_loss(work, name, module)
            if "norm" in kinds:
                for inner, layer in module.named_modules(prefix=name):
                    if type(layer).__name__.endswith("Norm") and not work.skipped(inner):
                        _transformers_norm(work, inner, layer)
                    elif set(layer._modules) in (SEPARATE, FUSED) and not work.skipped(inner):
                        _transformers_mlp(work, inner, layer)
                    elif ROTATION in _globals_of(layer) and not work.skipped(inner):
                        _transformers_rope(work, inner, layer)
                for inner, layer in module.named_modules(prefix=name):  # whose norms have been decided on
                    if set(layer._modules) == BLOCK and not work.skipped(inner):
                        _transformers_block(work, inner, layer)


def _transformers_attention(work: _Work, prefix: str, model: Any) -> None:
    from transformers import PreTrainedConfig, PreTrainedModel

    from lmops.integrations import transformers as integration

    through_registry: list[tuple[str, nn.Module]] = []
    others: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules(prefix=prefix):
        if "Attention" in type(module).__name__ and type(module).__module__.startswith("transformers."):
            (through_registry if "get_interface" in _names_in(type(module)) else others).append((name, module))
    skipped = [name for name, _ in through_registry if work.skipped(name)]
    if skipped:
        raise ValueError(
            f"skip names {skipped[0]}, but attention of a transformers model can only be chosen for all its layers; "
            "use attention=False"
        )
    for name, module in others:
        if any("Attention" in type(m).__name__ for m in module.modules() if m is not module) or work.skipped(name):
            continue
        if type(module).__name__ == "BloomAttention":
            work.replace_forward(name, module, _named_forward(integration.bloom_attention), "attention", ATTENTION)
        else:
            work.keep(name, module, "computes attention itself, without transformers' registry of attention functions")
    models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    if not through_registry or all(m.config._attn_implementation == integration.NAME for m in models):
        return
    held = [(m, key, v) for m in model.modules() for key, v in m.__dict__.items() if isinstance(v, PreTrainedConfig)]
    own = list({id(config): config for *_, config in held}.values())
    copies = dict(zip(map(id, own), copy.deepcopy(own), strict=True))
    for module, key, config in held:
        work.set(module, key, copies[id(config)])
    model.set_attn_implementation(integration.NAME)
    for name, module in through_registry:
        work.replaced(name, module, "attention", ATTENTION)


@_named_forward
def _transformers_norm_forward(self: Any, hidden_states: Tensor) -> Any:
    if self.weight.dtype != hidden_states.dtype:  # the result then is of another type than the input
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self._lmops_eps, weight_offset=self._lmops_offset)


def _transformers_norm(work: _Work, name: str, norm: Any) -> None:
    """Replace an RMSNorm whose formula is found out by trying: with weights as they are, or as differences from 1."""
    if not type(norm).__module__.startswith("transformers."):
        return None
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    weight = norm._parameters.get("weight")
    takes = list(inspect.signature(type(norm).forward).parameters)
    if not isinstance(eps, float) or weight is None or weight.ndim != 1 or weight.is_meta or len(takes) != 2:
        return work.keep(name, norm, "is not an RMSNorm of one weight")
    trial = copy.deepcopy(norm).float()
    x = torch.randn(4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
    x[2:] *= eps**0.5  # where eps counts
    with torch.no_grad():
        expected = type(norm).forward(trial, x)
        found: Any = [rms_norm(x, trial.weight, eps, weight_offset=offset) for offset in (0.0, 1.0)]
        offset = next((float(i) for i, y in enumerate(found) if torch.allclose(y, expected, 1e-4, 1e-6)), None)
    if offset is None:
        return work.keep(name, norm, "its result is not that of an RMSNorm")
    work.set(norm, "_lmops_eps", eps)
    work.set(norm, "_lmops_offset", offset)
    return work.replace_forward(name, norm, _transformers_norm_forward, "rms_norm", NORM)


# the children of an MLP that computes down(activation(gate(x)) * up(x)), with its two halves as two layers or as one
SEPARATE, FUSED = {"gate_proj", "up_proj", "down_proj", "act_fn"}, {"gate_up_proj", "down_proj", "activation_fn"}
ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "swiglu": swiglu, "geglu": geglu, "geglu, exact": partial(geglu, approximate="none"),
}  # fmt: skip


@_named_forward
def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(ACTIVATIONS[self._lmops_activation](self.gate_proj(x), self.up_proj(x)))


@_named_forward
def _fused_mlp_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return self.down_proj(ACTIVATIONS[self._lmops_activation](self.gate_up_proj(hidden_states)))


class _WithoutProjections:
    """An MLP to its class's forward, whose linear layers are replaced."""

    def __init__(self, mlp: nn.Module, **layers: Callable[[Tensor], Tensor]) -> None:
        self.__dict__.update(layers)
        self.mlp = mlp

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mlp, name)


def _transformers_mlp(work: _Work, name: str, mlp: nn.Module) -> None:
    """Replace the activation of a gated MLP; which it is, and that there is nothing else, is found out by trying."""
    takes = list(inspect.signature(type(mlp).forward).parameters)
    if not type(mlp).__module__.startswith("transformers.") or len(takes) != 2:
        return None
    gate, up = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(0)) * 3
    layers: dict[str, Callable[[Tensor], Tensor]] = {
        "gate_proj": lambda x: gate, "up_proj": lambda x: up, "gate_up_proj": lambda x: torch.cat([gate, up], -1),
        "down_proj": lambda x: x,
    }  # fmt: skip
    with torch.no_grad():
        expected = type(mlp).forward(_WithoutProjections(mlp, **layers), gate)
        same = (what for what, f in ACTIVATIONS.items() if torch.allclose(f(gate, up), expected, 1e-5, 1e-6))
        found = next(same, None)
    if found is None:
        return work.keep(name, mlp, "its result is not that of SwiGLU or GeGLU")
    work.set(mlp, "_lmops_activation", found)
    forward = _mlp_forward if set(mlp._modules) == SEPARATE else _fused_mlp_forward
    return work.replace_forward(name, mlp, forward, found, GATED)


ROTATION = "apply_rotary_pos_emb"  # what transformers' modeling files call the function


def _globals_of(module: nn.Module) -> tuple[str, ...]:
    """What the code of a transformers module's forward names, where this is a plain function."""
    forward = type(module).forward
    if not type(module).__module__.startswith("transformers.") or not isinstance(forward, FunctionType):
        return ()
    return forward.__code__.co_names


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    """ROTATION of (B, heads, T, D), or with unsqueeze_dim 2 (B, T, heads, D), by tables (B, T, 2 half)."""
    half = cos.shape[-1] // 2
    return _rotate_by(q, k, cos[..., :half], sin[..., :half], unsqueeze_dim)


def _rotate_by(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, ...]:
    """Likewise, by tables without their repetition, (B, T, half)."""
    if unsqueeze_dim == 2:
        return cast(tuple[Tensor, Tensor], rope(q, k, cos, sin))
    rotated = cast(tuple[Tensor, Tensor], rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin))
    return tuple(t.transpose(1, 2) for t in rotated)


def _transformers_rope(work: _Work, name: str, module: Any) -> None:
    """Give an instance a copy of its forward in which ROTATION is ours; what theirs does is found out by trying.

    The copy sees the other globals of its file as they are now.
    """
    forward = type(module).forward
    theirs = forward.__globals__[ROTATION]
    q, k = torch.randn(2, 2, 3, 5, 16, generator=torch.Generator().manual_seed(0))
    angles = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(1)) * 6
    for ours, repeat in ((_rotate, 2), (_rotate_by, 1)):
        cos, sin = (torch.cat([t] * repeat, -1) for t in (angles.cos(), angles.sin()))
        for x, y in ((q, k), (q[..., :8], k[..., :8])):  # of which all is rotated, where theirs can do no less
            try:
                expected = theirs(x, y, cos, sin)
            except (RuntimeError, TypeError):
                continue
            found = ours(x, y, cos, sin)
            if isinstance(expected, tuple) and all(map(partial(torch.allclose, rtol=1e-5, atol=1e-6), found, expected)):
                scope = forward.__globals__ | {ROTATION: ours}
                copied = FunctionType(forward.__code__, scope, "forward", forward.__defaults__, forward.__closure__)
                copied.__kwdefaults__ = forward.__kwdefaults__
                return work.replace_forward(name, module, copied, "rope", ("rope",))
    return work.keep(name, module, f"its {ROTATION} is not the rotation of halves")


# the children of a layer x + mlp(norm(x)) after x + attention(norm(x)), as Llama's and many others are
BLOCK = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def _hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


@_named_forward
def _block_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    norm = self.post_attention_layernorm
    checkpointing = self.training and getattr(self, "gradient_checkpointing", False)  # the class's forward does that
    other = norm.weight.dtype != hidden_states.dtype or _hooked(norm) or "_lmops_eps" not in norm.__dict__
    if args or checkpointing or other:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    if attended.dtype == hidden_states.dtype:
        offset = norm._lmops_offset
        y, residual = rms_norm(attended, norm.weight, norm._lmops_eps, residual=hidden_states, weight_offset=offset)
    else:  # under autocast
        residual = hidden_states + attended
        y = norm(residual)
    return residual + self.mlp(y)


def _transformers_block(work: _Work, name: str, block: Any) -> None:
    """Add attention's result and normalize the sum in one pass, in layers whose code is that of Llama's."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    codes: list[Any] = [inspect.unwrap(kind.forward).__code__ for kind in (type(block), LlamaDecoderLayer)]
    same = len({(code.co_code, code.co_names, code.co_varnames) for code in codes}) == 1
    if same and "_lmops_eps" in block.post_attention_layernorm.__dict__:
        work.replace_forward(name, block, _block_forward, "rms_norm with the residual", NORM)


def _transformers_loss(work: _Work, name: str, model: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    from lmops.integrations import transformers as integration

    if "_loss_function" in model.__dict__ or "loss_function" not in _names_in(type(model)):
        return
    ours = {ForCausalLMLoss: integration.causal_lm_loss, ForMaskedLMLoss: integration.masked_lm_loss}
    used = model.loss_function
    if used in ours:
        work.set(model, "_loss_function", ours[used])
        work.replaced(name, model, "cross_entropy", LOSS)
    else:
        work.keep(name, model, f"its loss is {getattr(used, '__name__', used)}")


# ------------------------------------------------------------------------------------------------------- linear layers


def _quantize(work: _Work, linear: str, group_size: int) -> None:
    model = work.model
    layers = _find_layers(model, [*work.skip, *HEADS])
    weight_only = linear in ("int4", "int8")
    rows = [] if weight_only else list(layers)  # what gets a scale a row
    if weight_only:
        rows = [name for name in _find_layers(model, work.skip) if name not in layers]
    found = {name: model.get_submodule(name) for name in rows}
    scales = {name: check_weight(float_weight(layer), 8, -1, None, name) for name, layer in found.items()}
    kind = W8A8Linear if linear == "w8a8" else QuantLinear
    packed = {
        name: QuantizedTensor.quantize(
            float_weight(layer), 8, -1, fp8=linear == "fp8", scale_dtype=scales[name], name=name
        )
        for name, layer in found.items()
    }
    what = dict.fromkeys(layers, f"{linear} weight") | {name: "int8 weight" for name in rows if weight_only}
    if linear == "w8a8":
        what = dict.fromkeys(layers, "int8 weight, inputs rounded to int8")
    kinds = {name: type(layer).__name__ for name, layer in (layers | found).items()}
    if weight_only:
        quantize_model(model, int(linear[3:]), group_size, skip=[*work.skip, *HEADS], progress=False)
    for name, layer in found.items():
        new = kind.from_quantized(packed[name], layer.bias, float_weight(layer).dtype).train(layer.training)  # type: ignore[arg-type]
        for parent in list(model.modules()):
            for key, child in list(parent._modules.items()):
                if child is layer:
                    parent._modules[key] = new
    forward = "int8_matmul_forward" if linear == "w8a8" else "quantized_matmul_forward"
    operators = (forward, "quantized_matmul_backward")
    for name in kinds:
        work.report.replaced.append(Item(name, kinds[name], what[name], operators))


# ------------------------------------------------------------------------------------------------------------- verify


def _run(model: nn.Module, inputs: Any) -> Tensor:
    """The main result of a model: its logits, at the positions that are not padding."""
    with torch.no_grad(), _evaluating(model):
        if isinstance(inputs, Mapping):
            out = model(**inputs)
        else:
            out = model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    for name in ("logits", "last_hidden_state"):
        out = getattr(out, name, out)
    while isinstance(out, (tuple, list, Mapping)):
        out = next(iter(out.values() if isinstance(out, Mapping) else out))
    if not isinstance(out, Tensor):
        raise TypeError(f"verify: the model returned a {type(out).__name__}, no tensor to compare")
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    if isinstance(mask, Tensor) and mask.ndim == 2 and out.shape[:2] == mask.shape:
        out = out[mask.bool()]
    return out


def _truth(model: nn.Module, inputs: Any) -> Tensor:
    """The result in the next higher precision, of a copy of the model."""
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
    higher = torch.float64 if torch.float32 in kinds or not kinds else torch.float32

    def raised(x: Any) -> Any:
        return x.to(higher) if isinstance(x, Tensor) and x.is_floating_point() else x

    if isinstance(inputs, Mapping):
        inputs = {name: raised(x) for name, x in inputs.items()}
    else:
        inputs = tuple(map(raised, inputs)) if isinstance(inputs, (tuple, list)) else raised(inputs)
    return _run(copy.deepcopy(model).to(higher), inputs)


def _verify(before: Tensor, truth: Tensor, after: Tensor) -> None:
    if (before.isfinite() & ~truth.isfinite()).any():
        raise ValueError(
            f"verify: the model gives finite results in {before.dtype} and NaN or infinities in {truth.dtype}, so "
            "there is no truth to compare with; transformers' eager attention does so for padding on the left"
        )
    try:
        assert_accurate(after, truth, before)
    except AssertionError as error:
        raise VerificationError(f"the optimized model is less accurate than the model was: {error}") from None


def _compare(report: Report, before: Tensor, after: Tensor) -> None:
    p, q = (x.float().log_softmax(-1) for x in (before, after))
    report.kl_divergence = (p.exp() * (p - q)).sum(-1).mean().item()
    report.agreement = (p.argmax(-1) == q.argmax(-1)).float().mean().item()


def _bytes(model: nn.Module) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
