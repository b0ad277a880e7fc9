"""How an operator over rows sees tensors of any strides: as (outer..., row, column)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowLayout:
    """Row dimensions common to several tensors, with as few as their strides allow.

    outer_shape: sizes of the outer dimensions, at least one; n_rows: size of the innermost one.
    strides: a tuple a tensor, in elements: one a dimension of outer_shape, the row's, and where the tensor has columns
    the column's.
    """

    outer_shape: tuple[int, ...]
    n_rows: int
    strides: tuple[tuple[int, ...], ...]

    @property
    def n_outer(self) -> int:
        return math.prod(self.outer_shape)


def row_layout(full: Sequence[Tensor], per_row: Sequence[Tensor] = (), *, keep_last: bool = False) -> RowLayout:
    """The layout of tensors `full` of one shape (..., n_cols) together with tensors `per_row` of shape (...).

    Dimensions are ordered by the strides of full[0] and merged where every tensor allows it. keep_last: dimension -2
    stays the row dimension, alone, because its index means something to the kernel.
    """
    shape = full[0].shape[:-1]
    tensors = (*full, *per_row)
    columns = [(t.stride(-1),) for t in full] + [()] * len(per_row)
    if not keep_last and all(t.is_contiguous() for t in tensors):
        n_cols = full[0].shape[-1]
        return RowLayout((1,), math.prod(shape), ((0, n_cols, 1),) * len(full) + ((0, 1),) * len(per_row))

    dims = [(size, [t.stride(d) for t in tensors]) for d, size in enumerate(shape)]
    row = dims.pop() if keep_last else None
    merged: list[tuple[int, list[int]]] = []
    for size, strides in sorted((d for d in dims if d[0] != 1), key=lambda d: -d[1][0]):
        if merged and all(outer == inner * size for outer, inner in zip(merged[-1][1], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    nothing = (1, [0] * len(tensors))
    row = row or (merged.pop() if merged else nothing)
    outer = merged or [nothing]
    strides_of = zip(*[s for _, s in outer], row[1], columns, strict=True)
    return RowLayout(tuple(size for size, _ in outer), row[0], tuple((*s[:-1], *s[-1]) for s in strides_of))


def aligned_alike(full: Sequence[Tensor], layout: RowLayout, elements: int) -> bool:
    """Whether every row starts equally many elements past a multiple of `elements` in all tensors, on 16-byte bases."""
    first, *others = layout.strides[: len(full)]
    return (
        all(s[-1] == 1 for s in layout.strides[: len(full)])
        and all(t.data_ptr() % 16 == 0 for t in full)
        and all((a - b) % elements == 0 for s in others for a, b in zip(first, s, strict=True))
    )
