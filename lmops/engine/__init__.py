"""Generation engines."""

from lmops.engine.generation import Completion, GenerationStats, complete, generate, generate_stream
from lmops.engine.sampling_params import SamplingParams

__all__ = ["Completion", "GenerationStats", "SamplingParams", "complete", "generate", "generate_stream"]
