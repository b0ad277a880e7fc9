"""transformers: `LmopsConfig` to quantize a model as it is loaded, and quantized checkpoints through our kernels."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lmops.models.checkpoint import CheckpointError
from lmops.models.huggingface import _tensors_of, read_json
from lmops.models.quantized import PARTS as FOREIGN_PARTS
from lmops.models.quantized import assemble, read_scheme
from lmops.quantization.linear import QuantLinear
from lmops.quantization.quantize import METHODS, quantize_model
from lmops.quantization.tensor import INFO, PARTS, QuantizedTensor
from lmops.quantization.w8a8 import W8A8Linear

NAME = "lmops"
# what transformers needs to load a checkpoint of that method; without it our quantizer takes its place
FOREIGN = {"gptq": ("optimum", "gptqmodel"), "awq": ("gptqmodel",), "compressed-tensors": ("compressed_tensors",)}


@register_quantization_config(NAME)
class LmopsConfig(QuantizationConfigMixin):
    """How to quantize a model, for `from_pretrained(..., quantization_config=LmopsConfig(bits=4))`.

    bits, group_size, method, symmetric, skip and calibration are those of `lmops.quantization.quantize_model`, and
    checked there. The model is loaded whole and then quantized. `save_pretrained` writes the quantized layers and these
    settings (not the calibration), and `from_pretrained` reads them; lmops.integrations.transformers must be imported.
    """

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 128,
        method: str = "rtn",
        symmetric: bool = False,
        skip: Sequence[str] = ("lm_head",),
        calibration: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = set(kwargs) - {"quant_method"}
        if unknown:
            raise TypeError(f"LmopsConfig has no argument {sorted(unknown)[0]!r}")
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        self.quant_method: Any = NAME
        self.bits, self.group_size, self.method, self.symmetric = bits, group_size, method, symmetric
        self.skip, self.calibration = list(skip), calibration

    def to_dict(self) -> dict[str, Any]:
        """Without the calibration, which is not for a file."""
        return {name: value for name, value in self.__dict__.items() if name != "calibration"}


@dataclass
class _Stored:
    """A quantized weight in a checkpoint: its shape, and how to read it."""

    shape: tuple[int, int]
    read: Callable[[], QuantizedTensor]


class _Awaited(nn.Module):
    """Where a quantized layer will be: only the bias is for transformers to load."""

    def __init__(self, linear: nn.Linear, stored: _Stored) -> None:
        super().__init__()
        self.stored, self.dtype = stored, linear.weight.dtype
        self.bias: nn.Parameter | None = linear.bias


@register_quantizer(NAME)
class LmopsQuantizer(HfQuantizer):
    """Quantizes after loading, or reads quantized layers: our own, and GPTQ's, AWQ's and compressed-tensors'.

    The last three are read without optimum, gptqmodel, autoawq or compressed_tensors, where those are not installed.
    Raises CheckpointError (a ValueError) where the tensors are not what quantization_config says.
    """

    requires_calibration = False

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top are

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Called by `save_pretrained`: the configuration is to say how the layers are read."""
        if any(isinstance(module, W8A8Linear) for module in model.modules()):
            raise NotImplementedError(
                "layers of 8 bits on both sides (W8A8) cannot be saved for transformers: save the model as it was, and "
                "quantize it where it is loaded"
            )
        config = copy.deepcopy(model.config)  # others may have it too, of models that are not quantized
        config.quantization_config = self.quantization_config
        if isinstance(model.get_output_embeddings(), QuantLinear):  # then it shares no weight with the embedding
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        before = model.config
        for module in model.modules():
            for name, value in module.__dict__.items():
                if value is before:
                    module.__dict__[name] = config
        return super().get_state_dict_and_metadata(model)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        layers = _stored_layers([Path(file) for file in checkpoint_files or ()])
        prefix = f"{model.base_model_prefix}."
        modules = dict(model.named_modules())
        for name, stored in layers.items():
            path = next((p for p in (name, prefix + name, name.removeprefix(prefix)) if p in modules), None)
            linear = None if path is None else modules[path]
            if path is None or not isinstance(linear, nn.Linear):
                found = "there is none" if linear is None else f"it is a {type(linear).__name__}"
                raise CheckpointError(f"{name}: the checkpoint has a quantized linear layer, in the model {found}")
            if stored.shape != (linear.out_features, linear.in_features):
                raise CheckpointError(
                    f"{name}: the checkpoint's weight is {stored.shape}, the model's layer "
                    f"{(linear.out_features, linear.in_features)}"
                )
            model.set_submodule(path, _Awaited(linear, stored))
        suffixes = "|".join(re.escape(s) for s in (*FOREIGN_PARTS, *(f".{part}" for part in (*PARTS, INFO))))
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()), rf"({suffixes})$",
        }  # fmt: skip

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if not self.pre_quantized:
            names = ("bits", "group_size", "method", "symmetric", "skip", "calibration")
            quantize_model(model, **{name: getattr(config, name) for name in names}, progress=False)
            return model
        first: QuantLinear | None = None
        for name, awaited in list(model.named_modules()):
            if isinstance(awaited, _Awaited):
                weight = awaited.stored.read().to(_device(model, name))
                first = QuantLinear.from_quantized(weight, awaited.bias, awaited.dtype).eval()
                model.set_submodule(name, first)
        if not isinstance(config, LmopsConfig) and first is not None:  # what `save_pretrained` will write
            own = LmopsConfig(first.quantized.bits, first.group_size, symmetric=first.zeros is None)
            self.quantization_config = model.config.quantization_config = own
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, layer in list(model.named_modules()):
            if isinstance(layer, QuantLinear):
                model.set_submodule(name, layer.dequantize().to(dtype))
        return model


def _device(model: Any, name: str) -> torch.device | str:
    """The device of a layer: where transformers' device map has it, else the model's."""
    places = getattr(model, "hf_device_map", None) or {}
    while name and name not in places:
        name = name.rpartition(".")[0]
    return places.get(name, model.device)


def _stored_layers(files: Sequence[Path]) -> dict[str, _Stored]:
    """The quantized linear layers in the files of a checkpoint, by name."""
    if not files or any(file.suffix != ".safetensors" for file in files):
        raise CheckpointError(f"a quantized checkpoint must be safetensors files, got {[file.name for file in files]}")
    own = tuple(f".{part}" for part in (*PARTS, INFO))
    settings = read_json(files[0].parent / "config.json")
    if settings.get("quantization_config", {}).get("quant_method") == NAME:
        groups: dict[str, dict[str, Any]] = {}
        for tensor in (t for file in files for t in _tensors_of(file, (), own)):
            if tensor.name.endswith(own):
                layer, _, part = tensor.name.rpartition(".")
                groups.setdefault(layer, {})[part] = tensor
        return {layer: _own(layer, parts) for layer, parts in groups.items() if "packed" in parts}
    scheme = read_scheme(settings, files[0].parent / "config.json")
    stored = assemble(scheme, [t for file in files for t in _tensors_of(file, (), FOREIGN_PARTS)])
    return {
        t.name.removesuffix(".weight"): _Stored((t.shape[0], t.shape[1]), t.quantized)
        for t in stored
        if t.quantized is not None
    }


def _own(layer: str, parts: dict[str, Any]) -> _Stored:
    """One of our layers. Raises CheckpointError where its tensors do not fit together."""
    if INFO not in parts:
        raise CheckpointError(f"{parts['packed'].file}: tensor {f'{layer}.{INFO}'!r} is missing beside {layer}.packed")
    _, _, n_out, n_in, _ = parts[INFO].read().tolist()

    def read() -> QuantizedTensor:
        try:
            return QuantizedTensor.from_tensors({part: tensor.read() for part, tensor in parts.items()}, layer)
        except ValueError as error:
            raise CheckpointError(f"{parts['packed'].file}: {error}") from error

    return _Stored((n_out, n_in), read)


for method, needed in FOREIGN.items():
    if any(importlib.util.find_spec(package) is None for package in needed):
        AUTO_QUANTIZER_MAPPING[method] = LmopsQuantizer
