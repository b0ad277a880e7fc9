"""The paged KV cache. So far its host side, without tensors: blocks, prefixes, and how much memory they take."""

from lmops.cache.allocator import (
    RELEASED,
    Appended,
    BlockAllocator,
    BlockCopy,
    OutOfBlocksError,
    PagedSequence,
    SwappedSequence,
)
from lmops.cache.plan import CachePlan, plan_cache
from lmops.cache.prefix import PrefixCache, PrefixStats

__all__ = [
    "RELEASED",
    "Appended",
    "BlockAllocator",
    "BlockCopy",
    "CachePlan",
    "OutOfBlocksError",
    "PagedSequence",
    "PrefixCache",
    "PrefixStats",
    "SwappedSequence",
    "plan_cache",
]
