"""The arithmetic of kernels/sampling.py by itself, as kernels; a test imports them, in the mode that it runs in."""

import triton
import triton.language as tl

from lmops.kernels.sampling import exp2, gumbel, ln, noise_of_ids, noise_of_tile, weigh


@triton.jit
def probe_kernel(word_ptr, y_ptr, x_ptr, gumbel_ptr, exp2_ptr, weight_ptr, ln_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(gumbel_ptr + at, gumbel(tl.load(word_ptr + at).to(tl.uint32, bitcast=True)))
    tl.store(exp2_ptr + at, exp2(tl.load(y_ptr + at)))
    tl.store(weight_ptr + at, weigh(tl.load(y_ptr + at)))
    tl.store(ln_ptr + at, ln(tl.load(x_ptr + at)))


@triton.jit(do_not_specialize=("seed", "offset"))
def noise_kernel(by_tile_ptr, by_id_ptr, seed, offset, BLOCK: tl.constexpr):
    start = tl.program_id(0) * BLOCK
    ids = start + tl.arange(0, BLOCK)
    seed, offset = seed.to(tl.int64), offset.to(tl.int64)
    tl.store(by_tile_ptr + ids, noise_of_tile(start, seed, offset, 0, BLOCK))
    tl.store(by_id_ptr + ids, noise_of_ids(ids, seed, offset, 0))
