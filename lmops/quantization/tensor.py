"""`QuantizedTensor`: a weight of 4 or 8 bits with a scale a group. docs/kernels.md has the layout and its reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmops.reference import quantization as reference

FORMATS = ("int4", "int8", "fp8")
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ZERO_DTYPES = {"int4": torch.uint8, "int8": torch.int8}
RANGES = {"int4": (0, 15), "int8": (-128, 127)}
VERSION = 1
PARTS = ("packed", "scales", "zeros", "offsets", "permutation")  # the tensors of a QuantizedTensor, by name
INFO = "info"


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight (n_out, n_in) as codes u of 4 or 8 bits, with a scale s for each group of columns of a row.

        w = s (u - 8)   int4, u in 0 .. 15          w = s u       int8, u in -128 .. 127; fp8, u an e4m3 number
        w = s (u - z)   with `zeros`                w = s u + z   with `offsets`

    Column k of a row belongs to group k // group_size; the last group may be short. Make one with `quantize`,
    `from_codes` or `from_tensors`, which check what they are given, rather than with the constructor.

    packed: (units, n_out, 32) int16, the codes as `lmops.reference.quantization` lays them out.
    scales: (groups, n_out) float16, bfloat16 or float32.
    zeros: (groups, n_out), uint8 for int4, int8 for int8; or None. offsets: (groups, n_out) as scales; or None.
    permutation: (n_in,) int32 or None: packed column k is column permutation[k] of the weight (act-order).
    format: "int4", "int8" or "fp8" (no zeros or offsets, one group). group_size: columns, 16 to 1024, or -1: one group.
    shape: (n_out, n_in).
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor | None
    offsets: Tensor | None
    permutation: Tensor | None
    format: str
    group_size: int
    shape: tuple[int, int]

    # ------------------------------------------------------------------------------------------------- making one

    @staticmethod
    def quantize(
        weight: Tensor,
        bits: int = 4,
        group_size: int = -1,
        *,
        symmetric: bool = True,
        fp8: bool = False,
        scale_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> QuantizedTensor:
        """Round a weight (n_out, n_in) to nearest: by the largest magnitude of each group, or its least and largest.

        symmetric: w = s (u - 8) or s u, with s such that both ends are at most half a step from a code. Otherwise with
        integer zero points; 0 is always a code.
        fp8: bits 8, group_size -1 and symmetric: the largest magnitude of a row is e4m3's largest number.
        scale_dtype: float16, bfloat16 or float32; by default the weight's, float32 where that is none of these.
        name: of the layer, for errors. Raises ValueError for other bits, group sizes or scale types, for NaN and
        infinities, and where a scale overflows its type; TypeError for a weight that is not floating point.
        """
        where = f" of {name}" if name else ""
        if not weight.is_floating_point():
            raise TypeError(f"weight{where} must be floating point, got {weight.dtype}")
        if weight.ndim != 2:
            raise ValueError(f"weight{where} must be (n_out, n_in), got {tuple(weight.shape)}")
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        format = "fp8" if fp8 else f"int{bits}"
        if fp8 and (bits != 8 or group_size != -1 or not symmetric):
            raise ValueError(
                f"fp8 needs bits=8, group_size=-1 and symmetric=True, got {bits}, {group_size} and {symmetric}"
            )
        if scale_dtype is None:
            scale_dtype = weight.dtype if weight.dtype in SCALE_DTYPES else torch.float32
        n_out, n_in = weight.shape
        groups = _check(format, group_size, n_out, n_in, scale_dtype, where)
        size = n_in if group_size == -1 else group_size

        w = weight.detach().float()
        if not w.isfinite().all():
            raise ValueError(f"weight{where} has NaN or infinite values, which cannot be quantized")
        # the last group is filled up with 0, which never widens a range that holds 0 anyway
        g = torch.nn.functional.pad(w, (0, groups * size - n_in)).view(n_out, groups, size)
        if symmetric:
            largest = 448.0 if fp8 else 2.0 ** (bits - 1) - 0.5
            scales = g.abs().amax(-1) / largest
        else:
            low, high = g.amin(-1).clamp(max=0), g.amax(-1).clamp(min=0)
            scales = (high - low) / (2**bits - 1)
        scales = scales.to(scale_dtype)
        if not scales.isfinite().all():
            raise ValueError(f"weight{where} is too large for scales in {scale_dtype}: {g.abs().max().item():.4g}")
        # a group of zeros, or of numbers under what the scale's type can hold
        scales = scales.clamp_(min=torch.finfo(scale_dtype).tiny)
        u = g / scales.float().unsqueeze(-1)
        zeros = None
        if fp8:
            codes = u.clamp_(-448, 448).to(torch.float8_e4m3fn)
        else:
            lowest, highest = RANGES[format]
            if symmetric:
                u = u.round_().add_(8 if bits == 4 else 0)
            else:
                zeros = (lowest - (low / scales.float()).round_()).clamp_(lowest, highest).to(ZERO_DTYPES[format])
                u = u.round_().add_(zeros.unsqueeze(-1))
            codes = u.clamp_(lowest, highest).to(ZERO_DTYPES[format])
        return QuantizedTensor(
            reference.pack(codes.view(n_out, -1)[:, :n_in], format), scales.T.contiguous(),
            None if zeros is None else zeros.T.contiguous(), None, None, format, group_size, (n_out, n_in),
        )  # fmt: skip

    @staticmethod
    def from_codes(
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        offsets: Tensor | None = None,
        *,
        bits: int = 4,
        group_size: int = -1,
        group_index: Tensor | None = None,
        name: str | None = None,
    ) -> QuantizedTensor:
        """Pack codes that another quantizer or a checkpoint has chosen; nothing is rounded.

        codes: (n_out, n_in), integers 0 .. 15 with bits 4, -128 .. 127 with bits 8; or float8_e4m3fn with bits 8.
        scales: (n_out, groups) float16, bfloat16 or float32, finite. zeros: (n_out, groups) integers 0 .. 16 with bits
        4, -128 .. 127 with bits 8. offsets: (n_out, groups), rounded to the scales' type. At most one of the two.
        group_index: (n_in,) integers, the group of each column where these are not neighbours (act-order); in the order
        of their groups they must fill them as group_size says. name: of the layer, for errors.
        Raises ValueError or TypeError for anything else.
        """
        where = f" of {name}" if name else ""
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        if codes.ndim != 2:
            raise ValueError(f"codes{where} must be (n_out, n_in), got {tuple(codes.shape)}")
        fp8 = codes.dtype == torch.float8_e4m3fn
        if (codes.is_floating_point() and not (fp8 and bits == 8)) or codes.dtype == torch.bool:
            raise TypeError(f"codes{where} must be integers, or float8_e4m3fn with bits 8, got {codes.dtype}")
        format = "fp8" if fp8 else f"int{bits}"
        n_out, n_in = codes.shape
        groups = _check(format, group_size, n_out, n_in, scales.dtype, where)
        for what, t in (("scales", scales), ("zeros", zeros), ("offsets", offsets)):
            if t is not None and t.shape != (n_out, groups):
                raise ValueError(f"{what}{where} must be (n_out, groups) = {(n_out, groups)}, got {tuple(t.shape)}")
            if t is not None and t.is_floating_point() and not t.isfinite().all():
                raise ValueError(f"{what}{where} have NaN or infinite values")
        if zeros is not None and offsets is not None:
            raise ValueError(f"zeros and offsets{where} were both given, at most one is allowed")
        if fp8 and (zeros is not None or offsets is not None):
            raise ValueError(f"fp8 codes{where} take no zeros or offsets")
        if fp8 and codes.view(torch.uint8).bitwise_and(0x7F).eq(0x7F).any():
            raise ValueError(f"codes{where} have NaN values")
        if not fp8:
            _check_range("codes", codes, RANGES[format], where)
        if zeros is not None:
            if zeros.is_floating_point():
                raise TypeError(f"zeros{where} must be integers, got {zeros.dtype}; floating-point ones are offsets")
            _check_range("zeros", zeros, (0, 16) if bits == 4 else RANGES[format], where)
            zeros = zeros.T.to(ZERO_DTYPES[format]).contiguous()
        if offsets is not None:
            offsets = offsets.T.to(scales.dtype).contiguous()
        permutation = None
        if group_index is not None:
            permutation = _permutation(group_index, group_size, n_in, where)
        if permutation is not None:
            codes = (codes.view(torch.uint8) if fp8 else codes)[:, permutation.long()]
            codes = codes.view(torch.float8_e4m3fn) if fp8 else codes
        return QuantizedTensor(
            reference.pack(codes, format), scales.T.contiguous(), zeros, offsets, permutation, format, group_size,
            (n_out, n_in),
        )  # fmt: skip

    @staticmethod
    def empty(
        shape: tuple[int, int],
        bits: int = 4,
        group_size: int = -1,
        *,
        fp8: bool = False,
        zeros: bool = False,
        offsets: bool = False,
        permuted: bool = False,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> QuantizedTensor:
        """One whose tensors hold nothing yet, also on the meta device: what a layer has before it is loaded."""
        n_out, n_in = shape
        if bits not in (4, 8):
            raise ValueError(f"bits must be 4 or 8, got {bits}")
        format = "fp8" if fp8 else f"int{bits}"
        groups = _check(format, group_size, n_out, n_in, scale_dtype, "")
        units = -(-n_in // reference.unit_columns(format))
        a_group = (groups, n_out)
        return QuantizedTensor(
            torch.empty(units, n_out, reference.WORDS, dtype=torch.int16, device=device),
            torch.empty(a_group, dtype=scale_dtype, device=device),
            torch.empty(a_group, dtype=ZERO_DTYPES[format], device=device) if zeros else None,
            torch.empty(a_group, dtype=scale_dtype, device=device) if offsets else None,
            torch.empty(n_in, dtype=torch.int32, device=device) if permuted else None,
            format, group_size, (n_out, n_in),
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------- what it stands for

    @property
    def bits(self) -> int:
        """Bits of a code: 4 or 8."""
        return reference.bits_of(self.format)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.packed.device

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.nbytes for t in self.parts().values())

    def codes(self) -> Tensor:
        """The codes (n_out, n_in) in the weight's order of columns: uint8 for int4, int8, or float8_e4m3fn."""
        u = reference.unpack(self.packed, self.format, self.shape[1])
        if self.permutation is None:
            return u
        raw = u.view(torch.uint8)
        return torch.empty_like(raw).index_copy_(1, self.permutation.long(), raw).view(u.dtype)

    def dequantize(self, dtype: torch.dtype = torch.float32, rows: slice | None = None) -> Tensor:
        """The weight (n_out, n_in) or some of its rows, computed in float32 (float64: in that) and rounded once."""
        parts = (self.packed, self.scales, self.zeros, self.offsets)
        if rows is not None:
            parts = tuple(None if t is None else t[:, rows] for t in parts)  # type: ignore[assignment]
        return reference.dequantize(*parts, self.permutation, self.format, self.group_size, self.shape[1], dtype)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.parts().items()}
        return replace(self, **moved)

    # --------------------------------------------------------------------------------------------- as plain tensors

    def parts(self) -> dict[str, Tensor]:
        """Those of its tensors that are there, by name; they are shared, not copied."""
        return {name: t for name in PARTS if (t := getattr(self, name)) is not None}

    def tensors(self) -> dict[str, Tensor]:
        """`parts` and "info", a small integer tensor with all else: what `from_tensors` takes, for any state_dict."""
        numbers = [VERSION, FORMATS.index(self.format), *self.shape, self.group_size]
        return {**self.parts(), INFO: torch.tensor(numbers, dtype=torch.int64)}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], name: str | None = None) -> QuantizedTensor:
        """The inverse of `tensors`. Raises ValueError where one is missing, unknown, or does not fit the others."""
        where = f" of {name}" if name else ""
        unknown, missing = set(tensors) - {*PARTS, INFO}, {"packed", "scales", INFO} - set(tensors)
        if unknown or missing:
            raise ValueError(f"tensors{where}: missing {sorted(missing)}, unknown {sorted(unknown)}")
        numbers = tensors[INFO].tolist()
        if len(numbers) != 5 or numbers[0] != VERSION or not 0 <= numbers[1] < len(FORMATS):
            raise ValueError(f"{INFO}{where} must be [{VERSION}, format, n_out, n_in, group_size], got {numbers}")
        _, index, n_out, n_in, group_size = numbers
        format = FORMATS[index]
        groups = _check(format, group_size, n_out, n_in, tensors["scales"].dtype, where)
        columns = reference.unit_columns(format)
        scale_dtype = tensors["scales"].dtype
        expected = {
            "packed": ((-(-n_in // columns), n_out, reference.WORDS), torch.int16),
            "scales": ((groups, n_out), scale_dtype),
            "zeros": ((groups, n_out), ZERO_DTYPES.get(format)),
            "offsets": ((groups, n_out), scale_dtype),
            "permutation": ((n_in,), torch.int32),
        }
        for part, (shape, dtype) in expected.items():
            t = tensors.get(part)
            if t is not None and (tuple(t.shape) != shape or t.dtype != dtype):
                raise ValueError(f"{part}{where} must be {shape} in {dtype}, got {tuple(t.shape)} in {t.dtype}")
        if len(tensors.keys() & {"zeros", "offsets"}) > (format != "fp8"):
            raise ValueError(f"tensors{where}: {format} with {sorted(tensors)} is not a combination that exists")
        order = tensors.get("permutation")
        if order is not None and not order.is_meta and not bool((order.sort()[0].cpu() == torch.arange(n_in)).all()):
            raise ValueError(f"permutation{where} must hold each column, 0 to {n_in - 1}, once")  # else reads outside
        return QuantizedTensor(
            tensors["packed"], tensors["scales"], tensors.get("zeros"), tensors.get("offsets"),
            tensors.get("permutation"), format, group_size, (n_out, n_in),
        )  # fmt: skip

    def __repr__(self) -> str:
        kind = "".join(f", {name}" for name in PARTS[2:] if getattr(self, name) is not None)
        return (
            f"QuantizedTensor({self.format}, {tuple(self.shape)}, group_size={self.group_size}, "
            f"{self.scales.dtype} scales{kind}, {self.device})"
        )


def _check(format: str, group_size: int, n_out: int, n_in: int, scale_dtype: torch.dtype, where: str) -> int:
    """The number of groups a row, once everything is found to be allowed."""
    if n_out < 1 or n_in < 1:
        raise ValueError(f"weight{where} must have at least one row and one column, got {(n_out, n_in)}")
    if group_size != -1 and not 16 <= group_size <= 1024:
        raise ValueError(f"group_size{where} must be -1 (a whole row) or 16 to 1024, got {group_size}")
    if group_size > n_in:
        raise ValueError(f"group_size{where} must be at most the {n_in} columns of the weight, or -1, got {group_size}")
    if format == "fp8" and group_size != -1:
        raise ValueError(f"group_size{where} must be -1 for fp8, got {group_size}")
    if scale_dtype not in SCALE_DTYPES:
        raise ValueError(f"scales{where} must be float16, bfloat16 or float32, got {scale_dtype}")
    return 1 if group_size == -1 else -(-n_in // group_size)


def _check_range(what: str, t: Tensor, allowed: tuple[int, int], where: str) -> None:
    low, high = (int(v) for v in t.aminmax())
    if low < allowed[0] or high > allowed[1]:
        raise ValueError(f"{what}{where} must be {allowed[0]} to {allowed[1]}, got {low} to {high}")


def _permutation(group_index: Tensor, group_size: int, n_in: int, where: str) -> Tensor | None:
    """The columns in the order of their groups; None where they are in it already."""
    if group_index.shape != (n_in,) or group_index.is_floating_point():
        raise ValueError(
            f"group_index{where} must be ({n_in},) integers, got {tuple(group_index.shape)} {group_index.dtype}"
        )
    ordered, permutation = group_index.sort(stable=True)
    columns = torch.arange(n_in, device=group_index.device)
    filled = columns * 0 if group_size == -1 else columns // group_size
    if not torch.equal(ordered.to(filled.dtype), filled):
        raise ValueError(f"group_index{where} must give every group {group_size} columns, and the last the rest")
    return None if torch.equal(permutation, columns) else permutation.to(torch.int32)
