"""Losses as modules: torch.nn.CrossEntropyLoss with more options, and a vocabulary layer with its loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lmops.ops.linear_loss import linear_cross_entropy
from lmops.ops.loss import cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Takes the place of `torch.nn.CrossEntropyLoss`; computes `lmops.cross_entropy`, which has the other arguments."""

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        inplace_backward: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.softcap, self.temperature = z_loss, softcap, temperature
        self.inplace_backward, self.dtype = inplace_backward, dtype

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            softcap=self.softcap,
            temperature=self.temperature,
            inplace_backward=self.inplace_backward,
            dtype=self.dtype,
        )


class LinearCrossEntropy(nn.Module):
    """A layer from d features to V classes together with its loss: `lmops.linear_cross_entropy(hidden, weight, ...)`.

    weight: a tensor (V, d) to use as it is, such as the parameter of an embedding that is tied to it; by default a
        parameter of its own, as `torch.nn.Linear` makes it. bias: whether there is one.
    class_weight: (V,), a buffer. options: the other arguments of `linear_cross_entropy`.
    Takes hidden (..., d) and targets (...). Raises ValueError if weight is not (num_classes, in_features).
    """

    class_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = False,
        *,
        weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes, in_features):
            raise ValueError(f"weight must be ({num_classes}, {in_features}), got {tuple(weight.shape)}")
        self.in_features, self.num_classes = in_features, num_classes
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        if weight is None:
            weight = nn.Parameter(torch.empty(num_classes, in_features, **like))
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        else:
            like = {"device": weight.device, "dtype": weight.dtype}
        self.weight = weight
        bound = 1 / math.sqrt(in_features)
        self.bias = nn.Parameter(torch.empty(num_classes, **like).uniform_(-bound, bound)) if bias else None
        self.register_buffer("class_weight", class_weight)
        self.options = options

    def forward(self, hidden: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, self.weight, target, self.bias, class_weight=self.class_weight, **self.options
        )

    def extra_repr(self) -> str:
        options = "".join(f", {name}={value}" for name, value in self.options.items())
        return f"in_features={self.in_features}, num_classes={self.num_classes}, bias={self.bias is not None}{options}"
