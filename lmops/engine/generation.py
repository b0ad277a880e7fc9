"""Text generation with a `GPT`: one prefill of the prompts, then one token a step for every row of the batch.

`generate_stream` is the loop and hands out each step as it is made; `generate` collects its steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmops.models.gpt import GPT
from lmops.ops.softmax import softmax

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


def generate(
    model: GPT,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    stats: GenerationStats | None = None,
) -> list[list[int]]:
    """Continue each prompt by up to `max_new_tokens` tokens; a row ends before that at a token of `stop_tokens`.

    prompts: lists of token ids, of any lengths, or a (B, T) tensor.
    temperature: 0 takes the most probable token; otherwise a token is drawn from softmax(logits / temperature).
    seed: of the draws: the same seed with the same prompts gives the same tokens. None uses torch's global state.
    stats: filled in with token counts and seconds.
    Returns the new tokens of each row, without the prompt and without the stop token.
    Raises ValueError for a prompt that is empty, does not fit the context, or has an id outside the vocabulary, and
    for a `temperature` or `max_new_tokens` without meaning.
    """
    stream = generate_stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop_tokens=stop_tokens,
        stats=stats,
    )
    rows: list[list[int]] = [[] for _ in prompts]
    for step in stream:
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


def generate_stream(
    model: GPT,
    prompts: Prompts,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int | None = None,
    stop_tokens: Collection[int] = (),
    stats: GenerationStats | None = None,
) -> Iterator[list[int | None]]:
    """`generate`, one step at a time: each item has the new token of every row, None for a row that has stopped.

    Arguments are checked by the call itself, not by the first step.
    """
    rows = (
        prompts.tolist()
        if isinstance(prompts, Tensor)
        else [list(p) if isinstance(p, Sequence) else p for p in prompts]
    )
    _check(model, rows, max_new_tokens)
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}; it must be finite and at least 0 (0 is greedy)")
    return _steps(model, rows, max_new_tokens, temperature, seed, frozenset(stop_tokens), stats or GenerationStats())


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


@torch.inference_mode()  # entered for each step only, so it never reaches the caller's code between two of them
def _steps(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    seed: int | None,
    stop_tokens: frozenset[int],
    stats: GenerationStats,
) -> Iterator[list[int | None]]:
    device = model.embed.weight.device
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    tokens = torch.tensor([[0] * pad + prompt for pad, prompt in zip(padding, prompts, strict=True)], device=device)
    # The last token is never fed back, so its column is not needed.
    cache = model.new_cache(len(prompts), longest + max_new_tokens - 1, padding)
    running = [True] * len(prompts)
    for step in range(max_new_tokens):
        start = time.perf_counter()
        logits = model(tokens, cache, last_only=True)[:, -1]  # (B, vocab_size)
        tokens = _choose(logits, temperature, generator)  # (B, 1)
        new: list[int] = tokens[:, 0].tolist()
        seconds = time.perf_counter() - start
        if step == 0:
            stats.prompt_tokens += sum(map(len, prompts))
            stats.prefill_seconds += seconds
        else:
            stats.decode_tokens += sum(running)
            stats.decode_seconds += seconds
        running = [was and token not in stop_tokens for was, token in zip(running, new, strict=True)]
        if not any(running):
            return
        # A stopped row stays in the batch, fed with tokens that nobody sees, until the last row stops.
        yield [token if runs else None for token, runs in zip(new, running, strict=True)]


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """The next token of each row: (B, vocab_size) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    return torch.multinomial(softmax(logits, temperature, dtype=torch.float32), 1, generator=generator)
