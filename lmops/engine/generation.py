"""Text generation with a `GPT`: one prefill of the prompts, then one token a step for every row of the batch.

`_steps` is the loop. `generate_stream` hands out its steps as they are made; `complete` collects them, and ranks the
samples of a prompt; `generate` is `complete` for those who only want the tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

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
    stats: GenerationStats | None = None,
    **changes: Any,
) -> list[list[int]]:
    """Continue each prompt; the new tokens of each, without the prompt and without the token that stopped it.

    prompts: lists of token ids, of any lengths, or a (B, T) tensor.
    params, changes: a `SamplingParams` (greedy by default), and fields to replace in it: `generate(model, prompts,
        max_new_tokens=20, temperature=0.8, top_p=0.9, seed=1)`.
    stats: filled in with token counts and seconds.
    Returns a list a prompt; with n samples, n lists for the first prompt, then n for the second and so on, the most
    probable of a prompt first.
    Raises ValueError for a prompt that is empty, does not fit the context, or has an id outside the vocabulary, for a
    parameter without meaning, and for a model whose logits are not finite.
    """
    results = complete(model, prompts, params, stats=stats, **changes)
    return [completion.tokens for completions in results for completion in completions]


def complete(
    model: GPT,
    prompts: Prompts,
    params: SamplingParams | None = None,
    *,
    stats: GenerationStats | None = None,
    **changes: Any,
) -> list[list[Completion]]:
    """`generate`, with what is known of each sequence: for every prompt its n completions, the most probable first."""
    rows, params = _checked(model, prompts, params, changes)
    steps = list(_steps(model, rows, params, stats or GenerationStats()))
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
    steps = _steps(model, rows, params, stats or GenerationStats())
    return (step.tokens for step in steps if any(token is not None for token in step.tokens))


# --------------------------------------------------------------------------------------------------------- arguments


def _checked(
    model: GPT, prompts: Prompts, params: SamplingParams | None, changes: dict[str, Any]
) -> tuple[list[list[int]], SamplingParams]:
    rows = (
        prompts.tolist()
        if isinstance(prompts, Tensor)
        else [list(p) if isinstance(p, Sequence) else p for p in prompts]
    )
    params = replace(params or SamplingParams(), **changes)
    _check(model, rows, params.max_new_tokens)
    for name, ids in (("logit_bias", params.logit_bias), ("allowed_tokens", params.allowed_tokens or ())):
        for token in ids:
            if not 0 <= token < model.config.vocab_size:
                raise ValueError(f"{name} has the token id {token}; ids go from 0 to {model.config.vocab_size - 1}")
    return rows, params


def _check(model: GPT, prompts: list[list[int]], max_new_tokens: int) -> None:
    config = model.config
    if model.training and config.dropout:
        raise ValueError(f"model is in training mode with dropout={config.dropout}; call model.eval() first")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if not prompts:
        raise ValueError("prompts is empty; at least one prompt is needed")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, list):
            raise TypeError(f"prompts[{i}] is {prompt!r}; prompts must be a list of token lists or a (B, T) tensor")
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
            self.bias = torch.zeros(vocab)
            self.bias[list(params.logit_bias)] = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            self.bias = self.bias.to(device)
        if params.allowed_tokens is not None:
            self.allowed = torch.zeros(vocab, dtype=torch.bool)
            self.allowed[list(params.allowed_tokens)] = True
            self.allowed = self.allowed.to(device)
        ranked = params.samples > 1
        self.logprobs = max(params.logprobs or 0, 1) if ranked or params.logprobs is not None else 0

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


@torch.inference_mode()  # entered for each step only, so it never reaches the caller's code between two of them
def _steps(model: GPT, prompts: list[list[int]], params: SamplingParams, stats: GenerationStats) -> Iterator[_Step]:
    device = model.embed.weight.device
    choose = _Chooser(prompts, params, model.config, device)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)], device=device)
    # The last token is never fed back, so its column is not needed.
    cache = model.new_cache(len(prompts), longest + params.max_new_tokens - 1, padding)
    running, stop = [True] * len(prompts) * params.samples, frozenset(params.stop_tokens)
    for step in range(params.max_new_tokens):
        start = time.perf_counter()
        logits = model(tokens, cache=cache, last_only=True)[:, -1]  # (B, vocab_size)
        if step == 0 and params.samples > 1:  # a prompt is read once for all its samples
            logits, cache = logits.repeat_interleave(params.samples, 0), cache.repeat_rows(params.samples)
        chosen = choose(logits, step)
        tokens = chosen.tokens[:, None]  # (B, 1)
        new: list[int] = torch.where(chosen.valid, chosen.tokens, -1).tolist()
        seconds = time.perf_counter() - start
        if step == 0:
            stats.prompt_tokens += sum(map(len, prompts))
            stats.prefill_seconds += seconds
        else:
            stats.decode_tokens += sum(running)
            stats.decode_seconds += seconds
        for row, token in enumerate(new):
            if token < 0 and running[row]:
                raise ValueError(
                    f"row {row} has no token to choose after {step} new ones: the model gave NaN, or no finite logit "
                    "for any allowed token"
                )
        was = running
        running = [is_running and token not in stop for is_running, token in zip(was, new, strict=True)]
        yield _step([token if runs else None for token, runs in zip(new, running, strict=True)], was, chosen)
        if not any(running):
            return
        # A stopped row stays in the batch, fed with tokens that nobody sees, until the last row stops.


def _step(tokens: list[int | None], running: list[bool], chosen: Sample) -> _Step:
    if chosen.logprobs is None or chosen.top_tokens is None or chosen.top_logprobs is None:
        return _Step(tokens, running, [], [])
    ids, values = chosen.top_tokens.tolist(), chosen.top_logprobs.tolist()
    top = [dict(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
    return _Step(tokens, running, chosen.logprobs.tolist(), top)


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
