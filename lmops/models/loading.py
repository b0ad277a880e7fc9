"""`load`: a model and its tokenizer from a folder, a GGUF file or the Hugging Face hub."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch

from lmops.models import huggingface
from lmops.models.checkpoint import CheckpointError, NameTable, StoredTensor, build_model
from lmops.models.extras import require
from lmops.models.gguf import GGUFFile, read_gguf, requantized
from lmops.models.gpt import GPT
from lmops.models.saved import is_saved, load_saved
from lmops.models.tokenizer import Tokenizer, tokenizer_from_folder, tokenizer_from_gguf

__all__ = ["CheckpointError", "load"]

Quantized = Literal["keep", "requantize", "dequantize"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt"]


def load(
    path_or_hub_id: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    quantized: Quantized = "keep",
    load_tokenizer: bool = True,
) -> tuple[GPT, Tokenizer | None]:
    """Load a language model, ready for inference, and its tokenizer (None where the checkpoint has none).

        model, tokenizer = lmops.load("models/SmolLM2-135M-Instruct.gguf")

    path_or_hub_id: a folder with config.json and safetensors files (GPT-2, Llama, Mistral, Qwen2, Qwen3, SmolLM),
        one that `lmops.models.save` wrote, a GGUF file (llama, qwen2, qwen3, gpt2), or a name on the Hugging Face hub
        such as "HuggingFaceTB/SmolLM2-135M", which is downloaded to huggingface_hub's cache.
    dtype: of what isn't quantized; None is what the checkpoint's embedding has, and float32 for a GGUF file.
    device: where the weights go, one tensor at a time: memory never holds the checkpoint beside the model.
    quantized: "keep" packs the weights of GPTQ (also act-order), AWQ (GEMM) and compressed-tensors (pack-quantized)
        folders and the Q8_0, Q4_0 and Q4_1 tensors of GGUF files as they are, in `QuantLinear` layers, and never
        computes them. GGUF's other types become numbers in `dtype`; "requantize" rounds them to 8 bits, groups of 32.
        A matrix that `GPT` fuses (qkv, gate and up) is kept if all its parts can be. "dequantize": all become numbers,
        for training all weights.
    load_tokenizer: False leaves the tokenizer out, for a checkpoint whose tokenizer is not supported.

    A folder that `lmops.models.save` wrote is opened as it is, whatever `quantized` says.
    Raises FileNotFoundError where there is nothing of that name, CheckpointError for a checkpoint that is damaged,
    incomplete or has a feature that the model doesn't have, NotImplementedError for a tokenizer of another kind, and
    ImportError where the packages of lmops[models] are missing.
    """
    if quantized not in get_args(Quantized):
        raise ValueError(f"quantized is {quantized!r}; allowed are {', '.join(map(repr, get_args(Quantized)))}")
    path = Path(path_or_hub_id)
    if not path.exists():
        path = _download(os.fspath(path_or_hub_id))
    if path.is_dir() and is_saved(path):
        return load_saved(path, dtype, device), tokenizer_from_folder(path) if load_tokenizer else None
    if path.is_dir():
        config, stored, table = huggingface.read_folder(path)
        dtype = dtype or _stored_dtype(stored, table)
        if quantized == "dequantize":
            stored = [replace(tensor, quantized=None) for tensor in stored]
        model = build_model(config, stored, table, dtype=dtype, device=device, source=path)
        return model, tokenizer_from_folder(path) if load_tokenizer else None
    file = GGUFFile(path)
    config, stored, table = read_gguf(file)
    if quantized == "dequantize":
        stored = [replace(tensor, quantized=None) for tensor in stored]
    elif quantized == "requantize":
        stored = [requantized(tensor) for tensor in stored]
    tokenizer = tokenizer_from_gguf(file) if load_tokenizer else None
    model = build_model(config, stored, table, dtype=dtype or torch.float32, device=device, source=path)
    return model, tokenizer


def _stored_dtype(stored: list[StoredTensor], table: NameTable) -> torch.dtype:
    """The dtype of the stored embedding, which decides for a checkpoint of mixed ones."""
    return next(
        (t.dtype for t in stored if t.name in table and table[t.name].parameter == "embed.weight"), torch.float32
    )


def _download(name: str) -> Path:
    """The local folder of a model on the hub."""
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{name}: no such file or folder")
    hub = require("huggingface_hub", "models")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:  # no such model, no access, no network: all its errors are one of these
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no such file or folder here, and not to be had from the Hugging Face hub: {reason}"
        ) from error
