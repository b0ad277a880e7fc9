"""Checkpoints as Hugging Face's transformers saves them: a folder with config.json and safetensors files.

The meaning of every key is that of transformers' configuration classes (4 and 5); a missing one has their default.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmops.models.checkpoint import CheckpointError, NameTable, StoredTensor, Target, check_features, naming
from lmops.models.extras import require
from lmops.models.gpt import GPTConfig, RopeScaling
from lmops.models.quantized import PARTS, assemble, read_scheme

Settings = Mapping[str, Any]


# ---- files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reader:
    """Reads one tensor. The file is opened each time: an open one would keep all pages read so far in memory."""

    file: Path
    name: str

    def __call__(self) -> Tensor:
        with require("safetensors", "models").safe_open(self.file, framework="pt") as opened:
            return opened.get_tensor(self.name)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}


def stored_tensors(
    folder: Path, weightless: tuple[str, ...] = (), integers: tuple[str, ...] = ()
) -> list[StoredTensor]:
    """The tensors of model.safetensors, or of the files that model.safetensors.index.json lists.

    weightless: ends of the names to leave out. integers: ends of the names of tensors that may hold integers.

    Raises CheckpointError for a missing, damaged or cut off file, for an index that doesn't agree with its files, and
    for a tensor that doesn't hold floating-point numbers.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return _tensors_of(folder / "model.safetensors", weightless, integers)
    if not index.exists():
        raise CheckpointError(
            f"{folder}: neither model.safetensors nor {index.name} is there (found {_listing(folder)})"
        )
    files: dict[str, str] = read_json(index).get("weight_map", {})
    stored = [
        tensor for name in sorted(set(files.values())) for tensor in _tensors_of(folder / name, weightless, integers)
    ]
    there = {(tensor.name, tensor.file.name) for tensor in stored}
    for name, file in files.items():
        if (name, file) not in there and not name.endswith(weightless):
            raise CheckpointError(f"{index}: tensor {name!r} should be in {file}, and is not")
    return stored


def _listing(folder: Path) -> str:
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"


def _tensors_of(file: Path, weightless: tuple[str, ...], integers: tuple[str, ...]) -> list[StoredTensor]:
    safetensors = require("safetensors", "models")
    if not file.exists():
        raise CheckpointError(f"{file}: the file is missing")
    stored = []
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  (not a dict)
                header = opened.get_slice(name)
                if name.endswith(weightless):
                    continue
                known = _DTYPES | _INTEGERS if name.endswith(integers) else _DTYPES
                if header.get_dtype() not in known:
                    raise CheckpointError(
                        f"{file}: tensor {name!r} has type {header.get_dtype()}, supported are {', '.join(known)}"
                    )
                dtype = known[header.get_dtype()]
                stored.append(StoredTensor(name, tuple(header.get_shape()), dtype, _Reader(file, name), file))
    except safetensors.SafetensorError as error:
        size = file.stat().st_size
        raise CheckpointError(f"{file}: not a whole safetensors file ({size} bytes): {error}") from error
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return value


# ---- configuration ------------------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

# These say how a model was made, trained or is served, and change nothing that it computes.
_INERT_KEYS = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype _name_or_path _attn_implementation use_cache
    initializer_range initializer_factor bos_token_id eos_token_id pad_token_id unk_token_id
    attention_dropout attn_pdrop embd_pdrop resid_pdrop hidden_dropout dropout
    pretraining_tp reorder_and_upcast_attn n_ctx task_specific_params gradient_checkpointing
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    output_attentions output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder problem_type
    id2label label2id finetuning_task tokenizer_class prefix max_length
    is_llama_config rope_interleaved transformers.js_config unsloth_version unsloth_fixed
    """.split()  # noqa: SIM905  (forty lines as a list)
)
_NEUTRAL = {"is_decoder": True, "add_cross_attention": False, "rope_interleaved": False}


def _required(settings: Settings, key: str, source: Path) -> Any:
    if settings.get(key) is None:
        raise CheckpointError(f"{source}: {key!r} is missing")
    return settings[key]


def _activation(settings: Settings, key: str, default: str, source: Path) -> Any:
    name = settings.get(key, default)
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"{source}: {key} = {name!r} is not supported (known: {', '.join(_ACTIVATIONS)})")
    return _ACTIVATIONS[name]


def _gpt2_config(settings: Settings, source: Path) -> GPTConfig:
    check_features(settings, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}, source)
    d_model = _required(settings, "n_embd", source)
    return GPTConfig(
        vocab_size=_required(settings, "vocab_size", source),
        context_length=_required(settings, "n_positions", source),
        n_layers=_required(settings, "n_layer", source),
        n_heads=_required(settings, "n_head", source),
        d_model=d_model,
        d_ff=settings.get("n_inner") or 4 * d_model,
        norm_eps=settings.get("layer_norm_epsilon", 1e-5),
        activation=_activation(settings, "activation_function", "gelu_new", source),
        tie_embeddings=settings.get("tie_word_embeddings", True),
    )


def _llama_config(settings: Settings, source: Path) -> GPTConfig:
    bias, mlp_bias = (bool(settings.get(key, False)) for key in ("attention_bias", "mlp_bias"))
    if bias != mlp_bias:
        raise CheckpointError(f"{source}: attention_bias = {bias} with mlp_bias = {mlp_bias} is not supported")
    return _decoder_config(settings, source, bias=bias)


def _mistral_config(settings: Settings, source: Path) -> GPTConfig:
    settings = {"num_key_value_heads": 8, **settings}
    return _decoder_config(settings, source, attention_window=settings.get("sliding_window", 4096))


def _qwen2_config(settings: Settings, source: Path) -> GPTConfig:
    return _decoder_config(settings, source, qkv_bias=True, attention_window=_qwen_window(settings, source))


def _qwen3_config(settings: Settings, source: Path) -> GPTConfig:
    check_features(settings, {"attention_bias": False}, source)
    settings = {"head_dim": 128, **settings}
    return _decoder_config(settings, source, qk_norm=True, attention_window=_qwen_window(settings, source))


def _qwen_window(settings: Settings, source: Path) -> int | None:
    """The window of every layer, or None where none has one; a mixture is not supported."""
    window = settings.get("sliding_window", 4096) if settings.get("use_sliding_window", False) else None
    layers = _required(settings, "num_hidden_layers", source)
    kinds = settings.get("layer_types")
    if kinds is None:
        full = min(settings.get("max_window_layers", 28), layers) if window is not None else layers
        kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if len(set(kinds)) > 1 or kinds[0] not in ("full_attention", "sliding_attention"):
        key = "layer_types" if settings.get("layer_types") else "max_window_layers"
        raise CheckpointError(f"{source}: {key} = {settings.get(key)!r}: only one full or sliding kind is supported")
    return window if kinds[0] == "sliding_attention" else None


def _decoder_config(settings: Settings, source: Path, **changes: Any) -> GPTConfig:
    """What Llama and its relatives share."""
    scaling = _rope_scaling(settings, source)
    context = _required(settings, "max_position_embeddings", source)
    if scaling is not None and scaling.kind in ("dynamic", "yarn") and scaling.original_context_length:
        context = max(context, int(scaling.factor * scaling.original_context_length))
    d_model = _required(settings, "hidden_size", source)
    n_heads = _required(settings, "num_attention_heads", source)
    head_dim = settings.get("head_dim") or d_model // n_heads
    rope = _rope_settings(settings)
    check_features(rope, {"partial_rotary_factor": 1.0}, source)  # none of these architectures reads it
    return GPTConfig(
        vocab_size=_required(settings, "vocab_size", source),
        context_length=context,
        n_layers=_required(settings, "num_hidden_layers", source),
        n_heads=n_heads,
        n_kv_heads=settings.get("num_key_value_heads") or n_heads,
        d_model=d_model,
        head_dim=head_dim,
        d_ff=_required(settings, "intermediate_size", source),
        norm="rmsnorm",
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        activation=_activation(settings, "hidden_act", "silu", source),
        gated_mlp=True,
        positions="rope",
        rope_base=rope.get("rope_theta") or 10000.0,
        rope_scaling=scaling,
        tie_embeddings=settings.get("tie_word_embeddings", False),
        **{"bias": False, **changes},
    )


def _rope_settings(settings: Settings) -> dict[str, Any]:
    """RoPE's keys in one place: transformers 5 has rope_parameters, 4 had rope_scaling and keys beside it."""
    outside = {
        key: settings[key]
        for key in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
        if settings.get(key) is not None
    }
    inside = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    return {**outside, **{key: value for key, value in inside.items() if value is not None}}


_ROPE_KEYS = {
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": {"factor", "attention_factor", "short_factor", "long_factor"},
}
_COMMON_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def _rope_scaling(settings: Settings, source: Path) -> RopeScaling | None:
    rope = _rope_settings(settings)
    kind: Any = rope.get("rope_type") or rope.get("type") or "default"
    known = _ROPE_KEYS.get(kind, set()) | _COMMON_ROPE_KEYS
    if kind not in {"default", *_ROPE_KEYS} or not known >= rope.keys():
        raise CheckpointError(f"{source}: RoPE parameters {rope} are not supported (types: {', '.join(_ROPE_KEYS)})")
    if kind == "default":
        return None
    longest = _required(settings, "max_position_embeddings", source)
    original = longest if kind == "dynamic" else rope.get("original_max_position_embeddings", longest)
    factor = rope.get("factor") or (longest / original if kind in ("yarn", "longrope") else None)
    if factor is None:
        raise CheckpointError(f"{source}: RoPE parameters {rope} lack 'factor'")
    values: dict[str, Any] = {key: rope[key] for key in rope.keys() & _ROPE_KEYS[kind]}
    mscales = (values.pop("mscale", 0), values.pop("mscale_all_dim", 0))
    if all(mscales) and "attention_factor" not in values:
        growth, all_dim = (0.1 * mscale * math.log(factor) + 1 for mscale in mscales)
        values["attention_factor"] = growth / all_dim
    for key in ("short_factor", "long_factor"):
        if key in values:
            values[key] = tuple(values[key])
    return RopeScaling(kind, **{**values, "factor": factor, "original_context_length": original})


# ---- names --------------------------------------------------------------------------------------------------------


def _gpt2_names() -> NameTable:
    table = {
        "wte.weight": Target("embed.weight"),
        "wpe.weight": Target("positions.weight"),
        "lm_head.weight": Target("head.weight"),
    }
    for norm, parameter in {
        "ln_f": "norm",
        "h.{i}.ln_1": "blocks.{i}.attn_norm",
        "h.{i}.ln_2": "blocks.{i}.mlp_norm",
    }.items():
        for kind in ("weight", "bias"):
            table[f"{norm}.{kind}"] = Target(f"{parameter}.{kind}")
    for linear, parameter in {
        "h.{i}.attn.c_attn": "blocks.{i}.attn.qkv",
        "h.{i}.attn.c_proj": "blocks.{i}.attn.out",
        "h.{i}.mlp.c_fc": "blocks.{i}.mlp.up",
        "h.{i}.mlp.c_proj": "blocks.{i}.mlp.down",
    }.items():
        table[f"{linear}.weight"] = Target(f"{parameter}.weight", layout="transposed")
        table[f"{linear}.bias"] = Target(f"{parameter}.bias")
    return table


def _llama_names() -> NameTable:
    layer, block = "layers.{i}", "blocks.{i}"
    table = {
        "embed_tokens.weight": Target("embed.weight"),
        "norm.weight": Target("norm.weight"),
        "lm_head.weight": Target("head.weight"),
        f"{layer}.input_layernorm.weight": Target(f"{block}.attn_norm.weight"),
        f"{layer}.post_attention_layernorm.weight": Target(f"{block}.mlp_norm.weight"),
        f"{layer}.self_attn.q_norm.weight": Target(f"{block}.attn.q_norm.weight"),
        f"{layer}.self_attn.k_norm.weight": Target(f"{block}.attn.k_norm.weight"),
    }
    for kind in ("weight", "bias"):
        table |= {
            f"{layer}.self_attn.q_proj.{kind}": Target(f"{block}.attn.qkv.{kind}", "q"),
            f"{layer}.self_attn.k_proj.{kind}": Target(f"{block}.attn.qkv.{kind}", "k"),
            f"{layer}.self_attn.v_proj.{kind}": Target(f"{block}.attn.qkv.{kind}", "v"),
            f"{layer}.self_attn.o_proj.{kind}": Target(f"{block}.attn.out.{kind}"),
            f"{layer}.mlp.gate_proj.{kind}": Target(f"{block}.mlp.up.{kind}", "gate"),
            f"{layer}.mlp.up_proj.{kind}": Target(f"{block}.mlp.up.{kind}", "up"),
            f"{layer}.mlp.down_proj.{kind}": Target(f"{block}.mlp.down.{kind}"),
        }
    return table


@dataclass(frozen=True)
class Architecture:
    """How to read one `model_type`.

    prefix: what all names but the head's start with, unless the base model alone was saved.
    used: the configuration keys that `config` reads, beside RoPE's.
    weightless: ends of the names of stored tensors that hold no weights.
    """

    config: Callable[[Settings, Path], GPTConfig]
    names: NameTable
    prefix: str
    used: str
    weightless: tuple[str, ...]


_DECODER_KEYS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters rope_scaling rope_theta "
    "partial_rotary_factor original_max_position_embeddings "
)
_QWEN_KEYS = _DECODER_KEYS + "use_sliding_window sliding_window max_window_layers layer_types "
_GPT2_KEYS = (
    "vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon tie_word_embeddings "
    "scale_attn_weights scale_attn_by_inverse_layer_idx"
)
_ROPE_BUFFER = ("self_attn.rotary_emb.inv_freq",)


def _relative_of_llama(config: Callable[[Settings, Path], GPTConfig], used: str) -> Architecture:
    return Architecture(config, _llama_names(), "model.", used, _ROPE_BUFFER)


ARCHITECTURES: dict[str, Architecture] = {
    # attn.bias and attn.masked_bias are the causal mask that old versions saved
    "gpt2": Architecture(_gpt2_config, _gpt2_names(), "transformer.", _GPT2_KEYS, (".attn.bias", ".attn.masked_bias")),
    "llama": _relative_of_llama(_llama_config, _DECODER_KEYS + "attention_bias mlp_bias"),
    "mistral": _relative_of_llama(_mistral_config, _DECODER_KEYS + "sliding_window"),
    "qwen2": _relative_of_llama(_qwen2_config, _QWEN_KEYS),
    "qwen3": _relative_of_llama(_qwen3_config, _QWEN_KEYS + "attention_bias"),
}


def read_folder(folder: Path) -> tuple[GPTConfig, list[StoredTensor], NameTable]:
    """The configuration, tensors and name table of a Hugging Face folder, nothing read yet but headers.

    Raises CheckpointError for what `GPT` can't express; a key that this loader has never heard of is a warning.
    """
    source = folder / "config.json"
    if not source.exists():
        raise CheckpointError(f"{folder}: config.json is missing (found {_listing(folder)})")
    settings = read_json(source)
    name = settings.get("model_type")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{source}: model_type = {name!r} is not supported (known: {', '.join(ARCHITECTURES)})")
    architecture = ARCHITECTURES[name]
    check_features(settings, _NEUTRAL, source)
    scheme = read_scheme(settings, source)
    unknown = sorted(settings.keys() - {*architecture.used.split(), *_INERT_KEYS, *_NEUTRAL, "quantization_config"})
    if unknown:
        warnings.warn(f"{source}: these keys are unknown and have no effect: {', '.join(unknown)}", stacklevel=4)
    with naming(source, "not the configuration of a model"):
        config = architecture.config(settings, source)
    stored = stored_tensors(folder, architecture.weightless, PARTS)
    stored = assemble(scheme, stored)
    prefix = architecture.prefix
    if not any(tensor.name.startswith(prefix) for tensor in stored):
        prefix = ""
    names = {key if key.startswith("lm_head.") else prefix + key: target for key, target in architecture.names.items()}
    return config, stored, names
