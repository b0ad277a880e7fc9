"""How a kernel over rows walks through them: tiles, whether a row fits one, 16-byte accesses, the rows' edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lmops.ops._register import warp_size
from lmops.ops._strides import RowLayout, aligned_alike

# For kernels whose products are summed across lanes: contracted with the sum, a product would be rounded by one lane
# only, and lanes that hold copies of one sum would differ in the last bit.
NO_FUSION = {"enable_fp_fusion": False}


@dataclass(frozen=True)
class Tile:
    """What a program takes at a time, rows x cols; whether that is all the columns; and its threads."""

    rows: int
    cols: int
    fits: bool
    threads: int


def softmax_tile(n_cols: int, n_rows: int, registers: int, by_column: bool = False) -> Tile:
    """The tile for n_rows rows of n_cols columns, each of which takes `registers` of 4 bytes while it is held.

    A row fits up to 32,768 registers: 1,024 threads then hold 32 of their 64 each. A thread takes 16 columns
    (8 in float64 with much to hold): for types of 2 bytes two accesses of 16. Chosen with
    `python -m benchmarks.compile_report`: at these tiles nothing spills on the targets it knows.
    by_column: the rows, not the columns, are neighbours in memory, so a tile is at least 32 rows wide.
    """
    cols, rows = max(16, _next_power_of_2(n_cols)), _next_power_of_2(n_rows)
    registers = _next_power_of_2(registers)
    rows = min(rows, 64 if cols <= 256 else 32) if by_column else min(rows, max(1, 2_048 // cols))
    fits = rows * cols * registers <= 32_768
    cols = cols if fits else max(16, 8_192 // (rows * registers))
    return Tile(rows, cols, fits, threads=min(1_024, rows * cols // (8 if registers >= 8 else 16)))


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@dataclass(frozen=True)
class Geometry:
    """How a launch walks over rows: their layout, the tile, elements an access, the width of the edges, the warps."""

    layout: RowLayout
    tile: Tile
    vec: int
    edge: int
    num_warps: int

    @property
    def n_blocks(self) -> int:
        """Blocks of tile.rows neighbouring rows."""
        return self.layout.n_outer * -(-self.layout.n_rows // self.tile.rows)

    @property
    def grid(self) -> tuple[int]:
        return (self.n_blocks,)

    @property
    def flags(self) -> dict[str, Any]:
        """For the kernel."""
        tile = self.tile
        return {"ROWS": tile.rows, "COLS": tile.cols, "VEC": self.vec, "EDGE": self.edge, "FITS": tile.fits,
                "num_warps": self.num_warps}  # fmt: skip


def geometry(full: Sequence[Tensor], layout: RowLayout, tile: Tile, *, edges: bool = True) -> Geometry:
    """For tensors `full` (..., n_cols), laid out as `layout` says. edges: the kernel has edge tiles (softmax.py)."""
    n_cols = full[0].shape[-1]
    vec = 16 // min(t.element_size() for t in full)
    whole = n_cols % vec == 0 and all(s % vec == 0 for s in layout.strides[0][:-1])
    # short rows are not worth the edges that 16-byte accesses need where rows are not whole multiples of 16 bytes
    if not (aligned_alike(full, layout, vec) and (whole or (edges and n_cols >= 8 * vec))):
        vec, whole = 1, True
    num_warps = max(1, tile.threads // warp_size())
    edge = 0 if whole else max(2 * vec, num_warps * warp_size() // tile.rows)
    return Geometry(layout, tile, vec, edge, num_warps)
