"""Language models: one configurable decoder."""

from lmops.models.gpt import GPT, GPTConfig, KVCache, RopeScaling

__all__ = ["GPT", "GPTConfig", "KVCache", "RopeScaling"]
