"""Our own checkpoints: a `GPT`, quantized layers included, and its tokenizer in a folder that `lmops.load` opens.

config.json has model_type "lmops" and the `GPTConfig`; model.safetensors the state_dict, in which a quantized layer is
what `QuantLinear` makes of it; tokenizer.json and the rest are as Hugging Face's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmops.models.checkpoint import CheckpointError, _NoInitialValues, naming
from lmops.models.config import GPTConfig, RopeScaling
from lmops.models.extras import require
from lmops.models.gpt import GPT
from lmops.models.huggingface import read_json
from lmops.models.tokenizer import Tokenizer
from lmops.quantization import JoinedLinear, QuantEmbedding, QuantizedTensor, QuantLinear, W8A8Linear
from lmops.quantization.tensor import INFO

MODEL_TYPE = "lmops"
VERSION = 1


def save(model: GPT, tokenizer: Tokenizer | None, folder: str | os.PathLike[str]) -> None:
    """Write a model and its tokenizer to a new folder, which appears only when it is complete.

    Raises FileExistsError where there is something of that name, and ImportError without the packages of lmops[models].
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder}: exists already")
    tensors = {name: t.contiguous() for name, t in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors.pop("head.weight", None)  # the embedding's
    if isinstance(model.embed, QuantEmbedding) and model.embed.table is model.head:
        tensors = {name: t for name, t in tensors.items() if not name.startswith("embed.")}  # the head's
    settings = {"model_type": MODEL_TYPE, "version": VERSION, "gpt": asdict(model.config)}
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    unfinished.mkdir()
    try:
        _write_json(unfinished / "config.json", settings)
        require("safetensors.torch", "models").save_file(tensors, unfinished / "model.safetensors")
        if tokenizer is not None:
            tokenizer.backend.save(str(unfinished / "tokenizer.json"))
            _write_json(unfinished / "tokenizer_config.json", tokenizer.special_tokens)
            _write_json(unfinished / "generation_config.json", {"eos_token_id": list(tokenizer.stop_tokens)})
            if tokenizer.chat_template is not None:
                (unfinished / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        # safetensors leaves it readable for its owner alone
        (unfinished / "model.safetensors").chmod((unfinished / "config.json").stat().st_mode)
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def is_saved(folder: Path) -> bool:
    """Whether `save` wrote this folder."""
    return (folder / "config.json").exists() and read_json(folder / "config.json").get("model_type") == MODEL_TYPE


def load_saved(folder: Path, dtype: torch.dtype | None, device: torch.device | str) -> GPT:
    """The model that `save` wrote, in evaluation mode.

    dtype: of all that isn't quantized, None is what was saved. Raises CheckpointError for a damaged folder.
    """
    safetensors = require("safetensors", "models")
    settings = read_json(folder / "config.json")
    if settings.get("version") != VERSION:
        version = settings.get("version")
        raise CheckpointError(f"{folder / 'config.json'}: version is {version!r}, supported is {VERSION}")
    with naming(folder / "config.json", "gpt"):
        fields = dict(settings["gpt"])
        scaling: dict[str, Any] | None = fields.get("rope_scaling")
        if scaling is not None:
            lists = {name: tuple(value) for name, value in scaling.items() if isinstance(value, list)}
            fields["rope_scaling"] = RopeScaling(**{**scaling, **lists})
        with torch.device("meta"), _NoInitialValues():
            model = GPT(GPTConfig(**fields))
    file = folder / "model.safetensors"
    if not file.exists():
        raise CheckpointError(f"{file}: the file is missing")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (not a dict)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error
    with naming(file, "does not fit its configuration"):
        if model.config.tie_embeddings and f"head.{INFO}" in tensors and "embed.weight" not in tensors:
            shared = {name.replace("head.", "embed.table.", 1): t for name, t in tensors.items() if name[:5] == "head."}
            tensors |= shared
        _quantized_layers(model, tensors, dtype or tensors["norm.weight"].dtype)
        model.load_state_dict(tensors, assign=True)
    return model.eval().to(device=device, dtype=dtype)


def _quantized_layers(model: GPT, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Replace the layers of a meta model for which `tensors` has quantized weights; biases stay to be loaded."""
    layers: dict[str, list[QuantLinear]] = {}
    for name in sorted(name.removesuffix(f".{INFO}") for name in tensors if name.endswith(f".{INFO}")):
        parts = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        parts.pop("bias", None)
        kind = QuantLinear if parts.pop("smooth", None) is None else W8A8Linear
        layer = kind.from_quantized(QuantizedTensor.from_tensors(parts, name), dtype=dtype)
        layers.setdefault(re.sub(r"\.(table|parts\.\d)$", "", name), []).append(layer)
    for path, found in layers.items():
        old = model.get_submodule(path)
        assert isinstance(old, (nn.Linear, nn.Embedding)), f"{path} is quantized, and neither linear nor an embedding"
        shape = (sum(layer.out_features for layer in found), found[0].in_features)
        if shape != old.weight.shape:
            raise ValueError(f"{path} has shape {shape}, the configuration needs {tuple(old.weight.shape)}")
        new: nn.Module
        if isinstance(old, nn.Embedding):
            new = QuantEmbedding(found[0])
        else:
            new = found[0] if len(found) == 1 else JoinedLinear(found)
            new.bias = old.bias
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, new)
    if isinstance(model.embed, QuantEmbedding) and isinstance(model.head, QuantLinear) and model.config.tie_embeddings:
        model.embed.table = model.head
