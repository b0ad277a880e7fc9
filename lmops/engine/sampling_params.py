"""`SamplingParams`: how tokens are chosen and when a sequence ends, one object for every way to generate."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from operator import index
from typing import Any


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How many tokens to make, how to choose each (`lmops.sample` says exactly), and how many samples to keep.

    max_new_tokens: of each sequence. stop_tokens: ids that end a sequence before that, and are left out of it.
    temperature: 0 takes the most probable token; otherwise tokens are drawn from softmax(logits / temperature).
    top_k (0: all), top_p, min_p: which tokens can be drawn.
    repetition_penalty, presence_penalty, frequency_penalty: for tokens that the prompt or the answer already has.
    logit_bias: added to the logits of these ids. allowed_tokens: if given, no other id is chosen.
    seed: the same seed with the same prompts draws the same tokens; None takes one from torch's global state.
    n: samples to return for each prompt, the most probable first. best_of: how many to draw and take these n from; n
        if None. They are ranked by the sum of the log-probabilities of their tokens.
    logprobs: None for none; a number n >= 0 for the log-probability of every token, and of the n most probable beside
        it (of the model's own distribution, before anything above changes it).

    Raises ValueError for a value without meaning, TypeError for one of another type. Integers of any kind, arrays and
    tensors of them too, become Python's; collections of ids become tuples.
    """

    max_new_tokens: int = 256
    stop_tokens: Collection[int] = ()
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_tokens: Collection[int] | None = None
    seed: int | None = None
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed", "n", "best_of", "logprobs"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None and name in _OPTIONAL else _integer(name, value))
        for name in ("stop_tokens", "allowed_tokens"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None and name in _OPTIONAL else _integers(name, value))

        def check(name: str, good: bool, allowed: str) -> None:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be {allowed}")

        check("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "from -2**63 to 2**64 - 1, or None")
        check("max_new_tokens", self.max_new_tokens >= 1, "at least 1")
        check("temperature", 0 <= self.temperature < math.inf, "finite and at least 0 (0 is greedy)")
        check("top_k", self.top_k >= 0, "at least 0 (0 keeps all tokens)")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "finite and above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            check(name, math.isfinite(getattr(self, name)), "finite")
        check("n", self.n >= 1, "at least 1")
        check("best_of", self.best_of is None or self.best_of >= self.n, f"at least n={self.n}, or None")
        if self.samples > 1:
            check("temperature", self.temperature > 0, "above 0 for n or best_of above 1: greedy samples are equal")
        check("logprobs", self.logprobs is None or self.logprobs >= 0, "at least 0, or None")
        check("allowed_tokens", self.allowed_tokens is None or len(self.allowed_tokens) > 0, "None, or not empty")

    @property
    def samples(self) -> int:
        """How many sequences are drawn for each prompt."""
        return self.n if self.best_of is None else self.best_of

    @property
    def has_penalties(self) -> bool:
        """Whether it matters which tokens a sequence has already."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


_OPTIONAL = ("seed", "best_of", "logprobs", "allowed_tokens")  # may be None


def _integer(name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def _integers(name: str, values: Any) -> tuple[int, ...]:
    try:
        return tuple(index(value) for value in (values.tolist() if hasattr(values, "tolist") else values))
    except TypeError:
        raise TypeError(f"{name} must be token ids, which are integers, got {values!r}") from None
