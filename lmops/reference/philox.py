"""Philox4x32-10 (Salmon et al., SC 2011), the random numbers of all operators: a function of a seed and a counter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

WORD = 0xFFFFFFFF


def philox(seed: int | Tensor, counter: Sequence[Tensor], rounds: int = 10) -> list[Tensor]:
    """Four words of 32 random bits for four words of counter, all held in int64.

    seed: 64 bits, a number or an int64 tensor; it and the counters broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & WORD, seed >> 32 & WORD
    for _ in range(rounds):
        # the multipliers less 2^32, so that products with a word stay inside int64; the upper word lacks the word then
        p0, p2 = c0 * (0xD2511F53 - (1 << 32)), c2 * (0xCD9E8D57 - (1 << 32))
        c0, c1, c2, c3 = (
            (p2 >> 32).add_(c2).bitwise_xor(c1).bitwise_xor(k0).bitwise_and_(WORD),
            p2,
            (p0 >> 32).add_(c0).bitwise_xor(c3).bitwise_xor(k1).bitwise_and_(WORD),
            p0,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return [c0, c1 & WORD, c2, c3 & WORD]
