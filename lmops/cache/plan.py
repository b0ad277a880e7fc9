"""How much memory the blocks of a paged KV cache take, and how many tokens fit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CachePlan:
    """The blocks that fit a budget of memory. `str()` says it in a line.

    Attributes:
        n_blocks: how many; may be 0.
        block_size: tokens a block.
        block_bytes: bytes a block takes, in all layers, keys and values and their scales.
        budget: bytes that were there.
    """

    n_blocks: int
    block_size: int
    block_bytes: int
    budget: int

    @property
    def n_tokens(self) -> int:
        """Tokens that fit, of one sequence; of several, each takes whole blocks."""
        return self.n_blocks * self.block_size

    @property
    def n_bytes(self) -> int:
        """Bytes that the blocks take."""
        return self.n_blocks * self.block_bytes

    def __str__(self) -> str:
        return (
            f"{self.n_tokens:,} tokens fit: {self.n_blocks:,} blocks of {self.block_size}, "
            f"{_human(self.block_bytes)} each, {_human(self.n_bytes)} of {_human(self.budget)}"
        )


def plan_cache(
    budget: int,
    *,
    n_layers: int,
    n_kv_heads: int,
    head_dim: int,
    value_dim: int | None = None,
    block_size: int = 16,
    bytes_per_element: float = 2,
    scale_bytes: int = 0,
) -> CachePlan:
    """How many blocks fit into `budget` bytes.

    value_dim: elements of a value, head_dim by default.
    bytes_per_element: 2 for float16 and bfloat16, 1 for int8 and fp8, 0.5 for int4.
    scale_bytes: bytes of scales for the key of a token and head; as many again for its value. 0 without quantization.
    Keys and values of a token and head must take whole bytes. TypeError and ValueError for what is not possible.
    """
    value_dim = head_dim if value_dim is None else value_dim
    counts = {
        "n_layers": n_layers, "n_kv_heads": n_kv_heads, "head_dim": head_dim, "value_dim": value_dim,
        "block_size": block_size,
    }  # fmt: skip
    least = {**dict.fromkeys(counts, 1), "budget": 0, "scale_bytes": 0}
    for name, value in {**counts, "budget": budget, "scale_bytes": scale_bytes}.items():
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an int, got {value!r} of type {type(value).__name__}")
        if value < least[name]:
            raise ValueError(f"{name} must be at least {least[name]}, got {value}")
    head_bytes = 0
    for name, dim in (("head_dim", head_dim), ("value_dim", value_dim)):
        n_bytes = dim * bytes_per_element
        if n_bytes <= 0 or n_bytes != int(n_bytes):
            raise ValueError(f"bytes_per_element must make whole bytes of {name} = {dim}, got {bytes_per_element}")
        head_bytes += int(n_bytes) + scale_bytes
    block_bytes = n_layers * n_kv_heads * block_size * head_bytes
    return CachePlan(budget // block_bytes, block_size, block_bytes, budget)


def _human(n_bytes: int) -> str:
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.4g} {unit}"
    return f"{n_bytes} bytes"
