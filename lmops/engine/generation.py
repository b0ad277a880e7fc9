"""Text generation with a `GPT`: one prefill of the prompts, then one token a step for every row that has not stopped.

Keys and values are in a paged cache: prompts of unequal lengths need no padding, the samples of a prompt share its
blocks, and what a row held is free again when it stops. With a cache of one's own, what earlier calls left in it is
found again: a chat's next turn computes only what is new.

`_steps` is the loop. `generate_stream` hands out its steps as they are made; `complete` collects them, and ranks the
samples of a prompt; `generate` is `complete` for those who only want the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor

from lmops.cache import PagedKVCache, PagedSequence
from lmops.engine.sampling_params import SamplingParams
from lmops.models.gpt import GPT, GPTConfig
from lmops.ops.sampling import Sample, sample

Prompts = Sequence[Sequence[int]] | Tensor


@dataclass
class GenerationStats:
    """What a generation processed and how long it took; `generate_stream` adds to it after every step."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0  # up to and including the choice of each row's first new token
    decode_tokens: int = 0  # made by the steps after that, over all rows that had not stopped
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Completion:
    """One sequence that continues a prompt."""

    tokens: list[int]  # without the prompt, and without the token that stopped it
    finish_reason: Literal["stop", "length"]
    # With `logprobs`, and where several samples were ranked: natural logarithms of probabilities that the model gave,
    # before any parameter changed its distribution. A token that stopped the sequence is the last of token_logprobs.
    logprob: float | None = None  # the sum of token_logprobs
    token_logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None  # for each token the most probable ones, greatest first


def generate(
    model: GPT,
    prompts: Prompts,
    params: SamplingParams | None = None,
    *,
    cache: PagedKVCache | None = None,
    stats: GenerationStats | None = None,
    **changes: Any,
) -> list[list[int]]:
    """Continue each prompt; the new tokens of each, without the prompt and without the token that stopped it.

    prompts: lists of token ids, of any lengths, or a (B, T) tensor.
    params, changes: a `SamplingParams` (greedy by default), and fields to replace in it: `generate(model, prompts,
        max_new_tokens=20, temperature=0.8, top_p=0.9, seed=1)`.
    cache: of the model's geometry. The blocks of the sequences come from it and go back to it, findable by their
        content. By default one is made that holds this call alone.
    stats: filled in with token counts and seconds.
    Returns a list a prompt; with n samples, n lists for the first prompt, then n for the second and so on, the most
    probable of a prompt first.
    Raises ValueError for a prompt that is empty, does not fit the context, or has an id outside the vocabulary, for a
    parameter without meaning, and for a model whose logits are not finite; OutOfBlocksError where the cache is too
    small. Blocks are given back whatever happens.
    """
    results = complete(model, prompts, params, cache=cache, stats=stats, **changes)
    return [completion.tokens for completions in results for completion in completions]


def complete(
    model: GPT,
    prompts: Prompts,
    params: SamplingParams | None = None,
    *,
    cache: PagedKVCache | None = None,
    stats: GenerationStats | None = None,
    **changes: Any,
) -> list[list[Completion]]:
    """`generate`, with what is known of each sequence: for every prompt its n completions, the most probable first."""
    rows, params = _checked(model, prompts, params, changes)
    steps = list(_steps(model, rows, params, stats or GenerationStats(), cache))
    samples = params.samples
    results = []
    for prompt in range(len(rows)):
        drawn = [_completion(steps, prompt * samples + i, params) for i in range(samples)]
        drawn.sort(key=lambda completion: completion.logprob or 0.0, reverse=True)  # stable: without ranks as drawn
        results.append(drawn[: params.n])
    return results


def generate_stream(
    model: GPT,
    prompts: Prompts,
    params: SamplingParams | None = None,
    *,
    cache: PagedKVCache | None = None,
    stats: GenerationStats | None = None,
    **changes: Any,
) -> Iterator[list[int | None]]:
    """`generate`, one step at a time: each item has the new token of every row, None for a row that has stopped.

    With n samples a prompt has n rows, one after another, as they are drawn: they can be ranked only when they are
    whole, so `best_of` has no place here. Arguments are checked by the call itself, not by the first step.
    """
    rows, params = _checked(model, prompts, params, changes)
    if params.samples != params.n:
        raise ValueError(f"best_of is {params.best_of}; a stream cannot rank, so it must be None")
    steps = _steps(model, rows, params, stats or GenerationStats(), cache)
    return (step.tokens for step in steps if any(token is not None for token in step.tokens))


# --------------------------------------------------------------------------------------------------------- arguments


def _checked(
    model: GPT, prompts: Prompts, params: SamplingParams | None, changes: dict[str, Any]
) -> tuple[list[list[int]], SamplingParams]:
    given = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    rows = [_token_ids(i, prompt) for i, prompt in enumerate(given)]
    params = replace(params or SamplingParams(), **changes)
    _check(model, rows, params.max_new_tokens)
    for name, ids in (("logit_bias", params.logit_bias), ("allowed_tokens", params.allowed_tokens or ())):
        for token in ids:
            if not 0 <= token < model.config.vocab_size:
                raise ValueError(f"{name} has the token id {token}; ids go from 0 to {model.config.vocab_size - 1}")
    return rows, params


def _token_ids(i: int, prompt: Any) -> list[int]:
    """Integers of any kind, in a list, an array or a tensor, as Python's."""
    try:
        return [index(token) for token in (prompt.tolist() if hasattr(prompt, "tolist") else prompt)]
    except TypeError:
        raise TypeError(
            f"prompts[{i}] is {prompt!r}; prompts must be a list of token lists or a (B, T) tensor, of integers"
        ) from None


def _check(model: GPT, prompts: list[list[int]], max_new_tokens: int) -> None:
    config = model.config
    if model.training and config.dropout:
        raise ValueError(f"model is in training mode with dropout={config.dropout}; call model.eval() first")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not prompts:
        raise ValueError("prompts is empty; at least one prompt is needed")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{i}] is empty; a prompt needs at least one token")
        if len(prompt) + max_new_tokens > config.context_length:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens, which with max_new_tokens={max_new_tokens} are more than the "
                f"context_length of {config.context_length}"
            )
        for token in prompt:
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"prompts[{i}] has the token id {token}; ids go from 0 to {config.vocab_size - 1}")


# -------------------------------------------------------------------------------------------------------------- loop


class _Chooser:
    """Chooses the next token of every row: `SamplingParams` as the tensors that `lmops.sample` takes."""

    def __init__(self, prompts: list[list[int]], params: SamplingParams, config: GPTConfig, device: torch.device):
        self.params = params
        rows, vocab = len(prompts) * params.samples, config.vocab_size
        self.seeds: Tensor | int = 0
        if params.temperature > 0:  # a seed for every row, so that equal prompts get different samples
            generator = None if params.seed is None else torch.Generator().manual_seed(params.seed)
            self.seeds = torch.randint(2**63 - 1, (rows,), generator=generator).to(device)
        self.counts = self.bias = self.allowed = None
        if params.has_penalties:
            counts = [torch.bincount(torch.tensor(prompt), minlength=vocab) for prompt in prompts]
            self.counts = torch.stack(counts).repeat_interleave(params.samples, 0).to(device, torch.int32)
        if params.logit_bias:
            self.bias = torch.zeros(vocab, dtype=torch.float32)
            self.bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            self.bias = self.bias.to(device)
        if params.allowed_tokens is not None:
            self.allowed = torch.zeros(vocab, dtype=torch.bool)
            self.allowed[list(params.allowed_tokens)] = True
            self.allowed = self.allowed.to(device)
        ranked = params.samples > 1
        self.logprobs = max(params.logprobs or 0, 1) if ranked or params.logprobs is not None else 0

    def keep(self, rows: list[int]) -> None:
        """The next logits are those of these of the present rows."""
        if isinstance(self.seeds, Tensor):
            self.seeds = self.seeds[rows]
        if self.counts is not None:
            self.counts = self.counts[rows]

    def __call__(self, logits: Tensor, step: int) -> Sample:
        """logits: (rows, vocab_size)."""
        params = self.params
        chosen = sample(
            logits, temperature=params.temperature, top_k=params.top_k, top_p=params.top_p, min_p=params.min_p,
            seed=self.seeds, offset=step, repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty, frequency_penalty=params.frequency_penalty,
            token_counts=self.counts, logit_bias=self.bias, allowed_mask=self.allowed, return_logprobs=self.logprobs,
        )  # fmt: skip
        if self.counts is not None:
            tokens = chosen.tokens[:, None]
            self.counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.int32))
        return chosen


@dataclass(frozen=True)
class _Step:
    """What a step made for every row. The token of a row that just stopped is None, but it has its log-probability."""

    tokens: list[int | None]
    running: list[bool]  # before this step
    logprobs: list[float]  # empty where nobody asked
    top_logprobs: list[dict[int, float]]


def _own_cache(model: GPT, prompts: list[list[int]], params: SamplingParams) -> PagedKVCache:
    """As many blocks as the rows can come to need. The last token is never fed back, so it has no slot."""
    config, weight, size = model.config, model.norm.weight, 16
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype  # of keys, values
    n_blocks = sum(-(-(len(prompt) + params.max_new_tokens - 1) // size) for prompt in prompts) * params.samples
    if device == "cpu":
        n_blocks *= 2  # room for each row to grow block by block, since blocks in a row are read without a copy
    return PagedKVCache(
        n_blocks, n_layers=config.n_layers, n_kv_heads=config.n_kv_heads, head_dim=config.head_dim, block_size=size,
        dtype=dtype, device=weight.device, prefix_caching=False, window=config.attention_window,
    )  # fmt: skip


@torch.inference_mode()  # entered for each step only, so it never reaches the caller's code between two of them
def _steps(
    model: GPT, prompts: list[list[int]], params: SamplingParams, stats: GenerationStats, cache: PagedKVCache | None
) -> Iterator[_Step]:
    device, stop, n_rows = model.embed.weight.device, frozenset(params.stop_tokens), len(prompts) * params.samples
    choose = _Chooser(prompts, params, model.config, device)
    cache = _own_cache(model, prompts, params) if cache is None else cache
    held = [list(prompt) for prompt in prompts for _ in range(params.samples)]  # tokens of each row
    seqs: dict[int, PagedSequence] = {}  # of the rows that have not stopped
    try:
        for step in range(params.max_new_tokens):
            start = time.perf_counter()
            if step == 0:  # a prompt is read once for all its samples
                for i, prompt in enumerate(prompts):
                    seqs[i * params.samples] = cache.new_sequence(prompt)
            new = [held[row][seq.n_tokens :] for row, seq in seqs.items()]
            batch = cache.append(list(seqs.values()), [len(tokens) for tokens in new])
            tokens = torch.tensor([[token for tokens in new for token in tokens]], device=device)
            logits = model(tokens, cache=batch, last_only=True)[:, -1]  # (rows, vocab_size)
            if step == 0:
                for row, seq in list(seqs.items()):
                    seqs |= {row + i: cache.fork(seq) for i in range(1, params.samples)}
                seqs = dict(sorted(seqs.items()))
                logits = logits.repeat_interleave(params.samples, 0) if params.samples > 1 else logits
            chosen = choose(logits, step)
            found: list[int] = torch.where(chosen.valid, chosen.tokens, -1).tolist()
            seconds = time.perf_counter() - start
            if step == 0:
                stats.prompt_tokens += sum(map(len, prompts))
                stats.prefill_seconds += seconds
            else:
                stats.decode_tokens += len(seqs)
                stats.decode_seconds += seconds
            rows, going = list(seqs), []
            for i, (row, token) in enumerate(zip(rows, found, strict=True)):
                if token < 0:
                    raise ValueError(
                        f"row {row} has no token to choose after {step} new ones: the model gave NaN, or no finite "
                        "logit for any allowed token"
                    )
                if token not in stop:
                    held[row].append(token)
                    going.append(i)
            if step == 0:  # now that the model is known to have given numbers
                for row, seq in seqs.items():
                    cache.register(seq, held[row][: seq.n_tokens])
            made = _step(n_rows, rows, [token if token not in stop else None for token in found], chosen)
            if len(going) < len(rows):
                for row in set(rows) - {rows[i] for i in going}:
                    _end(cache, seqs.pop(row), held[row])
                choose.keep(going)
            yield made
            if not seqs:
                return
        for row in list(seqs):
            _end(cache, seqs.pop(row), held[row])
    finally:  # what is left here was interrupted: its last tokens may have a slot, and nothing in it
        for seq in seqs.values():
            cache.free(seq)


def _end(cache: PagedKVCache, seq: PagedSequence, tokens: list[int]) -> None:
    """Frees a sequence, whose first tokens have been computed: what is in its blocks can be found again."""
    cache.register(seq, tokens[: seq.n_tokens])
    cache.free(seq)


def _step(n_rows: int, rows: list[int], tokens: list[int | None], chosen: Sample) -> _Step:
    """What the rows got, spread over all of them."""
    at = {row: i for i, row in enumerate(rows)}
    running = [row in at for row in range(n_rows)]
    spread = [tokens[at[row]] if row in at else None for row in range(n_rows)]
    if chosen.logprobs is None or chosen.top_tokens is None or chosen.top_logprobs is None:
        return _Step(spread, running, [], [])
    own, ids, values = chosen.logprobs.tolist(), chosen.top_tokens.tolist(), chosen.top_logprobs.tolist()
    top = [dict(zip(*pair, strict=True)) for pair in zip(ids, values, strict=True)]
    return _Step(
        spread, running,
        [own[at[row]] if row in at else 0.0 for row in range(n_rows)],
        [top[at[row]] if row in at else {} for row in range(n_rows)],
    )  # fmt: skip


def _completion(steps: list[_Step], row: int, params: SamplingParams) -> Completion:
    """What a row of the steps made."""
    own = [step for step in steps if step.running[row]]
    tokens = [token for step in own if (token := step.tokens[row]) is not None]
    reason: Literal["stop", "length"] = "length" if len(tokens) == len(own) else "stop"
    if not own[0].logprobs:
        return Completion(tokens, reason)
    logprobs = [step.logprobs[row] for step in own]
    if params.logprobs is None:
        return Completion(tokens, reason, sum(logprobs))
    top = [dict(list(step.top_logprobs[row].items())[: params.logprobs]) for step in own]
    return Completion(tokens, reason, sum(logprobs), logprobs, top)
