"""Pages of keys and values, and what writes them: schema, launchers, CPU implementation, public functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
FORMATS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8", torch.uint8: "int4"}
Format = Literal["native", "int8", "fp8", "int4"]


@dataclass(frozen=True)
class KVPages:
    """The pages of one layer: n_blocks blocks of block_size slots, of one token each. Slot s is [s // size, s % size].

    k: (n_blocks, block_size, kv_heads, head_dim), any strides. float16, bfloat16 or float32, which is format "native";
        int8; float8_e4m3fn, "fp8"; uint8, "int4": (..., head_dim / 2), byte i holds element 2 i in its low bits and
        2 i + 1 in its high ones.
    v: likewise, of the same dtype; value_dim need not be head_dim.
    k_scale, v_scale: float16 or float32, None for "native". int8 and fp8: (n_blocks, block_size, kv_heads), an element
        is value * scale. int4: (..., 2), a scale and a minimum: an element is value * scale + minimum.
    Raises TypeError or ValueError if these do not fit together.
    """

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None

    def __post_init__(self) -> None:
        k, v = self.k, self.v
        if k.dtype not in FLOATS and k.dtype not in FORMATS:
            raise TypeError(f"k must be float16, bfloat16, float32, int8, float8_e4m3fn or uint8 (int4), got {k.dtype}")
        if v.dtype != k.dtype:
            raise TypeError(f"v must be {k.dtype} like k, got {v.dtype}")
        if k.ndim != 4:
            raise ValueError(f"k must be (n_blocks, block_size, kv_heads, head_dim), got {tuple(k.shape)}")
        if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
            raise ValueError(f"v must be (*{tuple(k.shape[:3])}, value_dim) like k, got {tuple(v.shape)}")
        shape = None if self.format == "native" else (*k.shape[:3], 2) if self.format == "int4" else k.shape[:3]
        for name, scale in (("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if shape is None:
                if scale is not None:
                    raise ValueError(f"{name} must be None for pages of {k.dtype}, got {tuple(scale.shape)}")
                continue
            if scale is None or scale.shape != shape:
                got = None if scale is None else tuple(scale.shape)
                raise ValueError(f"{name} must be {tuple(shape)} for pages of {k.dtype}, got {got}")
            if scale.dtype not in (torch.float16, torch.float32):
                raise TypeError(f"{name} must be float16 or float32, got {scale.dtype}")
            if self.k_scale is not None and scale.dtype != self.k_scale.dtype:
                raise TypeError(f"{name} must be {self.k_scale.dtype} like k_scale, got {scale.dtype}")
        for name, tensor in (("v", v), ("k_scale", self.k_scale), ("v_scale", self.v_scale)):
            if tensor is not None and tensor.device != k.device:
                raise ValueError(f"{name} must be on {k.device} like k, got {tensor.device}")

    @property
    def format(self) -> Format:
        """How elements are stored: as they are ("native"), or as "int8", "fp8" or "int4"."""
        return FORMATS.get(self.k.dtype, "native")  # type: ignore[return-value]

    @property
    def n_blocks(self) -> int:
        return self.k.shape[0]

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.k.shape[1]

    @property
    def n_kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """Elements of a key."""
        return self.k.shape[3] * (2 if self.format == "int4" else 1)

    @property
    def value_dim(self) -> int:
        """Elements of a value."""
        return self.v.shape[3] * (2 if self.format == "int4" else 1)
