"""`W8A8Linear`: a linear layer whose products are of 8-bit numbers on both sides; and SmoothQuant, which makes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lmops.ops.int8_matmul import int8_matmul
from lmops.ops.quantized_matmul_cpu import cpu_weight_helps
from lmops.quantization.linear import QuantLinear
from lmops.quantization.quantize import _check_calibration, _evaluating, _find_layers, _replace, _undone_on_error
from lmops.quantization.rounding import check_weight, float_weight
from lmops.quantization.tensor import QuantizedTensor
from lmops.reference.quantization import int8_matmul_of_codes, unpack


class W8A8Linear(QuantLinear):
    """A `QuantLinear` that rounds x to 8 bits too, a scale a row, on the fly: `lmops.int8_matmul`.

    Its weight must have the format int8 or fp8, one scale a row (group_size -1), and no zeros or offsets; forward
    raises ValueError otherwise. x is float16, bfloat16 or float32.

    smooth: (in_features,) float32 or None. x is divided by it before it is rounded, by the kernel that rounds it, and
    the columns of the packed weight have been multiplied by it: SmoothQuant (arXiv 2211.10438). A buffer, which
    `.to(dtype)` leaves as it is. `weight` and `dequantize()` are the layer's, without it.
    """

    smooth: Tensor | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("smooth", None)

    @classmethod
    def smoothed(
        cls,
        linear: nn.Module,
        magnitude: Tensor,
        alpha: float = 0.5,
        *,
        scale_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> W8A8Linear:
        """A layer with the weight of `linear` in int8, smoothed for inputs of these magnitudes, and its bias itself.

        magnitude: (n_in,), the largest |x| of each column. Column j is smoothed by s_j = magnitude_j^alpha / (largest
        |w| of column j)^(1 - alpha), equation 4 of the paper; by 1 where one of the two is 0.
        """
        weight = float_weight(linear).detach()
        if magnitude.shape != weight.shape[1:]:
            raise ValueError(f"magnitude must be ({weight.shape[1]},), got {tuple(magnitude.shape)}")
        largest = weight.float().abs().amax(0)
        smooth = magnitude.float() ** alpha / largest ** (1 - alpha)
        smooth = torch.where((magnitude > 0) & (largest > 0), smooth, 1.0)
        scale_dtype = check_weight(weight, 8, -1, scale_dtype, name)
        packed = QuantizedTensor.quantize(weight.float() * smooth, 8, scale_dtype=scale_dtype, name=name)
        layer = cls.from_quantized(packed, linear.bias, weight.dtype)  # type: ignore[arg-type]
        layer.smooth = smooth
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) in x's dtype, under autocast in autocast's."""
        kind = x.device.type
        if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        on_cpu = cpu_weight_helps(x, self.packed, self.bias)
        if on_cpu and self._cpu_weight is not None and x.shape[-1] == self.in_features:
            return int8_matmul_of_codes(x, self._cpu_weight, self.scales, self.smooth, self.bias)
        y = int8_matmul(x, self.quantized, self.bias, smooth=self.smooth)
        if on_cpu:  # the codes in order: taking them out of their packed layout takes longer than a product
            self._cpu_weight = unpack(self.packed, self.format, self.in_features)
        return y

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        if self.smooth is None:
            return super()._dequantized(dtype)
        return (self.quantized.dequantize(torch.promote_types(dtype, torch.float32)) / self.smooth).to(dtype)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        saved = state_dict.get(f"{prefix}smooth")
        if (saved is None) != (self.smooth is None):
            self.smooth = None if saved is None else torch.empty_like(saved, device=self.packed.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def smooth_quantize(
    model: nn.Module,
    calibration: Iterable[Tensor | Mapping[str, Any]],
    *,
    alpha: float = 0.5,
    skip: Sequence[str] = ("lm_head", "head"),
    scale_dtype: torch.dtype | None = None,
) -> list[str]:
    """Replace the linear layers of a model by `W8A8Linear`s with SmoothQuant's scales, in place; the names of those.

    The largest magnitude of each input column over the calibration decides how much of it goes over to the weight, so
    that a few large columns do not take the 8 bits of all others (arXiv 2211.10438).

    model, calibration, skip, scale_dtype: as of `lmops.quantization.quantize_model`; any model will do. alpha: 0 to 1,
    how much of the difference between columns the weight takes over. A layer that the calibration does not reach is
    not smoothed. Raises ValueError or TypeError as `quantize_model` does, with the model as it was.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be from 0 to 1, got {alpha}")
    if isinstance(skip, str):
        raise TypeError(f"skip must be a list of names, got the string {skip!r}")
    layers = _find_layers(model, skip)
    for name, layer in layers.items():
        check_weight(float_weight(layer), 8, -1, scale_dtype, name)
    batches = _check_calibration("smoothquant", calibration)
    with torch.no_grad(), _evaluating(model), _undone_on_error() as edit:
        magnitudes = _magnitudes(model, layers, batches)
        for name, layer in layers.items():
            seen = magnitudes.get(name)
            if seen is None:
                seen = torch.zeros(float_weight(layer).shape[1], device=float_weight(layer).device)
            if not seen.isfinite().all():
                raise ValueError(f"the calibration inputs of {name} have NaN or infinite values")
            new = W8A8Linear.smoothed(layer, seen, alpha, scale_dtype=scale_dtype, name=name)
            _replace(model, layer, new, edit)
    return list(layers)


def _magnitudes(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Any] | Tensor]
) -> dict[str, Tensor]:
    """The largest |x| of each input column of the layers that are reached, NaN where there was one."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        largest = args[0].detach().flatten(0, -2).abs().amax(0).float()
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    device = next(model.parameters()).device
    options = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(note, name)).remove)
        for batch in batches:
            batch = tree_map_only(Tensor, lambda t: t.to(device), batch)
            model(**{**options, **batch}) if isinstance(batch, Mapping) else model(batch, **options)
    return found
