"""`QuantLinear`: a torch.nn.Linear whose weight is a `QuantizedTensor`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lmops.ops.quantized_matmul import quantized_matmul
from lmops.ops.quantized_matmul_cpu import CPUWeight, cpu_weight_helps
from lmops.quantization.tensor import INFO, PARTS, QuantizedTensor

if TYPE_CHECKING:
    from typing_extensions import Self


class _Weight(Tensor):
    """What `QuantLinear.weight` is: shape, dtype and device of a weight; dequantized where it is computed with.

    It holds no memory, so writing to it is an error rather than lost.
    """

    layer: QuantLinear

    @staticmethod
    def __new__(cls, layer: QuantLinear) -> _Weight:
        shape = (layer.out_features, layer.in_features)
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=layer.dtype, device=layer.packed.device)
        weight.layer = layer
        return weight

    def __init__(self, layer: QuantLinear) -> None:
        pass

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"weight of {self.layer}"

    @property
    def quantized(self) -> QuantizedTensor:
        """What it stands for, for those that can compute with it; AttributeError where that is not all."""
        if getattr(self.layer, "smooth", None) is not None:
            raise AttributeError("the columns of the packed weight are smoothed")
        return self.layer.quantized

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:  # .data and .detach()
            return _Weight(args[0].layer)
        if func._schema.is_mutable:
            raise RuntimeError(
                f"the weight of a QuantLinear is quantized and cannot be written to, as {func} would: "
                "make a float layer of it with dequantize()"
            )
        args, kwargs = tree_map_only(_Weight, lambda w: w.layer._dequantized(w.dtype), (args, kwargs or {}))
        return func(*args, **kwargs)


class QuantLinear(nn.Linear):
    """y = x dequantize(weight)^T + bias: torch.nn.Linear with a weight of 4 or 8 bits, which is a constant.

    Make one with `from_float` or `from_quantized`; the constructor makes an empty one, for `load_state_dict`.

    in_features, out_features, bias: as torch.nn.Linear. bits, group_size and what follows: of
    `QuantizedTensor.empty`. dtype: of the bias, and what `weight` says it has; x may have another.

    Buffers packed, scales, zeros, offsets and permutation are those of a `QuantizedTensor`, `quantized` is all of them.
    `state_dict` has them under these names and, as "info", the format; loading takes over a saved format that differs.
    `.to(dtype)`, `.half()` and the like change bias and `dtype` alone: scales keep the type that they were rounded to.
    `weight` can be looked at (shape, dtype, device) and computed with, which dequantizes it; writing to it raises
    RuntimeError. Differentiable with respect to x and bias.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    permutation: Tensor | None
    _cpu_weight: Any  # what torch's packed kernels take, from the first call on a CPU: a CPUWeight

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bits: int = 4,
        group_size: int = -1,
        **layout: Any,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would make a float weight
        self.in_features, self.out_features = in_features, out_features
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        empty = QuantizedTensor.empty((out_features, in_features), bits, group_size, device=device, **layout)
        for name in PARTS:
            self.register_buffer(name, None)
        self._take(empty)
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(out_features, device=device, dtype=self.dtype)) if bias else None
        )

    @classmethod
    def from_quantized(
        cls, weight: QuantizedTensor, bias: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """A layer with this weight, whose tensors it shares, and bias, (n_out,) or None, kept if it is a Parameter.

        dtype: what `weight` says it has; by default the bias's, without one the scales'.
        Raises ValueError or TypeError for a bias that does not fit the weight.
        """
        n_out, n_in = weight.shape
        if bias is not None and (bias.shape != (n_out,) or not bias.is_floating_point()):
            raise ValueError(f"bias must be ({n_out},) floating point, got {tuple(bias.shape)} {bias.dtype}")
        if bias is not None and bias.device != weight.device:
            raise ValueError(f"bias must be on {weight.device} like the weight, got {bias.device}")
        if dtype is None:
            dtype = weight.scales.dtype if bias is None else bias.dtype
        layer = cls(n_in, n_out, bias=False, device="meta", dtype=dtype)
        layer._take(weight)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias)
        return layer

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        bits: int = 4,
        group_size: int = 128,
        *,
        symmetric: bool = True,
        fp8: bool = False,
        scale_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> Self:
        """A layer with the weight of `linear` rounded to nearest (`QuantizedTensor.quantize`), and its bias itself.

        name: of the layer, for errors. `lmops.quantization.quantize_model` rounds whole models, and better.
        """
        weight = QuantizedTensor.quantize(
            linear.weight, bits, group_size, symmetric=symmetric, fp8=fp8, scale_dtype=scale_dtype, name=name
        )
        return cls.from_quantized(weight, linear.bias, linear.weight.dtype).train(linear.training)

    def dequantize(self) -> nn.Linear:
        """A float layer that computes the same, with a copy of the bias, in `dtype`."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=self.dtype)
        layer.weight = nn.Parameter(self._dequantized(self.dtype))
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.detach().clone(), self.bias.requires_grad)
        return layer.train(self.training)

    def _dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.quantized.dequantize(dtype)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight; its tensors are the layer's own."""
        return QuantizedTensor(
            self.packed, self.scales, self.zeros, self.offsets, self.permutation, self.format, self.group_size,
            (self.out_features, self.in_features),
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Stands for the dequantized weight (out_features, in_features) without holding it."""
        return _Weight(self)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features) in x's dtype, under autocast in autocast's."""
        kind = "cpu" if x.is_cpu else "cuda" if x.is_cuda else ""
        if kind and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):  # so that products inside stay in float32
                return self.forward(x.to(torch.get_autocast_dtype(kind)))
        bias = self.bias
        if cpu_weight_helps(x, self.packed, bias):
            if self._cpu_weight is None:
                self._cpu_weight = CPUWeight(self.quantized)
            return self._cpu_weight.matmul(x, bias)
        return quantized_matmul(x, self.quantized, bias)

    def forget(self) -> None:
        """Let go of what calls on a CPU have kept to be fast; the next makes it anew."""
        self._cpu_weight = None

    def reset_parameters(self) -> None:
        """Raises RuntimeError: random numbers are not what one quantizes."""
        raise RuntimeError("a QuantLinear has no initial weights: make it with from_float or from_quantized")

    def extra_repr(self) -> str:
        kind = "".join(f", {name}" for name in PARTS[2:] if getattr(self, name) is not None)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.format}, group_size={self.group_size}, {self.scales.dtype} scales{kind}"
        )

    def _take(self, weight: QuantizedTensor) -> None:
        self.format, self.group_size = weight.format, weight.group_size
        for name in PARTS:
            setattr(self, name, getattr(weight, name))
        self._cpu_weight = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cpu_weight": None}  # copies and pickles make their own

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        mine = {id(t) for t in self._buffers.values()}

        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if id(t) not in mine or moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(keep_dtype, recurse)
        self._cpu_weight = None
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.packed.device)).dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + INFO] = self.quantized.tensors()[INFO]

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        saved = {name: state_dict[prefix + name] for name in (*PARTS, INFO) if prefix + name in state_dict}
        if saved:
            try:
                weight = QuantizedTensor.from_tensors(saved, prefix.removesuffix("."))
            except ValueError as error:
                error_msgs.append(str(error))
                return
            if weight.shape != (self.out_features, self.in_features):
                expected = (self.out_features, self.in_features)
                error_msgs.append(f"{prefix}info: the saved weight is {weight.shape}, the layer's is {expected}")
                return
            own = self.quantized
            if [(n, t.dtype, t.shape) for n, t in weight.parts().items()] != [
                (n, t.dtype, t.shape) for n, t in own.parts().items()
            ]:
                empty: dict[str, Any] = {n: torch.empty_like(t, device=own.device) for n, t in weight.parts().items()}
                weight = replace(weight, **empty)
                self._take(weight)
            self.format, self.group_size = weight.format, weight.group_size
        self._cpu_weight = None
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if saved:
            unexpected_keys[:] = [key for key in unexpected_keys if key != prefix + INFO]
        elif strict:
            missing_keys.append(prefix + INFO)
