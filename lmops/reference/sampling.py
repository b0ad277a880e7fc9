"""Sampling of tokens in plain torch: the arithmetic that decides, bit by bit, and the exact sets and distributions.

Everything that a draw depends on is one of float32's IEEE operations (+, -, *, /, comparisons, conversions) or an
integer operation, each rounded on its own, in the order written here: a kernel that does the same gets the same bits.
`ln`, `exp2`, `weights` and `gumbel` are such functions; `kept` and `probabilities` are the truth in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmops.reference.philox import WORD, philox

NEG_INF = float("-inf")
LARGEST = torch.finfo(torch.float32).max
LOG2E, LN2 = 1.4426950216293335, 0.6931471824645996
# ln(1 + t) = t (1 + t Q(t)) on [sqrt(1/2) - 1, sqrt(2) - 1], to 2e-7; 2^f = 1 + f R(f) on [0, 1), to 1e-7
Q = (
    -0.10347994416952133, 0.16278991103172302, -0.17201559245586395, 0.1989399641752243, -0.2497338503599167,
    0.33335089683532715, -0.5000028610229492,
)  # fmt: skip
R = (0.0018671300495043397, 0.009017030708491802, 0.05579991266131401, 0.24016444385051727, 0.6931512951850891)
SQRT_HALF = 0x3F3504F3  # the bits of sqrt(1/2)
GREEDY_BELOW = 1e-5  # temperatures under it count as 0


def polynomial(t: Tensor, coefficients: Sequence[float]) -> Tensor:
    """By Horner's rule, the highest power's coefficient first."""
    y = (t * coefficients[0]).add_(coefficients[1])
    for c in coefficients[2:]:
        y.mul_(t).add_(c)
    return y


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent e (int32) and t of a positive normal float32 x = 2^e (1 + t), with 1 + t from sqrt(1/2) to sqrt(2)."""
    bits = x.view(torch.int32) - SQRT_HALF
    return bits >> 23, bits.bitwise_and_(0x7FFFFF).add_(SQRT_HALF).view(torch.float32).sub_(1)


def ln_of_split(e: Tensor, t: Tensor) -> Tensor:
    return e.float().mul_(LN2).add_(polynomial(t, Q).mul_(t).add_(1).mul_(t))


def ln(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal float32 numbers."""
    return ln_of_split(*split(x))


def exp2(y: Tensor) -> Tensor:
    """2^y of float32 numbers from -64 to 0; what is below counts as -64."""
    y = y.clamp(min=-64.0)
    whole = y.floor()
    f = y - whole
    p = polynomial(f, R) * f + 1
    return (p.view(torch.int32) + (whole.to(torch.int32) << 23)).view(torch.float32)


def weights(y: Tensor) -> Tensor:
    """2^y as a whole number of 2^-40ths (int64), so that sums do not depend on their order."""
    return (exp2(y) * 2.0**40).to(torch.int64)


def gumbel(word: Tensor) -> Tensor:
    """Standard Gumbel noise -ln(-ln u) in float32 from words of 32 random bits in int64; u = (word + 1/2) / 2^32.

    From -3.13 to 22.87. The largest come from u near 1, where ln u is taken of 1 - u, which has all its digits.
    """
    u = word.float().add_(0.5).mul_(2.0**-32)
    minus_rest = (word ^ WORD).float().add_(0.5).mul_(-(2.0**-32))
    e, t = split(u)
    return ln(ln_of_split(e, torch.where(e == 0, minus_rest, t)).neg_()).neg_()


def noise(ids: Tensor, seed: Tensor, offset: Tensor, stream: int) -> Tensor:
    """Gumbel noise of token ids (B, n): word id % 4 of Philox of the counter (id // 4, offset, stream) under the seed.

    seed, offset: (B, 1) int64, of whose 64 bits two words are made.
    """
    stream_word = torch.full((1, 1), stream, device=ids.device)
    words = philox(seed, [ids >> 2, offset & WORD, offset >> 32 & WORD, stream_word])
    return gumbel(torch.stack(words, -1).gather(-1, (ids & 3).unsqueeze(-1)).squeeze(-1))


def words_of_all(n_cols: int, seed: Tensor, offset: Tensor, stream: int) -> Tensor:
    """The words that `noise` makes noise of, for the ids 0 .. n_cols - 1: (B, n_cols), four from one call of Philox."""
    fours = torch.arange(-(-n_cols // 4), device=seed.device)[None]
    stream_word = torch.full((1, 1), stream, device=seed.device)
    words = philox(seed, [fours, offset & WORD, offset >> 32 & WORD, stream_word])
    return torch.stack(words, -1).flatten(-2)[:, :n_cols]


def noise_of_all(n_cols: int, seed: Tensor, offset: Tensor, stream: int) -> Tensor:
    """`noise` of the ids 0 .. n_cols - 1 of each row, (B, n_cols)."""
    return gumbel(words_of_all(n_cols, seed, offset, stream))


def adjust(
    logits: Tensor,
    *,
    logit_bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    token_counts: Tensor | None = None,
    repetition_penalty: Tensor | float = 1.0,
    presence_penalty: Tensor | float = 0.0,
    frequency_penalty: Tensor | float = 0.0,
) -> Tensor:
    """Logits (B, V) with bias, mask and penalties, in promote_types(dtype, float32); penalties are numbers or (B, 1).

    x = logit + bias, -inf where not allowed; where count > 0, x = x / r if x > 0 else x r (CTRL, arXiv 1909.05858), and
    then x - presence - frequency * count (OpenAI's API). What is above the largest float32, such as +inf, becomes that.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_bias is not None:
        x = x + logit_bias.to(x.dtype)
    if allowed_mask is not None:
        x = x.masked_fill(~allowed_mask, NEG_INF)
    if token_counts is not None:
        r = torch.as_tensor(repetition_penalty, dtype=x.dtype)
        penalized = torch.where(x > 0, x / r, x * r) - presence_penalty - token_counts.to(x.dtype) * frequency_penalty
        x = torch.where(token_counts > 0, penalized, x)
    return x.clamp(max=LARGEST)


def kept(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens of x (B, V) may be drawn, (B, V) bool; parameters (B,). Exact where x is float64, by sorting.

    With tokens in descending order of x, ties by ascending id, each filter keeps a prefix: top_k the first k (0: all);
    top_p the shortest whose softmax(x / temperature), taken over the first k, adds up to at least top_p; min_p those
    whose probability is at least min_p times the largest. Entries of -inf are never kept. A temperature under 1e-5
    keeps the first token alone.
    """
    temperature, top_k, top_p, min_p = (v[:, None] for v in (temperature, top_k, top_p, min_p))
    z, order = x.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(x.shape[-1])
    greedy = temperature < GREEDY_BELOW
    y = (z - z[:, :1]) / temperature.masked_fill(greedy, 1).to(z.dtype)
    keep = (top_k == 0) | (rank < top_k)
    p = y.exp() * keep
    before = p.cumsum(-1) - p
    keep &= (top_p >= 1) | (before < top_p * p.sum(-1, keepdim=True))
    keep &= y >= min_p.to(z.dtype).log()
    keep = torch.where(greedy, rank < 1, keep) & (z > NEG_INF)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def probabilities(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The distribution (B, V) that tokens are drawn from: softmax(x / temperature) over what is `kept`."""
    keep = kept(x, temperature, top_k, top_p, min_p)
    t = temperature.masked_fill(temperature < GREEDY_BELOW, 1)[:, None]
    return torch.softmax((x / t).masked_fill(~keep, NEG_INF), -1)
