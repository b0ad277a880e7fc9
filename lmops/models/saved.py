"""Our own checkpoints: a `GPT`, quantized layers included, and its tokenizer in a folder that `lmops.load` opens.

config.json has model_type "lmops" and the `GPTConfig`; model.safetensors the state_dict, in which a quantized layer is
what `QuantLinear` makes of it; tokenizer.json and the rest are as Hugging Face's.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from lmops.models.checkpoint import CheckpointError, _NoInitialValues, naming
from lmops.models.config import GPTConfig, RopeScaling
from lmops.models.extras import require
from lmops.models.gpt import GPT
from lmops.models.huggingface import read_json
from lmops.models.tokenizer import Tokenizer
from lmops.quantization import QuantLinear
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
    settings = {"model_type": MODEL_TYPE, "version": VERSION, "gpt": asdict(model.config)}
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_json(unfinished / "config.json", settings)
        require("safetensors.torch", "models").save_file(tensors, unfinished / "model.safetensors")
        if tokenizer is not None:
            tokenizer.backend.save(str(unfinished / "tokenizer.json"))
            _write_json(unfinished / "tokenizer_config.json", tokenizer.special_tokens)
            _write_json(unfinished / "generation_config.json", {"eos_token_id": list(tokenizer.stop_tokens)})
            if tokenizer.chat_template is not None:
                (unfinished / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
        unfinished.chmod(0o755)  # mkdtemp's are private
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
        for name in [name.removesuffix(f".{INFO}") for name in tensors if name.endswith(f".{INFO}")]:
            old = model.get_submodule(name)
            assert isinstance(old, torch.nn.Linear), f"{name} is quantized, and no linear layer"
            bias = f"{name}.bias" in tensors
            new = QuantLinear(old.in_features, old.out_features, bias, "meta", dtype or tensors["norm.weight"].dtype)
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, new)
        model.load_state_dict(tensors, assign=True)
    return model.eval().to(device=device, dtype=dtype)
