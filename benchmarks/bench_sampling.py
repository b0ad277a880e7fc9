"""Sampling from rows of 32,000 to 262,144 logits: temperature alone, with top-k and top-p, and draft verification.

One token of each row stands far above the others, so that every provider must draw it and can be checked; the work of a
sort, a softmax or a search is that of any row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Benchmark, Call, Variant
from lmops.ops.sampling import filter_logits, sample, verify_draft

SIZES = (32_000, 50_257, 128_256, 151_936, 262_144)
T, K, P, DRAFTS = 0.7, 50, 0.9, 4


def rows(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor]:
    """Logits of 64 rows on a GPU, of 4 on a CPU, spread about as far as a trained model's."""
    n_rows = 64 if device.type == "cuda" else 4
    x = torch.randn(n_rows, size, device=device) * 4
    return (x.scatter_(1, torch.randint(size, (n_rows, 1), device=device), 80.0).to(dtype),)


def drafts(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the target and of the draft after each of DRAFTS tokens, and these, of which the target agrees."""
    (x,) = rows(size, dtype, device)
    target = x[:, None].repeat(1, DRAFTS + 1, 1)
    return target, x.argmax(-1, keepdim=True).repeat(1, DRAFTS), target[:, :DRAFTS].clone()


def draw(x: Tensor) -> Tensor:
    """A draw in plain torch."""
    return torch.multinomial(torch.softmax(x / T, -1), 1)[:, 0].float()


def draw_sorted(x: Tensor) -> Tensor:
    """A draw as most programs filter: sort, cut, multinomial."""
    ordered, ids = (x / T).sort(dim=-1, descending=True)
    ordered = ordered.masked_fill(torch.arange(x.shape[-1], device=x.device) >= K, float("-inf"))
    p = torch.softmax(ordered, -1)
    p = p.masked_fill(p.cumsum(-1) - p >= P, 0)
    return ids.gather(-1, torch.multinomial(p, 1))[:, 0].float()


def flashinfer(x: Tensor) -> Tensor:
    from flashinfer.sampling import sampling_from_logits

    return sampling_from_logits((x / T).float()).float()


def flashinfer_filtered(x: Tensor) -> Tensor:
    from flashinfer.sampling import top_k_top_p_sampling_from_logits

    return top_k_top_p_sampling_from_logits((x / T).float(), K, P).float()


def verify(target: Tensor, tokens: Tensor, draft: Tensor) -> Tensor:
    """Speculative sampling in plain torch."""
    p, q = torch.softmax(target / T, -1), torch.softmax(draft / T, -1)
    p_d, q_d = (x[:, :DRAFTS].gather(-1, tokens[..., None])[..., 0] for x in (p, q))
    n = (torch.rand_like(p_d) * q_d < p_d).long().cumprod(-1).sum(-1)
    every = torch.arange(len(n), device=n.device)
    left = p[every, n] - torch.cat([q, torch.zeros_like(q[:, :1])], 1)[every, n]
    token = torch.multinomial(left.clamp(min=0), 1)
    position = torch.arange(DRAFTS + 1, device=n.device)
    padded = torch.cat([tokens, token], 1)
    return torch.where(position < n[:, None], padded, torch.where(position == n[:, None], token, -1)).float()


def read(*inputs: Tensor) -> int:
    return sum(x.nbytes for x in inputs)


OURS = {"lmops": lambda x: sample(x, temperature=T, seed=1).tokens.float(), "flashinfer": flashinfer}
FILTERED = {
    "lmops": lambda x: sample(x, temperature=T, top_k=K, top_p=P, seed=1).tokens.float(),
    "flashinfer": flashinfer_filtered,
}
VERIFIED = {"lmops": lambda p, d, q: verify_draft(p, d, q, temperature=T, seed=1).tokens.float()}
BENCHMARKS = [
    Benchmark("sample", "sample", rows, OURS, draw, read, SIZES, 4_099),
    Benchmark("sample, top-k and top-p", "sample", rows, FILTERED, draw_sorted, read, SIZES, 4_099),
    Benchmark("verify drafts", "verify_draft", drafts, VERIFIED, verify, read, SIZES, 4_099, sizes_on_cpu=(32_000,)),
]

half, bf16, fp32 = torch.float16, torch.bfloat16, torch.float32
WHOLE = ("top_k", "seed", "offset")
PER_ROW = ("temperature", "top_k", "top_p", "min_p", "seed", "offset")
PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")  # of tokens that are counted


def draws(
    n_cols: int,
    dtype: torch.dtype,
    *,
    n_rows: int = 64,
    per_row: bool = False,
    shifted: bool = False,
    **parameters: Any,
) -> Call:
    """Host code that launches the kernel for rows of memory that nobody fills.

    per_row: every parameter is a tensor; shifted: with counts, bias and mask.
    """

    def run() -> None:
        values: dict[str, Any] = {"seed": 1, **parameters}
        if per_row:
            names = PER_ROW + PENALTIES if shifted else PER_ROW
            values |= {name: torch.empty(n_rows, dtype=torch.int64 if name in WHOLE else fp32) for name in names}
        if shifted:
            values["token_counts"] = torch.empty(n_rows, n_cols, dtype=torch.int32)
            values["logit_bias"] = torch.empty(n_cols)
            values["allowed_mask"] = torch.empty(n_rows, n_cols, dtype=torch.bool)
        sample(torch.empty(n_rows, n_cols, dtype=dtype), **values)

    return run


def verifies(n_cols: int, dtype: torch.dtype, with_logits: bool) -> Call:
    """Host code that launches both kernels of verify_draft."""

    def run() -> None:
        target = torch.empty(8, 5, n_cols, dtype=dtype)
        tokens = torch.empty(8, 4, dtype=torch.int64)
        verify_draft(target, tokens, target[:, :4] if with_logits else None, seed=1)

    return run


# a variant for each of the ways to hold a row: whole in registers, in tiles; with and without what is loaded beside it
COMPILE = [
    Variant("sampling-bf16-32", draws(32, bf16)),
    Variant("sampling-bf16-128256", draws(128_256, bf16), wide=0.75),
    Variant("sampling-fp32-151936", draws(151_936, fp32), wide=0.75),
    Variant("sampling-fp16-50257", draws(50_257, half)),
    Variant("sampling-bf16-one-row-50257", draws(50_257, bf16, n_rows=1), wide=0.4),
    Variant("sampling-bf16-shifted-151936", draws(151_936, bf16, shifted=True, return_logprobs=1), wide=0.7),
    Variant("sampling-fp32-top-p-32", draws(32, fp32, top_p=P)),
    Variant("sampling-bf16-top-p-1000", draws(1_000, bf16, top_p=P, return_logprobs=5)),
    Variant("sampling-bf16-top-p-8192", draws(8_192, bf16, top_p=P)),
    Variant("sampling-fp32-top-p-8192", draws(8_192, fp32, top_p=P)),
    Variant("sampling-bf16-top-k-128256", draws(128_256, bf16, top_k=K)),
    Variant("sampling-fp16-top-k-50257", draws(50_257, half, top_k=K)),
    Variant("sampling-bf16-one-row-top-p-50257", draws(50_257, bf16, n_rows=1, top_p=P, return_logprobs=1)),
    Variant("sampling-fp32-per-row-151936", draws(151_936, fp32, per_row=True)),
    Variant("sampling-bf16-everything-300", draws(300, bf16, per_row=True, shifted=True, return_logprobs=1)),
    Variant("sampling-bf16-everything-2000", draws(2_000, bf16, per_row=True, shifted=True, return_logprobs=1)),
    Variant("sampling-bf16-everything-50257", draws(50_257, bf16, per_row=True, shifted=True, return_logprobs=1)),
    Variant("sampling-bf16-everything-4096", draws(4_096, bf16, per_row=True, shifted=True, return_logprobs=1)),
    Variant("sampling-bf16-everything-32000", draws(32_000, bf16, per_row=True, shifted=True, return_logprobs=1)),
    Variant("sampling-fp32-everything-262144", draws(262_144, fp32, per_row=True, shifted=True, return_logprobs=1)),
    Variant("sampling-bf16-filter-logits-8192", lambda: filter_logits(torch.empty(64, 8_192, dtype=bf16), top_p=P)),
    Variant("sampling-bf16-filter-logits-128256", lambda: filter_logits(torch.empty(8, 128_256, dtype=bf16), top_p=P)),
    Variant("sampling-bf16-filter-logits-50257", lambda: filter_logits(torch.empty(8, 50_257, dtype=bf16), top_p=P)),
    Variant("sampling-bf16-verify-50257", verifies(50_257, bf16, True)),
    Variant("sampling-bf16-verify-128256", verifies(128_256, bf16, True), wide=0.3),
    Variant("sampling-fp16-verify-no-logits-32000", verifies(32_000, half, False), wide=0.3),
]
