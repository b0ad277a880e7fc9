"""Quantized Hugging Face checkpoints: what quantization_config says, and the tensors that make up each weight.

A weight `X.weight` is there as `X.qweight`, `X.scales`, ... Each such set becomes one `StoredTensor` named `X.weight`,
of the weight's own shape, that can be read as it is or dequantized; the rest of the loading needs to know no more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmops.models.checkpoint import CheckpointError, StoredTensor, naming
from lmops.quantization.checkpoints import from_awq, from_compressed_tensors, from_gptq
from lmops.quantization.tensor import QuantizedTensor

Settings = Mapping[str, Any]

_FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # the tensors of a weight: needed, and optional ones
    "gptq": ((".qweight", ".qzeros", ".scales"), (".g_idx",)),
    "awq": ((".qweight", ".qzeros", ".scales"), ()),
    "compressed-tensors": (
        (".weight_packed", ".weight_scale", ".weight_shape"), (".weight_zero_point", ".weight_g_idx"),
    ),
}  # fmt: skip
PARTS = tuple({suffix: 0 for needed, optional in _FORMATS.values() for suffix in needed + optional})


@dataclass(frozen=True)
class Scheme:
    """What a checkpoint says about all its quantized weights.

    method: "gptq", "awq" or "compressed-tensors". version: of GPTQ's zero points. source: the file that says it.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    version: int
    source: Path


def read_scheme(settings: Settings, source: Path) -> Scheme | None:
    """The scheme in quantization_config; None where there is none.

    Raises CheckpointError for methods, formats and features that are not supported, with key and value.
    """
    config = settings.get("quantization_config")
    if config is None:
        return None
    if not isinstance(config, dict):
        raise CheckpointError(f"{source}: quantization_config = {config!r} is not an object")
    method = config.get("quant_method")
    if method not in _FORMATS:
        raise CheckpointError(
            f"{source}: quantization_config.quant_method = {method!r} is not supported (known: {', '.join(_FORMATS)})"
        )
    read = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}[method]
    with naming(source, "quantization_config"):
        return read(_Config(config, source), source)


@dataclass(frozen=True)
class _Config:
    """An object of the configuration, with its name for errors."""

    values: Settings
    source: Path
    name: str = "quantization_config"

    def one_of(self, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value not in allowed or isinstance(value, bool) is not isinstance(allowed[0], bool):
            options = ", ".join(map(repr, allowed))
            raise CheckpointError(f"{self.source}: {self.name}.{key} = {value!r} is not supported (only {options})")
        return value

    def group_size(self, default: Any = None) -> int:
        size = self.values.get("group_size", default)
        if not isinstance(size, int) or (size != -1 and not 16 <= size <= 1024):
            raise CheckpointError(
                f"{self.source}: {self.name}.group_size = {size!r} is not supported (only -1 and 16 to 1024)"
            )
        return size

    def absent(self, *keys: str) -> None:
        for key in keys:
            if self.values.get(key):
                raise CheckpointError(f"{self.source}: {self.name}.{key} = {self.values[key]!r} is not supported")

    def inner(self, key: str) -> _Config:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise CheckpointError(f"{self.source}: {self.name}.{key} = {value!r}: an object is needed")
        return _Config(value, self.source, f"{self.name}.{key}")


def _gptq(config: _Config, source: Path) -> Scheme:
    bits = config.one_of("bits", (4, 8))
    config.absent("dynamic")  # other settings for some layers
    checkpoint = config.one_of("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    config.one_of("pack_dtype", ("int32",), "int32")
    return Scheme(
        "gptq", bits, config.group_size(), config.one_of("sym", (True, False), True),
        config.one_of("desc_act", (True, False), False), 2 if checkpoint == "gptq_v2" else 1, source,
    )  # fmt: skip


def _awq(config: _Config, source: Path) -> Scheme:
    bits = config.one_of("bits", (4,))
    config.one_of("version", ("gemm", "GEMM"), "gemm")
    config.one_of("zero_point", (True,), True)
    return Scheme("awq", bits, config.group_size(), False, False, 0, source)


def _compressed_tensors(config: _Config, source: Path) -> Scheme:
    config.one_of("format", ("pack-quantized",))
    config.absent("kv_cache_scheme")
    groups = config.inner("config_groups")
    schemes = {_compressed_weights(groups.inner(name), source) for name in groups.values}
    if len(schemes) != 1:
        raise CheckpointError(
            f"{source}: quantization_config.config_groups has {len(schemes)} different kinds of weights, "
            "only one is supported"
        )
    return schemes.pop()


def _compressed_weights(group: _Config, source: Path) -> Scheme:
    group.absent("input_activations", "output_activations")
    weights = group.inner("weights")
    bits = weights.one_of("num_bits", (4, 8))
    weights.one_of("type", ("int",), "int")
    weights.absent("dynamic")
    usual = "group" if weights.values.get("group_size") else "channel"
    strategy = weights.one_of("strategy", ("group", "channel", "tensor"), usual)
    size = weights.group_size() if strategy == "group" else -1
    act_order = weights.one_of("actorder", (None, "weight", "static", "group", "dynamic")) in ("group", "dynamic")
    return Scheme(
        "compressed-tensors", bits, size, weights.one_of("symmetric", (True, False), True), act_order, 0, source
    )


# ---- tensors ------------------------------------------------------------------------------------------------------


def assemble(scheme: Scheme | None, stored: list[StoredTensor]) -> list[StoredTensor]:
    """The tensors with each set of parts of a quantized weight replaced by one `StoredTensor` of that weight.

    Raises CheckpointError where the sets are incomplete or do not agree with the scheme, from their headers alone.
    """
    if scheme is None:
        first = next((tensor for tensor in stored if tensor.name.endswith(PARTS)), None)
        if first is not None:
            raise CheckpointError(
                f"{first.file}: tensor {first.name!r} is of a quantized weight, but config.json has no "
                "quantization_config that says how"
            )
        return stored
    needed, optional = _FORMATS[scheme.method]
    parts: dict[str, dict[str, StoredTensor]] = {}
    plain = []
    for tensor in stored:
        suffix = next((end for end in needed + optional if tensor.name.endswith(end)), None)
        if suffix is None:
            plain.append(tensor)
        else:
            parts.setdefault(tensor.name.removesuffix(suffix), {})[suffix] = tensor
    if not parts:
        raise CheckpointError(
            f"{scheme.source}: quantization_config says {scheme.method}, but no tensor has a name that ends with "
            f"{needed[0]}"
        )
    weights = [_weight(scheme, name, tensors) for name, tensors in parts.items()]
    # AutoGPTQ has given layers without a bias one of zeros
    biases = {f"{name}.bias" for name in parts}
    return [replace(tensor, zeros_mean_none=tensor.name in biases) for tensor in plain] + weights


def _weight(scheme: Scheme, name: str, parts: dict[str, StoredTensor]) -> StoredTensor:
    first = next(iter(parts.values()))
    missing = [suffix for suffix in _FORMATS[scheme.method][0] if suffix not in parts]
    if missing:
        raise CheckpointError(f"{first.file}: tensor {name + missing[0]!r} is missing beside {first.name!r}")
    per_word = 32 // scheme.bits
    packed = parts[_FORMATS[scheme.method][0][0]]
    if len(packed.shape) != 2 or packed.dtype != torch.int32:
        raise CheckpointError(
            f"{packed.file}: tensor {packed.name!r} must be 2-dimensional int32, got {packed.shape} {packed.dtype}"
        )
    rows, columns = packed.shape
    if scheme.method == "gptq":
        shape = (columns, rows * per_word)
    elif scheme.method == "awq":
        shape = (columns * per_word, rows)
    else:
        with naming(first.file, parts[".weight_shape"].name):
            n_out, n_in = (int(size) for size in parts[".weight_shape"].read())
        shape = (n_out, n_in)
    n_out, n_in = shape
    if scheme.group_size >= n_in:
        scheme = replace(scheme, group_size=-1)
    groups = 1 if scheme.group_size == -1 else -(-n_in // scheme.group_size)
    out_words = -(-n_out // per_word)
    zero_point = parts.get(".weight_zero_point")
    unpacked = zero_point is not None and zero_point.dtype != torch.int32
    expected: dict[str, tuple[tuple[int, ...], ...]] = {
        ".qzeros": ((groups, out_words),),
        ".scales": ((groups, n_out),),
        ".g_idx": ((n_in,),),
        ".weight_packed": ((n_out, -(-n_in // per_word)),),
        ".weight_scale": ((n_out, groups), (n_out,), (1,), ()) if groups == 1 else ((n_out, groups),),
        ".weight_zero_point": ((n_out, groups),) if unpacked else ((out_words, groups),),
        ".weight_g_idx": ((n_in,),),
    }
    for suffix, tensor in parts.items():
        if suffix in expected and tensor.shape not in expected[suffix]:
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but {scheme.bits} bits with "
                f"group_size {scheme.group_size} in quantization_config need {expected[suffix][0]} for a weight {shape}"
            )
    if scheme.method == "compressed-tensors" and not scheme.symmetric and zero_point is None:
        raise CheckpointError(
            f"{first.file}: tensor {name + '.weight_zero_point'!r} is missing, and quantization_config says "
            "symmetric = False"
        )
    scales = parts[".weight_scale" if scheme.method == "compressed-tensors" else ".scales"]
    read = _READERS[scheme.method]

    def quantized() -> QuantizedTensor:
        with naming(first.file, f"{name} does not agree with quantization_config"):
            tensors = {suffix: tensor.read() for suffix, tensor in parts.items()}
            index = tensors.get(".g_idx", tensors.get(".weight_g_idx"))
            weight = read(scheme, tensors, shape, None if scheme.group_size == -1 else index, name)
            if weight.permutation is not None and not scheme.act_order:
                raise ValueError("the order of its groups (g_idx) is not that of the columns, as without act-order")
            return weight

    return StoredTensor(
        f"{name}.weight", shape, scales.dtype, lambda: quantized().dequantize(scales.dtype), first.file, quantized
    )


def _read_gptq(scheme: Scheme, t: dict[str, Tensor], shape: tuple[int, int], index: Any, name: str) -> QuantizedTensor:
    return from_gptq(
        t[".qweight"], t[".qzeros"], t[".scales"], index, bits=scheme.bits, group_size=scheme.group_size,
        version=scheme.version, symmetric=scheme.symmetric, name=name,
    )  # fmt: skip


def _read_awq(scheme: Scheme, t: dict[str, Tensor], shape: tuple[int, int], index: Any, name: str) -> QuantizedTensor:
    return from_awq(t[".qweight"], t[".qzeros"], t[".scales"], group_size=scheme.group_size, name=name)


def _read_compressed(
    scheme: Scheme, t: dict[str, Tensor], shape: tuple[int, int], index: Any, name: str
) -> QuantizedTensor:
    return from_compressed_tensors(
        t[".weight_packed"], t[".weight_scale"], t.get(".weight_zero_point"), index, shape=shape, bits=scheme.bits,
        group_size=scheme.group_size, symmetric=scheme.symmetric, name=name,
    )  # fmt: skip


_READERS: dict[str, Callable[..., QuantizedTensor]] = {
    "gptq": _read_gptq,
    "awq": _read_awq,
    "compressed-tensors": _read_compressed,
}
