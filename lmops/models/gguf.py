"""Checkpoints in llama.cpp's GGUF format, read with the `gguf` package.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmops.models.checkpoint import CheckpointError, NameTable, StoredTensor, Target, naming
from lmops.models.extras import require
from lmops.models.gpt import GPTConfig, RopeScaling
from lmops.quantization import QuantizedTensor
from lmops.quantization.checkpoints import GGUF_BLOCKS, from_gguf, join_rows
from lmops.reference.quantization import row_chunks

SUPPORTED_TYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
)  # fmt: skip

_CHUNK = 1 << 18  # elements dequantized at a time, a multiple of every block: numpy's temporaries stay in the cache


class GGUFFile:
    """What the header of a GGUF file says: `metadata` (key to value), and the tensors, not read yet.

    Raises CheckpointError where the file is not GGUF, is damaged or ends too early, or has a tensor of a type that is
    not supported.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        gguf = require("gguf", "models")
        with naming(self.path, f"not a GGUF file, damaged, or cut off ({self.path.stat().st_size} bytes)"):
            reader = gguf.GGUFReader(self.path)
            if reader.byte_order != "I":
                raise CheckpointError(f"{self.path}: its byte order is not this machine's")
            self.metadata: dict[str, Any] = {key: field.contents() for key, field in reader.fields.items()}
        # only numbers are kept: the reader maps the file, and mapped pages count towards the process
        self.tensors = [self._stored(tensor) for tensor in reader.tensors]

    def _stored(self, tensor: Any) -> StoredTensor:
        kind = tensor.tensor_type
        if kind.name not in SUPPORTED_TYPES:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} has type {kind.name}, supported are {', '.join(SUPPORTED_TYPES)}"
            )
        shape = tuple(int(size) for size in reversed(tensor.shape))  # the file lists the fastest dimension first
        read = _Reader(self.path, shape, kind, int(tensor.data_offset), int(tensor.n_bytes))
        kept = len(shape) == 2 and kind.name in GGUF_BLOCKS
        quantized = partial(read.quantized, tensor.name) if kept else None
        return StoredTensor(tensor.name, shape, read.dtype, read, self.path, quantized)


_PLAIN_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Reader:
    """Reads one tensor, dequantized to float32 (F16 and BF16 stay as they are)."""

    path: Path
    shape: tuple[int, ...]
    kind: Any  # a gguf.GGMLQuantizationType
    offset: int
    n_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        return _PLAIN_TYPES.get(self.kind.name, torch.float32)

    def _raw(self) -> np.ndarray:
        return np.fromfile(self.path, dtype=np.uint8, count=self.n_bytes, offset=self.offset)

    def quantized(self, name: str) -> QuantizedTensor:
        """The tensor as it is stored, for the types of `GGUF_BLOCKS`."""
        n_out, n_in = self.shape
        with naming(self.path, f"tensor {name!r}"):
            return from_gguf(torch.from_numpy(self._raw()), self.kind.name, (n_out, n_in), name)

    def requantized(self, name: str) -> QuantizedTensor:
        """The tensor rounded to 8 bits in groups of 32."""
        weight = self()
        with naming(self.path, f"tensor {name!r}"):
            chunks = [weight[rows] for rows in row_chunks(*weight.shape)]
            joined = join_rows([QuantizedTensor.quantize(w, 8, 32) for w in chunks])
            assert joined is not None
            return joined

    def __call__(self) -> Tensor:
        gguf = require("gguf", "models")
        raw = self._raw()
        if self.kind.name in _PLAIN_TYPES:
            return torch.from_numpy(raw).view(self.dtype).view(self.shape)
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        out = torch.empty(math.prod(self.shape))
        for start in range(0, len(out), _CHUNK):
            part = out[start : start + _CHUNK]
            blocks = raw[start // block * block_bytes :][: len(part) // block * block_bytes]
            # as one row: the package works on 16 rows at a time, which for many short ones is slow
            part.copy_(torch.from_numpy(gguf.quants.dequantize(blocks[None], self.kind)[0]))
        return out.view(self.shape)


# ---- architectures ------------------------------------------------------------------------------------------------


def _llama_names(qk_layout: Any) -> dict[str, Target]:
    block = "blocks.{i}."
    table = {"token_embd.weight": Target("embed.weight"), "output_norm.weight": Target("norm.weight")}
    table["output.weight"] = Target("head.weight")
    for kind in ("weight", "bias"):
        qkv = f"{block}attn.qkv.{kind}"
        table |= {
            f"blk.{{i}}.attn_q.{kind}": Target(qkv, "q", qk_layout),
            f"blk.{{i}}.attn_k.{kind}": Target(qkv, "k", qk_layout),
            f"blk.{{i}}.attn_v.{kind}": Target(qkv, "v"),
        }
    return table | {
        "blk.{i}.attn_norm.weight": Target(f"{block}attn_norm.weight"),
        "blk.{i}.attn_q_norm.weight": Target(f"{block}attn.q_norm.weight"),
        "blk.{i}.attn_k_norm.weight": Target(f"{block}attn.k_norm.weight"),
        "blk.{i}.attn_output.weight": Target(f"{block}attn.out.weight"),
        "blk.{i}.ffn_norm.weight": Target(f"{block}mlp_norm.weight"),
        "blk.{i}.ffn_gate.weight": Target(f"{block}mlp.up.weight", "gate"),
        "blk.{i}.ffn_up.weight": Target(f"{block}mlp.up.weight", "up"),
        "blk.{i}.ffn_down.weight": Target(f"{block}mlp.down.weight"),
    }


def _gpt2_names() -> dict[str, Target]:
    table = {
        "token_embd.weight": Target("embed.weight"),
        "position_embd.weight": Target("positions.weight"),
        "output.weight": Target("head.weight"),
    }
    pairs = {
        "output_norm": "norm",
        "blk.{i}.attn_norm": "blocks.{i}.attn_norm",
        "blk.{i}.attn_qkv": "blocks.{i}.attn.qkv",
        "blk.{i}.attn_output": "blocks.{i}.attn.out",
        "blk.{i}.ffn_norm": "blocks.{i}.mlp_norm",
        "blk.{i}.ffn_up": "blocks.{i}.mlp.up",
        "blk.{i}.ffn_down": "blocks.{i}.mlp.down",
    }
    for stored, parameter in pairs.items():
        for kind in ("weight", "bias"):
            table[f"{stored}.{kind}"] = Target(f"{parameter}.{kind}")
    return table


class _Metadata:
    """The settings of one architecture: keys without its name, and which of them nobody asked for."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        prefix = f"{architecture}."
        self.source = file.path
        self.prefix = prefix
        self.values = {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)}
        self.used: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.used.add(key)
        return self.values.get(key, default)

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.source}: metadata {self.prefix}{key} is missing")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raise where the key is there with a value that `GPT` can't express."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise CheckpointError(f"{self.source}: {self.prefix}{key} = {value!r} is not supported (only {allowed})")


def _gpt2_config(data: _Metadata, file: GGUFFile) -> GPTConfig:
    return GPTConfig(
        vocab_size=_shape(file, "token_embd.weight")[0],
        context_length=data.need("context_length"),
        n_layers=data.need("block_count"),
        n_heads=data.need("attention.head_count"),
        d_model=data.need("embedding_length"),
        d_ff=data.need("feed_forward_length"),
        norm_eps=data.need("attention.layer_norm_epsilon"),
        activation="gelu_tanh",
        tie_embeddings=not _has(file, "output.weight"),
    )


def _llama_config(data: _Metadata, file: GGUFFile, **changes: Any) -> GPTConfig:
    """Llama and its relatives; in GGUF, Mistral and SmolLM are "llama" too."""
    d_model, n_heads = data.need("embedding_length"), data.need("attention.head_count")
    head_dim = data.get("attention.key_length", d_model // n_heads)
    data.only("attention.value_length", head_dim)
    data.only("rope.dimension_count", head_dim)
    data.only("expert_count", 0)
    data.only("attention.causal", True)
    data.only("attention.sliding_window")
    scaling = _rope_scaling(data, file, head_dim)
    return GPTConfig(
        vocab_size=_shape(file, "token_embd.weight")[0],
        context_length=data.need("context_length"),
        n_layers=data.need("block_count"),
        n_heads=n_heads,
        n_kv_heads=data.get("attention.head_count_kv", n_heads),
        d_model=d_model,
        head_dim=head_dim,
        d_ff=data.need("feed_forward_length"),
        norm="rmsnorm",
        norm_eps=data.need("attention.layer_norm_rms_epsilon"),
        activation="silu",
        gated_mlp=True,
        positions="rope",
        rope_base=data.get("rope.freq_base", 10000.0),
        rope_scaling=scaling,
        tie_embeddings=not _has(file, "output.weight"),
        **{"bias": False, **changes},
    )


def _qwen2_config(data: _Metadata, file: GGUFFile) -> GPTConfig:
    return _llama_config(data, file, qkv_bias=True)


def _qwen3_config(data: _Metadata, file: GGUFFile) -> GPTConfig:
    return _llama_config(data, file, qk_norm=True)


def _rope_scaling(data: _Metadata, file: GGUFFile, head_dim: int) -> RopeScaling | None:
    kind = data.get("rope.scaling.type", "none")
    factor = data.get("rope.scaling.factor") or data.get("rope.scale_linear") or 1.0
    original = data.get("rope.scaling.original_context_length")
    attention_factor = data.get("rope.scaling.attn_factor")
    data.get("rope.scaling.finetuned")  # says that the model was trained with it; changes nothing
    if _has(file, "rope_freqs.weight"):
        return _llama3_scaling(data, file, head_dim)
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return RopeScaling("linear", factor=factor)
    if kind == "yarn":
        original = original or data.need("context_length")
        return RopeScaling("yarn", factor, original_context_length=original, attention_factor=attention_factor)
    data.only("rope.scaling.type", "none", "linear", "yarn")
    return None


def _llama3_scaling(data: _Metadata, file: GGUFFile, head_dim: int) -> RopeScaling:
    """The scaling whose divisors the tensor rope_freqs holds: Llama 3.1 (factor 8) or 3.2 (32).

    GGUF keeps the divisors and not what they were computed from.
    """
    stored = next(tensor for tensor in file.tensors if tensor.name == "rope_freqs.weight").read().double()
    frequencies = data.get("rope.freq_base", 10000.0) ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    for factor in (8.0, 32.0):
        scaling = RopeScaling("llama3", factor, original_context_length=8192)
        rotations = 8192 * frequencies / (2 * math.pi)
        keep = (rotations - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0, 1)
        divisors = 1 / (keep + (1 - keep) / factor)
        if stored.shape == divisors.shape and torch.allclose(stored, divisors, rtol=1e-5):
            return scaling
    raise CheckpointError(f"{file.path}: tensor 'rope_freqs.weight' is not Llama 3.1's or 3.2's scaling")


def _has(file: GGUFFile, name: str) -> bool:
    return any(tensor.name == name for tensor in file.tensors)


def _shape(file: GGUFFile, name: str) -> tuple[int, ...]:
    for tensor in file.tensors:
        if tensor.name == name:
            return tensor.shape
    raise CheckpointError(f"{file.path}: missing tensor {name!r}")


# q and k of "llama" have llama.cpp's order of rows; Qwen's keep Hugging Face's
_ARCHITECTURES: dict[str, tuple[Any, NameTable]] = {
    "llama": (_llama_config, _llama_names("interleaved")),
    "qwen2": (_qwen2_config, _llama_names("")),
    "qwen3": (_qwen3_config, _llama_names("")),
    "gpt2": (_gpt2_config, _gpt2_names()),
}
_WEIGHTLESS = ("rope_freqs.weight",)  # read into the configuration


def requantized(stored: StoredTensor) -> StoredTensor:
    """The tensor with `quantized` also where it is of a type that isn't kept as it is: rounded to 8 bits then."""
    read = stored.read
    assert isinstance(read, _Reader)
    if stored.quantized is not None or len(stored.shape) != 2 or read.kind.name in _PLAIN_TYPES:
        return stored
    return replace(stored, quantized=partial(read.requantized, stored.name))


def read_gguf(file: GGUFFile) -> tuple[GPTConfig, list[StoredTensor], NameTable]:
    """The configuration, tensors and name table of a GGUF file, no weights read yet.

    Raises CheckpointError for an architecture, setting or tensor type that is not supported; a key of the architecture
    that this loader has never heard of is a warning.
    """
    name = file.metadata.get("general.architecture")
    if name not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise CheckpointError(f"{file.path}: general.architecture = {name!r} is not supported (known: {known})")
    make_config, table = _ARCHITECTURES[name]
    data = _Metadata(file, name)
    data.get("vocab_size")  # the embedding's shape says it too
    with naming(file.path, "the metadata is not that of a model"):
        config = make_config(data, file)
    unknown = sorted(data.values.keys() - data.used)
    if unknown:
        warnings.warn(f"{file.path}: these keys are unknown and have no effect: {', '.join(unknown)}", stacklevel=4)
    stored = [tensor for tensor in file.tensors if tensor.name not in _WEIGHTLESS]
    return config, stored, table
