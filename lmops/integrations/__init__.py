"""lmops inside other people's models: `lmops.optimize`, transformers, Hugging Face kernels."""
