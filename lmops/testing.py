"""What tests of operators share: the accuracy rule, inputs in awkward layouts, and a named implementation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Literal

import torch
from torch import Tensor
from torch.library import Library

from lmops.ops._register import OPERATORS

LAYOUTS = ("contiguous", "strided", "transposed", "expanded", "offset")


def assert_accurate(actual: Tensor, truth: Tensor, baseline: Tensor, *, factor: float = 2.0) -> None:
    """Assert that `actual` is about as close to the truth as torch is in the same precision.

    truth: computed in float64. baseline: computed by plain torch in actual's dtype. The rule: max |actual - truth| is
    at most factor * (max |baseline - truth| + eps * max |truth|), with the eps of actual's dtype. NaN and the two
    infinities must stand where they do in the truth. Raises AssertionError with the figures.
    """
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == baseline.dtype, f"dtype {actual.dtype}, expected {baseline.dtype}"
    got, want = actual.detach().double().cpu(), truth.detach().double().cpu()
    special = ~want.isfinite()
    same = torch.where(want.isnan(), got.isnan(), got == want)[special]
    assert same.all(), f"{int((~same).sum())} of {same.numel()} NaN or infinite entries differ"
    assert got[~special].isfinite().all(), f"{int((~got[~special].isfinite()).sum())} entries should be finite"
    if special.all():
        return
    error = (got - want)[~special].abs().max().item()
    # rounding the truth is the least that a baseline can be wrong by, also where its own range ends
    torch_error = (baseline.detach().double().cpu() - want)[~special].abs().nan_to_num(nan=0.0, posinf=0.0).max().item()
    scale = want[~special].abs().max().item()
    eps = torch.finfo(actual.dtype).eps
    allowed = factor * (torch_error + eps * scale)
    assert error <= allowed, (
        f"max error {error:.3e} > {allowed:.3e} = {factor} * (torch's {torch_error:.3e} + eps {eps:.1e} * {scale:.3e})"
    )


def arrange(x: Tensor, layout: str) -> Tensor:
    """A tensor equal to x with another layout in memory.

    layout: "contiguous"; "strided", every second element of its rows; "transposed", the last two dimensions swapped in
    memory; "expanded", the first index repeated with stride 0, so the values change to x[:1]'s; "offset", rows padded
    by 3 and one element past the start of the storage.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "strided":
        return torch.stack([x, x.new_full((), float("nan")).expand_as(x)], -1)[..., 0]
    if layout == "transposed":
        return x.mT.contiguous().mT if x.ndim > 1 else x
    if layout == "expanded":
        return x[:1].expand_as(x)
    if layout == "offset":
        padded = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        padded[..., 1:-2] = x
        return padded[..., 1:-2]
    raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")


@dataclass
class Calls:
    """How often operators ran."""

    count: int = 0


@contextmanager
def implementation(kind: Literal["triton", "torch"], device_type: str = "cpu") -> Iterator[Calls]:
    """Inside the block every lmops operator runs its `kind` of implementation for tensors on device_type, and counts.

    "triton" on CPU tensors needs a Triton that can run there: its interpreter (TRITON_INTERPRET=1 before triton is
    imported) or a driver that simulates a GPU.
    """
    calls = Calls()

    def counted(run):
        @wraps(run)
        def call(*args):
            calls.count += 1
            return run(*args)

        return call

    library = Library("lmops", "IMPL")
    try:
        for name, operator in OPERATORS.items():
            library.impl(name, counted(getattr(operator, kind)), device_type.upper(), allow_override=True)
        yield calls
    finally:
        library._destroy()
