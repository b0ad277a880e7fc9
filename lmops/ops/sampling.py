"""sample, filter_logits and verify_draft: schemas, launchers, CPU implementations, public functions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmops.ops._launch import Launch, prepared
from lmops.ops._register import backend, define_op, warp_size
from lmops.reference.philox import WORD, philox
from lmops.reference.sampling import (
    GREEDY_BELOW,
    LARGEST,
    LOG2E,
    NEG_INF,
    adjust,
    exp2,
    gumbel,
    ln,
    noise,
    noise_of_all,
    weights,
    words_of_all,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)
MAX_COLS = 1 << 22  # sums of weights of at most 2^40 each stay inside int64
DRAW, ACCEPT, REDRAW = 0, 1, 2  # streams of random numbers, which share nothing
ROWS_AT_ONCE = 1 << 20  # elements, on a CPU
LISTS_AT_ONCE = 1 << 24  # entries of 8 bytes: 128 MiB, more than 100 rows of any usual vocabulary


class Sample(NamedTuple):
    """What `sample` returns."""

    tokens: Tensor
    valid: Tensor
    logprobs: Tensor | None
    top_tokens: Tensor | None
    top_logprobs: Tensor | None


@dataclass(frozen=True)
class Tile:
    """Columns that a program takes at a time, and whether that is all; entries of its list at a time; its threads."""

    cols: int
    fits: bool
    list_cols: int
    threads: int


def sampling_tile(n_cols: int, filters: bool, extras: bool = False, lanes: int = 32) -> Tile:
    """The tile for rows of n_cols columns. Chosen with `python -m benchmarks.compile_report`: nothing spills.

    extras: more is loaded than the logits (bias, mask, counts), or log-probabilities are added up.
    lanes: of a warp. With 64, a mask takes two scalar registers for each column of a thread, of 100 that there are:
        with filters, which hold several, a thread takes few columns.
    """
    whole = max(16, 1 << (n_cols - 1).bit_length())
    cols = min(whole, 4_096 if extras or (filters and n_cols > 8_192) else 8_192)
    threads = max(32, min(512, cols // 8))
    # of another shape than a tile, whose layout its loads would take: the list is read element by element
    list_cols = max(16, min(cols // 2, 2_048))
    if filters and lanes == 64:
        if extras or not n_cols <= cols:
            cols = min(cols, 512 if extras else 1_024)
        threads, list_cols = max(64, min(1_024, cols // 2)), min(cols, 1_024)
    return Tile(cols, n_cols <= cols, list_cols, threads)


def _walk(*tensors: Tensor, filters: bool) -> tuple[int, bool]:
    """VEC and SHIFTED of the kernels, for rows (..., V): columns of 16 bytes, and whether rows begin in between."""
    if filters and warp_size() == 64:  # a thread takes less than 16 bytes
        return 1, False
    first = tensors[0]
    n_cols, vec = first.shape[-1], 16 // first.element_size()
    # Triton knows of multiples of 16 elements
    aligned = all(
        stride % 16 == 0 or size == 1
        for t in tensors
        for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True)
    )
    begin = all(t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and t.dtype == first.dtype for t in tensors)
    short = n_cols < 8 * vec  # not worth the edges
    if (aligned and n_cols % 16 == 0) or short or not begin:
        return 1, False
    return vec, not aligned


def _options(tile: Tile) -> dict[str, Any]:
    """How kernels over such tiles are compiled and launched."""
    options = {
        "num_warps": max(1, tile.threads // warp_size()),
        "enable_fp_fusion": False,  # products and sums are rounded one by one, as on a CPU
    }
    if backend() == "cuda":
        options["maxnreg"] = 128  # all that 512 threads have: without a bound ptxas saves registers, and spills
    return options


# ------------------------------------------------------------------------------------------- what may be drawn, and one


def _z(x: Tensor, temperature: Tensor) -> Tensor:
    """x / temperature by its reciprocal; a number stays one, however small."""
    z = x.mul(torch.div(1.0, temperature)).clamp_(-LARGEST, LARGEST)
    return z.masked_fill_(x == NEG_INF, NEG_INF)


def _ordered(x: Tensor) -> Tensor:
    """int64 keys whose descending order is that of x, and of ids that ascend where x is equal."""
    bits = (x + 0.0).view(torch.int32)  # + 0 makes -0 equal to 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (key.to(torch.int64) << 32) + torch.arange(0xFFFFFFFF, 0xFFFFFFFF - x.shape[-1], -1)


def _prefix(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """The first tokens of each row in descending order, (B, m) ids, and which of them the filters keep.

    m grows until the last token of every row is not kept. Parameters (B, 1).
    """
    n_cols = x.shape[-1]
    top_k = torch.where((top_k > 0) & (top_k < n_cols), top_k, n_cols).to(torch.int64)
    scale = torch.div(torch.tensor(LOG2E), temperature)
    peak = x.amax(-1, keepdim=True)
    least = torch.where(min_p > 0, ln(min_p.clamp(min=1e-37)) * LOG2E, NEG_INF)
    order = _ordered(x)
    all_weights = weights((x - peak) * scale).sum(-1, keepdim=True) if (top_k == n_cols).any() else 0
    m = 1024
    while True:
        m = n_cols if 4 * m > n_cols else m
        first = order.sort(dim=-1, descending=True).values if m == n_cols else order.topk(m).values
        ids = 0xFFFFFFFF - (first & 0xFFFFFFFF)
        z = x.gather(-1, ids)
        y = (z - peak) * scale
        keep = torch.arange(m) < top_k
        w = weights(y) * keep
        up_to = w.cumsum(-1)
        total = torch.where(top_k == n_cols, all_weights, up_to[:, -1:]).to(torch.float64)
        target = (top_p.to(torch.float64) * total).ceil_().to(torch.int64)
        keep &= (top_p >= 1) | (up_to - w < target)
        keep &= (y >= least) & (z > NEG_INF)
        if m == n_cols or not ((top_k > m) & ((top_k < n_cols) | keep[:, -1:])).any():
            return ids, keep
        m *= 16


def _draw(
    x: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    offset: Tensor,
    *,
    stream: int,
) -> Tensor:
    """A token (B,) for each row of x (B, V), which has no NaN; parameters (B, 1)."""
    greedy = temperature < GREEDY_BELOW
    filtered = ((top_k > 0) & (top_k < x.shape[-1])) | (top_p < 1) | (min_p > 0)
    kind = torch.where(greedy, 0, torch.where(filtered, 2, 1))[:, 0]
    tokens = torch.empty(x.shape[0], dtype=torch.int64)
    for value in kind.unique().tolist():
        rows = slice(None) if (kind == value).all() else (kind == value).nonzero()[:, 0]
        z, t, of = x[rows], temperature[rows], (seed[rows], offset[rows], stream)
        if value == 0:
            tokens[rows] = z.argmax(-1)
        elif value == 1:
            tokens[rows] = _draw_unfiltered(_z(z, t), words_of_all(x.shape[-1], *of))
        else:
            ids, keep = _prefix(z, t, top_k[rows], top_p[rows], min_p[rows])
            ids = ids[:, : int(keep.sum(-1).max())]
            key = _z(z.gather(-1, ids), t).add_(noise(ids, *of)).masked_fill_(~keep[:, : ids.shape[-1]], NEG_INF)
            best = key == key.amax(-1, keepdim=True)
            tokens[rows] = ids.masked_fill(~best, x.shape[-1] - 1).amin(-1)
    return tokens


def _draw_unfiltered(z: Tensor, words: Tensor) -> Tensor:
    """The token (B,) of the largest z + gumbel(words), the first of equal ones.

    The noise that counts is formed only where another, quicker to form and never 0.4 from it, comes near the largest.
    """
    rest = (WORD - words).to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    near = rest.neg_().log1p_().neg_().log_().neg_().add_(z)
    most = near.amax(-1, keepdim=True)
    may_win = near >= most - (1 + most.abs() * 1e-5)
    key = torch.full_like(z, NEG_INF)
    key[may_win] = z[may_win] + gumbel(words[may_win])
    return key.argmax(-1)


# --------------------------------------------------------------------------------------------------------- the operator

# the order of the operator's `per_row` and `numbers`; seed and offset come after them in `per_row`
PARAMETERS = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
)  # fmt: skip
Parameters = Sequence["Tensor | None"]


def _columns(
    per_row: Parameters, numbers: Sequence[float], n_rows: int, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Parameters as (B, 1)."""
    values = (torch.tensor(n, dtype=dtype) if t is None else t.to(dtype) for t, n in zip(per_row, numbers, strict=True))
    return [value.expand(n_rows)[:, None] for value in values]


def _sample_cpu(
    logits: Tensor, per_row: Parameters, numbers: Sequence[float], seed: int, offset: int,
    token_counts: Tensor | None, logit_bias: Tensor | None, allowed_mask: Tensor | None, n_logprobs: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    _check_values(per_row)
    outputs = _sample_fake(logits, per_row, numbers, seed, offset, token_counts, logit_bias, allowed_mask, n_logprobs)
    tokens, valid, of_logprobs = outputs
    n_rows, n_cols = logits.shape
    plain = all(t is None for t in (*per_row[:-2], token_counts, logit_bias, allowed_mask)) and not n_logprobs
    if plain and numbers[0] < GREEDY_BELOW and n_cols:  # greedy decoding: the largest logit, where all is well
        largest, found = logits.max(-1)
        finite = largest.isfinite()
        if finite.all():
            return found, finite, of_logprobs
    columns = _columns(per_row[:-2], numbers, n_rows)
    columns += _columns(per_row[-2:], (seed, offset), n_rows, torch.int64)
    step = max(1, ROWS_AT_ONCE // n_cols)
    for first in range(0, n_rows, step):
        rows = slice(first, first + step)
        part = logits[rows]
        temperature, top_k, top_p, min_p, repetition, presence, frequency, seeds, offsets = (c[rows] for c in columns)
        x = adjust(
            part,
            logit_bias=logit_bias if logit_bias is None or logit_bias.ndim == 1 else logit_bias[rows],
            allowed_mask=allowed_mask if allowed_mask is None or allowed_mask.ndim == 1 else allowed_mask[rows],
            token_counts=None if token_counts is None else token_counts[rows],
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
        )
        valid[rows] = ok = x.amax(-1) > NEG_INF
        if not ok.all():
            x = x.masked_fill(~ok[:, None], 0)
        tokens[rows] = _draw(x, temperature, top_k, top_p, min_p, seeds, offsets, stream=DRAW).masked_fill_(~ok, 0)
        if n_logprobs:
            logprobs, top_tokens, top_logprobs = of_logprobs
            lse = part.to(torch.float32).logsumexp(-1, keepdim=True)
            logprobs[rows] = (part.gather(-1, tokens[rows, None]).to(torch.float32) - lse)[:, 0]
            top, top_tokens[rows] = part.topk(n_logprobs)
            top_logprobs[rows] = top.to(torch.float32) - lse
    return outputs


def _sample_fake(
    logits: Tensor, per_row: Parameters, numbers: Sequence[float], seed: int, offset: int,
    token_counts: Tensor | None, logit_bias: Tensor | None, allowed_mask: Tensor | None, n_logprobs: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    n_rows = logits.shape[0]
    tokens, valid = logits.new_empty(n_rows, dtype=torch.int64), logits.new_empty(n_rows, dtype=torch.bool)
    if not n_logprobs:
        return tokens, valid, []
    top = (n_rows, n_logprobs)
    logprobs = logits.new_empty(n_rows, dtype=torch.float32)
    return tokens, valid, [logprobs, tokens.new_empty(top), logprobs.new_empty(top)]


@prepared
def _prepare_sample(
    n_rows: int, filters: bool, logprobs: bool, wide_numbers: tuple[bool, ...], logits: Tensor, bias: Tensor | None,
    allowed: Tensor | None, counts: Tensor | None, *per_row: Tensor | None,
) -> Launch:  # fmt: skip
    """A launch for n_rows of the rows, whose leading arguments are those of the kernel up to first_row.

    wide_numbers: whether seed and offset do not fit 32 bits, by which Triton types them.
    """
    from lmops.kernels.sampling import sample_kernel

    n_cols = logits.shape[1]
    vec, shifted = _walk(logits, filters=filters)
    if shifted and not filters:
        vec, shifted = 1, False  # the noise of tiles begins with the row
    extras = logprobs or any(t is not None for t in (bias, allowed, counts))
    tile = sampling_tile(n_cols + (vec - 1 if shifted else 0), filters, extras, warp_size())
    full = [logits, *(logits if t is None else t.expand_as(logits) for t in (bias, allowed, counts))]
    return Launch(
        sample_kernel, (n_rows,), n_cols, tuple(_row_stride(t) for t in full), tuple(t.stride(1) for t in full),
        tuple(None if t is None else t.stride(0) for t in per_row),
        BIAS=bias is not None, ALLOWED=allowed is not None, COUNTS=counts is not None, FILTERS=filters,
        LOGPROBS=logprobs, FITS=tile.fits, BLOCK=tile.cols, LIST_BLOCK=tile.list_cols, VEC=vec, SHIFTED=shifted,
        **_options(tile),
    )  # fmt: skip


def _row_stride(rows: Tensor) -> int:
    """That of a single row is any number: then one that is known to be a multiple of 16."""
    return 0 if rows.shape[0] == 1 else rows.stride(0)


def _sample_triton(
    logits: Tensor, per_row: Parameters, numbers: Sequence[float], seed: int, offset: int,
    token_counts: Tensor | None, logit_bias: Tensor | None, allowed_mask: Tensor | None, n_logprobs: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
    outputs = _sample_fake(logits, per_row, numbers, seed, offset, token_counts, logit_bias, allowed_mask, n_logprobs)
    tokens, valid, of_logprobs = outputs
    n_rows = logits.shape[0]
    if n_rows == 0:
        return outputs
    filters = numbers[1] > 0 or numbers[2] < 1 or numbers[3] > 0 or per_row[1:4] != [None] * 3
    allowed = None if allowed_mask is None else allowed_mask.view(torch.uint8)
    extras = logit_bias, allowed, token_counts
    # the logits take the place of what is not there, and are not looked at
    logprobs = of_logprobs[0] if n_logprobs else logits
    lse = torch.empty_like(logprobs) if n_logprobs else logits
    *parameters, seeds, offsets = [
        number if tensor is None else tensor for tensor, number in zip(per_row, (*numbers, seed, offset), strict=True)
    ]
    wide = _wide(seed, offset)
    at_once, lists = _lists(logits) if filters else (n_rows, lse)
    leading = (
        logits, *(logits if t is None else t for t in extras), tokens, valid, logprobs, lse, lists,
        tuple(parameters), seeds, offsets,
    )  # fmt: skip
    for first in range(0, n_rows, at_once):
        launch = _prepare_sample(min(at_once, n_rows - first), filters, n_logprobs > 0, wide, logits, *extras, *per_row)
        launch(*leading, first)
    if n_logprobs:
        _, top_tokens, top_logprobs = of_logprobs
        top, ids = logits.topk(n_logprobs)
        top_tokens.copy_(ids)
        torch.sub(top.to(torch.float32), lse[:, None], out=top_logprobs)
    return outputs


def _lists(logits: Tensor) -> tuple[int, Tensor]:
    """How many rows a launch with filters takes, and where its programs write what may be kept."""
    n_rows, n_cols = logits.shape
    at_once = max(1, min(n_rows, LISTS_AT_ONCE // n_cols))
    return at_once, logits.new_empty((at_once, n_cols), dtype=torch.int64)


def _filter_cpu(logits: Tensor, per_row: Parameters, numbers: Sequence[float]) -> Tensor:
    _check_values(per_row)
    out = torch.empty_like(logits)
    n_rows, n_cols = logits.shape
    columns = _columns(per_row, numbers, n_rows)
    step = max(1, ROWS_AT_ONCE // n_cols)
    for first in range(0, n_rows, step):
        rows = slice(first, first + step)
        part = logits[rows]
        temperature, top_k, top_p, min_p = (c[rows] for c in columns)
        x = adjust(part)
        ok = x.amax(-1, keepdim=True) > NEG_INF
        greedy = temperature < GREEDY_BELOW
        temperature, min_p = temperature.masked_fill(greedy, 1), min_p.masked_fill(greedy, 0)
        top_k, top_p = top_k.masked_fill(greedy, 1), top_p.masked_fill(greedy, 1)
        ids, keep = _prefix(x.masked_fill(~ok, 0), temperature, top_k, top_p, min_p)
        every = torch.zeros_like(x, dtype=torch.bool).scatter_(-1, ids, keep & ok)
        out[rows] = part.masked_fill(~every, NEG_INF)
    return out


def _filter_fake(logits: Tensor, per_row: Parameters, numbers: Sequence[float]) -> Tensor:
    return torch.empty_like(logits)


@prepared
def _prepare_filter(n_rows: int, logits: Tensor, out: Tensor, *per_row: Tensor | None) -> Launch:
    """A launch for n_rows of the rows, whose leading arguments are those of the kernel up to first_row."""
    from lmops.kernels.sampling import filter_kernel

    n_cols = logits.shape[1]
    vec, shifted = _walk(logits, out, filters=True) if logits.stride() == out.stride() else (1, False)
    tile = sampling_tile(n_cols + (vec - 1 if shifted else 0), filters=True, lanes=warp_size())
    return Launch(
        filter_kernel, (n_rows,), n_cols, (_row_stride(logits), _row_stride(out)), (logits.stride(1), out.stride(1)),
        tuple(None if t is None else t.stride(0) for t in per_row),
        FITS=tile.fits, BLOCK=tile.cols, LIST_BLOCK=tile.list_cols, VEC=vec, SHIFTED=shifted, **_options(tile),
    )  # fmt: skip


def _filter_triton(logits: Tensor, per_row: Parameters, numbers: Sequence[float]) -> Tensor:
    out = torch.empty_like(logits)
    n_rows = logits.shape[0]
    if n_rows == 0:
        return out
    at_once, lists = _lists(logits)
    parameters = tuple(n if t is None else t for t, n in zip(per_row, numbers, strict=True))
    for first in range(0, n_rows, at_once):
        launch = _prepare_filter(min(at_once, n_rows - first), logits, out, *per_row)
        launch(logits, out, lists, parameters, first)
    return out


def _verify_cpu(
    target: Tensor, draft_tokens: Tensor, draft: Tensor | None, per_row: Parameters, temperature: float, seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    _check_values(per_row[:1])
    n_rows, n_drafts = draft_tokens.shape
    n_cols = target.shape[-1]
    (t,) = _columns(per_row[:1], [temperature], n_rows)
    seeds, offsets = _columns(per_row[1:3], (seed, offset), n_rows, torch.int64)
    length = torch.full((n_rows,), n_drafts) if per_row[3] is None else per_row[3].clamp(0, n_drafts).to(torch.int64)
    greedy = t < GREEDY_BELOW
    t = t.masked_fill(greedy, 1)
    x = adjust(target)
    p = _shares(x[:, :-1], t[..., None])
    first = x[:, :-1].argmax(-1)
    known = (draft_tokens >= 0) & (draft_tokens < n_cols) & ~p[..., 0].isnan()
    d = draft_tokens.masked_fill(~known, 0).to(torch.int64)
    p_d = p.gather(-1, d[..., None])[..., 0]
    q = None if draft is None else _shares(adjust(draft), t[..., None])
    q_d = torch.ones_like(p_d) if q is None else q.gather(-1, d[..., None])[..., 0]
    at = offsets + torch.arange(n_drafts)
    zero = torch.zeros((1, 1), dtype=torch.int64)
    word = philox(seeds, [zero, at & WORD, at >> 32 & WORD, zero + ACCEPT])[0]
    accepted = known & torch.where(greedy, d == first, (word >> 8).to(torch.float32) * 2.0**-24 * q_d < p_d)
    accepted &= torch.arange(n_drafts) < length[:, None]
    n = accepted.to(torch.int64).cumprod(-1).sum(-1)

    every_row = torch.arange(n_rows)
    x = x[every_row, n]
    noise = noise_of_all(n_cols, seeds, offsets + n[:, None], REDRAW)
    key = torch.where(greedy, x, _z(x, t) + noise)
    rejected = (n < length)[:, None] & ~greedy
    refused = torch.full((n_rows,), n_cols)
    same = rejected[:, 0] & (x.amax(-1) > NEG_INF)
    if n_drafts:
        i = n.clamp(max=n_drafts - 1)
        refused = torch.where(known[every_row, i], d[every_row, i], n_cols)
        if q is None:
            key = key.masked_fill(rejected & (torch.arange(n_cols) == refused[:, None]), NEG_INF)
        else:
            left = p[every_row, i] - q[every_row, i]
            some = ln(left.clamp(min=1e-37)).add_(noise).masked_fill_(~(left > 1e-37), NEG_INF)
            key = torch.where(rejected, some.masked_fill_(x.isnan(), math.nan), key)
            same &= ~q[every_row, i, 0].isnan()
    # nothing is left by rounding alone, where p = q: the draft's token is as good
    same &= (key.amax(-1) == NEG_INF) & (refused < n_cols)
    valid = same | (key.amax(-1) > NEG_INF)
    token = torch.where(same, refused, key.argmax(-1)).masked_fill(~valid, 0)
    position = torch.arange(n_drafts + 1)
    padded = torch.cat([draft_tokens.to(torch.int64), draft_tokens.new_full((n_rows, 1), -1, dtype=torch.int64)], -1)
    behind = torch.where(position == n[:, None], token[:, None], -1)
    return torch.where(position < n[:, None], padded, behind), n, valid


def _shares(x: Tensor, temperature: Tensor) -> Tensor:
    """softmax(x / temperature) in the arithmetic that decides; NaN for a row with NaN."""
    peak = x.amax(-1, keepdim=True)
    y = (x - peak) * torch.div(torch.tensor(LOG2E), temperature)
    some = x > NEG_INF
    total = weights(y).masked_fill_(~some, 0).sum(-1, keepdim=True).to(torch.float32)
    shares = (exp2(y) * torch.div(torch.tensor(2.0**40), total)).masked_fill_(~some, 0)
    return shares.masked_fill_(peak.isnan(), math.nan)


def _verify_fake(
    target: Tensor, draft_tokens: Tensor, draft: Tensor | None, per_row: Parameters, temperature: float, seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n_rows = target.shape[0]
    return (
        target.new_empty(target.shape[:2], dtype=torch.int64),
        target.new_empty(n_rows, dtype=torch.int64),
        target.new_empty(n_rows, dtype=torch.bool),
    )


@prepared
def _prepare_verify(
    wide_numbers: tuple[bool, ...], target: Tensor, draft_tokens: Tensor, draft: Tensor | None,
    *per_row: Tensor | None,
) -> tuple[Launch, Launch]:  # fmt: skip
    """What decides on the drafts, and what draws a token: their leading arguments are those before n_drafts.

    wide_numbers: see `_prepare_sample`.
    """
    from lmops.kernels.sampling import accept_kernel, redraw_kernel

    n_rows, n_drafts = draft_tokens.shape
    tile = sampling_tile(target.shape[-1], filters=False, extras=True)
    q = target if draft is None else draft
    vec, shifted = _walk(target, q, filters=False)
    arguments = (
        n_drafts, target.shape[-1], target.stride(), q.stride(), draft_tokens.stride(),
        tuple(None if t is None else t.stride(0) for t in per_row),
    )  # fmt: skip
    options = {"DRAFT": draft is not None, "BLOCK": tile.cols, **_options(tile)}
    return (
        Launch(accept_kernel, (n_rows * n_drafts,), *arguments, VEC=vec if shifted else 1, **options),
        Launch(
            redraw_kernel, (n_rows,), *arguments, LENS=per_row[3] is not None, POSITIONS=1 << n_drafts.bit_length(),
            **options,
        ),
    )  # fmt: skip


def _verify_triton(
    target: Tensor, draft_tokens: Tensor, draft: Tensor | None, per_row: Parameters, temperature: float, seed: int,
    offset: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tokens, counts, valid = outputs = _verify_fake(target, draft_tokens, draft, per_row, temperature, seed, offset)
    n_rows, n_drafts = draft_tokens.shape
    if n_rows == 0:
        return outputs
    accept, redraw = _prepare_verify(_wide(seed, offset), target, draft_tokens, draft, *per_row)
    accepted = target.new_empty((n_rows, n_drafts), dtype=torch.uint8)
    sums = target.new_empty((n_rows, n_drafts, 4), dtype=torch.float32)
    values = [v if t is None else t for t, v in zip(per_row, (temperature, seed, offset), strict=False)]
    of_drafts = (target, target if draft is None else draft, draft_tokens, accepted, sums)
    if n_drafts:
        accept(*of_drafts, *values)
    lens = counts if per_row[3] is None else per_row[3]
    redraw(*of_drafts, lens, tokens, counts, valid.view(torch.uint8), *values)
    return outputs


def _wide(*numbers: int) -> tuple[bool, ...]:
    """Which do not fit 32 bits, by which Triton types them."""
    return tuple([number >> 31 not in (0, -1) for number in numbers])


# name -> (test of values, what is allowed)
RANGES = {
    "temperature": (lambda v: (v >= 0) & (v < math.inf), "finite and at least 0"),
    "top_k": (lambda v: v >= 0, "at least 0, which keeps all"),
    "top_p": (lambda v: (v > 0) & (v <= 1), "above 0 and at most 1"),
    "min_p": (lambda v: (v >= 0) & (v <= 1), "from 0 to 1"),
    "repetition_penalty": (lambda v: (v > 0) & (v < math.inf), "finite and above 0"),
    "presence_penalty": (lambda v: (v > -math.inf) & (v < math.inf), "finite"),
    "frequency_penalty": (lambda v: (v > -math.inf) & (v < math.inf), "finite"),
}


def _check_values(per_row: Parameters) -> None:
    for (name, (good, allowed)), value in zip(RANGES.items(), per_row, strict=False):
        if value is not None and not (fine := good(value)).all():
            raise ValueError(f"{name} must be {allowed}, got {value[~fine].flatten()[0].item()} in its tensor")


sample_op = define_op(
    "sample(Tensor logits, Tensor?[] per_row, float[] numbers, SymInt seed, SymInt offset, Tensor? token_counts,"
    " Tensor? logit_bias, Tensor? allowed_mask, int n_logprobs) -> (Tensor, Tensor, Tensor[])",
    triton=_sample_triton,
    torch_cpu=_sample_cpu,
    fake=_sample_fake,
)


filter_op = define_op(
    "filter_logits(Tensor logits, Tensor?[] per_row, float[] numbers) -> Tensor",
    triton=_filter_triton,
    torch_cpu=_filter_cpu,
    fake=_filter_fake,
)
verify_op = define_op(
    "verify_draft(Tensor target, Tensor draft_tokens, Tensor? draft, Tensor?[] per_row, float temperature, SymInt seed,"
    " SymInt offset) -> (Tensor, Tensor, Tensor)",
    triton=_verify_triton,
    torch_cpu=_verify_cpu,
    fake=_verify_fake,
)


# --------------------------------------------------------------------------------------------------- public functions


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    token_counts: Tensor | None = None,
    logit_bias: Tensor | None = None,
    allowed_mask: Tensor | None = None,
    return_logprobs: int = 0,
) -> Sample:
    """Draw one token a row from softmax(x / temperature) over the tokens that the filters keep.

    logits: (B, V) or (V,), float32, float16 or bfloat16, any strides, V at most 4,194,304. What follows is float32.
    Every parameter is a number or a tensor with a value a row, (B,) or with one element.

    1. x = logit + logit_bias; -inf where allowed_mask is False. logit_bias: (V,) or (B, V), floating point.
       allowed_mask: (V,) or (B, V), bool.
    2. token_counts (B, V) int32, how often each token stands in prompt and output so far, which penalties need: where
       it is above 0, x = x / r if x > 0 else x r with r = repetition_penalty (CTRL, arXiv 1909.05858), then
       x = x - presence_penalty - frequency_penalty * count (OpenAI's API).
    3. temperature: 0 (and all below 1e-5) takes the largest x, the lowest id of equal ones; what follows is for others.
    4. Of the tokens in descending order of x, equal ones by ascending id, the filters keep a prefix, the shortest that
       does: top_k, the first k (0: all). top_p, a mass of at least top_p of that of the first k. min_p, those with at
       least min_p times the largest probability. Mass is counted in whole 2^-40ths of the heaviest token's, from
       float32 weights: top_p is met to within 2^-20 of the mass, and by the same tokens on every device.
    5. The token is argmax(x / temperature + g), the lowest id of equal ones. g is Gumbel noise of 32 random bits: word
       id % 4 of Philox4x32-10 of the counter (id // 4, offset, 0) under the key `seed`, 64 bits each. A row's draw
       depends on nothing else: not on the batch around it, nor on the device. Draw again with another offset.
       g is between -3.13 and 22.88: a token of probability below 1e-10 is never drawn from among others.

    +inf counts as the largest float32 number. The same seed and offset give the same token on a CPU and on a GPU.

    return_logprobs: n >= 1 also gives the log-probabilities of the chosen token and of the n most probable, of the
        model's distribution log_softmax(logits), before bias, mask, penalties, temperature and filters.

    Returns a Sample: tokens (B,) int64; valid (B,) bool, False where a row has NaN, or nothing but -inf, after step 2,
    and its token is 0; logprobs (B,) float32, top_tokens (B, n) int64 in descending order, and top_logprobs (B, n)
    float32, each None for n = 0. For logits (V,) without the B.

    Raises ValueError or TypeError for a shape, dtype, device or value that is not allowed. Values in tensors are
    checked on the CPU; on a GPU that would stall the stream, so there a row with a temperature that is not allowed is
    not valid, other values are taken as the nearest allowed one, and nothing is read outside the row.
    """
    batch = _matrix("logits", logits)
    n_cols = batch.shape[1]
    values = (temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty)
    per_row, numbers = _parameters(zip(PARAMETERS, values, strict=True), batch)
    per_row += _per_row("seed", seed, batch, floating=False), _per_row("offset", offset, batch, floating=False)
    if token_counts is not None:
        _fits(token_counts, "token_counts", batch, (torch.int32,), ("(B, V)",))
    if logit_bias is not None:
        _fits(logit_bias, "logit_bias", batch, FLOATS, ("(V,)", "(B, V)"))
    if allowed_mask is not None:
        _fits(allowed_mask, "allowed_mask", batch, (torch.bool,), ("(V,)", "(B, V)"))
    if not isinstance(return_logprobs, int) or not 0 <= return_logprobs <= n_cols:
        raise ValueError(f"return_logprobs must be from 0 to the {n_cols} columns, got {return_logprobs}")
    if token_counts is None and (per_row[4:7] != [None] * 3 or numbers[4:] != [1.0, 0.0, 0.0]):
        raise ValueError("token_counts must be given for penalties, which are for tokens that stand there already")
    counts = None if token_counts is None else token_counts.view_as(batch)
    seed, offset = _int64("seed", seed), _int64("offset", offset)
    batch = batch.detach() if batch.requires_grad else batch
    found = sample_op(batch, per_row, numbers, seed, offset, counts, logit_bias, allowed_mask, return_logprobs)
    tokens, valid, logprobs = found
    if logits.ndim == 1:
        tokens, valid, logprobs = tokens[0], valid[0], [t[0] for t in logprobs]
    return Sample(tokens, valid, *(logprobs or (None, None, None)))


def filter_logits(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
) -> Tensor:
    """Logits (B, V) or (V,) with -inf in place of the tokens that `sample` would never draw, otherwise as they are.

    Arguments, the exact set, its ties and errors are those of `lmops.sample`. Temperature 0 keeps the first maximum.
    The temperature decides what top_p and min_p keep; the logits are not divided by it. A row with NaN is -inf
    throughout.
    """
    batch = _matrix("logits", logits)
    values = zip(PARAMETERS[:4], (temperature, top_k, top_p, min_p), strict=True)
    return filter_op(batch.detach(), *_parameters(values, batch)).view_as(logits)


class Verified(NamedTuple):
    """What `verify_draft` returns."""

    tokens: Tensor
    counts: Tensor
    valid: Tensor


def verify_draft(
    target_logits: Tensor,
    draft_tokens: Tensor,
    draft_logits: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    draft_lens: Tensor | None = None,
) -> Verified:
    """Speculative sampling: keep the drafted tokens that the target model agrees with, and draw one more.

    Draft i is accepted with probability min(1, p_i(d) / q_i(d)); at the first that is not, the token is drawn from
    normalise(max(p_i - q_i, 0)), and after the last from p_K. So all tokens are distributed as the target model's own
    (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318). At temperature 0 drafts are accepted while they
    are the first maximum of the target's logits, and that maximum follows.

    target_logits: (B, K + 1, V), K at least 0, of the model after the last accepted token and after each draft, of the
        dtypes of `lmops.sample`. p = softmax(target_logits / temperature) over what the filters keep, as there.
    draft_tokens: (B, K) int32 or int64. One outside the vocabulary is not accepted.
    draft_logits: (B, K, V), what the drafts were drawn from: q = softmax(draft_logits / temperature). The filters are
        not applied to them: where the drafts were filtered, pass `filter_logits` of the logits. None: the drafts were
        chosen without chance, q = 1 at the draft.
    temperature, top_k, top_p, min_p, seed, offset: numbers or one a row, as in `lmops.sample`. Position i of a row
        takes random numbers of the seed and offset + i, from streams of their own, independent of `sample`'s.
    draft_lens: (B,) int32 or int64, how many of its K drafts a row has; all by default.

    Returns a Verified: tokens (B, K + 1) int64, the accepted drafts and then the drawn token, -1 behind it; counts (B,)
    int64, how many drafts were accepted; valid (B,) bool, False where the last token could not be drawn, because its
    logits, or the draft's, have NaN, or nothing but -inf, and is 0.
    Raises ValueError or TypeError as `lmops.sample` does.
    """
    if target_logits.ndim != 3:
        raise ValueError(f"target_logits must be (B, K + 1, V), got {tuple(target_logits.shape)}")
    n_rows, n_positions, n_cols = target_logits.shape
    if n_positions < 1:
        raise ValueError(f"target_logits must be (B, K + 1, V) with K at least 0, got {tuple(target_logits.shape)}")
    flat = _matrix("target_logits", target_logits.reshape(-1, n_cols))
    batch = target_logits[:, 0]
    expected = (n_rows, n_positions - 1)
    _expect("draft_tokens", draft_tokens, batch, INTS, expected)
    if draft_logits is not None:
        _expect("draft_logits", draft_logits, batch, FLOATS, (*expected, n_cols))
    if draft_lens is not None:
        _expect("draft_lens", draft_lens, batch, INTS, (n_rows,))
    values = zip(PARAMETERS[:4], (temperature, top_k, top_p, min_p), strict=True)
    per_row, numbers = _parameters(values, batch)
    target = target_logits.detach()
    if any(t is not None for t in per_row[1:]) or numbers[1:] != [0.0, 1.0, 0.0]:
        each = [None if t is None else t[:, None].expand(n_rows, n_positions).reshape(-1) for t in per_row]
        target = filter_op(flat.detach(), each, numbers).view_as(target_logits)
    seeds = _per_row("seed", seed, batch, floating=False), _per_row("offset", offset, batch, floating=False)
    per_row = [per_row[0], *seeds, draft_lens]
    seed, offset = _int64("seed", seed), _int64("offset", offset)
    draft = None if draft_logits is None else draft_logits.detach()
    return Verified(*verify_op(target, draft_tokens, draft, per_row, numbers[0], seed, offset))


def _expect(name: str, tensor: Tensor, batch: Tensor, dtypes: Sequence[torch.dtype], shape: tuple[int, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if tensor.device != batch.device:
        raise ValueError(f"{name} must be on {batch.device} like the logits, got {tensor.device}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape} for these logits, got {tuple(tensor.shape)}")


def _matrix(name: str, x: Tensor) -> Tensor:
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {x.dtype}")
    if x.ndim not in (1, 2) or not 1 <= x.shape[-1] <= MAX_COLS:
        raise ValueError(f"{name} must be (B, V) or (V,) with V from 1 to {MAX_COLS}, got {tuple(x.shape)}")
    return x if x.ndim == 2 else x[None]


def _parameters(values: Iterable[tuple[str, float | Tensor]], batch: Tensor) -> tuple[list[Tensor | None], list[float]]:
    """Tensors a row, None for a number; and the numbers, which are checked here."""
    per_row: list[Tensor | None] = []
    numbers = []
    for name, value in values:
        if isinstance(value, Tensor):
            per_row.append(_per_row(name, value, batch, floating=name != "top_k"))
            numbers.append(0.0)
            continue
        good, allowed = RANGES[name]
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name} must be a number or a tensor with a value a row, got {value!r}") from None
        if not good(number):
            raise ValueError(f"{name} must be {allowed}, got {value}")
        if name == "top_k" and number != int(number):
            raise TypeError(f"top_k must be an integer, got {value}")
        per_row.append(None)
        numbers.append(number)
    return per_row, numbers


def _per_row(name: str, value: float | Tensor, batch: Tensor, *, floating: bool) -> Tensor | None:
    if not isinstance(value, Tensor):
        return None
    if value.is_floating_point() != floating or value.is_complex() or (not floating and value.dtype not in INTS):
        kind = "floating-point" if floating else "int32 or int64"
        raise TypeError(f"{name} must be a number or a tensor of {kind} values, got {value.dtype}")
    if value.device != batch.device:
        raise ValueError(f"{name} must be on {batch.device} like the logits, got {value.device}")
    n_rows = batch.shape[0]
    if value.numel() != 1 and tuple(value.shape) != (n_rows,):
        raise ValueError(f"{name} must have one value, or one a row, ({n_rows},), got {tuple(value.shape)}")
    return value.reshape(-1).expand(n_rows)


def _int64(name: str, value: int | Tensor) -> int:
    """A number of at most 64 bits, as int64 holds it; 0 for a tensor."""
    if isinstance(value, Tensor):
        return 0
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer or a tensor of them, got {value}")
    if not -(1 << 63) <= value < 1 << 64:
        raise ValueError(f"{name} must have at most 64 bits, got {value}")
    return value if value < 1 << 63 else value - (1 << 64)


def _fits(tensor: Tensor, name: str, batch: Tensor, dtypes: Sequence[torch.dtype], shapes: Sequence[str]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must be {' or '.join(str(d) for d in dtypes)}, got {tensor.dtype}")
    if tensor.device != batch.device:
        raise ValueError(f"{name} must be on {batch.device} like the logits, got {tensor.device}")
    sizes = {"(V,)": (batch.shape[1],), "(B, V)": tuple(batch.shape)}
    # one row of logits may come with one of these, without its dimension
    allowed = [sizes[s] for s in shapes] + ([(batch.shape[1],)] if batch.shape[0] == 1 else [])
    if tuple(tensor.shape) not in allowed:
        raise ValueError(
            f"{name} must be {' or '.join(shapes)} for (B, V) = {tuple(batch.shape)}, got {tuple(tensor.shape)}"
        )
