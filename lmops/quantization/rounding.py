"""Round to nearest with scales that cost least, and its straight-through estimator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmops.quantization.tensor import RANGES, SCALE_DTYPES, ZERO_DTYPES, QuantizedTensor, _check
from lmops.reference.quantization import row_chunks

# Of the scale that reaches the largest magnitude of a group, which shares are tried. At 4 bits the best lie around 0.85
# for groups of 128 normal numbers; above 1 a code may fall better on the one large number that a small group has.
SHARES = [1.08 - 0.02 * i for i in range(32)]


class Inputs:
    """What calibration sent to a linear layer: gram, (n_in, n_in), the sum of x^T x, and the magnitude of each column.

    Both in float32. magnitude: (n_in,), the sum of |x|.
    """

    def __init__(self, n_in: int, device: torch.device) -> None:
        self.gram = torch.zeros(n_in, n_in, device=device)
        self.magnitude = torch.zeros(n_in, device=device)

    def add(self, x: Tensor) -> None:
        """Add inputs x (..., n_in)."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.gram.addmm_(x.T, x)
        self.magnitude += x.abs().sum(0)


def float_weight(layer: nn.Module) -> Tensor:
    """The weight (n_out, n_in) of a linear layer, a view: transformers' Conv1D keeps it transposed."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(layer, nn.Linear) else weight.T


def check_weight(
    weight: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype | None = None, name: str | None = None
) -> torch.dtype:
    """The type of the scales, once everything is found to be allowed; ValueError or TypeError otherwise."""
    where = f" of {name}" if name else ""
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits}")
    if not weight.is_floating_point():
        raise TypeError(f"weight{where} must be floating point, got {weight.dtype}")
    if weight.ndim != 2:
        raise ValueError(f"weight{where} must be (n_out, n_in), got {tuple(weight.shape)}")
    if weight.is_meta:
        raise ValueError(f"weight{where} is on the meta device; load it first")
    if scale_dtype is None:
        scale_dtype = weight.dtype if weight.dtype in SCALE_DTYPES else torch.float32
    _check(f"int{bits}", group_size, weight.shape[0], weight.shape[1], scale_dtype, where)
    largest = weight.abs().amax().item()  # NaN wins, an infinity too
    if not largest < float("inf"):
        raise ValueError(f"weight{where} has NaN or infinite values, which cannot be quantized")
    if largest / (2 ** (bits - 1) - 1) > torch.finfo(scale_dtype).max:
        raise ValueError(f"weight{where} is too large for scales in {scale_dtype}: {largest:.4g}")
    return scale_dtype


def choose_scales(
    weight: Tensor,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The scales and integer zeros (None: symmetric) with which rounding a weight to nearest costs least.

    weight: (n_out, n_in) finite. importance: (n_in,), the cost of a squared error in each column, by default 1: the
    second moment of the layer's input there makes it the error of the output, columns taken as independent.
    Returns scales and zeros, (n_out, groups). For each group the best of len(SHARES) scales, which clip more or less
    of it; where symmetric of either sign, because 0 .. 15 reaches one step farther below 8 than above.
    """
    n_out, n_in = weight.shape
    size = n_in if group_size == -1 else group_size
    groups = -(-n_in // size)
    low_code, high_code = RANGES[f"int{bits}"]
    pad = (0, groups * size - n_in)
    cost = None
    if importance is not None and importance.any():
        # what calibration did not see may still come
        cost = torch.nn.functional.pad(importance.float() + 0.01 * importance.float().mean(), pad).view(groups, size)
    tiny = torch.finfo(scale_dtype).tiny
    scales = torch.empty(n_out, groups, dtype=scale_dtype, device=weight.device)
    zeros = None if symmetric else torch.empty(n_out, groups, dtype=ZERO_DTYPES[f"int{bits}"], device=weight.device)
    for rows in row_chunks(n_out, n_in):
        # the last group is filled up with 0, which costs nothing and never widens a range that holds 0 anyway
        w = torch.nn.functional.pad(weight[rows].float(), pad).view(-1, groups, size)
        least = w.new_full(w.shape[:2], float("nan"))  # below which nothing is: the first share counts
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        whole = torch.maximum(-low, high) / (2 ** (bits - 1) - 0.5) if symmetric else (high - low) / (2**bits - 1)
        for share in SHARES:
            for sign in (1, -1) if symmetric else (1,):
                s = (whole * share).clamp(min=tiny).mul(sign).to(scale_dtype)
                if symmetric:
                    z = torch.full_like(least, low_code + 2 ** (bits - 1))
                else:
                    z = (low_code - low * share / s.float()).round_().clamp_(low_code, high_code)
                u = (w / s.float().unsqueeze(-1)).round_().add_(z.unsqueeze(-1)).clamp_(low_code, high_code)
                error = u.sub_(z.unsqueeze(-1)).mul_(s.float().unsqueeze(-1)).sub_(w).square_()
                total = error.sum(-1) if cost is None else torch.einsum("rgk,gk->rg", error, cost)
                better = ~(total >= least)
                least = torch.where(better, total, least)
                scales[rows] = torch.where(better, s, scales[rows])
                if zeros is not None:
                    zeros[rows] = torch.where(better, z.to(zeros.dtype), zeros[rows])
    return scales, zeros


def round_to_nearest(
    weight: Tensor,
    bits: int = 4,
    group_size: int = 128,
    *,
    symmetric: bool = True,
    scale_dtype: torch.dtype | None = None,
    importance: Tensor | None = None,
    name: str | None = None,
) -> QuantizedTensor:
    """A weight (n_out, n_in) rounded to the nearest codes, with the scales of `choose_scales`: RTN with clipping.

    `QuantizedTensor.quantize` is the same with the scales that clip nothing. name: of the layer, for errors.
    Raises ValueError or TypeError for another bits or group_size, and for NaN and infinities.
    """
    scale_dtype = check_weight(weight, bits, group_size, scale_dtype, name)
    weight = weight.detach()
    scales, zeros = choose_scales(
        weight, bits, group_size, symmetric=symmetric, scale_dtype=scale_dtype, importance=importance
    )
    low_code, high_code = RANGES[f"int{bits}"]
    codes = torch.empty(weight.shape, dtype=ZERO_DTYPES[f"int{bits}"], device=weight.device)
    for rows in row_chunks(*weight.shape):
        s = columns(scales[rows].float(), group_size, weight.shape[1])
        z = low_code + 2 ** (bits - 1) if zeros is None else columns(zeros[rows].float(), group_size, weight.shape[1])
        codes[rows] = (weight[rows].float() / s).round_().add_(z).clamp_(low_code, high_code).to(codes.dtype)
    return QuantizedTensor.from_codes(codes, scales, zeros, bits=bits, group_size=group_size, name=name)


def columns(groups: Tensor, group_size: int, n_in: int) -> Tensor:
    """A value a group, (n_out, groups), as one a column, (n_out, n_in)."""
    return groups.expand(-1, n_in) if group_size == -1 else groups.repeat_interleave(group_size, 1)[:, :n_in]


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bits, group_size, symmetric):
        return QuantizedTensor.quantize(weight, bits, group_size, symmetric=symmetric).dequantize(weight.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None, None


def fake_quantize(weight: Tensor, bits: int = 4, group_size: int = 128, *, symmetric: bool = True) -> Tensor:
    """The weight as `QuantizedTensor.quantize` would round it, in floating point, for quantization-aware training.

    The gradient passes as if nothing had been rounded: the straight-through estimator (arXiv 1308.3432).
    Train `F.linear(x, fake_quantize(layer.weight), layer.bias)`; then `QuantLinear.from_float(layer)` with the same
    settings has exactly the weight that was trained with.
    """
    return _FakeQuantize.apply(weight, bits, group_size, symmetric)
