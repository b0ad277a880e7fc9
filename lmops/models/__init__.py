"""Language models: one configurable decoder, its tokenizer, and loading of checkpoints."""

from lmops.models.checkpoint import CheckpointError
from lmops.models.config import GPTConfig, RopeScaling
from lmops.models.gpt import GPT, KVCache
from lmops.models.loading import load
from lmops.models.saved import save
from lmops.models.tokenizer import Tokenizer

__all__ = ["GPT", "CheckpointError", "GPTConfig", "KVCache", "RopeScaling", "Tokenizer", "load", "save"]
