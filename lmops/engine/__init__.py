"""Generation engines."""

from lmops.engine.generation import GenerationStats, generate, generate_stream

__all__ = ["GenerationStats", "generate", "generate_stream"]
