"""Hugging Face's package `kernels`: a local repository with layers and attention of lmops.

    from kernels import Mode, kernelize, use_kernel_mapping
    from lmops.integrations.kernels_hub import kernel_mapping, write_repository

    folder = write_repository("lmops-kernels")
    with use_kernel_mapping(kernel_mapping(folder)):
        model = kernelize(model, mode=Mode.INFERENCE, device="cuda")

Layers: "RMSNorm", and "RMSNormZeroCentered", whose weights are differences from 1. Any class that was annotated with
`kernels.use_kernel_forward_from_hub` under these names takes them; transformers annotates its own where the version of
`kernels` is one that it accepts (5.23: 0.18.2 to 0.19). Tested with kernels 0.17.2.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lmops.ops.norm import rms_norm

BACKENDS = ("cpu", "cuda", "rocm")
LAYERS = ("RMSNorm", "RMSNormZeroCentered")
__all__ = ["kernel_mapping", "layers", "write_repository"]


class RMSNorm(nn.Module):
    """Takes the place of transformers' RMSNorms of a weight and variance_epsilon."""

    can_torch_compile = True
    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Any:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class RMSNormZeroCentered(nn.Module):
    """Takes the place of transformers' RMSNorms of 1 + weight and eps."""

    can_torch_compile = True
    weight: Tensor
    eps: float

    def forward(self, x: Tensor) -> Any:
        return rms_norm(x, self.weight, self.eps, weight_offset=1.0)


class layers:
    """Where `kernels` looks for them."""

    RMSNorm = RMSNorm
    RMSNormZeroCentered = RMSNormZeroCentered


def write_repository(folder: str | os.PathLike[str]) -> Path:
    """A kernel repository in a folder, in the layout of `kernels`; its code is what is installed as lmops."""
    folder = Path(folder).resolve()
    for backend in BACKENDS:
        variant = folder / "build" / f"torch-{backend}"
        variant.mkdir(parents=True, exist_ok=True)
        metadata = {
            "id": f"lmops_{backend}", "name": "lmops", "version": 1, "license": "Apache-2.0", "python-depends": [],
            "backend": {"type": backend},
        }  # fmt: skip
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        (variant / "__init__.py").write_text("from lmops.integrations.kernels_hub import *  # noqa: F403\n")
    return folder


def kernel_mapping(folder: str | os.PathLike[str]) -> dict[str, dict[str, Any]]:
    """What `kernels.use_kernel_mapping` and `register_kernel_mapping` take: the layers, for all devices and modes."""
    from kernels import LocalLayerRepository  # type: ignore[attr-defined]  # mypy takes our folder for it

    path = Path(folder).resolve()
    return {layer: {backend: LocalLayerRepository(path, layer_name=layer) for backend in BACKENDS} for layer in LAYERS}
