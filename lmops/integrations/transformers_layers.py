"""Layers of transformers models over the operators of lmops: attention, norms, MLPs, RoPE, blocks, losses."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn

from lmops.integrations.edits import ATTENTION, GATED, LOSS, NORM, Work
from lmops.integrations.layers import named_forward, names_in
from lmops.ops.activation import geglu, swiglu
from lmops.ops.norm import layer_norm, rms_norm
from lmops.ops.rope import rope


def transformers_layers(work: Work, kinds: set[str]) -> None:
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
                    if set(layer._modules) in (BLOCK, GPT2_BLOCK) and not work.skipped(inner):
                        _transformers_block(work, inner, layer)


def _transformers_attention(work: Work, prefix: str, model: Any) -> None:
    from transformers import PreTrainedConfig, PreTrainedModel

    from lmops.integrations import transformers as integration

    through_registry: list[tuple[str, nn.Module]] = []
    others: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules(prefix=prefix):
        if "Attention" in type(module).__name__ and type(module).__module__.startswith("transformers."):
            (through_registry if "get_interface" in names_in(type(module)) else others).append((name, module))
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
            work.replace_forward(name, module, named_forward(integration.bloom_attention), "attention", ATTENTION)
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


@named_forward
def _transformers_norm_forward(self: Any, hidden_states: Tensor) -> Any:
    if self.weight.dtype != hidden_states.dtype:  # the result then is of another type than the input
        return type(self).forward(self, hidden_states)
    return rms_norm(hidden_states, self.weight, self._lmops_eps, weight_offset=self._lmops_offset)


def _transformers_norm(work: Work, name: str, norm: Any) -> None:
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


@named_forward
def _mlp_forward(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(ACTIVATIONS[self._lmops_activation](self.gate_proj(x), self.up_proj(x)))


@named_forward
def _fused_mlp_forward(self: Any, hidden_states: Tensor) -> Tensor:
    return self.down_proj(ACTIVATIONS[self._lmops_activation](self.gate_up_proj(hidden_states)))


class _WithoutProjections:
    """An MLP to its class's forward, whose linear layers are replaced."""

    def __init__(self, mlp: nn.Module, **layers: Callable[[Tensor], Tensor]) -> None:
        self.__dict__.update(layers)
        self.mlp = mlp

    def __getattr__(self, name: str) -> Any:
        return getattr(self.mlp, name)


def _transformers_mlp(work: Work, name: str, mlp: nn.Module) -> None:
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


def _transformers_rope(work: Work, name: str, module: Any) -> None:
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
GPT2_BLOCK = {"attn", "mlp", "ln_1", "ln_2"}  # likewise, with LayerNorm


def _hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


@named_forward
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


@named_forward
def _gpt2_block_forward(
    self: Any,
    hidden_states: Tensor,
    past_key_values: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    use_cache: bool | None = False,
    **kwargs: Any,
) -> Tensor:
    norm, given = self.ln_2, {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
    checkpointing = self.training and getattr(self, "gradient_checkpointing", False)
    if checkpointing or encoder_hidden_states is not None or norm.weight.dtype != hidden_states.dtype or _hooked(norm):
        others = {"encoder_hidden_states": encoder_hidden_states, "encoder_attention_mask": encoder_attention_mask}
        return type(self).forward(self, hidden_states, use_cache=use_cache, **others, **given)
    attended, _ = self.attn(self.ln_1(hidden_states), use_cache=use_cache, **given)
    if attended.dtype == hidden_states.dtype:
        y, residual = layer_norm(attended, norm.weight, norm.bias, norm.eps, residual=hidden_states)
    else:  # under autocast
        residual = hidden_states + attended
        y = norm(residual)
    return residual + self.mlp(y)


def _transformers_block(work: Work, name: str, block: Any) -> None:
    """Add attention's result and normalize the sum in one pass, in layers whose code is that of Llama's or GPT-2's."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    if set(block._modules) == BLOCK:
        known: Any = LlamaDecoderLayer
        ours, what = _block_forward, "rms_norm with the residual"
        replaced = "_lmops_eps" in block.post_attention_layernorm.__dict__
    else:
        known, ours, what = GPT2Block, _gpt2_block_forward, "layer_norm with the residual"
        norm = block.ln_2
        replaced = type(norm).forward is nn.LayerNorm.forward and norm.weight is not None
        replaced = replaced and "forward" not in norm.__dict__ and not work.skipped(f"{name}.ln_2")
    codes: list[Any] = [inspect.unwrap(kind.forward).__code__ for kind in (type(block), known)]
    same = len({(code.co_code, code.co_names, code.co_varnames) for code in codes}) == 1
    if same and replaced:
        work.replace_forward(name, block, ours, what, NORM)


def transformers_quantized(model: nn.Module, linear: str, group_size: int, skip: Sequence[str]) -> None:
    """Give transformers models their quantizer: `save_pretrained` then writes what `from_pretrained` reads."""
    if "transformers" not in sys.modules:
        return
    from transformers import PreTrainedModel

    from lmops.integrations.quantizer import LmopsConfig, LmopsQuantizer

    bits, group_size = 4 if linear == "int4" else 8, group_size if linear[:3] == "int" else -1
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and getattr(module, "hf_quantizer", None) is None:
            quantizer: Any = LmopsQuantizer(LmopsConfig(bits, group_size, skip=skip), pre_quantized=True)
            module.hf_quantizer = quantizer


def _transformers_loss(work: Work, name: str, model: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

    from lmops.integrations import transformers as integration

    if "_loss_function" in model.__dict__ or "loss_function" not in names_in(type(model)):
        return
    ours = {ForCausalLMLoss: integration.causal_lm_loss, ForMaskedLMLoss: integration.masked_lm_loss}
    used = model.loss_function
    if used in ours:
        work.set(model, "_loss_function", ours[used])
        work.replaced(name, model, "cross_entropy", LOSS)
    else:
        work.keep(name, model, f"its loss is {getattr(used, '__name__', used)}")
